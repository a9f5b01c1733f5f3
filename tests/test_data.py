import copy
import json
import logging
import pickle
import random
import re

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import CLASS_NAMES, SHARED, encoded, image_dataset, make_image_processor, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Siglip2ImageProcessor

from coop_hf.data.few_shot import coop_few_shot_rows, resolve_labels, sample_few_shot
from coop_hf.data.labelled_images import LabelledImages, collate
from coop_hf.data.transforms import eval_transform, train_transform


@pytest.fixture(scope="module")
def processor():
    return make_image_processor(24)


def label_dataset(labels, feature=None):
    features = datasets.Features({"label": feature, "row": datasets.Value("int64")}) if feature else None
    return datasets.Dataset.from_dict({"label": labels, "row": list(range(len(labels)))}, features=features)


# Labels


def test_resolve_labels_of_each_kind():
    class_label = label_dataset([2, 0, 1], datasets.ClassLabel(names=CLASS_NAMES))
    for dataset, class_names, names, labels in (
        (class_label, None, CLASS_NAMES, [2, 0, 1]),
        (class_label, ["a", "b", "c"], ["a", "b", "c"], [2, 0, 1]),
        (label_dataset([2, 0, 1]), CLASS_NAMES, CLASS_NAMES, [2, 0, 1]),
        (label_dataset([2, 0, 1], datasets.Value("uint8")), CLASS_NAMES, CLASS_NAMES, [2, 0, 1]),
        (label_dataset(["dog", "cat", "dog"]), None, ["cat", "dog"], [1, 0, 1]),
        (label_dataset(["dog", "cat", "dog"]), ["dog", "sea_lion", "cat"], ["dog", "sea_lion", "cat"], [0, 2, 0]),
    ):
        found_names, found = resolve_labels(dataset, class_names=class_names)
        assert found_names == names and found.dtype == np.int64 and found.tolist() == labels


@pytest.mark.parametrize(
    "labels, feature, class_names, message",
    [
        ([0, 1], None, None, r"integers without names \(0, 1\).*pass `class_names="),
        ([0, 3, 1], None, CLASS_NAMES, "Row 1 of the column 'label' has the label 3, but there are 3 classes"),
        (["cat", "cow"], None, CLASS_NAMES, "Row 1 has the label 'cow'.*not among the 3 class names"),
        ([0, None], None, CLASS_NAMES, "1 of 2 rows have no label.*row 1"),
        ([0, -1], datasets.ClassLabel(names=CLASS_NAMES), None, "1 of 2 rows have no label"),
        (["cat", None], None, None, "rows have no label"),
        (
            [0, 1],
            datasets.ClassLabel(names=CLASS_NAMES),
            ["a", "b"],
            "has 2 names, but the column 'label' has 3 classes",
        ),
        ([0, 1], None, ["a", " "], "class name 1 is empty"),
        ([0, 1], None, [], "`class_names` is empty"),
        ([0.5, 1.0], None, CLASS_NAMES, "must be a ClassLabel, integers or strings.*float64"),
        ([True, False], None, CLASS_NAMES, "must be a ClassLabel, integers or strings.*bool"),
        ([[0], [1]], None, CLASS_NAMES, "must be a ClassLabel, integers or strings.*Several labels for one image"),
    ],
)
def test_bad_labels(labels, feature, class_names, message):
    with pytest.raises(ValueError, match=message):
        resolve_labels(label_dataset(labels, feature), class_names=class_names)


def test_bad_label_arguments():
    with pytest.raises(ValueError, match="single string 'cat'"):
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


def test_sample_few_shot_reads_no_image():
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
        ([0, 0, 1], {"num_shots": 1, "draw": "dassl"}, ValueError, "`draw` must be 'nested' or 'coop', got 'dassl'"),
        ([0, 0, 1], {"num_shots": 1, "seed": -1}, ValueError, "`seed` must be from 0"),
        ([0, 0, 1], {"num_shots": 2}, ValueError, r"fewer than 2 images: '1 \(1\)'.*at most 1 shots"),
        (
            [0, 0, 1],
            {"num_shots": 1, "class_names": CLASS_NAMES},
            ValueError,
            "1 of 3 classes have no image: 'sea_lion'",
        ),
        ([0, 0, 1], {"num_shots": 1, "label_column": "y"}, ValueError, "no column 'y'; it has 'label', 'row'"),
        ([0, 3], {"num_shots": 1, "class_names": CLASS_NAMES}, ValueError, "Row 1 of .* has the label 3"),
    ],
)
def test_bad_few_shot(labels, options, error, message):
    with pytest.raises(error, match=message):
        sample_few_shot(label_dataset(labels), **options)


def test_the_draw_of_the_public_code_in_closed_form():
    labels = ["b", "a", "b", "b", "a", "c"]
    random.seed(5)
    state = random.getstate()
    train, val = coop_few_shot_rows(2, 7, labels, [1, 1, 1, 0, 1, 1])
    assert random.getstate() == state
    random.seed(7)  # once for all; classes as they first occur; a class with fewer rows gives all of them, undrawn
    expected = random.sample([0, 2, 3], 2) + random.sample([1, 4], 2) + [5]
    assert train == expected and val == random.sample([0, 1, 2, 4, 5], 2) + [3]
    drawn = sample_few_shot(label_dataset(labels), 2, seed=7, allow_fewer=True, draw="coop")
    assert drawn["row"][:] == train
    assert len(coop_few_shot_rows(16, 1, [0] * 20, [0] * 20)[1]) == 4


def test_the_draw_of_the_public_code_is_that_of_its_index_files():
    folder = SHARED / "splits"
    if not (folder / "indices_caltech101").is_dir():
        pytest.skip("no ../shared/data/splits/indices_caltech101 here")
    split = json.loads((folder / "split_zhou_Caltech101.json").read_text())
    labels = [[label for _, label, _ in split[part]] for part in ("train", "val")]
    files = sorted((folder / "indices_caltech101").glob("shot_*-seed_*.json"))
    assert len(files) == 15
    for file in files:
        shots, seed = map(int, re.findall(r"\d+", file.stem))
        content = json.loads(file.read_text())
        assert coop_few_shot_rows(shots, seed, *labels) == [content[part]["indices"] for part in ("train", "val")]


# The data set of a training


def test_items_and_views(processor):
    dataset = image_dataset()
    plain = LabelledImages(dataset, processor)
    assert len(plain) == 9 and plain.class_names == CLASS_NAMES and plain.labels.tolist() == [0, 1, 2] * 3
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
    data[1], data[4] = b"no image", data[4][: len(data[4]) // 2]
    rows = [{"bytes": item, "path": None} for item in data]
    rows[5] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASS_NAMES)})
    return datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 2, 0, 1, 2]}, features=features)


def test_unreadable_images(processor, tmp_path, caplog):
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
    assert "Left out 3 of 6 images" in caplog.text and "rows 1, 4, 5" in caplog.text
    assert kept.skipped == [1, 4, 5] and kept.rows.tolist() == [0, 2, 3] and kept.labels.tolist() == [0, 2, 0]
    assert len(kept) == 3 and kept[1]["labels"] == 2
    # Skipping does not change the augmentation of the others.
    assert torch.equal(kept.view(2, 7), LabelledImages(dataset, processor, seed=1).view(3, 7))
    with pytest.raises(ValueError, match="None of the 1 images can be read. The first: .*row 0"):
        LabelledImages(dataset.select([4]), processor, on_bad_image="skip")
    assert LabelledImages(image_dataset(), processor, on_bad_image="skip").skipped == []
    loader = DataLoader(images, batch_size=6, collate_fn=collate, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="row 1, column 'image'"):
        list(loader)


def test_long_and_thin_images_are_skipped(caplog):
    dataset = datasets.Dataset.from_dict(
        {"image": [encoded(picture(0)), encoded(PIL.Image.new("1", (5000, 1)))], "label": ["cat", "dog"]}
    )
    processor = make_image_processor(224)
    with pytest.raises(ValueError, match="row 1, column 'image', cannot be read: .*too long and thin.*on_bad_image="):
        LabelledImages(dataset, processor)[1]
    with caplog.at_level(logging.WARNING):
        assert LabelledImages(dataset, processor, on_bad_image="skip").skipped == [1]


def test_original_views(processor):
    dataset, processor = image_dataset(), make_image_processor(12)  # 37 x 29 becomes 15 x 12; half of 3 rounds to 2
    own, original = LabelledImages(dataset, processor), LabelledImages(dataset, processor, original=True)
    assert torch.equal(original.view(4), eval_transform(processor, original=True)(picture(4)))
    assert not torch.allclose(original.view(4), own.view(4), atol=1e-3)
    assert torch.equal(original.view(4, 0), own.view(4, 0)) and own.preprocessing_key() != original.preprocessing_key()


def test_naflex_items_and_batches():
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=12)
    images = LabelledImages(image_dataset(4), processor, augment=True)
    assert set(images.view(1)) == {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
    item = images[2]
    assert item["labels"] == 2 and torch.equal(item["pixel_values"], images.view(2, 0)["pixel_values"])
    batch = next(iter(DataLoader(images, batch_size=4, collate_fn=collate, num_workers=1)))
    assert batch["pixel_values"].shape == (4, 12, 192) and batch["labels"].tolist() == [0, 1, 2, 0]
    for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes"):
        assert torch.equal(batch[name], torch.stack([images[i][name] for i in range(4)]))
    assert not batch["spatial_shapes"].is_floating_point()
    other = LabelledImages(image_dataset(4), Siglip2ImageProcessor(patch_size=8, max_num_patches=16))
    assert other.view_key(0, 0) != images.view_key(0, 0) and other.preprocessing_key() != images.preprocessing_key()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_column": "photo"}, "no column 'photo'; it has 'image', 'label', 'note'.*`image_column=`"),
        ({"label_column": "class"}, "no column 'class'.*`label_column=`"),
        (
            {"image_column": "label"},
            r"'label' holds ClassLabel.*is not an image.*\(columns with a datasets.Image: 'image'\)",
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
