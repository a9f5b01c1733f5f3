"""Images and data sets as people have them: each way in gives what the plainest way gives."""

import functools
import http.server
import io
import logging
import threading

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import encoded, picture
from test_trainer import NAMES, arguments, make_model, pictures, trained

from coop_hf import CoOpTrainer, LabelledImages, load_images
from coop_hf.data.inputs import image_files
from coop_hf.data.sources import as_dataset


@pytest.fixture(scope="module")
def model(base, processor):
    return make_model(base, processor)


@pytest.fixture(scope="module")
def expected(model):
    return model.predict([picture(i) for i in range(4)])


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert [guess["label"] for guess in one] == [guess["label"] for guess in other]
        np.testing.assert_allclose([g["score"] for g in one], [g["score"] for g in other], rtol=1e-4)


# What `predict` takes


def test_predict_takes_images_in_any_holder(model, expected, tmp_path):
    images, paths = [picture(i) for i in range(4)], [tmp_path / f"{i}.png" for i in range(4)]
    for image, path in zip(images, paths):
        image.save(path)
    arrays = [np.asarray(image) for image in images]
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 0]})
    files = datasets.Dataset.from_dict({"image": list(map(str, paths))}).cast_column("image", datasets.Image())
    pixels = model.image_processor(images=images, return_tensors="pt")
    for given in (
        images, tuple(images), iter(images), (image for image in images), paths, list(map(str, paths)), arrays,
        np.stack(arrays), torch.from_numpy(np.stack(arrays)), [encoded(image) for image in images], data["image"],
        data, files, data.to_iterable_dataset(), data.with_format("torch"), [(image, 1) for image in images],
        [{"image": image} for image in images], pixels, pixels["pixel_values"], list(pixels["pixel_values"]),
        LabelledImages(data, model.image_processor, class_names=NAMES),
    ):  # fmt: skip
        same(model.predict(given, batch_size=3), expected)
    for given in (
        images[2],
        str(paths[2]),
        paths[2],
        arrays[2],
        encoded(images[2]),
        data[2],
        pixels["pixel_values"][2],
    ):
        same([model.predict(given)], expected[2:3])
    same(model.predict(data.rename_column("image", "photo"), image_column="photo"), expected)


def test_predict_on_a_folder(model, expected, tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    places = ["a.png", "b/0.png", "b/deep/x.PNG", "c.png"]
    for index, place in enumerate(places):
        picture(index).save(tmp_path / place)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    picture(0).save(tmp_path / ".hidden" / "thumb.png")
    found = model.predict(tmp_path)
    assert list(found) == [str(tmp_path / place) for place in places] == image_files(tmp_path)
    same(list(found.values()), expected)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images.*empty"):
        model.predict(tmp_path / "empty")


def test_predict_on_an_address_and_only_on_one(model, expected, tmp_path, monkeypatch):
    picture(0).save(tmp_path / "0.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        same([model.predict(f"{url}/0.png")], expected[:1])
        same(model.predict([f"{url}/0.png", tmp_path / "0.png"]), expected[:1] * 2)
        with pytest.raises(ValueError, match=r"image 1 \('http.*/gone.png'\) cannot be read"):
            model.predict([picture(0), f"{url}/gone.png"])
        server.shutdown()
    with pytest.raises(ValueError, match=r"image 0 \('example.org/cat.jpg'\) cannot be read: .*No such file"):
        model.predict("example.org/cat.jpg")


def test_bad_images_are_told_or_left_out(model, expected, tmp_path, caplog):
    (tmp_path / "1.png").write_bytes(b"no image")
    picture(0).save(tmp_path / "0.png")
    picture(2).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match="image 1 .*1.png.*cannot be read"):
        model.predict(tmp_path)
    for batch_size in (1, 2, 3):
        found = model.predict(tmp_path, batch_size=batch_size, on_bad_image="skip")
        assert found[str(tmp_path / "1.png")] is None
        same([guesses for guesses in found.values() if guesses], [expected[0], expected[2]])
    given = [None, picture(3), b"", str(tmp_path / "gone.png")]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = model.predict((image for image in given), on_bad_image="skip")
    same(found[1:2], expected[3:])
    assert found[0] is found[2] is found[3] is None and "3 of 4 images cannot be read" in caplog.text
    assert model.predict(tmp_path / "1.png", on_bad_image="skip") is None
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"x", "path": None}, {"bytes": encoded(picture(1)), "path": None}]}
    )
    rows = rows.cast_column("image", datasets.Image())
    for data in (rows, rows.to_iterable_dataset()):
        found = model.predict(data, on_bad_image="skip")
        assert found[0] is None
        same(found[1:], expected[1:2])


def test_predict_refuses_what_holds_no_images(model):
    data = datasets.Dataset.from_dict({"photo": [picture(0)]})
    for given, error, message in (
        ([], ValueError, "is empty"),
        (iter([]), ValueError, "is empty"),
        (data, ValueError, "no column 'image'; it has 'photo'.*image_column"),
        (datasets.DatasetDict(test=data), TypeError, "one split of a data set.*DatasetDict"),
        (3, TypeError, "got int"),
        (np.ones((8, 8, 3)), ValueError, "integers from 0 to 255, got float64"),
    ):
        with pytest.raises(error, match=message):
            model.predict(given)
    with pytest.raises(ValueError, match="'raise' or 'skip', got 'ignore'"):
        model.predict(picture(0), on_bad_image="ignore")


def test_tuning_at_test_time_takes_the_same(model, tmp_path):
    picture(0).save(tmp_path / "0.png")
    options = {"num_views": 3}
    single = model.predict(picture(0), tpt=options)
    for given in (tmp_path, [tmp_path / "0.png", b"bad"], iter([picture(0)])):
        found = model.predict(given, tpt=options, on_bad_image="skip")
        same([next(iter(found.values())) if isinstance(found, dict) else found[0]], [single])


# Parts of a split


def test_parts_of_a_split_are_those_of_datasets(tmp_path):
    for split, count in (("train", 5), ("test", 3)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                picture(index).save(tmp_path / split / name / f"{index}.png")
    whole = load_images(tmp_path)
    paths = {split: part.cast_column("image", datasets.Image(decode=False)) for split, part in whole.items()}
    paths = {split: [image["path"] for image in part["image"]] for split, part in paths.items()}
    for split, expected in (
        ("train[:3]", paths["train"][:3]),
        ("train[-2:]", paths["train"][-2:]),
        ("train[80%:]", paths["train"][8:]),
        ("train[:10%]+test[5:]", paths["train"][:1] + paths["test"][5:]),
        ("test", paths["test"]),
    ):
        part = load_images(tmp_path, split=split)
        assert [
            image["path"] for image in part.cast_column("image", datasets.Image(decode=False))["image"]
        ] == expected
        assert part.features == whole["train"].features
    for split in ("val[:3]", "train[", "train[:x]"):
        with pytest.raises(ValueError, match=r"no split.*'test', 'train'|no split.*'train', 'test'"):
            load_images(tmp_path, split=split)


# Iterables


def test_encoded_images_stay_as_they_are_and_pixels_lose_nothing(tmp_path):
    file = io.BytesIO()
    picture(0).save(file, "JPEG", quality=60)
    jpeg = file.getvalue()
    pixels = PIL.Image.open(io.BytesIO(jpeg))  # knows that it was a JPEG, and must not be written as one again
    given = [(jpeg, 0), ({"bytes": jpeg, "path": None}, 1), (pixels, 0), (np.asarray(pixels), 1)]
    made = as_dataset(given)
    assert [made.cast_column("image", datasets.Image(decode=False))[i]["image"]["bytes"] for i in (0, 1)] == [jpeg] * 2
    for row in made:
        assert np.array_equal(np.asarray(row["image"]), np.asarray(pixels))
    assert as_dataset(iter(given))._fingerprint == made._fingerprint != as_dataset(given[:3])._fingerprint


def test_a_streamed_set_is_read_as_it_is_stored():
    file = io.BytesIO()
    picture(0).save(file, "JPEG", quality=60)
    data = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}], "label": [1]})
    data = data.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    made = as_dataset(data.to_iterable_dataset())
    assert made.features == data.features
    assert made.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"] == file.getvalue()


def test_training_and_evaluation_on_what_people_have(base, processor, tmp_path):
    data = pictures(12)
    rows = [{"image": row["image"], "label": row["label"]} for row in data]
    given = {"max_steps": 2, "seed": 3}
    expected = trained(make_model(base, processor), tmp_path, data, **given)
    ways = [rows, iter(rows), [(row["image"], row["label"]) for row in rows], data.to_iterable_dataset()]
    for way in ways:
        assert torch.equal(trained(make_model(base, processor), tmp_path, way, **given), expected)
    model = make_model(base, processor)
    metrics = CoOpTrainer(model, arguments(tmp_path), eval_dataset=data).evaluate()
    stream = CoOpTrainer(model, arguments(tmp_path), eval_dataset=data.to_iterable_dataset())
    assert stream.evaluate()["eval_loss"] == metrics["eval_loss"] == stream.evaluate()["eval_loss"]
    several = CoOpTrainer(model, arguments(tmp_path), eval_dataset={"a": rows, "b": data})
    assert several.evaluate()["eval_a_loss"] == metrics["eval_loss"]
    assert stream.evaluate(iter(rows))["eval_loss"] == metrics["eval_loss"]
