"""Push, pull and what can go wrong between, over HTTP against the server in `hub_server.py`.

What reads or depends on environment variables of `huggingface_hub`, which are read at import, runs in a fresh process.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import warnings

import huggingface_hub
import pytest
import torch
import yaml
from conftest import make_base
from hub_server import HubServer

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.files.adapter_files import read_adapter
from coop_hf.files.publish import push_to_hub
from coop_hf.hub import find_file, has_file


NAMES = ["cat", "dog", "sea_lion"]


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def token(hub):
    return hub.add_user("ada")


def set_endpoint(monkeypatch, url):
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def here(hub, monkeypatch):
    """Lets this process talk to the server, without waiting where the client would pause."""
    sleep = time.sleep
    set_endpoint(monkeypatch, hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    return hub


def make_model(base, processor, names=NAMES, seed=0, name=None, revision=None, adapter_name="default", **config):
    torch.manual_seed(seed)
    config = CoOpConfig(n_ctx=4, base_model_name_or_path=name, revision=revision, **config)
    return CoOpModel(base, config, names, processor, adapter_name=adapter_name)


def run(hub, tmp_path, program, cache="cache", timeout=150, **env):
    """Runs a program in a fresh process whose Hub is the server; returns what it printed last, read as JSON."""
    program = (
        "import json, sys, torch\n"
        "def out(**values): print(json.dumps(values))\n"
        "def failure(function):\n"
        "    try:\n        function()\n"
        "    except Exception as error:\n        return [type(error).__name__, str(error)]\n"
        "pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)\n" + textwrap.dedent(program)
    )
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    environment = {
        **keep,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **env,
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def logits(model):
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    with torch.no_grad():
        return model(pixel_values=pixels).logits.tolist()


def close(found, expected):
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)


# ---------------------------------------------------------------------- the whole way, in fresh processes


def test_push_pull_list_revisions_and_offline(hub, token, base, processor, base_folder, tmp_path):
    """One process pushes, another one reads, a third one is offline."""
    first_base = hub.add_folder("ada/tiny-clip", base_folder)
    other = make_base(processor.tokenizer, seed=5)
    other.save_pretrained(tmp_path / "other")
    model = make_model(base, processor, name="ada/tiny-clip", revision=first_base)
    expected = [logits(model)]
    model.save_pretrained(tmp_path / "adapter")

    pushed = run(
        hub,
        tmp_path,
        """
        from coop_hf import CoOpModel
        from coop_hf.files.publish import push_to_hub
        model = CoOpModel.from_pretrained("adapter", is_trainable=True)
        infos = [push_to_hub(model, "ada/flowers", private=False, commit_message="First")]
        model.context.data.neg_()
        infos.append(push_to_hub(model, "flowers"))
        again = push_to_hub(model, "ada/flowers")  # nothing new
        branch = push_to_hub(model, "ada/flowers", revision="wip")
        model.context.data.mul_(2)
        request = push_to_hub(model, "ada/flowers", create_pr=True)
        model.add_adapter("for snow", model.config, context=model.context.detach() + 1)
        model.set_adapter("for snow")
        several = push_to_hub(model, "ada/flowers", selected_adapters=["for snow"])
        with torch.no_grad():
            out(oids=[i.oid for i in infos], again=again.oid, request=request.oid, url=request.pr_url,
                branch=branch.oid, several=several.oid, logits=model(pixel_values=pixels).logits.tolist())
        """,
        cache="writer",
        HF_TOKEN=token,
    )
    repo = hub.repos["ada/flowers"]
    first, second = pushed["oids"]
    assert repo.commits[first].title == "First" and repo.commits[second].parent == first
    assert set(hub.files("ada/flowers", first)) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert pushed["again"] == second, "a push of what is there already makes no commit"
    assert repo.refs["refs/heads/wip"] == second, "a new branch starts at main, which has the same files"
    assert repo.refs["refs/pr/1"] == pushed["request"] and pushed["url"].endswith("/ada/flowers/discussions/1")
    assert repo.refs["refs/heads/main"] == pushed["several"]
    main = hub.files("ada/flowers")
    assert main["adapter_model.safetensors"] == repo.commits[second].files["adapter_model.safetensors"]
    assert "for snow/adapter_model.safetensors" in main
    card = main["README.md"].decode()
    assert "What was learned: `for snow`" in card and card.count("## What was learned") == 2

    # The base moves on; the adapter names the revision that it was learned on.
    hub.add_folder("ada/tiny-clip", tmp_path / "other")
    read = run(
        hub,
        tmp_path,
        f"""
        from coop_hf import CoOpModel
        from huggingface_hub import HfApi
        result = {{}}
        for name, options in {{
            "main": {{}},
            "first": {{"revision": {first!r}}},
            "short": {{"revision": {first[:10]!r}}},
            "request": {{"revision": "refs/pr/1"}},
            "branch": {{"revision": "wip"}},
            "subfolder": {{"subfolder": "for snow"}},
        }}.items():
            model = CoOpModel.from_pretrained("ada/flowers", **options)
            with torch.no_grad():
                result[name] = model(pixel_values=pixels).logits.tolist()
        model.load_adapter("ada/flowers", "old", revision={first!r})
        model.set_adapter("old")
        with torch.no_grad():
            result["loaded"] = model(pixel_values=pixels).logits.tolist()
        model = CoOpModel.from_pretrained("ada/tiny-clip", class_names=["cat", "dog"], revision={first_base!r})
        result["base revision"] = model.config.revision
        result["files"] = HfApi().list_repo_files("ada/flowers")
        local = CoOpModel.from_pretrained("ada/flowers", local_files_only=True)
        with torch.no_grad():
            result["local"] = local(pixel_values=pixels).logits.tolist()
        result["missing"] = {{
            "repository": failure(lambda: CoOpModel.from_pretrained("ada/nothing")),
            "revision": failure(lambda: CoOpModel.from_pretrained("ada/flowers", revision="nowhere")),
            "subfolder": failure(lambda: CoOpModel.from_pretrained("ada/flowers", subfolder="rain")),
        }}
        out(**result)
        """,
    )
    expected.append(model_logits_with(model, -1))
    close(read["first"], expected[0])
    close(read["short"], expected[0])
    close(read["loaded"], expected[0])
    close(read["main"], expected[1])
    close(read["local"], expected[1])
    close(read["branch"], expected[1])
    close(read["request"], model_logits_with(model, -2))
    close(read["subfolder"], pushed["logits"])
    assert read["base revision"] == first_base
    assert read["files"] == sorted(main)
    assert read["missing"]["repository"][0] == "OSError" and "no such repository" in read["missing"]["repository"][1]
    assert read["missing"]["revision"] == ["OSError", "the Hub repository 'ada/flowers' has no revision 'nowhere'."]
    assert read["missing"]["subfolder"][0] == "FileNotFoundError"

    # Offline: what was read before comes from the cache, told apart into adapter and base.
    count = len(hub.requests)
    offline = run(
        hub,
        tmp_path,
        f"""
        from coop_hf import CoOpModel
        model = CoOpModel.from_pretrained("ada/flowers")
        with torch.no_grad():
            main = model(pixel_values=pixels).logits.tolist()
        base = CoOpModel.from_pretrained("ada/tiny-clip", class_names=["cat"], revision={first_base!r})
        missing = failure(lambda: CoOpModel.from_pretrained("ada/nothing"))
        out(main=main, base=base.class_names, missing=missing)
        """,
        HF_HUB_OFFLINE="1",
    )
    close(offline["main"], expected[1])
    assert offline["base"] == ["cat"]
    assert offline["missing"][0] == "OSError" and "is not in the cache" in offline["missing"][1]
    assert len(hub.requests) == count, "offline is offline"


def model_logits_with(model, factor):
    before = model.context.data.clone()
    model.context.data.mul_(factor)
    try:
        return logits(model)
    finally:
        model.context.data.copy_(before)


def test_private_repository_and_errors_for_a_fresh_reader(hub, token, base, processor, base_folder, tmp_path):
    """Without a token, with a wrong one, and with the right one; then a server that drops connections and is down."""
    hub.add_folder("ada/tiny-clip", base_folder)
    model = make_model(base, processor, name="ada/tiny-clip")
    model.save_pretrained(tmp_path / "adapter")
    hub.add_folder("ada/secret", tmp_path / "adapter", private=True)
    hub.fail("GET", "secret/resolve/.*/adapter_model.safetensors", drop="middle", times=2)
    hub.fail("HEAD", "secret/resolve/.*/adapter_config.json", status=503, times=1, after=2)
    read = run(
        hub,
        tmp_path,
        f"""
        from coop_hf import CoOpModel
        result = {{
            "none": failure(lambda: CoOpModel.from_pretrained("ada/secret")),
            "wrong": failure(lambda: CoOpModel.from_pretrained("ada/secret", token="hf_wrong")),
        }}
        model = CoOpModel.from_pretrained("ada/secret", token={token!r})
        with torch.no_grad():
            result["logits"] = model(pixel_values=pixels).logits.tolist()
        out(**result)
        """,
    )
    assert read["none"][0] == "OSError" and "private and no token with access was given" in read["none"][1]
    assert read["wrong"][0] == "OSError" and "does not accept the token" in read["wrong"][1]
    close(read["logits"], logits(model))


# ---------------------------------------------------------------------- reading, fault by fault


@pytest.fixture
def published(here, base, processor, tmp_path):
    """A repository `ada/flowers` with an adapter of no base in particular."""
    make_model(base, processor).save_pretrained(tmp_path / "adapter")
    here.add_folder("ada/flowers", tmp_path / "adapter")
    return tmp_path / "adapter"


def read(tmp_path, name="adapter_config.json", **kwargs):
    with open(find_file("ada/flowers", name, cache_dir=tmp_path / "cache", **kwargs), "rb") as file:
        return file.read()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 500}, {"status": 503}, {"drop": "before"}], ids=str)
def test_a_passing_fault_is_waited_for(here, published, tmp_path, method, fault, times):
    here.fail(method, "/resolve/", times=times, **fault)
    assert read(tmp_path) == (published / "adapter_config.json").read_bytes()


def test_a_body_cut_in_the_middle_is_read_on(here, published, tmp_path):
    here.fail("GET", "safetensors", drop="middle", times=3)
    assert read(tmp_path, "adapter_model.safetensors") == (published / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "method, fault, message",
    [
        ("HEAD", {"status": 429}, "too many requests .429."),
        ("HEAD", {"status": 500}, "answered with the error 500"),
        ("GET", {"status": 503}, "answered with the error 503"),
        ("HEAD", {"drop": "before"}, "hung up"),
        ("GET", {"drop": "before"}, "hung up"),
        ("GET", {"drop": "middle"}, "hung up|Consistency"),
        ("HEAD", {"status": 403}, "answered with the error 403"),
    ],
)
def test_a_lasting_fault_is_a_clear_error_and_leaves_nothing_half(here, published, tmp_path, method, fault, message):
    here.fail(method, "/resolve/", times=1000, **fault)
    started = time.monotonic()
    with pytest.raises(OSError, match=message):
        read(tmp_path)
    assert time.monotonic() - started < 20
    here.faults.clear()
    assert read(tmp_path) == (published / "adapter_config.json").read_bytes()


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": "before"}, {"status": 429}], ids=str)
def test_what_is_in_the_cache_is_used_while_the_hub_is_down(here, published, tmp_path, fault):
    expected = read(tmp_path)
    here.fail("", "/resolve/", times=1000, **fault)
    assert read(tmp_path) == expected
    with pytest.raises(OSError):
        read(tmp_path, force_download=True)


def test_no_server_at_all(published, tmp_path, monkeypatch):
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(OSError, match="the Hub could not be reached"):
        read(tmp_path)


def test_arguments_that_contradict_each_other(published, tmp_path):
    with pytest.raises(ValueError, match="force_download"):
        read(tmp_path, force_download=True, local_files_only=True)


def test_has_file(here, published, tmp_path):
    where = {"cache_dir": tmp_path / "cache"}
    assert has_file("ada/flowers", "adapter_config.json", **where)
    assert not has_file("ada/flowers", "config.json", **where)
    with pytest.raises(OSError, match="no such repository"):
        has_file("ada/nothing", "config.json", **where)
    assert not has_file("ada/flowers", "config.json", local_files_only=True, **where), "the cache remembers"
    with pytest.raises(OSError, match="not in the cache"):
        has_file("ada/flowers", "never_asked.json", local_files_only=True, **where)


def test_a_cached_base_is_told_from_an_adapter_offline(here, base_folder, tmp_path):
    """Also if another program put it into the cache, which never asked for an adapter configuration."""
    here.add_folder("ada/tiny-clip", base_folder)
    huggingface_hub.snapshot_download("ada/tiny-clip", cache_dir=tmp_path / "cache")
    assert not has_file("ada/tiny-clip", "adapter_config.json", cache_dir=tmp_path / "cache", local_files_only=True)


def gets(hub):
    return [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]


@pytest.mark.parametrize("lfs", [(), ("adapter_model.safetensors",)], ids=["git", "lfs"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_flipped_bit_is_found_and_the_file_fetched_again(here, published, tmp_path, lfs, times):
    name = "adapter_model.safetensors"
    expected = (published / name).read_bytes()
    here.add_repo("ada/flowers", {name: expected}, lfs=lfs)
    here.fail("GET", name, drop="flip", times=times)
    if times == 1:
        assert read(tmp_path, name) == expected and len(gets(here)) == 2, gets(here)
    else:
        with pytest.raises(OSError, match="arrived damaged twice: its hash is not the one that the Hub gives"):
            read(tmp_path, name)
        assert not list((tmp_path / "cache").rglob(f"snapshots/*/{name}")), "nothing damaged stays"
    assert read(tmp_path, name) == expected
    before = gets(here)
    assert read(tmp_path, name, local_files_only=True) == expected and gets(here) == before


@pytest.mark.parametrize("large", [False, True])
def test_a_file_that_was_damaged_in_the_cache(here, published, tmp_path, monkeypatch, large):
    """Small ones are looked at whenever they are read, large ones when they arrive."""
    monkeypatch.setattr("coop_hf.hub.MAX_CHECKED_BYTES", 0 if large else 1 << 26)
    expected = read(tmp_path)
    path = find_file("ada/flowers", "adapter_config.json", cache_dir=tmp_path / "cache")
    with open(path, "rb+") as file:
        file.write(b"X")
    if large:
        assert read(tmp_path) == b"X" + expected[1:]
        return
    with pytest.raises(OSError, match="is not in the cache"):
        read(tmp_path, local_files_only=True)
    assert read(tmp_path) == expected


@pytest.mark.parametrize("shards", [False, True])
def test_a_flipped_bit_in_the_weights_of_a_base(here, base, processor, tmp_path, shards):
    base.save_pretrained(tmp_path / "base", **({"max_shard_size": "60KB"} if shards else {}))
    name = f"ada/clip-{shards}"  # transformers remembers the revision of a name
    here.add_folder(name, tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1 or not shards
    here.fail("GET", r"resolve/.*\.safetensors$", drop="flip", times=1)
    options = {"processor": processor, "cache_dir": tmp_path / "cache"}
    model = CoOpModel.from_pretrained(name, class_names=["cat"], **options)
    assert here.faults[0].times == 0, "a bit was flipped"
    own = base.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.base_model.state_dict().items())


LOGIN = b"<html><body>Welcome to our network, please log in</body></html>"


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_login_page_is_no_file(here, published, tmp_path, method):
    here.fail(method, "/resolve/", status=200, body=LOGIN, times=1000)
    with pytest.raises(OSError, match="what answered is not the Hub|Consistency check failed"):
        read(tmp_path)
    here.faults.clear()
    assert read(tmp_path) == (published / "adapter_config.json").read_bytes()


def test_both_files_are_of_one_commit(here, published, tmp_path, base, processor):
    """Somebody pushes between the two downloads."""
    second = tmp_path / "second"
    make_model(base, processor, ["yak", "gnu"], seed=1).save_pretrained(second)
    first = (published / "adapter_model.safetensors").read_bytes()
    dispatch = here._fault

    def pushes(method, path):
        if method == "HEAD" and "adapter_model" in path:
            here._fault = dispatch
            here.add_folder("ada/flowers", second)
        return dispatch(method, path)

    here._fault = pushes
    config, tensors = read_adapter("ada/flowers", cache_dir=tmp_path / "cache")
    assert config.class_names == NAMES and here.files("ada/flowers")["adapter_model.safetensors"] != first
    assert read_adapter("ada/flowers", cache_dir=tmp_path / "cache")[0].class_names == ["yak", "gnu"]


@pytest.mark.parametrize("name", ["models/clip", "clip"])
def test_a_base_named_on_the_hub_is_not_taken_from_the_working_folder(
    here, base_folder, base, processor, tmp_path, monkeypatch, name
):
    make_model(base, processor, name=name).save_pretrained(tmp_path / "adapter")
    here.add_folder("ada/flowers", tmp_path / "adapter")
    shutil.copytree(base_folder, tmp_path / "work" / name)
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ValueError, match=f"names the base model '{name}', and '.*' is on this machine: pass `base_m"):
        CoOpModel.from_pretrained("ada/flowers", cache_dir=tmp_path / "cache")
    model = CoOpModel.from_pretrained("ada/flowers", base_model=os.path.abspath(name), cache_dir=tmp_path / "cache")
    assert model.class_names == NAMES


@pytest.mark.parametrize("path", ["../evil.json", "/etc/evil.json"])
def test_hostile_file_names_of_a_repository_are_never_asked_for(here, published, tmp_path, path):
    here.add_repo("ada/flowers", {path: b"{}"})
    read(tmp_path)
    assert not any("evil" in asked for _, asked in here.requests)


# ---------------------------------------------------------------------- pushing, fault by fault


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "method, pattern, fault, message",
    [
        ("POST", "repos/create", {"status": 500}, "answered with the error 500"),
        ("POST", "repos/create", {"status": 429}, "too many requests"),
        ("POST", "repos/create", {"drop": "before"}, "the connection failed"),
        ("POST", "validate-yaml", {"drop": "before"}, "the connection failed"),
        ("POST", "preupload", {"status": 403}, "may not write there"),
        ("POST", "/commit/", {"status": 503}, "answered with the error 503"),
        ("POST", "/commit/", {"status": 412}, "somebody else committed"),
        ("POST", "/commit/", {"drop": "before"}, "the connection failed"),
        ("POST", "/commit/", {"drop": "after"}, "the connection failed"),
        ("POST", "/commit/", {"drop": "middle"}, "the connection failed"),
    ],
)
def test_a_failed_push_changes_nothing_and_can_be_repeated(
    here, token, base, processor, tmp_path, method, pattern, fault, message
):
    model = make_model(base, processor, name="ada/tiny-clip")
    model.save_pretrained(tmp_path / "adapter")
    before, context = snapshot(tmp_path), model.context.detach().clone()
    here.fail(method, pattern, times=1, **fault)
    with pytest.raises(OSError, match=f"could not push to 'ada/flowers': .*{message}.*Nothing on this machine"):
        push_to_hub(model, "ada/flowers", token=token)
    assert snapshot(tmp_path) == before and torch.equal(model.context, context)
    info = push_to_hub(model, "ada/flowers", token=token)
    assert here.repos["ada/flowers"].refs["refs/heads/main"] == info.oid
    files = here.files("ada/flowers")
    assert files["adapter_model.safetensors"] == (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    # Never half: each commit has all the files of the push, or none.
    for commit in here.repos["ada/flowers"].commits.values():
        assert len(commit.files) in (1, 4)


@pytest.mark.parametrize("body", [LOGIN, b"", b"[]", b"{}", b"null", b'"ok"'], ids=str)
@pytest.mark.parametrize("pattern", ["repos/create", "validate-yaml", "preupload", "/commit/", "lfs/objects/batch"])
def test_an_answer_that_is_not_the_hubs(here, token, base, processor, tmp_path, pattern, body):
    """A network that asks for a login answers 200 with a page."""
    large = {"names": [f"class {i}" for i in range(30)], "class_specific": True} if "lfs" in pattern else {}
    model = make_model(base, processor, **large)
    here.fail("POST", pattern, status=200, body=body, times=1)
    try:
        push_to_hub(model, "ada/flowers", token=token)
    except OSError as error:
        assert "could not push to 'ada/flowers'" in str(error) and "Nothing on this machine was changed" in str(error)
    else:
        assert pattern == "validate-yaml" or body != LOGIN, "what the client does not read may be anything"
    here.faults.clear()
    push_to_hub(model, "ada/flowers", token=token)
    assert "adapter_model.safetensors" in here.files("ada/flowers")


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": "before"}, {"status": 429}], ids=str)
def test_passing_faults_where_the_client_waits_by_itself(here, token, base, processor, fault):
    here.fail("POST", "preupload", times=2, **fault)
    push_to_hub(make_model(base, processor), "ada/flowers", token=token)
    assert "adapter_model.safetensors" in here.files("ada/flowers")


def test_large_contexts_go_through_lfs(here, token, base, processor, tmp_path):
    names = [f"class {i}" for i in range(30)]
    model = make_model(base, processor, names, class_specific=True)
    here.fail("PUT", "/_lfs/", status=500, times=1000)
    with pytest.raises(OSError, match="could not push"):
        push_to_hub(model, "ada/large", token=token)
    here.faults.clear()
    push_to_hub(model, "ada/large", token=token)
    commit = here.repos["ada/large"].find("main")
    assert commit.lfs == {"adapter_model.safetensors"}
    path = find_file("ada/large", "adapter_model.safetensors", cache_dir=tmp_path / "cache")
    with open(path, "rb") as file:
        assert file.read() == commit.files["adapter_model.safetensors"]


def test_who_may_push(here, token, base, processor):
    model = make_model(base, processor)
    with pytest.raises(OSError, match="no token was given, or one that the Hub does not accept"):
        push_to_hub(model, "ada/flowers", token=False)
    with pytest.raises(OSError, match="no token was given, or one that the Hub does not accept"):
        push_to_hub(model, "ada/flowers", token="hf_wrong")
    with pytest.raises(OSError, match="the token may not write there"):
        push_to_hub(model, "bob/flowers", token=token)
    assert not here.repos
    # Somebody else's repository takes a pull request.
    push_to_hub(model, "ada/flowers", token=token)
    other = here.add_user("bob")
    with pytest.raises(OSError, match="the token may not write there"):
        push_to_hub(make_model(base, processor, seed=1), "ada/flowers", token=other)
    info = push_to_hub(make_model(base, processor, seed=1), "ada/flowers", token=other, create_pr=True)
    assert here.repos["ada/flowers"].refs["refs/pr/1"] == info.oid


def test_private_and_what_is_sent(here, token, base, processor):
    push_to_hub(make_model(base, processor), "ada/secret", private=True, token=token)
    assert here.repos["ada/secret"].private
    sent = here.files("ada/secret")
    assert sum(map(len, sent.values())) < 20_000, "the adapter and its card, never the base"


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "../x", "a b", None, 5, "a--b"])
def test_bad_names_are_refused_before_anything_is_sent(here, base, processor, repo_id):
    with pytest.raises(ValueError, match="`repo_id` must have the form"):
        push_to_hub(make_model(base, processor), repo_id)
    assert not here.requests


def test_other_refusals_before_anything_is_sent(here, base, processor):
    model = make_model(base, processor)
    with pytest.raises(ValueError, match="a pull request goes to the main branch"):
        push_to_hub(model, "ada/flowers", create_pr=True, revision="wip")
    with pytest.raises(ValueError, match="no adapter named 'rain'"):
        push_to_hub(model, "ada/flowers", selected_adapters=["rain"])
    with pytest.raises(ValueError, match="`selected_adapters` is empty"):
        push_to_hub(model, "ada/flowers", selected_adapters=[])
    model.context.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        push_to_hub(model, "ada/flowers")
    assert not here.requests


def test_a_revision_that_can_not_be_committed_to(here, token, base, processor):
    push_to_hub(make_model(base, processor), "ada/flowers", token=token)
    with pytest.raises(OSError, match="has no revision 'refs/pr/9'"):
        push_to_hub(make_model(base, processor, seed=1), "ada/flowers", token=token, revision="refs/pr/9")


def test_edits_of_the_card_on_the_hub_survive(here, token, base, processor):
    model = make_model(base, processor)
    push_to_hub(model, "ada/flowers", token=token, training={"metrics": {"accuracy": 0.5}, "dataset": "Flowers"})
    card = here.files("ada/flowers")["README.md"].decode()
    edited = card.replace("---\n", "---\nlicense: mit\n", 1) + "\nA word of my own.\n"
    here.add_repo("ada/flowers", {"README.md": edited.encode(), "notes.txt": b"mine"})
    model.context.data.neg_()
    push_to_hub(model, "ada/flowers", token=token, training={"metrics": {"accuracy": 0.75}, "dataset": "Flowers"})
    after = here.files("ada/flowers")
    text = after["README.md"].decode()
    assert "license: mit" in text and "A word of my own." in text
    assert "**75.0**" in text and "**50.0**" not in text and "value: 0.75" in text
    assert after["notes.txt"] == b"mine", "other files of the repository stay"
    push_to_hub(model, "ada/flowers", token=token, card="---\nlicense: mit\n---\nAll mine.\n")
    assert here.files("ada/flowers")["README.md"] == b"---\nlicense: mit\n---\nAll mine.\n"


# ---------------------------------------------------------------------- habits of transformers, and paths of one's own


def card_values(hub, repo_id="ada/flowers"):
    return yaml.safe_load(hub.files(repo_id)["README.md"].decode().split("---\n")[1])


def test_saving_and_pushing_in_one_call(here, token, base, processor, tmp_path, monkeypatch):
    model = make_model(base, processor, name="ada/tiny-clip")
    with pytest.raises(TypeError, match="has no use for `token`, `repo_id`: .* push_to_hub=True"):
        model.save_pretrained(tmp_path / "flowers", token=token, repo_id="ada/flowers")
    with pytest.raises(TypeError, match="must be True or False, and the repository `repo_id="):
        model.save_pretrained(tmp_path / "flowers", push_to_hub="ada/flowers")
    assert not (tmp_path / "flowers").exists()
    model.save_pretrained(tmp_path / "flowers", push_to_hub=True, token=token, tags=["garden"])
    assert "garden" in card_values(here)["tags"], "named after the folder, in the token's own space"
    model.save_pretrained(tmp_path / "x", push_to_hub=True, repo_id="ada/other", token=token, commit_message="Mine")
    commit = here.repos["ada/other"].find("main")
    assert commit.title == "Mine"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert commit.files[name] == (tmp_path / "x" / name).read_bytes()


def test_tags_license_and_language(here, token, base, processor):
    model = make_model(base, processor, name="ada/tiny-clip")
    training = {"dataset": "Flowers", "metrics": {"accuracy": 0.5}, "num_eval": 10}
    push_to_hub(model, "ada/flowers", token=token, training=training)
    before = here.files("ada/flowers")["README.md"].decode()
    options = {"tags": ["garden", "clip"], "license": "mit", "language": "de"}
    push_to_hub(model, "ada/flowers", token=token, **options)
    values = card_values(here)
    assert values["license"] == "mit" and values["language"] == ["de"]
    assert values["tags"][-1] == "garden" and values["tags"].count("clip") == 1
    after = here.files("ada/flowers")["README.md"].decode()
    assert after.split("---\n", 2)[2] == before.split("---\n", 2)[2], "what was measured stays"
    with pytest.warns(UserWarning, match="no place for tasks in"):
        push_to_hub(model, "ada/flowers", token=token, tasks="image-classification", dataset_name="Roses")
    assert "`Roses`" in here.files("ada/flowers")["README.md"].decode()


@pytest.mark.parametrize("adapter_name", ["default", "for snow"])
def test_a_local_base_is_not_uploaded(here, token, base_folder, tmp_path, adapter_name):
    model = CoOpModel.from_pretrained(base_folder, n_ctx=2, class_names=NAMES, adapter_name=adapter_name)
    with pytest.warns(UserWarning, match="is a folder on this machine, .*model.config.base_model_name_or_path = "):
        push_to_hub(model, "ada/flowers", token=token)
    assert not [path for path, data in here.files("ada/flowers").items() if str(base_folder.parent).encode() in data]
    assert model.config.base_model_name_or_path == str(base_folder), "here it stays"
    where = {"cache_dir": tmp_path, "token": token, "subfolder": None if adapter_name == "default" else adapter_name}
    with pytest.raises(ValueError, match="does not name its base model: pass `base_model=`"):
        CoOpModel.from_pretrained("ada/flowers", **where)
    again = CoOpModel.from_pretrained("ada/flowers", base_model=base_folder, **where)
    assert torch.equal(again.context, model.context)
    model.config.base_model_name_or_path = "ada/tiny-clip"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        push_to_hub(model, "ada/flowers", token=token)
    assert card_values(here)["base_model"] == "ada/tiny-clip"
