"""Every fault that a Hub or the way to it can have, at every endpoint that pushing and pulling ask.

Each ends in an `OSError` that says what to do, with nothing changed on this machine and nothing half on the Hub; or in
success, where the client has another way. Without the fault, the same call succeeds.
"""

import functools
from contextlib import contextmanager

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from test_hub import LOGIN, here, hub, make_model, snapshot, token  # noqa: F401

from coop_hf import CoOpModel
from coop_hf.files.adapter_files import read_adapter
from coop_hf.files.load_base import _load_processor
from coop_hf.files.publish import push_to_hub


FAULTS = {
    "dropped before": {"drop": "before"},
    "dropped after": {"drop": "after"},
    "time-out": {"drop": "hang"},
    **{str(status): {"status": status} for status in (401, 403, 404, 409, 429, 500, 502, 503)},
    "login page": {"status": 200, "body": LOGIN},
    "truncated": {"drop": "middle"},
    "flipped bit": {"drop": "flip"},
    "too short": {"drop": "short"},
    "too long": {"drop": "long"},
}
CLASSES = [f"class {number}" for number in range(30)]


@contextmanager
def asked_to_fail(server, method, pattern, fault):
    """Every such request fails; who waits for an answer waits a moment, not seconds."""
    server.fail(method, pattern, times=1000, **fault)
    with pytest.MonkeyPatch.context() as patch:
        if fault.get("drop") == "hang":
            patch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
            patch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
            patch.setattr(huggingface_hub.file_download, "_ETAG_RETRY_TIMEOUT", 0.1)
            patch.setattr("coop_hf.hub.REQUEST_SECONDS", 0.1)
        yield
    server.faults.clear()


PUSH = {
    "create": ("POST", "repos/create"),
    "branch": ("POST", "/branch/"),
    "card's head": ("HEAD", "resolve/.*/README.md"),
    "card": ("GET", "resolve/.*/README.md"),
    "card's check": ("POST", "validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "lfs batch": ("POST", "lfs/objects/batch"),
    "lfs upload": ("PUT", "/_lfs/"),
    "lfs verify": ("POST", "/_lfs/.*/verify"),
    "commit": ("POST", "/commit/"),
}


@pytest.mark.parametrize("endpoint", PUSH)
def test_push(here, token, base, processor, tmp_path, endpoint):  # noqa: F811
    """Over an adapter with a card that somebody edited, to a new branch, large enough for LFS."""
    model = make_model(base, processor, CLASSES, class_specific=True)
    model.save_pretrained(tmp_path / "adapter")
    before, context = snapshot(tmp_path), model.context.detach().clone()
    new = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir() if path.name != "README.md"}
    old = {"README.md": b"---\nlicense: mit\n---\nBy hand.\n", **dict.fromkeys(new, b"old")}
    for number, (name, fault) in enumerate(FAULTS.items()):
        repo_id = f"ada/flowers-{number}"
        first = here.add_repo(repo_id, old)
        here.lfs_objects.clear()
        with asked_to_fail(here, *PUSH[endpoint], fault):
            try:
                push_to_hub(model, repo_id, token=token, revision="wip")
                assert new.items() <= here.files(repo_id, "wip").items(), name  # there was another way
            except OSError as error:
                assert type(error) is OSError and repo_id in str(error) and 50 < len(str(error)) < 1000, (name, error)
        assert snapshot(tmp_path) == before and torch.equal(model.context, context), name
        info = push_to_hub(model, repo_id, token=token, revision="wip")
        repo = here.repos[repo_id]
        assert repo.refs["refs/heads/wip"] == info.oid and repo.refs["refs/heads/main"] == first, name
        for commit in repo.commits.values():  # the old adapter or the new one, never half of each
            files = dict(commit.files)
            card = files.pop("README.md")
            assert b"license: mit" in card and b"By hand." in card, name
            assert files == (new if commit.oid != first else {key: old[key] for key in new}), name


PULL = {
    f"{file}, {method}": (method, f"resolve/.*/{file}")
    for file in ("adapter_config.json", "adapter_model.safetensors")
    for method in ("HEAD", "GET")
}


@pytest.mark.parametrize("lfs", [(), ("adapter_model.safetensors",)], ids=["git", "lfs"])
@pytest.mark.parametrize("endpoint", PULL)
def test_pull(here, base, processor, tmp_path, endpoint, lfs):  # noqa: F811
    make_model(base, processor).save_pretrained(tmp_path / "adapter")
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    here.add_repo("ada/flowers", files, lfs=lfs)
    expected = read_adapter(tmp_path / "adapter")[1]["prompt_embeddings"]
    for name, fault in FAULTS.items():
        cache = tmp_path / name
        with asked_to_fail(here, *PULL[endpoint], fault):
            try:
                found = read_adapter("ada/flowers", cache_dir=cache)[1]["prompt_embeddings"]
                assert torch.equal(found, expected), name
            except OSError as error:
                assert "ada/flowers" in str(error) and 50 < len(str(error)) < 1000, (name, error)
        assert torch.equal(read_adapter("ada/flowers", cache_dir=cache)[1]["prompt_embeddings"], expected), name


BASE_FILES = ("config.json", "model.safetensors")


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("file", BASE_FILES)
def test_pull_of_a_base(here, processor, base_folder, tmp_path, file, method):  # noqa: F811
    expected = load_file(base_folder / "model.safetensors")  # `base` is shared: others may change it
    for number, (name, fault) in enumerate(FAULTS.items()):
        repo_id = f"ada/{file.split('.')[0]}-{method}-{number}".replace("_", "-")  # remembered by transformers
        here.add_folder(repo_id, base_folder)
        load = functools.partial(CoOpModel.from_pretrained, repo_id, class_names=["cat"], cache_dir=tmp_path / name)
        load = functools.partial(load, processor=processor)
        with asked_to_fail(here, method, f"resolve/.*/{file}", fault):
            try:
                models = [load()]
            except OSError as error:
                assert repo_id in str(error) and 60 < len(str(error)) < 2000, (name, error)
                models = []
        models.append(load())
        for model in models:
            own = model.base_model.state_dict()
            assert all(torch.equal(own[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("times", [1, 2])
def test_a_flipped_bit_in_a_tokenizer(here, base_folder, tmp_path, monkeypatch, times):  # noqa: F811
    """transformers compares nothing with the Hub's hash."""

    class Processor:
        @staticmethod
        def from_pretrained(name, **source):
            with open(huggingface_hub.hf_hub_download(name, "tokenizer.json", **source), "rb") as file:
                return file.read()

    monkeypatch.setattr("coop_hf.files.load_base.AutoProcessor", Processor)
    here.add_folder("ada/tokens", base_folder)
    here.fail("GET", "resolve/.*/tokenizer.json", drop="flip", times=times)
    source = {"cache_dir": tmp_path / "cache"}
    if times == 2:
        with pytest.raises(OSError, match="tokenizer.json of 'ada/tokens' arrived damaged twice"):
            _load_processor("ada/tokens", source)
    assert _load_processor("ada/tokens", source) == (base_folder / "tokenizer.json").read_bytes()
    assert here.faults[0].times == 0
