import logging
import multiprocessing
import os

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from family_kit import FAMILIES, family_images, fresh_family, make_family
from safetensors import safe_open
from torch.nn import functional as F
from torch.utils.data import DataLoader

from coop_hf import (
    CoOpModel,
    CoOpTrainer,
    CoOpTrainingArguments,
    EmbeddedImages,
    LabelledImages,
    embed_images,
)
from coop_hf.data.feature_cache import FeatureCache, default_cache_dir
from coop_hf.data.few_shot import check_labels
from coop_hf.data.transforms import train_transform


@pytest.fixture(scope="module")
def model(base, processor):
    return CoOpModel(base, class_names=["a", "b", "c"], processor=processor)


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    images = [PIL.Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict({"image": images, "label": [i % 3 for i in range(count)]}, features=features)


def labelled(dataset, processor, **kwargs):
    return LabelledImages(dataset, processor, **kwargs)


@pytest.fixture
def counted(model, monkeypatch):
    """Counts the images that go through the image tower."""
    seen = []
    real = model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda pixels: (seen.append(len(pixels)), real(pixels))[1])
    return seen


def direct(model, images, view=None):
    pixels = torch.stack([images.view(i, view) for i in range(len(images))])
    with torch.no_grad():
        return model.get_image_features(pixels)


def test_plain_views_are_what_the_image_tower_gives(model, processor, tmp_path):
    images = labelled(pictures(7), processor)
    embeddings = embed_images(model, images, cache_dir=tmp_path, batch_size=3, progress=False)
    assert embeddings.shape == (1, 7, 24) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings[0], direct(model, images), rtol=1e-5, atol=1e-6)


def test_a_tower_on_a_cpu_takes_few_images_at_a_time(model, processor, tmp_path, counted):
    images = labelled(pictures(37), processor)
    embeddings = embed_images(model, images, cache_dir=tmp_path, progress=False)
    assert counted == [16, 16, 5]
    assert torch.allclose(embeddings[0], direct(model, images), atol=1e-5)


def test_augmented_views_are_those_of_the_epochs(model, processor, tmp_path):
    images = labelled(pictures(5), processor, augment=True, seed=3)
    embeddings = embed_images(model, images, num_views=4, cache_dir=tmp_path, batch_size=3, progress=False)
    assert embeddings.shape == (4, 5, 24)
    for epoch in range(4):
        images.set_epoch(epoch)
        pixels = torch.stack([images[i]["pixel_values"] for i in range(5)])
        with torch.no_grad():
            expected = model.get_image_features(pixels)
        torch.testing.assert_close(embeddings[epoch], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-3)


def test_a_second_run_computes_nothing_and_gives_the_same_bits(model, processor, tmp_path, counted):
    first = embed_images(model, labelled(pictures(7), processor), cache_dir=tmp_path, progress=False)
    assert sum(counted) == 7
    second = embed_images(model, labelled(pictures(7), processor), cache_dir=tmp_path, progress=False)
    assert sum(counted) == 7
    assert torch.equal(first, second)


def test_images_are_known_by_content_not_by_data_set(model, processor, tmp_path, counted):
    whole = pictures(9)
    embed_images(model, labelled(whole, processor), cache_dir=tmp_path, progress=False)
    part = embed_images(model, labelled(whole.select([8, 2, 5]), processor), cache_dir=tmp_path, progress=False)
    assert sum(counted) == 9  # another selection, another order: all were there
    torch.testing.assert_close(part[0], direct(model, labelled(whole, processor))[[8, 2, 5]], rtol=1e-5, atol=1e-6)


def test_what_changes_the_embedding_changes_the_key(model, base, processor, image_processor, tmp_path, counted):
    images = pictures(3)
    embed_images(model, labelled(images, processor), cache_dir=tmp_path, progress=False)
    embed_images(model, labelled(images, processor), num_views=1, cache_dir=tmp_path, progress=False)  # a view
    assert sum(counted) == 6
    embed_images(model, labelled(images, processor, seed=1), num_views=1, cache_dir=tmp_path, progress=False)
    assert sum(counted) == 9  # another seed of the views
    other = type(image_processor)(**{**image_processor.to_dict(), "image_mean": [0.1, 0.2, 0.3]})
    embed_images(model, labelled(images, other), cache_dir=tmp_path, progress=False)
    assert sum(counted) == 12  # other preprocessing
    with torch.no_grad():
        base.visual_projection.weight[0, 0] += 1
    try:
        embed_images(model, labelled(images, processor), cache_dir=tmp_path, progress=False)
        assert sum(counted) == 15  # other weights
    finally:
        with torch.no_grad():
            base.visual_projection.weight[0, 0] -= 1


def test_other_augmentations_are_not_mixed_up(model, processor, tmp_path, counted):
    images = pictures(2)
    for transform in (None, train_transform(processor, flip=False), lambda image, rng: torch.zeros(3, 16, 16)):
        embed_images(
            model, labelled(images, processor, transform=transform), num_views=1, cache_dir=tmp_path, progress=False
        )
    assert sum(counted) == 6


def test_interrupted_it_goes_on(model, processor, tmp_path, monkeypatch, counted):
    monkeypatch.setattr("coop_hf.data.feature_cache._FILE_ROWS", 4)
    images = labelled(pictures(10), processor)
    real = FeatureCache.add

    def stop_at_third(self, ids, features):
        if len(os.listdir(self.folder) if os.path.isdir(self.folder) else []) == 2:
            raise KeyboardInterrupt
        real(self, ids, features)

    monkeypatch.setattr(FeatureCache, "add", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        embed_images(model, images, cache_dir=tmp_path, batch_size=2, progress=False)
    monkeypatch.setattr(FeatureCache, "add", real)
    before = sum(counted)
    result = embed_images(model, images, cache_dir=tmp_path, batch_size=2, progress=False)
    assert sum(counted) - before == 2  # 8 were saved in two files
    torch.testing.assert_close(result[0], direct(model, images), rtol=1e-5, atol=1e-6)


def test_where_nothing_can_be_written_it_says_so_and_goes_on(model, processor, tmp_path, monkeypatch, caplog, counted):
    monkeypatch.setattr("coop_hf.data.feature_cache._FILE_ROWS", 4)
    (tmp_path / "features").write_text("a file where the cache wants a folder")
    images = labelled(pictures(10), processor)
    result = embed_images(model, images, cache_dir=tmp_path, batch_size=2, progress=False)
    torch.testing.assert_close(result[0], direct(model, images), rtol=1e-5, atol=1e-6)
    assert len([r for r in caplog.records if "cannot be kept" in r.message and "COOP_HF_CACHE" in r.message]) == 1
    before = sum(counted)
    assert torch.equal(embed_images(model, images, cache_dir=tmp_path, batch_size=2, progress=False), result)
    assert sum(counted) - before == 10


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "garbage", "empty"])
def test_damaged_it_says_so_and_is_rebuilt(model, processor, tmp_path, caplog, damage):
    images = labelled(pictures(4), processor)
    good = embed_images(model, images, cache_dir=tmp_path, progress=False)
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-10]
    elif damage == "flipped bit":
        content[-5] ^= 1
    else:
        content = b"" if damage == "empty" else os.urandom(len(content))
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = embed_images(model, images, cache_dir=tmp_path, progress=False)
    assert torch.equal(good, again)
    assert "damaged" in caplog.text and str(path) in caplog.text


def test_a_file_that_is_removed_while_it_is_read_does_no_harm(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("coop_hf.data.feature_cache._FILE_ROWS", 4)
    images = labelled(pictures(10), processor)
    good = embed_images(model, images, cache_dir=tmp_path, batch_size=2, progress=False)
    real = FeatureCache.get

    def clear_first(self, ids):
        for path in sorted(tmp_path.rglob("*.safetensors"))[:2]:
            path.unlink()
        return real(self, ids)

    monkeypatch.setattr(FeatureCache, "get", clear_first)
    again = embed_images(model, images, cache_dir=tmp_path, batch_size=2, progress=False)
    assert torch.equal(again, good)


def test_a_row_that_is_damaged_after_the_file_was_opened_is_computed_again(
    model, processor, tmp_path, monkeypatch, caplog
):
    images = labelled(pictures(10), processor)
    good = embed_images(model, images, cache_dir=tmp_path, batch_size=2, progress=False)
    monkeypatch.setattr("coop_hf.data.feature_cache._SAMPLED_ROWS", 2)
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4  # neither in the first nor in the last row
    path.write_bytes(content)
    again = embed_images(model, images, cache_dir=tmp_path, batch_size=2, progress=False)
    torch.testing.assert_close(again, good, rtol=1e-5, atol=1e-6)
    assert "damaged (checksum does not fit)" in caplog.text and not path.exists()


@pytest.fixture
def mapped(monkeypatch):
    """Every set gets a file of its own, put together from pieces of four."""
    monkeypatch.setattr("coop_hf.data.feature_cache._MAPPED_BYTES", 1)
    monkeypatch.setattr("coop_hf.data.feature_cache._FILE_ROWS", 4)


@pytest.mark.parametrize("views", [None, 3])
def test_a_large_set_is_one_file_that_a_second_run_only_maps(
    model, processor, tmp_path, mapped, monkeypatch, counted, views
):
    data = pictures(10)
    first = embed_images(model, labelled(data, processor), views, cache_dir=tmp_path, batch_size=3, progress=False)
    (path,) = tmp_path.rglob("*.safetensors")  # the pieces are gone
    assert path.name.startswith("set-") and sum(counted) == 10 * (views or 1)
    with safe_open(path, framework="pt") as file:  # an ordinary safetensors file
        assert torch.equal(file.get_tensor("features"), first.flatten(0, 1))
    for view in range(views or 1):
        expected = direct(model, labelled(data, processor), None if views is None else view)
        torch.testing.assert_close(first[view], expected, rtol=1e-5, atol=1e-6)
    before = sum(counted)
    for name in ("content_keys", "view_key", "view"):  # nothing is read, image by image
        monkeypatch.delattr(LabelledImages, name)
    second = embed_images(model, labelled(data, processor), views, cache_dir=tmp_path, progress=False)
    assert torch.equal(first, second) and sum(counted) == before


def test_what_is_in_the_file_of_a_large_set_serves_others(model, processor, tmp_path, mapped, counted):
    data = pictures(10)
    whole = embed_images(model, labelled(data, processor), cache_dir=tmp_path, progress=False)
    part = embed_images(model, labelled(data.select([7, 0, 7, 3]), processor), cache_dir=tmp_path, progress=False)
    assert torch.equal(part[0], whole[0, [7, 0, 7, 3]]) and sum(counted) == 10
    more = datasets.concatenate_datasets([data, pictures(3, seed=5)])
    embed_images(model, labelled(more, processor), cache_dir=tmp_path, progress=False)
    assert sum(counted) == 13


def test_the_same_images_in_another_data_set_are_mapped_without_another_file(model, processor, tmp_path, mapped):
    data, first = pictures(10), None
    for other in (data, data.map(lambda row: {"more": 1}), data.select(range(10))):
        embeds = embed_images(model, labelled(other, processor), cache_dir=tmp_path, batch_size=3, progress=False)
        assert first is None or torch.equal(embeds, first)
        first = embeds
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_what_is_no_labelled_images_becomes_one(model, processor, tmp_path):
    data = pictures(4)
    rows = [(data[i]["image"], data[i]["label"]) for i in range(4)]
    expected = embed_images(model, labelled(data, processor), cache_dir=tmp_path, progress=False)
    for given in (data, data.to_iterable_dataset(), rows, iter(rows)):
        assert torch.equal(embed_images(model, given, cache_dir=tmp_path, progress=False), expected)


def test_a_damaged_file_of_a_large_set_is_made_again(model, processor, tmp_path, mapped, caplog, counted):
    images = labelled(pictures(10), processor)
    good = embed_images(model, images, cache_dir=tmp_path, batch_size=2, progress=False).clone()
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    again = embed_images(model, images, cache_dir=tmp_path, batch_size=2, progress=False)
    assert torch.equal(good, again) and "damaged" in caplog.text and sum(counted) == 20


def test_a_large_set_of_files_follows_their_changes(model, processor, tmp_path, mapped, counted):
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    for path, image in zip(paths, pictures(4)["image"]):
        image.save(path)
    dataset = datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 2, 0]})
    for data in (dataset, dataset.cast_column("image", datasets.Image())):
        embed_images(model, labelled(data, processor, class_names=["a", "b", "c"]), cache_dir=tmp_path, progress=False)
    assert sum(counted) == 4
    PIL.Image.new("RGB", (20, 20), "blue").save(paths[2])
    embed_images(model, labelled(data, processor, class_names=["a", "b", "c"]), cache_dir=tmp_path, progress=False)
    assert sum(counted) == 5


def test_a_large_set_without_room_is_kept_in_memory(model, processor, tmp_path, mapped, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coop_hf.data.feature_cache._header", refuse)
    images = labelled(pictures(10), processor)
    result = embed_images(model, images, cache_dir=tmp_path, batch_size=2, progress=False)
    torch.testing.assert_close(result[0], direct(model, images), rtol=1e-5, atol=1e-6)
    assert "No space left" in caplog.text and not list(tmp_path.rglob("*set-*"))


def test_skipped_images_and_other_augmentations_have_other_files(model, processor, tmp_path, mapped):
    data = pictures(4)
    keys = [labelled(data, processor).set_key(views) for views in (None, 1, 2)]
    keys += [labelled(data, processor, seed=1).set_key(1), labelled(data.select([1, 0, 2, 3]), processor).set_key()]
    keys.append(labelled(data, processor, transform=train_transform(processor, flip=False)).set_key(1))
    skipping = labelled(data, processor)
    skipping.rows, skipping.skipped = skipping.rows[1:], [0]
    keys.append(skipping.set_key())
    assert len(set(keys)) == 7 and labelled(pictures(4), processor).set_key() == keys[0]


def test_workers_give_the_same_bits_and_start_by_themselves(model, processor, tmp_path, monkeypatch):
    images = labelled(pictures(6), processor)
    alone = embed_images(model, images, cache_dir=tmp_path / "a", num_workers=0, batch_size=2, progress=False)
    asked = []

    def loader(*args, num_workers, **kwargs):
        asked.append(num_workers)
        return DataLoader(*args, num_workers=num_workers, **kwargs)

    monkeypatch.setattr("coop_hf.data.feature_cache.DataLoader", loader)
    embed_images(model, images, cache_dir=tmp_path / "b", batch_size=2, progress=False)
    monkeypatch.setattr("coop_hf.data.feature_cache._IMAGES_FOR_WORKERS", 6)
    monkeypatch.setattr("coop_hf.data.feature_cache._cores", lambda: 2)
    workers = embed_images(model, images, cache_dir=tmp_path / "c", batch_size=2, progress=False)
    assert asked == [0, 2 if multiprocessing.get_start_method() == "fork" else 0] and torch.equal(alone, workers)


def test_what_is_not_finite_is_never_kept(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "get_image_features", lambda pixels: torch.full((len(pixels), 24), torch.nan))
    with pytest.raises(ValueError, match="NaN or infinite"):
        embed_images(model, labelled(pictures(3), processor), cache_dir=tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_training_on_a_mapped_set_is_training_on_the_same_in_memory(base, processor, tmp_path, mapped):
    contexts = []
    for _ in range(2):  # the second run maps what the first one put together
        torch.manual_seed(0)
        model = CoOpModel(base, class_names=["a", "b", "c"], processor=processor)
        args = CoOpTrainingArguments(tmp_path, feature_cache_dir=str(tmp_path), max_steps=3, save_strategy="no")
        CoOpTrainer(model, args, pictures(9)).train()
        contexts.append(model.context.detach())
    embeds = direct(model, labelled(pictures(9), processor))
    torch.manual_seed(0)
    model = CoOpModel(base, class_names=["a", "b", "c"], processor=processor)
    args = CoOpTrainingArguments(tmp_path, max_steps=3, save_strategy="no")
    CoOpTrainer(model, args, EmbeddedImages(embeds, [i % 3 for i in range(9)])).train()
    assert torch.equal(contexts[0], contexts[1])
    torch.testing.assert_close(contexts[0], model.context.detach(), rtol=1e-4, atol=1e-5)


def test_processors_of_different_kinds_are_not_mixed_up(model, image_processor, tmp_path, counted):
    images = pictures(3)
    other = type("CLIPImageProcessor", (type(image_processor),), {})(**image_processor.to_dict())  # another backend
    assert other.to_json_string() == image_processor.to_json_string()
    for kind in (image_processor, other):
        embed_images(model, labelled(images, kind), cache_dir=tmp_path, progress=False)
    embed_images(model, labelled(images, image_processor, original=True), cache_dir=tmp_path, progress=False)
    assert sum(counted) == 9


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_embedded_as_by_itself(name, tmp_path):
    base, processor = make_family(name)
    model = CoOpModel(base, class_names=["a", "b", "c"], processor=processor)
    data = pictures(5)
    embeddings = embed_images(model, labelled(data, processor), cache_dir=tmp_path, batch_size=2, progress=False)
    own = family_images(base, processor, data["image"][:])
    torch.testing.assert_close(F.normalize(embeddings[0], dim=-1), F.normalize(own, dim=-1), rtol=1e-5, atol=1e-5)
    views = embed_images(model, labelled(data, processor), 2, cache_dir=tmp_path, batch_size=2, progress=False)
    assert views.shape == (2, 5, model.family.projection_dim) and not torch.allclose(views[0], views[1])


def test_naflex_images_are_embedded_with_their_masks(tmp_path):
    base, processor = fresh_family("siglip2_naflex")
    model = CoOpModel(base, class_names=["a", "b", "c"], processor=processor)
    noise = PIL.Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 60, 3), np.uint8))
    data = [noise.crop((0, 0, width, 20)) for width in (12, 32, 60)]
    images = LabelledImages([(image, "abc"[i]) for i, image in enumerate(data)], processor)
    embeddings = embed_images(model, images, cache_dir=tmp_path, batch_size=3, progress=False)
    with torch.no_grad():  # one by one, without anything that is padded
        for index in range(3):
            made = images.view(index)
            assert made["pixel_attention_mask"].sum() == made["spatial_shapes"].prod()
            alone = model.get_image_features(**{key: value[None] for key, value in made.items() if key != "labels"})
            torch.testing.assert_close(embeddings[0, index], alone[0], rtol=1e-5, atol=1e-5)
    assert len({tuple(images.view(index)["spatial_shapes"].tolist()) for index in range(3)}) == 3


def test_a_changed_file_is_computed_again(model, processor, tmp_path, counted):
    path = tmp_path / "image.png"
    PIL.Image.new("RGB", (20, 20), "red").save(path)
    dataset = datasets.Dataset.from_dict({"image": [str(path)], "label": [0]}).cast_column("image", datasets.Image())
    images = LabelledImages(dataset, processor, class_names=["a", "b", "c"])
    red = embed_images(model, images, cache_dir=tmp_path / "cache", progress=False)
    PIL.Image.new("RGB", (20, 20), "blue").save(path)
    os.utime(path, ns=(1, 1))
    blue = embed_images(model, images, cache_dir=tmp_path / "cache", progress=False)
    assert sum(counted) == 2 and not torch.equal(red, blue)


def test_shares_of_several_processes_make_the_whole(model, processor, tmp_path, counted):
    images = labelled(pictures(7), processor)
    embed_images(model, images, cache_dir=tmp_path, process_index=1, num_processes=2, progress=False)
    first_share = sum(counted)
    whole = embed_images(model, images, cache_dir=tmp_path, process_index=0, num_processes=2, progress=False)
    torch.testing.assert_close(whole[0], direct(model, images), rtol=1e-5, atol=1e-6)
    assert first_share == 7  # nobody else was there, so the rest was computed too
    assert sum(counted) == 7 + 7  # the comparison's own pass


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path))
    assert default_cache_dir() == str(tmp_path)


def test_embedded_images_take_views_in_turn():
    embeddings = torch.arange(2 * 3 * 4).float().view(2, 3, 4)
    data = EmbeddedImages(embeddings, [2, 0, 1])
    assert len(data) == 3
    for epoch in range(5):
        data.set_epoch(epoch)
        batch = data.__getitems__([2, 0])
        assert torch.equal(batch["image_embeds"], embeddings[epoch % 2][[2, 0]])
        assert batch["labels"].tolist() == [1, 2]
        assert torch.equal(data[1]["image_embeds"], embeddings[epoch % 2, 1])


def test_embedded_images_refuse_what_does_not_pair_up():
    with pytest.raises(ValueError, match="3 image embeddings and 2 labels"):
        EmbeddedImages(torch.zeros(3, 4), [0, 1])
    with pytest.raises(ValueError, match=r"Image 1 has the label -1, but labels go from 0 \(1 of 3 are outside\)"):
        EmbeddedImages(torch.zeros(3, 4), [0, -1, 2])
    with pytest.raises(ValueError, match=r"whole numbers \(num_images,\), got float64"):
        EmbeddedImages(torch.zeros(2, 4), [0.5, 1.0])
    assert EmbeddedImages(torch.zeros(2, 4), [-100, 1]).labels.tolist() == [-100, 1]  # not labelled
    with pytest.raises(ValueError, match="Item 1 has the label 3, but there are 3 classes, so labels go from 0 to 2"):
        check_labels(np.array([0, 3]), 3)
    with pytest.raises(ValueError, match="NaN or infinite"):
        EmbeddedImages(torch.full((2, 4), torch.nan), [0, 1])
