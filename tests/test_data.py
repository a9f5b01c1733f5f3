import copy
import io
import json
import logging
import os
import pickle
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor

from coop_hf.data import (
    LabelledImages,
    collate,
    decode_image,
    eval_transform,
    load_images,
    read_coop_split,
    read_few_shot_indices,
    resolve_labels,
    sample_few_shot,
    to_rgb,
    train_transform,
)


SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_splits = pytest.mark.skipif(not (SHARED / "splits").is_dir(), reason="no ../shared/data/splits here")
NAMES = ["cat", "dog", "sea_lion"]


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})


def picture(seed, size=(37, 29), mode="RGB"):
    rng = np.random.default_rng(seed)
    bands = len(PIL.Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    return PIL.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def image_dataset(count=9, **columns):
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": encoded(picture(i)), "path": None} for i in range(count)],
            "label": [i % 3 for i in range(count)],
            **columns,
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=NAMES),
                **{k: datasets.Value("string") for k in columns},
            }
        ),
    )


def label_dataset(labels, feature=None):
    features = datasets.Features({"label": feature, "row": datasets.Value("int64")}) if feature else None
    return datasets.Dataset.from_dict({"label": labels, "row": list(range(len(labels)))}, features=features)


# Labels


def test_resolve_labels_of_each_kind():
    class_label = label_dataset([2, 0, 1], datasets.ClassLabel(names=NAMES))
    for dataset, class_names, names, labels in (
        (class_label, None, NAMES, [2, 0, 1]),
        (class_label, ["a", "b", "c"], ["a", "b", "c"], [2, 0, 1]),
        (label_dataset([2, 0, 1]), NAMES, NAMES, [2, 0, 1]),
        (label_dataset([2, 0, 1], datasets.Value("uint8")), NAMES, NAMES, [2, 0, 1]),
        (label_dataset(["dog", "cat", "dog"]), None, ["cat", "dog"], [1, 0, 1]),
        (label_dataset(["dog", "cat", "dog"]), ["dog", "sea_lion", "cat"], ["dog", "sea_lion", "cat"], [0, 2, 0]),
    ):
        found_names, found = resolve_labels(dataset, class_names=class_names)
        assert found_names == names and found.dtype == np.int64 and found.tolist() == labels


@pytest.mark.parametrize(
    "labels, feature, class_names, message",
    [
        ([0, 1], None, None, r"integers without names \(0, 1\).*pass `class_names="),
        ([0, 3, 1], None, NAMES, "Row 1 has the label 3 in the column 'label', but there are 3 classes"),
        (["cat", "cow"], None, NAMES, "Row 1 has the label 'cow'.*not among the 3 class names"),
        ([0, None], None, NAMES, "1 of 2 rows have no label.*row 1"),
        ([0, -1], datasets.ClassLabel(names=NAMES), None, "1 of 2 rows have no label"),
        (["cat", None], None, None, "rows have no label"),
        ([0, 1], datasets.ClassLabel(names=NAMES), ["a", "b"], "has 2 names, but the column 'label' has 3 classes"),
        ([0, 1], None, ["a", "a"], "repeated: 'a'"),
        ([0, 1], None, ["a", " "], "Class name 1 is ' '"),
        ([0, 1], None, [], "`class_names` is empty"),
        ([0.5, 1.0], None, NAMES, "must be a ClassLabel, integers or strings.*float64"),
        ([True, False], None, NAMES, "must be a ClassLabel, integers or strings.*bool"),
        ([[0], [1]], None, NAMES, "must be a ClassLabel, integers or strings"),
    ],
)
def test_bad_labels(labels, feature, class_names, message):
    with pytest.raises(ValueError, match=message):
        resolve_labels(label_dataset(labels, feature), class_names=class_names)


def test_bad_label_arguments():
    with pytest.raises(TypeError, match="single string 'cat'"):
        resolve_labels(label_dataset([0]), class_names="cat")
    with pytest.raises(ValueError, match="no column 'target'; it has 'label', 'row'.*`label_column=`"):
        resolve_labels(label_dataset([0]), "target")
    with pytest.raises(TypeError, match="splits 'train'.*dataset\\['train'\\]"):
        resolve_labels(datasets.DatasetDict(train=label_dataset([0])))
    with pytest.raises(TypeError, match="Expected a datasets.Dataset, got list"):
        resolve_labels([{"label": 0}])


# Few-shot sampling


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_sample_few_shot_counts_nesting_and_reproduction(labels, shots, seed):
    dataset = label_dataset(labels)
    rows = sample_few_shot(dataset, shots, seed=seed, allow_fewer=True)["row"][:]
    assert len(set(rows)) == len(rows)
    for label in range(5):
        drawn = [row for row in rows if labels[row] == label]
        assert len(drawn) == min(shots, labels.count(label))
    more = sample_few_shot(dataset, 2 * shots, seed=seed, allow_fewer=True)["row"][:]
    assert set(rows) <= set(more)
    # Another fingerprint, other label type, other columns: the same rows.
    other = label_dataset([f"class {label}" for label in labels]).map(lambda row: {"x": 1})
    assert sample_few_shot(other, shots, seed=seed, allow_fewer=True)["row"][:] == rows


def test_sample_few_shot_is_fixed_for_ever_and_uniform():
    dataset = label_dataset([0] * 10 + [1] * 10)
    # Not to be changed: users' published results name a seed.
    assert sample_few_shot(dataset, 3, seed=1)["row"][:] == [2, 5, 4, 14, 18, 19]
    counts = np.bincount(np.concatenate([sample_few_shot(dataset, 3, seed=s)["row"][:] for s in range(400)]))
    # Each row is drawn with probability 0.3: 120 ± 9.2 of 400; five standard deviations.
    assert counts.sum() == 400 * 6 and abs(counts - 120).max() < 46


def test_sample_few_shot_reads_no_picture():
    dataset = image_dataset().cast_column("image", datasets.Image(decode=False))
    dataset = dataset.map(lambda row: {"image": {"bytes": b"broken", "path": None}})
    dataset = dataset.cast_column("image", datasets.Image())
    few = sample_few_shot(dataset, 2)
    assert len(few) == 6 and few.features == dataset.features
    assert len(sample_few_shot(dataset.with_transform(lambda batch: 1 / 0), 2)) == 6


@pytest.mark.parametrize(
    "labels, options, error, message",
    [
        ([0, 0, 1], {"num_shots": 0}, ValueError, "`num_shots` must be at least 1, got 0"),
        ([0, 0, 1], {"num_shots": 1.5}, TypeError, "must be integers, got 1.5"),
        ([0, 0, 1], {"num_shots": 1, "seed": -1}, ValueError, "`seed` must be from 0"),
        ([0, 0, 1], {"num_shots": 2}, ValueError, r"fewer than 2 pictures: '1 \(1\)'.*at most 1 shots"),
        ([0, 0, 1], {"num_shots": 1, "class_names": NAMES}, ValueError, "1 of 3 classes have no picture: 'sea_lion'"),
        ([0, 0, 1], {"num_shots": 1, "label_column": "y"}, ValueError, "no column 'y'; it has 'label', 'row'"),
        ([0, 3], {"num_shots": 1, "class_names": NAMES}, ValueError, "Row 1 has the label 3"),
    ],
)
def test_bad_few_shot(labels, options, error, message):
    with pytest.raises(error, match=message):
        sample_few_shot(label_dataset(labels), **options)


# Files of the CoOp benchmark


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def benchmark(tmp_path):
    (tmp_path / "pictures").mkdir()
    content = {
        key: [[f"{key}_{i}.jpg", i % 2, ["face", "yin_yang"][i % 2]] for i in range(size)]
        for key, size in (("train", 6), ("val", 4), ("test", 2))
    }
    for entries in content.values():
        for file, _, _ in entries:
            (tmp_path / "pictures" / file).write_bytes(b"never decoded")
    return tmp_path, content


def test_read_coop_split(benchmark):
    folder, content = benchmark
    path = write(folder / "split.json", content)
    split = read_coop_split(path, folder / "pictures")
    assert {name: len(part) for name, part in split.items()} == {"train": 6, "validation": 4, "test": 2}
    assert split["train"].features["label"].names == ["face", "yin_yang"]
    row = split["test"].cast_column("image", datasets.Image(decode=False))[1]
    assert row == {"image": {"bytes": None, "path": str(folder / "pictures" / "test_1.jpg")}, "label": 1}
    for part in ("val", "validation"):
        assert read_coop_split(path, folder / "pictures", part=part)["label"][:] == [0, 1, 0, 1]


def test_bad_coop_splits(benchmark):
    folder, content = benchmark
    root = folder / "pictures"
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
    fails(ValueError, "'face' has the label 0, but 5", lambda c: c["val"].__setitem__(0, ["val_0.jpg", 5, "face"]))
    fails(ValueError, "2 are missing", lambda c: c["val"].append(["val_0.jpg", 3, "cup"]))
    fails(FileNotFoundError, "1 of 13 pictures.*gone.jpg", lambda c: c["val"].append(["gone.jpg", 0, "face"]))
    fails(ValueError, "no CoOp split file", lambda c: c.update(train=[], val=[], test=[]) or c.update(extra=1))
    with pytest.raises(FileNotFoundError, match="There is no CoOp split file at"):
        read_coop_split(folder / "none.json", root)
    with pytest.raises(ValueError, match="is not JSON"):
        read_coop_split(write(path, "{"), root)
    with pytest.raises(ValueError, match="a list"):
        read_coop_split(write(path, []), root)
    with pytest.raises(ValueError, match="is a pickle"):
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
    split = read_coop_split(write(folder / "split.json", content), folder / "pictures")
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
    fails("no few-shot index file", lambda c: c.pop("train"))
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
        with pytest.raises(FileNotFoundError, match=f"{sum(sizes.values())} of {sum(sizes.values())} pictures"):
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
    root = class_folders(tmp_path / "my [pictures] *", ["dog", "cat", "train"])
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
    load_images(class_folders(tmp_path / "pictures", ["cat"]))
    for name in (tmp_path / "none", "./none", "a/b/c", "none.parquet", "~/none"):
        with pytest.raises(FileNotFoundError, match="There is no file or folder"):
            load_images(name)
    assert not calls
    with pytest.raises(FileNotFoundError, match="'owner/pets' is no file or folder.*nor.*from the Hub: offline"):
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
    with pytest.raises(ValueError, match="No pictures"):
        load_images(root / "cow")
    with pytest.raises(ValueError, match="is a file, but no .parquet"):
        load_images(write(tmp_path / "x.txt", ""))
    class_folders(tmp_path / "s" / "val", ["cat"])
    class_folders(tmp_path / "s" / "dev", ["cat"])
    with pytest.raises(ValueError, match="would both be the split 'validation'"):
        load_images(tmp_path / "s")


# Pictures


def png16(values):
    """A 16-bit grey PNG, written by hand."""
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks
    )


def modes():
    palette = picture(1).quantize(16)
    transparent = io.BytesIO()
    palette.save(transparent, "PNG", transparency=3)
    return {
        "RGB": picture(2),
        "L": picture(3, mode="L"),
        "1": picture(3, mode="L").convert("1"),
        "RGBA": picture(4, mode="RGBA"),
        "LA": picture(4, mode="LA"),
        "P": palette,
        "P with transparency": PIL.Image.open(io.BytesIO(transparent.getvalue())),
        "CMYK": picture(5, mode="CMYK"),
        "YCbCr": picture(6, mode="YCbCr"),
        "F": picture(3, mode="L").convert("F"),
        "I": picture(3, mode="L").convert("I"),
    }


@pytest.mark.parametrize("mode", list(modes()))
@pytest.mark.parametrize("size", [(37, 29), (24, 24), (10, 90)])
def test_eval_transform_is_the_processor(processor, mode, size):
    image = modes()[mode].resize(size) if size != (37, 29) else modes()[mode]
    pixels = eval_transform(processor)(image)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 24, 24)
    assert torch.equal(pixels, processor(images=image, return_tensors="pt")["pixel_values"][0].float())


def test_eval_transform_is_the_real_processor():
    if not (SHARED / "clip_tokenizer").is_dir():
        pytest.skip("no ../shared/data/clip_tokenizer here")
    real = CLIPImageProcessor.from_pretrained(SHARED / "clip_tokenizer")
    image = picture(7, (301, 260))
    pixels = eval_transform(real)(image)
    assert pixels.shape == (3, 224, 224)
    assert torch.equal(pixels, real(images=image, return_tensors="pt")["pixel_values"][0].float())
    # Without resizing, the whole way in closed form.
    image = picture(8, (224, 224))
    expected = (np.asarray(image) / 255 - real.image_mean) / real.image_std
    assert np.allclose(eval_transform(real)(image), expected.transpose(2, 0, 1), atol=1e-6)


def test_to_rgb():
    clear = PIL.Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    image = picture(1)
    assert to_rgb(image) is image
    values = np.linspace(0, 65535, 12).reshape(3, 4).astype(np.uint16)
    decoded = decode_image(png16(values))
    assert np.array_equal(np.asarray(to_rgb(decoded)), np.repeat((values // 256).astype(np.uint8)[..., None], 3, -1))


def test_decode_image_as_datasets_does(tmp_path):
    image = picture(1)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    data = encoded(image, "PNG", exif=exif.tobytes())
    (tmp_path / "x.png").write_bytes(data)
    turned = np.rot90(np.asarray(image), -1)
    expected = datasets.Image().decode_example({"bytes": data, "path": None})
    assert np.array_equal(np.asarray(expected), turned)
    for value in (
        data,
        str(tmp_path / "x.png"),
        tmp_path / "x.png",
        {"bytes": data, "path": None},
        {"path": str(tmp_path / "x.png")},
    ):
        assert np.array_equal(np.asarray(decode_image(value)), turned)
    pixels = np.asarray(image)
    assert decode_image(image) is image
    for value in (pixels, pixels.tolist(), pixels.transpose(2, 0, 1), pixels.astype(np.int64)):
        assert np.array_equal(np.asarray(decode_image(value)), pixels)
    assert decode_image(pixels[..., 0]).mode == decode_image(pixels[..., :1]).mode == "L"
    assert decode_image(pixels, "L").mode == "L"


@pytest.mark.parametrize(
    "value, message",
    [
        (None, "missing"),
        (np.zeros((4, 4, 3)), "integers from 0 to 255, got float64"),
        (np.full((4, 4), 300), "integers from 0 to 255"),
        (np.zeros((5, 4, 2), np.uint8), r"got the shape \(5, 4, 2\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "got the shape"),
    ],
)
def test_bad_pixels(value, message):
    with pytest.raises(ValueError, match=message):
        decode_image(value)


class Draws:
    """A generator that gives the numbers it was made with."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def test_train_transform_in_closed_form(processor):
    image = picture(1, (80, 60))
    # Share of the area 0.08 + 0.92·0.5 = 0.54; log-ratio half way, ratio 1: a square of √(0.54·4800) = 50.9 → 51.
    # left = ⌊0.5·(80 - 51 + 1)⌋ = 15, top = ⌊0.9·(60 - 51 + 1)⌋ = 9
    crop = image.crop((15, 9, 66, 60)).resize((24, 24), PIL.Image.Resampling.BICUBIC)
    expected = (np.asarray(crop) / 255 - processor.image_mean) / processor.image_std
    for last, step in ((0.4, -1), (0.6, 1)):
        pixels = train_transform(processor)(image, Draws(0.5, 0.5, 0.5, 0.9, last))
        assert pixels.dtype == torch.float32 and pixels.shape == (3, 24, 24)
        assert np.allclose(pixels, expected[:, ::step].transpose(2, 0, 1), atol=1e-5)
    pixels = train_transform(processor, flip=False)(image, Draws(0.5, 0.5, 0.5, 0.9))
    assert np.allclose(pixels, expected.transpose(2, 0, 1), atol=1e-5)


def test_whole_crop_is_the_processor(processor):
    image = picture(1, (48, 48))
    pixels = train_transform(processor, flip=False, scale=(1, 1), ratio=(1, 1))(image, np.random.default_rng(0))
    assert np.allclose(pixels, eval_transform(processor)(image), atol=1e-5)


@pytest.mark.parametrize("size, box", [((1000, 6), (496, 0, 504, 6)), ((6, 1000), (0, 496, 6, 504))])
def test_train_transform_falls_back_to_the_centre(processor, size, box):
    image = picture(1, size)
    pixels = train_transform(processor, scale=(0.5, 1))(image, Draws(*[0.9] * 20, 0.9))
    crop = image.crop(box).resize((24, 24), PIL.Image.Resampling.BICUBIC)
    expected = (np.asarray(crop) / 255 - processor.image_mean) / processor.image_std
    assert np.allclose(pixels, expected.transpose(2, 0, 1), atol=1e-5)


def test_crops_have_the_published_distribution():
    from coop_hf.data import _crop_box

    rng = np.random.default_rng(0)
    boxes = np.array([_crop_box(400, 400, rng, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 400
    area, ratio = width * height / 160000, width / height
    assert area.min() > 0.078 and 0.74 < ratio.min() and ratio.max() < 1.35
    # Small crops always fit, so there the area is uniform and the log-ratio symmetric.
    small = area < 0.6
    assert abs(area[small].mean() - 0.34) < 0.012 and abs(np.log(ratio[small]).mean()) < 0.012
    centre = (boxes[:, 0] + boxes[:, 2]) / 2
    assert abs(centre.mean() - 200) < 5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_crops_lie_inside_any_picture(width, height, seed):
    from coop_hf.data import _crop_box

    left, top, right, bottom = _crop_box(width, height, np.random.default_rng(seed), (0.08, 1.0), (3 / 4, 4 / 3))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_other_processors_and_bad_ones():
    class Square:
        size = {"height": 20, "width": 30}
        do_rescale, rescale_factor, do_normalize, image_mean, image_std = True, 1 / 255, False, None, None

        def __call__(self, images, return_tensors):
            raise NotImplementedError

    pixels = train_transform(Square())(picture(1), np.random.default_rng(0))
    assert pixels.shape == (3, 20, 30) and 0 <= pixels.min() and pixels.max() <= 1
    holder = type("Processor", (), {"image_processor": Square()})()
    assert torch.equal(train_transform(holder)(picture(1), np.random.default_rng(0)), pixels)
    free = Square()
    free.size = {"longest_edge": 20}
    with pytest.raises(ValueError, match="no fixed size"):
        train_transform(free)
    with pytest.raises(TypeError, match="Expected an image processor.*got str"):
        eval_transform("openai/clip-vit-base-patch32")
    with pytest.raises(ValueError, match="`scale` must be"):
        train_transform(Square(), scale=(0, 1))
    with pytest.raises(ValueError, match="`ratio` must be"):
        train_transform(Square(), ratio=(2, 1))


# The data set of a training


def test_items_and_views(processor):
    dataset = image_dataset()
    plain = LabelledImages(dataset, processor)
    assert len(plain) == 9 and plain.class_names == NAMES and plain.labels.tolist() == [0, 1, 2] * 3
    item = plain[4]
    assert item["labels"] == 1 and type(item["labels"]) is int
    assert torch.equal(item["pixel_values"], eval_transform(processor)(picture(4)))
    assert torch.equal(plain[-1]["pixel_values"], plain[8]["pixel_values"])
    with pytest.raises(IndexError, match="no item 9: the data set has 9"):
        plain[9]

    augmented = LabelledImages(dataset, processor, seed=3, augment=True)
    seen = []
    for epoch in (0, 1, 5):
        augmented.set_epoch(epoch)
        for index in (0, 4):
            pixels = augmented[index]["pixel_values"]
            expected = train_transform(processor)(picture(index), np.random.default_rng([3, epoch, index]))
            assert torch.equal(pixels, expected) and torch.equal(augmented.view(index, epoch), expected)
            # Views do not depend on the epoch that is set, nor on whether items are augmented.
            assert torch.equal(LabelledImages(dataset, processor, seed=3).view(index, epoch), expected)
            seen.append(expected)
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert torch.equal(augmented.view(4), plain[4]["pixel_values"])
    other = LabelledImages(dataset, processor, seed=4, augment=True)
    assert not torch.equal(other.view(0, 0), augmented.view(0, 0))


def test_own_transform(processor):
    images = LabelledImages(
        image_dataset(), processor, augment=True, transform=lambda image, rng: torch.full((3, 1, 1), rng.random())
    )
    assert float(images[2]["pixel_values"][0]) == pytest.approx(np.random.default_rng([0, 0, 2]).random())


def test_image_columns_of_each_kind(processor, tmp_path):
    expected = eval_transform(processor)(picture(0))
    picture(0).save(tmp_path / "0.png")
    raw = np.asarray(picture(0))
    for column, feature in (
        ([picture(0)], datasets.Image()),
        ([str(tmp_path / "0.png")], datasets.Image()),
        ([encoded(picture(0))], datasets.Image()),
        ([encoded(picture(0))], datasets.Image(decode=False)),
        ([str(tmp_path / "0.png")], datasets.Value("string")),
        ([encoded(picture(0))], datasets.Value("binary")),
        (
            [{"bytes": encoded(picture(0)), "path": None}],
            {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        ),
        ([raw], datasets.Array3D(raw.shape, "uint8")),
        ([raw.tolist()], None),
    ):
        dataset = datasets.Dataset.from_dict(
            {"photo": column, "label": ["cat"]},
            features=feature and datasets.Features({"photo": feature, "label": datasets.Value("string")}),
        )
        images = LabelledImages(dataset.with_format("torch"), processor, image_column="photo")
        assert torch.equal(images[0]["pixel_values"], expected), feature
    grey = datasets.Dataset.from_dict({"image": [encoded(picture(0))], "label": ["cat"]}).cast_column(
        "image", datasets.Image(mode="L")
    )
    assert torch.equal(
        LabelledImages(grey, processor)[0]["pixel_values"], eval_transform(processor)(picture(0).convert("L"))
    )


def broken_dataset(tmp_path):
    data = [encoded(picture(i)) for i in range(6)]
    data[1], data[4] = b"no picture", data[4][: len(data[4]) // 2]
    rows = [{"bytes": item, "path": None} for item in data]
    rows[5] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 2, 0, 1, 2]}, features=features)


def test_unreadable_pictures(processor, tmp_path, caplog):
    dataset = broken_dataset(tmp_path)
    images = LabelledImages(dataset, processor)
    images[0]
    for row, message in (
        (1, "row 1, column 'image', cannot be read: UnidentifiedImageError"),
        (4, "row 4, "),
        (5, "row 5 .*gone.png"),
    ):
        with pytest.raises(ValueError, match=message):
            images[row]
    with caplog.at_level(logging.WARNING):
        kept = LabelledImages(dataset, processor, seed=1, on_bad_image="skip")
    assert "Left out 3 of 6 pictures" in caplog.text and "rows 1, 4, 5" in caplog.text
    assert kept.skipped == [1, 4, 5] and kept.rows.tolist() == [0, 2, 3] and kept.labels.tolist() == [0, 2, 0]
    assert len(kept) == 3 and kept[1]["labels"] == 2
    # Skipping does not change the augmentation of the others.
    assert torch.equal(kept.view(2, 7), LabelledImages(dataset, processor, seed=1).view(3, 7))
    with pytest.raises(ValueError, match="None of the 1 pictures can be read. The first: .*row 0"):
        LabelledImages(dataset.select([4]), processor, on_bad_image="skip")
    assert LabelledImages(image_dataset(), processor, on_bad_image="skip").skipped == []
    loader = DataLoader(images, batch_size=6, collate_fn=collate, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="row 1, column 'image'"):
        list(loader)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_column": "photo"}, "no column 'photo'; it has 'image', 'label', 'note'.*`image_column=`"),
        ({"label_column": "class"}, "no column 'class'.*`label_column=`"),
        (
            {"image_column": "label"},
            r"'label' holds ClassLabel.*no picture.*\(columns with a datasets.Image: 'image'\)",
        ),
        ({"class_names": ["a"]}, "has 1 names, but"),
        ({"on_bad_image": "ignore"}, "`on_bad_image` must be 'raise' or 'skip', got 'ignore'"),
        ({"seed": -1}, "`seed` must be from 0"),
    ],
)
def test_bad_data_sets(processor, options, message):
    with pytest.raises(ValueError, match=message):
        LabelledImages(image_dataset(note=["x"] * 9), processor, **options)


def test_bad_rows_and_epochs(processor):
    with pytest.raises(ValueError, match="has no rows"):
        LabelledImages(image_dataset().select([]), processor)
    with pytest.raises(ValueError, match="`epoch` must be at least 0, got -1"):
        LabelledImages(image_dataset(), processor).set_epoch(-1)


def epochs(loader, dataset, number=3):
    batches = []
    for epoch in range(number):
        dataset.set_epoch(epoch)
        batches.append(torch.cat([batch["pixel_values"] for batch in loader]))
    return torch.stack(batches)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_change_nothing(processor, context):
    dataset = LabelledImages(image_dataset(), processor, seed=5, augment=True)
    expected = torch.stack([torch.stack([dataset.view(i, e) for i in range(9)]) for e in range(3)])
    assert torch.equal(epochs(DataLoader(dataset, batch_size=2, collate_fn=collate), dataset), expected)
    # Persistent workers start once, in epoch 0, and must see later epochs.
    loader = DataLoader(
        dataset,
        batch_size=2,
        collate_fn=collate,
        num_workers=2 if context == "fork" else 1,  # a spawned worker imports everything again
        persistent_workers=True,
        multiprocessing_context=context,
    )
    assert torch.equal(epochs(loader, dataset), expected)
    if context == "fork":
        loader = DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=2, multiprocessing_context=context)
        assert torch.equal(epochs(loader, dataset, 2), expected[:2])


def test_copies_have_an_epoch_of_their_own(processor):
    dataset = LabelledImages(image_dataset(), processor, augment=True)
    dataset.set_epoch(2)
    for other in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert other.epoch == 2 and torch.equal(other[3]["pixel_values"], dataset[3]["pixel_values"])
        other.set_epoch(4)
        assert dataset.epoch == 2 and other.epoch == 4 and other._epoch.is_shared()


def test_accelerate_sets_the_epoch(processor):
    accelerate = pytest.importorskip("accelerate")
    dataset = LabelledImages(image_dataset(), processor, augment=True)
    loader = accelerate.Accelerator(cpu=True).prepare_data_loader(
        DataLoader(dataset, batch_size=9, collate_fn=collate)
    )
    for epoch in range(3):
        (batch,) = loader
        assert dataset.epoch == epoch
        assert torch.equal(batch["pixel_values"][4], dataset.view(4, epoch))


def test_collate():
    batch = collate([{"pixel_values": torch.full((3, 2, 2), i, dtype=torch.float64), "labels": i} for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 2, 2) and batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 1, 2] and batch["labels"].dtype == torch.int64
    batch = collate([{"image_embeds": np.ones(4, np.float16), "pixel_values": None, "labels": np.int64(1)}])
    assert set(batch) == {"image_embeds", "labels"} and batch["image_embeds"].dtype == torch.float32
    assert set(collate([{"image_embeds": torch.ones(4)}])) == {"image_embeds"}
    with pytest.raises(ValueError, match="need 'pixel_values' or 'image_embeds', got 'image'"):
        collate([{"image": 1}])
    with pytest.raises(ValueError, match=r"must have one shape, got \(3, 2, 2\), \(3, 4, 4\)"):
        collate([{"pixel_values": torch.ones(3, n, n)} for n in (2, 4)])
