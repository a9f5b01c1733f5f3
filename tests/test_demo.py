"""Behind the demo's page: answers, a visitor's images, and the Space. The page itself is in `test_demo_page.py`."""

import configparser
import io
import os
import runpy
import socket
import stat
import struct
import subprocess
import sys
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from coop_hf import (
    CoOpConfig,
    CoOpModel,
    MaPLeConfig,
    TaskResConfig,
    VPTConfig,
    emoji_model_path,
    load_emoji,
    nearest_tokens,
)
from coop_hf.demo import answers, learn, space
from coop_hf.demo.answers import Message, Shelf, ask, edited_names, facts, load_shelf, words
from coop_hf.demo.app import main
from coop_hf.demo.examples import example_files
from coop_hf.demo.learn import Found, images_of_folder, images_of_zip, split_images
from coop_hf.demo.space import write_space


NAMES = ["smiley face", "heart", "hand", "mammal"]
TEMPLATE = "an emoji of a {}."


def png(colour=(200, 30, 30), size=(24, 24)):
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def make_adapter(folder, class_specific=False, noise=0.05):
    torch.manual_seed(3)
    config = CoOpConfig(ctx_init="an emoji of a", class_specific=class_specific, template=TEMPLATE)
    model = CoOpModel.from_pretrained(emoji_model_path(), config, class_names=NAMES)
    with torch.no_grad():
        model.context.add_(torch.randn_like(model.context), alpha=noise)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / "one-for-all"), make_adapter(folder / "one-for-each", True)]


@pytest.fixture(scope="module")
def shelf(adapters):
    return load_shelf(adapters)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "heart.png"
    test = load_emoji()["test"]
    test[test["label"].index(1)]["image"].save(path)
    return str(path)


def same(scores, prediction):
    """Whether names agree, and scores but for rounding."""
    prediction = [tuple(entry.values()) if isinstance(entry, dict) else entry for entry in prediction]
    assert [name for name, _ in scores] == [name for name, _ in prediction]
    return [score for _, score in scores] == pytest.approx([score for _, score in prediction], abs=1e-5)


# ---------------------------------------------------------------------- answers


def test_adapters_share_their_base(shelf):
    one, each = shelf.models["one-for-all"], shelf.models["one-for-each"]
    assert one.base_model is each.base_model


def test_answer_is_that_of_predict(adapters, shelf, picture):
    model = CoOpModel.from_pretrained(adapters[0])
    answer = ask(shelf, "one-for-all", picture, "\n".join(NAMES), top_k=3)
    assert same(answer.learned, model.predict(picture, top_k=3))
    with model.disable_adapter():
        assert same(answer.template, model.predict(picture, top_k=3))
    assert answer.learned != answer.template and answer.note == ""
    assert ask(shelf, "one-for-all", None, "cat\ndog").learned == []


def test_edited_names(adapters, shelf, picture):
    model = CoOpModel.from_pretrained(adapters[0], class_names=["cat", "heart"])
    answer = ask(shelf, "one-for-all", picture, "cat, heart, Cat")
    assert same(answer.learned, model.predict(picture))
    assert answer.note == "“Cat” stands there more than once, and is taken once."
    assert shelf.models["one-for-all"].class_names == NAMES  # the others' model has not changed
    assert edited_names(" a b \n\nc,d\n")[0] == ["a b", "c,d"]


def test_class_bound_adapters_keep_their_names(shelf, picture):
    answer = ask(shelf, "one-for-each", picture, "cat, dog")
    assert {name for name, _ in answer.learned} == set(NAMES)


def test_classes_of_one_name_are_told_apart(shelf, picture):
    model = answers.CoOpModel(
        shelf.models["one-for-all"].base_model,
        CoOpConfig(n_ctx=2),
        ["heart", "cat", "heart"],
        shelf.models["one-for-all"].processor,
    )
    own = Shelf()
    key = own.keep(model)
    answer = ask(own, key, picture, "heart\ncat\nheart")
    assert sorted(name for name, _ in answer.template) == ["cat", "heart", "heart (2)"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Write the names"),
        (" \n , \n", "Write the names"),
        ("x" * 201, "has 201 characters; up to 200"),
        ("\n".join(map(str, range(1001))), "1,001 classes; this page takes up to 1,000"),
        ("1 " * 100, "do not fit"),
    ],
)
def test_names_that_do_not_fit(shelf, picture, text, message):
    if message == "Write the names" and "," in text:
        text = text.replace(",", "")
    with pytest.raises(Message, match=message):
        ask(shelf, "one-for-all", picture, text)


def test_broken_and_huge_images(shelf, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(png()[:60])
    with pytest.raises(Message, match="“broken.png” cannot be read as an image"):
        ask(shelf, "one-for-all", broken, "cat, dog")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 8_000, 8, 2, 0, 0, 0)
    huge = tmp_path / "huge.png"
    huge.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(Message, match="too large: 10,000 × 8,000"):
        ask(shelf, "one-for-all", huge, "cat, dog")


def test_visitors_at_once_get_their_own_answers(shelf, picture):
    asked = [
        ("one-for-all", "\n".join(NAMES)),
        ("one-for-all", "cat, dog"),
        ("one-for-all", "heart, hand, clock"),
        ("one-for-each", ""),
    ]
    alone = [ask(shelf, key, picture, names) for key, names in asked]
    assert len({repr(answer) for answer in alone}) == len(asked)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: ask(shelf, asked[i % 4][0], picture, asked[i % 4][1]), range(48)))
    for index, answer in enumerate(together):
        expected = alone[index % 4]
        assert same(answer.learned, expected.learned) and same(answer.template, expected.template)


def test_shelf_is_bounded(shelf, picture):
    model = shelf.models["one-for-all"]
    small = Shelf(num_learned=2, num_edited=3)
    keys = [small.keep(model) for _ in range(3)]
    with pytest.raises(Message, match="no longer here"):
        small.get(keys[0])
    assert small.get(keys[2]) is model and len(set(keys)) == 3
    for number in range(5):
        small.get(keys[1], ["cat", f"dog {number}"])
    assert len(small._edited) == 3


def test_words(shelf):
    one, each = shelf.models["one-for-all"], shelf.models["one-for-each"]
    assert words(one) == {"": [[entry["token"] for entry in row] for row in nearest_tokens(one)]}
    assert [row[0] for row in words(one)[""]] == ["an", "emoji", "of", "a"]  # what it started from, nearly
    assert list(words(each, max_classes=2)) == NAMES[:2]
    assert facts(one) == "coop, 768 learned numbers, for any classes; base model emoji-clip"
    assert "for each class its own" in facts(each)


@pytest.mark.parametrize("config", [VPTConfig(), MaPLeConfig(depth=2), TaskResConfig()])
def test_other_methods(shelf, picture, config):
    first = shelf.models["one-for-all"]
    model = CoOpModel(first.base_model, config, NAMES, first.processor)
    if hasattr(model.adapter, "fit"):
        embeds = torch.nn.functional.normalize(torch.randn(8, model.family.projection_dim), dim=-1)
        model.adapter.fit(embeds, np.arange(8) % 4, model.template_embeds())
    own = Shelf()
    key = own.keep(model)
    assert len(ask(own, key, picture, "\n".join(NAMES)).learned) == 4
    assert bool(words(model)) == (config.method == "maple") and facts(model).startswith(config.method)


def test_adapters_that_are_not_there(adapters):
    with pytest.raises(ValueError, match="named twice"):
        load_shelf([adapters[0], adapters[0]])
    with pytest.raises(OSError, match="nowhere"):
        load_shelf([adapters[0], "/nowhere/prompt"])


# ---------------------------------------------------------------------- a visitor's images


def make_zip(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return str(path)


def test_a_zip_chooses_no_place(tmp_path):
    link = zipfile.ZipInfo("pics/cat/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    entries = [
        ("../../evil/a.png", png()),
        ("/etc/b.png", png()),
        ("..\\..\\windows\\c.PNG", png()),
        ("pics/cat/d.jpg", b"no image"),
        (link, "/etc/passwd"),
        ("pics/cat/notes.txt", "text"),
        ("__MACOSX/cat/._d.png", b""),
        ("pics/.hidden/e.png", png()),
    ]
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    found = images_of_zip(make_zip(tmp_path / "a.zip", entries), inside)
    assert [image.label for image in found] == ["evil", "etc", "windows", "cat"]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a.zip"]
    assert sorted(files) == sorted(Path(image.file) for image in found)
    assert all(path.parent == inside and not path.is_symlink() for path in files)


def test_zips_that_are_refused(tmp_path, monkeypatch):
    def refused(path, message):
        with pytest.raises(Message, match=message):
            images_of_zip(path, tmp_path)

    text = tmp_path / "text.zip"
    text.write_text("no zip")
    refused(text, "cannot be read as a zip")
    whole = Path(make_zip(tmp_path / "whole.zip", [("cat/a.png", png()), ("dog/b.png", png())]))
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole.read_bytes()[:-30])
    refused(cut, "cannot be read as a zip")
    flipped = bytearray(whole.read_bytes())
    flipped[60] ^= 255  # in the content of the first file
    (tmp_path / "flipped.zip").write_bytes(flipped)
    refused(tmp_path / "flipped.zip", "cannot be read as a zip")
    locked = bytearray(whole.read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    refused(tmp_path / "locked.zip", "password")
    refused(make_zip(tmp_path / "loose.zip", [("a.png", png())]), "“a.png” lies in no folder")
    monkeypatch.setattr(learn, "MAX_FILES", 1)
    refused(whole, "2 files; this page takes up to 1")
    monkeypatch.setattr(learn, "MAX_FILES", 10)
    monkeypatch.setattr(learn, "MAX_BYTES", 2**20)
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/a.png", bytes(2**22))
    assert bomb.stat().st_size < 2**13
    refused(bomb, "4 MiB unpacked; this page takes up to 1")


def test_a_zip_that_lies_about_its_size_writes_no_more(tmp_path):
    path = tmp_path / "lies.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/a.png", bytes(2**22))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02") + 24
    assert struct.unpack_from("<I", content, place)[0] == 2**22
    struct.pack_into("<I", content, place, 100)
    path.write_bytes(content)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(Message, match="cannot be read as a zip"):
        images_of_zip(path, folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 100


def test_a_folder_is_read_as_its_zip(tmp_path):
    names = ["mine/train/cat/a.png", "mine/test/cat/b.png", "mine/dog/c.png", "mine/dog/.d.png", "mine/read.me"]
    files = []
    for number, name in enumerate(names):
        (tmp_path / f"{number}").write_bytes(png())
        files.append((str(tmp_path / f"{number}"), name))
    folder = images_of_folder(files)
    (tmp_path / "out").mkdir()
    unpacked = images_of_zip(make_zip(tmp_path / "a.zip", [(name, png()) for name in names]), tmp_path / "out")
    assert [(i.label, i.split) for i in folder] == [("cat", "train"), ("cat", "test"), ("dog", "")]
    assert [(i.name, i.label, i.split) for i in folder] == [(i.name, i.label, i.split) for i in unpacked]


@pytest.fixture
def found(tmp_path):
    def make(counts, split="", content=None):
        result = []
        for label, count in counts.items():
            for number in range(count):
                file = tmp_path / f"{split}-{label}-{number}.png"
                file.write_bytes(content or png((number, 7 * len(label), 9)))
                result.append(Found(str(file), f"{label}/{number}.png", label, split))
        return result

    return make


def test_a_quarter_is_set_apart(found):
    images = found({"cat": 8, "dog_house": 3})
    train, test, note = split_images(images, num_shots=4)
    names = train.features["label"].names
    assert names == test.features["label"].names == ["cat", "dog_house"] and note == ""
    assert np.bincount(train["label"]).tolist() == [4, 2] and np.bincount(test["label"]).tolist() == [2, 1]
    decoded = [part.cast_column("image", type(part.features["image"])(decode=False)) for part in (train, test)]
    paths = [[row["image"]["path"] for row in part] for part in decoded]
    assert not set(paths[0]) & set(paths[1])  # nothing is measured on what was learned from
    assert split_images(images, num_shots=4)[0]["label"] == train["label"]


def test_own_test_folders_are_taken(found):
    images = (
        found({"cat": 2, "dog": 2}, "train") + found({"cat": 3}, "test") + found({"cat": 5, "dog": 5}, "validation")
    )
    train, test, _ = split_images(images)
    assert (len(train), len(test)) == (4, 3)


@pytest.mark.parametrize(
    "counts, message",
    [
        ({}, "There is no image in it"),
        ({"cat": 5}, "one class only, “cat”"),
        ({"my_cat": 2, "My  cat": 2, "dog": 2}, "“My  cat” and “my_cat” are one name"),
        ({"cat": 4, "dog": 1}, "“dog” has 1 readable images, and one of them is for the test"),
        ({"cat": 4, "__": 4}, "“__” is no name for a class"),
    ],
)
def test_images_that_nothing_is_learned_from(found, counts, message):
    with pytest.raises(Message, match=message):
        split_images(found(counts))


def test_unreadable_images_are_left_out(found):
    images = found({"cat": 4, "dog": 4})
    Path(images[1].file).write_bytes(b"broken")
    train, test, note = split_images(images)
    assert len(train) + len(test) == 7
    assert note == "1 files cannot be read as images and were left out: 'cat/1.png'."


def test_learn_refuses_a_template_without_a_place(shelf, found, tmp_path):
    train, test, _ = split_images(found({"cat": 2, "dog": 2}))
    with pytest.raises(Message, match="does not make a prompt"):
        learn.learn(shelf.models["one-for-all"], train, test, tmp_path, template="an emoji")


def test_learning_and_asking_at_once(shelf, picture, found, tmp_path):
    """While one visitor's prompt is learned, others get the answers that they got before, and the base stays."""
    model = shelf.models["one-for-all"]
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    alone = ask(shelf, "one-for-all", picture, "cat, heart")
    train, test, _ = split_images(found({"red thing": 6, "blue thing": 6}))
    told = []
    with ThreadPoolExecutor(1) as pool:
        learning = pool.submit(
            learn.learn, model, train, test, tmp_path, TEMPLATE, True, tell=lambda share, text: told.append(share)
        )
        answers_meanwhile = []
        while not learning.done():
            answers_meanwhile.append(ask(shelf, "one-for-all", picture, "cat, heart"))
    got = learning.result()
    assert len(answers_meanwhile) > 3 and all(same(a.learned, alone.learned) for a in answers_meanwhile)
    assert all(same(a.template, alone.template) for a in answers_meanwhile)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_model.state_dict().items())
    assert told == sorted(told) and told[-1] == 1 and len(told) > 10
    assert got.model.context.shape[0] == 2 and got.model.adapter.is_class_bound
    assert (got.num_train, got.num_test) == (10, 2) and os.path.getsize(got.archive) > 1000


# ---------------------------------------------------------------------- the Space


def texts(folder):
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in Path(folder).rglob("*")
        if path.suffix in (".py", ".md", ".txt", ".json") and not path.is_relative_to(Path(folder) / "coop_hf")
    }


def arguments_of(app, monkeypatch):
    """What an `app.py` calls `launch` with, run from another folder."""
    called = {}
    monkeypatch.chdir("/")
    monkeypatch.setattr("coop_hf.demo.app.launch", lambda **kwargs: called.update(kwargs))
    runpy.run_path(str(app))
    return called


def test_a_space_of_local_adapters_holds_all_it_needs(adapters, shelf, picture, tmp_path, monkeypatch):
    folder = write_space(adapters, "you/emoji-prompts", tmp_path / "space")
    files = texts(folder)
    header = yaml.safe_load(files["README.md"].split("---")[1])
    assert header["sdk"] == "gradio" and header["sdk_version"].startswith("6.")
    assert header["app_file"] == "app.py" and header["title"] == "Emoji prompts" and "models" not in header
    assert f"torch=={torch.__version__.partition('+')[0]}\n" in files["requirements.txt"]
    home = Path(emoji_model_path()).parents[2]
    for name, text in files.items():
        assert str(tmp_path) not in text and str(home) not in text and adapters[0] not in text, name
    assert (Path(folder) / "coop_hf" / "demo" / "app.py").is_file()

    moved = Path(folder).rename(tmp_path / "elsewhere")
    called = arguments_of(moved / "app.py", monkeypatch)
    assert called["title"] == "Emoji prompts" and called["learning"] is True and os.getcwd() == str(moved)
    assert len(example_files(called["examples"], [])) == 12
    there = load_shelf(called["adapters"], called["base_model"])
    assert there.models["one-for-all"].base_model.config._name_or_path == "bases/emoji-clip"
    for key in ("one-for-all", "one-for-each"):
        names = "\n".join(NAMES)
        assert same(ask(there, key, picture, names).learned, ask(shelf, key, picture, names).learned)


@pytest.mark.slow
def test_a_space_runs_alone(adapters, tmp_path):
    """Its own copy of coop_hf, in a process of its own."""
    pytest.importorskip("gradio")
    folder = write_space(adapters, "you/emoji-prompts", tmp_path / "space")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, os.path.join(folder, "app.py")]
    process = subprocess.Popen(command, cwd="/", env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert any("http://" in line for line in process.stdout)
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60).read().decode()
        assert "Emoji prompts" in page and "one-for-each" in page
    finally:
        process.kill()
        process.communicate()


def test_a_space_of_hub_adapters_names_them(tmp_path, monkeypatch):
    folder = write_space(
        ["you/prompt"], "me/show", tmp_path / "show", base_model="openai/clip-vit-base-patch32", title='A "title"',
        learning=False, package="coop_hf[demo] @ git+https://example.org/coop_hf",
    )  # fmt: skip
    assert sorted(os.listdir(folder)) == ["README.md", "app.py", "requirements.txt"]
    files = texts(folder)
    called = arguments_of(Path(folder) / "app.py", monkeypatch)
    assert called == {
        "adapters": ["you/prompt"], "base_model": "openai/clip-vit-base-patch32", "examples": None,
        "title": 'A "title"', "learning": False,
    }  # fmt: skip
    header = yaml.safe_load(files["README.md"].split("---")[1])
    assert header["models"] == ["you/prompt", "openai/clip-vit-base-patch32"] and header["title"] == 'A "title"'
    assert files["requirements.txt"] == "coop_hf[demo] @ git+https://example.org/coop_hf\n"


def test_a_space_that_cannot_be_written(adapters, tmp_path):
    with pytest.raises(ValueError, match="'you/name'"):
        write_space(adapters, "name", tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        write_space(["/nowhere/prompt"], "you/name", tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        write_space(adapters, "you/name", tmp_path / "full")
    assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["file"]


def test_requirements_are_those_of_the_package():
    file = Path(learn.__file__).parents[2] / "setup.cfg"
    if not file.exists():
        pytest.skip("not a clone")
    parser = configparser.ConfigParser()
    parser.read(file)
    wanted = [line.split(">")[0].strip() for line in parser["options"]["install_requires"].split("\n") if line.strip()]
    assert sorted(wanted) == sorted(space.REQUIREMENTS)
    pins = (file.parent / "constraints.txt").read_text(encoding="utf-8").split()
    assert f"gradio=={space.GRADIO}" in pins


def test_examples_are_scaled_and_bare(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x010E] = "where I live"
    (tmp_path / "own").mkdir()
    PIL.Image.new("RGB", (2000, 1000), "red").save(tmp_path / "own" / "a.jpg", exif=exif)
    folder = write_space(["you/prompt"], "me/show", tmp_path / "show", examples=tmp_path / "own", package="coop_hf")
    (name,) = os.listdir(Path(folder) / "examples")
    image = PIL.Image.open(Path(folder) / "examples" / name)
    assert image.size == (512, 256) and not image.getexif()
    with pytest.raises(ValueError, match="there is no image"):
        example_files(tmp_path / "show" / "nothing", [])


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["you/prompt", "--space", "me/show", "--package", "coop_hf"])
    assert os.path.isfile("show/app.py") and "hf upload me/show show . --type space" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--output", "show"])
    monkeypatch.setattr(sys, "argv", ["coop_hf.demo", "/nowhere/prompt"])
    with pytest.raises(SystemExit, match="coop_hf.demo: '/nowhere/prompt' is neither a folder"):
        runpy.run_module("coop_hf.demo", run_name="__main__")  # one line, no traceback
