import logging
import os

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from family_kit import FAMILIES, family_images, fresh_family, make_family
from torch.nn import functional as F

from coop_hf import CoOpModel, EmbeddedImages, LabelledImages, embed_images
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


def test_a_file_that_is_removed_while_it_is_read_is_computed_again(model, processor, tmp_path, monkeypatch, caplog):
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
    torch.testing.assert_close(again, good, rtol=1e-5, atol=1e-6)
    assert caplog.text.count("went away") == 2


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
