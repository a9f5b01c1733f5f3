import copy
import json
import os
import pickle
import re
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, SHARED, image_dataset, make_image_processor, picture

from coop_hf.data.few_shot import resolve_labels
from coop_hf.data.labelled_images import LabelledImages
from coop_hf.data.sources import as_dataset, load_images, read_coop_split, read_few_shot_indices
from coop_hf.data.transforms import eval_transform


needs_splits = pytest.mark.skipif(not (SHARED / "splits").is_dir(), reason="no ../shared/data/splits here")


# Files of the CoOp benchmark


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def benchmark(tmp_path):
    (tmp_path / "images").mkdir()
    content = {
        key: [[f"{key}_{i}.jpg", i % 2, ["face", "yin_yang"][i % 2]] for i in range(size)]
        for key, size in (("train", 6), ("val", 4), ("test", 2))
    }
    for entries in content.values():
        for file, _, _ in entries:
            (tmp_path / "images" / file).write_bytes(b"never decoded")
    return tmp_path, content


def test_read_coop_split(benchmark):
    folder, content = benchmark
    path = write(folder / "split.json", content)
    split = read_coop_split(path, folder / "images")
    assert {name: len(part) for name, part in split.items()} == {"train": 6, "validation": 4, "test": 2}
    assert split["train"].features["label"].names == ["face", "yin_yang"]
    row = split["test"].cast_column("image", datasets.Image(decode=False))[1]
    assert row == {"image": {"bytes": None, "path": str(folder / "images" / "test_1.jpg")}, "label": 1}
    for part in ("val", "validation"):
        assert read_coop_split(path, folder / "images", part=part)["label"][:] == [0, 1, 0, 1]


def test_bad_coop_splits(benchmark):
    folder, content = benchmark
    root = folder / "images"
    path = write(folder / "split.json", content)

    def fails(error, message, change=None, **options):
        changed = copy.deepcopy(content)
        if change:
            change(changed)
        with pytest.raises(error, match=message):
            read_coop_split(write(path, changed), **{"image_root": root, **options})

    fails(FileNotFoundError, "There is no folder.*image_root", image_root=folder / "none")
    fails(ValueError, "`part` is 'dev2', but.*'train', 'validation', 'test'", part="dev2")
    fails(ValueError, "keys 'annotations'", lambda c: (c.clear(), c.update(annotations=[])))
    fails(ValueError, "entry 2 of 'train' is", lambda c: c["train"].__setitem__(2, ["a.jpg", "0", "face"]))
    fails(ValueError, "entry 0 of 'val' is", lambda c: c.update(val=3))
    fails(ValueError, "label 0 stands for 'face'.*'cup'", lambda c: c["val"].__setitem__(0, ["val_0.jpg", 0, "cup"]))
    fails(ValueError, "2 are missing", lambda c: c["val"].append(["val_0.jpg", 3, "cup"]))
    fails(FileNotFoundError, "1 of 13 images.*gone.jpg", lambda c: c["val"].append(["gone.jpg", 0, "face"]))
    fails(ValueError, "not a CoOp split file", lambda c: c.update(train=[], val=[], test=[]) or c.update(extra=1))
    with pytest.raises(FileNotFoundError, match="There is no CoOp split file at"):
        read_coop_split(folder / "none.json", root)
    with pytest.raises(ValueError, match="is not JSON"):
        read_coop_split(write(path, "{"), root)
    with pytest.raises(ValueError, match="a list"):
        read_coop_split(write(path, []), root)
    with pytest.raises(ValueError, match="is a pickle.*docs/datasets.md has a few lines that convert"):
        read_coop_split("split.pkl", root)


def few_shot_file(content, train, val):
    return {
        key: {
            "indices": indices,
            "data": [
                {"impath": f"./data/x/{f}", "label": y, "classname": n}
                for f, y, n in (content[key][i] for i in indices)
            ],
        }
        for key, indices in (("train", train), ("val", val))
    }


def test_read_few_shot_indices(benchmark):
    folder, content = benchmark
    split = read_coop_split(write(folder / "split.json", content), folder / "images")
    few = few_shot_file(content, [4, 1], [0, 3])
    found = read_few_shot_indices(write(folder / "shot_1-seed_1.json", few), split)
    files = [x["path"] for x in found["train"].cast_column("image", datasets.Image(decode=False))["image"]]
    assert [os.path.basename(file) for file in files] == ["train_4.jpg", "train_1.jpg"]
    assert found["train"]["label"][:] == [0, 1] and found["validation"]["label"][:] == [0, 1]

    def fails(message, change):
        changed = copy.deepcopy(few)
        change(changed)
        with pytest.raises(ValueError, match=message):
            read_few_shot_indices(write(folder / "bad.json", changed), split)

    fails("expects .*train_4.jpg.* at index 2 of 'train'", lambda c: c["train"]["indices"].__setitem__(0, 2))
    fails("index 6 for 'train', which has 6 rows", lambda c: c["train"]["indices"].__setitem__(0, 6))
    fails("expects \\('cup', 0", lambda c: c["train"]["data"][0].update(classname="cup"))
    fails("part 'train' does not", lambda c: c["train"]["indices"].pop())
    fails("part 'val' does not", lambda c: c.update(val=[]))
    fails("not a few-shot index file", lambda c: c.pop("train"))
    with pytest.raises(TypeError, match="must be the DatasetDict"):
        read_few_shot_indices(folder / "shot_1-seed_1.json", split["train"])
    with pytest.raises(ValueError, match="indices for 'validation'.*only 'train'"):
        read_few_shot_indices(folder / "shot_1-seed_1.json", datasets.DatasetDict(train=split["train"]))


@needs_splits
def test_real_split_and_index_files(tmp_path):
    folder = SHARED / "splits"
    for name, sizes, classes in (
        ("Caltech101", {"train": 4128, "validation": 1649, "test": 2465}, 100),
        ("OxfordPets", {"train": 2944, "validation": 736, "test": 3669}, 37),
    ):
        split = read_coop_split(folder / f"split_zhou_{name}.json", tmp_path, check_files=False)
        assert {key: len(part) for key, part in split.items()} == sizes
        assert split["train"].features["label"].num_classes == classes
        with pytest.raises(FileNotFoundError, match=f"{sum(sizes.values())} of {sum(sizes.values())} images"):
            read_coop_split(folder / f"split_zhou_{name}.json", tmp_path)
    caltech = read_coop_split(folder / "split_zhou_Caltech101.json", tmp_path, check_files=False)
    for shots in (1, 16):
        file = folder / "indices_caltech101" / f"shot_{shots}-seed_2.json"
        few = read_few_shot_indices(file, caltech)
        assert np.bincount(few["train"]["label"][:]).tolist() == [shots] * 100
        assert np.bincount(few["validation"]["label"][:]).tolist() == [min(shots, 4)] * 100
        raw = json.loads(file.read_text())["train"]["data"]
        paths = [x["path"] for x in few["train"].cast_column("image", datasets.Image(decode=False))["image"]]
        assert [os.path.relpath(p, tmp_path) for p in paths] == ["/".join(x["impath"].split("/")[-2:]) for x in raw]
    with pytest.raises(ValueError, match="belongs to another split"):
        read_few_shot_indices(
            folder / "indices_caltech101" / "shot_1-seed_1.json",
            read_coop_split(folder / "split_zhou_OxfordPets.json", tmp_path, check_files=False),
        )


# Loading


def class_folders(root, names, files=("a_1.png", "b_test_2.png")):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j, file in enumerate(files):
            picture(10 * i + j).save(root / name / file)
    return root


def test_load_class_folders(tmp_path):
    # A class called "train", files called "_test_", characters of glob patterns: nothing may get lost.
    root = class_folders(tmp_path / "my [images] *", ["dog", "cat", "train"])
    (root / ".hidden").mkdir()
    loaded = load_images(root)
    assert list(loaded) == ["train"] and len(loaded["train"]) == 6
    assert loaded["train"].features["label"].names == ["cat", "dog", "train"]
    assert loaded["train"]["label"][:] == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(loaded["train"][0]["image"], picture(10))
    assert len(load_images(str(root), split="train")) == 6


def test_load_split_folders(tmp_path):
    class_folders(tmp_path / "train", ["cat", "dog"])
    class_folders(tmp_path / "val", ["dog"])
    loaded = load_images(tmp_path)
    assert {key: len(part) for key, part in loaded.items()} == {"train": 4, "validation": 2}
    assert loaded["validation"].features["label"].names == ["cat", "dog"]
    assert loaded["validation"]["label"][:] == [1, 1]
    with pytest.raises(ValueError, match="has no split 'test'; it has 'train', 'validation'"):
        load_images(tmp_path, split="test")


def test_load_saved_and_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = image_dataset(6)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "two")
    assert load_images(tmp_path / "one").features == dataset.features
    assert list(load_images(tmp_path / "two")) == ["train", "test"]
    with pytest.raises(ValueError, match="one set without splits"):
        load_images(tmp_path / "one", split="train")

    (tmp_path / "files").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        dataset.to_parquet(tmp_path / "files" / f"{name}.parquet")
    loaded = load_images(tmp_path / "files")
    assert {key: len(part) for key, part in loaded.items()} == {"train": 12, "test": 6}
    assert loaded["test"].features == dataset.features
    assert np.array_equal(loaded["test"][2]["image"], picture(2))
    assert list(load_images(tmp_path / "files" / "test.parquet")) == ["test"]
    dataset.to_parquet(tmp_path / "files" / "other.parquet")
    with pytest.raises(ValueError, match="other.parquet' belongs to no split"):
        load_images(tmp_path / "files")


def test_load_metadata_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "x").mkdir()
    picture(1).save(tmp_path / "x" / "p.png")
    write(tmp_path / "x" / "metadata.csv", "file_name,species\np.png,owl\n")
    loaded = load_images(tmp_path / "x")["train"]
    assert loaded["species"][:] == ["owl"] and resolve_labels(loaded, "species")[0] == ["owl"]


def test_load_asks_the_hub_only_for_what_is_not_on_disk(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_images(class_folders(tmp_path / "images", ["cat"]))
    for name in (tmp_path / "none", "./none", "a/b/c", "none.parquet", "~/none"):
        with pytest.raises(FileNotFoundError, match="There is no file or folder"):
            load_images(name)
    assert not calls
    with pytest.raises(
        FileNotFoundError, match="'owner/pets' is neither a file nor a folder.*nor.*from the Hub: offline"
    ):
        load_images("owner/pets", split="train", revision="main")
    assert calls == [(("owner/pets",), {"split": "train", "revision": "main"})]


def test_bad_folders(tmp_path):
    root = class_folders(tmp_path / "r", ["cat", "dog"])
    with pytest.raises(TypeError, match="'revision' are for data sets on the Hub"):
        load_images(root, revision="main")
    picture(1).save(root / "loose.png")
    with pytest.raises(ValueError, match="loose.png' lies in no class folder"):
        load_images(root)
    (root / "loose.png").unlink()
    (root / "cow").mkdir()
    with pytest.raises(ValueError, match="class folders 'cow' of"):
        load_images(root)
    with pytest.raises(ValueError, match="lies deeper than its class folder"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="No images"):
        load_images(root / "cow")
    with pytest.raises(ValueError, match="is a file, but no .parquet"):
        load_images(write(tmp_path / "x.txt", ""))
    class_folders(tmp_path / "s" / "val", ["cat"])
    class_folders(tmp_path / "s" / "dev", ["cat"])
    with pytest.raises(ValueError, match="would both be the split 'validation'"):
        load_images(tmp_path / "s")


def test_the_page_converts_index_files_of_the_original(benchmark, monkeypatch):
    """In a pickle as the original writes it, of objects of a module that is not installed."""
    folder, content = benchmark
    monkeypatch.chdir(folder)
    write(folder / "split_zhou_Caltech101.json", content)
    record = type("Datum", (), {"__module__": "dassl.data.datasets.base_dataset", "__qualname__": "Datum"})
    stub = types.ModuleType("dassl.data.datasets.base_dataset")
    stub.Datum = record
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    for package in ("dassl", "dassl.data", "dassl.data.datasets"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    chosen, drawn = {"train": [4, 1], "val": [3]}, {}
    for part, rows in chosen.items():
        drawn[part] = []
        for file, label, name in (content[part][row] for row in rows):
            drawn[part].append(record())
            drawn[part][-1].__dict__ = {
                "_impath": f"/data/images/{file}", "_label": label, "_domain": 0, "_classname": name
            }  # fmt: skip
    (folder / "shot_16-seed_1.pkl").write_bytes(pickle.dumps(drawn, protocol=pickle.HIGHEST_PROTOCOL))
    page = (Path(__file__).resolve().parents[1] / "docs" / "datasets.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    exec(code, {})
    split = read_coop_split(folder / "split_zhou_Caltech101.json", folder / "images")
    few = read_few_shot_indices(folder / "shot_16-seed_1.json", split)
    images = few["train"].cast_column("image", datasets.Image(decode=False))["image"]
    assert [os.path.basename(image["path"]) for image in images] == ["train_4.jpg", "train_1.jpg"] and few[
        "validation"
    ]["label"][:] == [1]
    with pytest.raises(ValueError, match="is a pickle"):
        read_few_shot_indices(folder / "shot_16-seed_1.pkl", split)
    (folder / "shot_16-seed_1.pkl").write_bytes(pickle.dumps({"train": [Path("x")]}))
    with pytest.raises(pickle.UnpicklingError, match="not a record of an image"):
        exec(code, {})


def test_leaf_folders(tmp_path):
    for part, folders in {"train": ["a/abbey", "c/church/indoor", "c/church/outdoor", "d/barn/outdoor"],
                          "test": ["c/church/outdoor"]}.items():  # fmt: skip
        for index, folder in enumerate(folders):
            (tmp_path / part / folder).mkdir(parents=True)
            picture(index).save(tmp_path / part / folder / "x.png")
    (tmp_path / "train" / ".hidden").mkdir()
    picture(9).save(tmp_path / "train" / ".hidden" / "x.png")
    with pytest.raises(ValueError, match="lies deeper than its class folder.*leaf_folders=True"):
        load_images(tmp_path)
    data = load_images(tmp_path, leaf_folders=True)
    names = data["train"].features["label"].names
    assert names == ["abbey", "barn outdoor", "church outdoor", "indoor"] == data["test"].features["label"].names
    assert [names[label] for label in data["train"]["label"]] == ["abbey", "indoor", "church outdoor", "barn outdoor"]
    assert np.array_equal(np.asarray(data["train"][3]["image"]), np.asarray(picture(3)))
    assert load_images(tmp_path / "test" / "c", leaf_folders=True)["train"].features["label"].names == ["outdoor"]


class Pairs:
    """In the form of torchvision's `ImageFolder`."""

    classes = ["cat", "dog"]

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return picture(index), index % 2


def test_any_iterable_of_labelled_images(tmp_path):
    expected = [np.asarray(picture(index)) for index in range(3)]
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    paths = [(str(tmp_path / f"{index}.png"), "cat" if index % 2 == 0 else "dog") for index in range(3)]
    whole = image_dataset(3)
    for data, options, names in (
        (Pairs(), {}, ["cat", "dog"]),
        (paths, {}, None),
        ((pair for pair in paths), {}, None),
        ([{"photo": (tmp_path / f"{i}.png").read_bytes(), "kind": np.int64(i % 2)} for i in range(3)],
         {"image_column": "photo", "label_column": "kind"}, None),
        (whole.to_iterable_dataset(), {}, CLASS_NAMES),
    ):  # fmt: skip
        made = as_dataset(data, **options)
        image_column, label_column = made.column_names
        assert [np.array_equal(np.asarray(a), b) for a, b in zip(made[image_column], expected)] == [True] * 3
        assert getattr(made.features[label_column], "names", None) == names
        resolve_labels(made, label_column, names or ["cat", "dog"])
    assert as_dataset(whole) is whole
    processor = make_image_processor(24)
    images = LabelledImages(Pairs(), processor)
    assert images.class_names == ["cat", "dog"] and images.labels.tolist() == [0, 1, 0]
    assert torch.equal(images[1]["pixel_values"], eval_transform(processor)(picture(1)))
    with pytest.raises(TypeError, match="got list .*KeyError: 'image'"):
        as_dataset([{"img": 1, "label": 0}])
    with pytest.raises(TypeError, match="an item of 3 parts"):
        as_dataset([(picture(0), 1, 2)])
    with pytest.raises(TypeError, match="got int"):
        as_dataset(3)
    with pytest.raises(ValueError, match="no images"):
        as_dataset([])
