"""The emoji images and the small model that come with the repository, and their loader."""

import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Image, Value
from PIL import Image as PILImage
from transformers import AutoProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from coop_hf.baselines import read_prompts
from coop_hf.demo import emoji as embedded
from coop_hf.demo.emoji import EMOJI_SPLITS, EMOJI_STYLES, emoji_cupl_path, emoji_model_path, load_emoji


FOLDER = Path(embedded.__file__).resolve().parents[2] / "examples" / "emoji"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="examples/emoji is in the repository only")

CLASSES = [
    "smiley face", "heart", "hand", "person", "mammal", "plant", "fruit or vegetable", "meal", "building", "vehicle",
    "clock", "clothing", "weather", "sport", "tool", "sign", "media button", "letter button", "colored shape",
    "electronic device",
]  # fmt: skip
COUNTS = {
    "fluent-flat": (448, 117, 267),
    "fluent": (448, 117, 267),
    "fluent-hc": (448, 116, 266),
    "emojione": (332, 91, 198),
    "noto": (448, 117, 267),
    "twemoji": (448, 117, 267),
}
# Chance is 0.05 on 20 classes.
FLOORS = {"fluent-flat": 0.25, "fluent": 0.25, "emojione": 0.2, "noto": 0.3, "twemoji": 0.22}


@pytest.fixture(scope="module")
def emoji():
    return {style: load_emoji(style) for style in EMOJI_STYLES}


@pytest.fixture(scope="module")
def model():
    return CLIPModel.from_pretrained(emoji_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return CLIPProcessor.from_pretrained(emoji_model_path())


def test_counts_and_features(emoji):
    assert tuple(emoji) == tuple(COUNTS) == EMOJI_STYLES
    for style, parts in emoji.items():
        assert tuple(parts) == EMOJI_SPLITS
        assert tuple(len(part) for part in parts.values()) == COUNTS[style]
        for split, part in parts.items():
            assert part.features == {
                "image": Image(),
                "label": ClassLabel(names=CLASSES),
                "name": Value("string"),
                "style": Value("string"),
            }
            assert set(part["style"]) == {style}
            assert str(part.split) == split


def test_every_class_is_in_every_split_and_sixteen_shots_can_be_drawn(emoji):
    for style, parts in emoji.items():
        for part in parts.values():
            assert set(part["label"]) == set(range(20)), style
    for style in ("fluent-flat", "fluent", "fluent-hc", "noto", "twemoji"):
        assert min(Counter(emoji[style]["train"]["label"]).values()) >= 16, style


def test_splits_share_no_emoji_in_any_style_pair(emoji):
    names = {split: set() for split in EMOJI_SPLITS}
    for parts in emoji.values():
        for split, part in parts.items():
            assert len(set(part["name"])) == len(part)
            names[split] |= set(part["name"])
    assert not names["train"] & names["validation"]
    assert not names["train"] & names["test"]
    assert not names["validation"] & names["test"]


def test_no_held_out_image_is_a_training_image(emoji):
    def pictures(split):
        found = {}
        for style, parts in emoji.items():
            for row in parts[split].with_format("arrow").to_dict()["image"]:
                found[np.asarray(PILImage.open(io.BytesIO(row["bytes"]))).tobytes()] = style
        return found

    seen = pictures("train")
    assert not seen.keys() & pictures("test").keys()
    assert not seen.keys() & pictures("validation").keys()


def test_images_are_square_rgb_on_white(emoji):
    for parts in emoji.values():
        for part in parts.values():
            image = part[0]["image"]
            assert image.mode == "RGB"
            assert image.size == (64, 64)
    corners = [np.asarray(row["image"])[0, 0] for row in emoji["fluent-flat"]["test"]]
    assert np.mean([(corner == 255).all() for corner in corners]) > 0.9


def test_same_emoji_has_the_same_label_in_all_styles(emoji):
    labels = {}
    for parts in emoji.values():
        for part in parts.values():
            for name, label in zip(part["name"], part["label"], strict=True):
                assert labels.setdefault(name, label) == label


def test_loader_is_deterministic_and_writes_nothing(emoji, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    again = load_emoji("fluent-flat")
    assert again["test"].to_dict() == emoji["fluent-flat"]["test"].to_dict()
    assert again["test"].cache_files == []
    assert list(tmp_path.iterdir()) == []


def test_default_style_is_fluent_flat():
    assert set(load_emoji()["validation"]["style"]) == {"fluent-flat"}


def test_unknown_style_names_the_styles():
    with pytest.raises(ValueError, match=r"no emoji style 'wingdings'.*'fluent-flat'.*'twemoji'"):
        load_emoji("wingdings")


def test_missing_folder_says_where_the_images_are(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"not with the wheel. Clone"):
        load_emoji()
    with pytest.raises(FileNotFoundError, match=r"not with the wheel. Clone"):
        emoji_model_path()


def test_files_stay_small():
    def megabytes(folder):
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6

    assert megabytes(FOLDER / "data") <= 10
    assert megabytes(FOLDER / "model") <= 20


def test_model_is_stored_in_half_and_runs_in_single_precision(model):
    from safetensors import safe_open

    with safe_open(os.path.join(emoji_model_path(), "model.safetensors"), "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys() if "position_ids" not in key} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in CLIPModel.from_pretrained(emoji_model_path()).parameters()} == {torch.float32}


def test_config_has_a_real_end_token_and_room_for_sixteen_context_tokens(model, processor):
    text, tokenizer = model.config.text_config, processor.tokenizer
    assert text.eos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert text.eos_token_id != 2
    assert text.bos_token_id == tokenizer.bos_token_id
    longest = max(len(tokenizer(f"{name}.", add_special_tokens=False).input_ids) for name in CLASSES)
    assert 1 + 16 + longest + 1 <= text.max_position_embeddings == tokenizer.model_max_length


def test_tokenizer_is_cased_as_clip_and_round_trips(processor):
    tokenizer = CLIPTokenizer.from_pretrained(emoji_model_path())
    ids = tokenizer("A Photo of a FOX.").input_ids
    assert ids == tokenizer("a photo  of a fox.").input_ids == processor.tokenizer("a photo of a fox .").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert all(
        token.endswith("</w>") for token in tokenizer.convert_ids_to_tokens(tokenizer("fox dog").input_ids[1:-1])
    )
    text = "ÿ€ unseen wörds 123!"
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]


def test_processor_reproduces_the_pixels_of_pre_training(emoji, processor):
    """Both shrink with the same bicubic filter; Pillow cuts overshoot at sharp edges after each of its two passes."""
    images = [row["image"] for style in EMOJI_STYLES for row in emoji[style]["validation"].select(range(0, 90, 9))]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    whole = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float()
    shrunk = torch.nn.functional.interpolate(whole, size=(48, 48), mode="bicubic", antialias=True)
    expected = (shrunk.clamp(0, 255).round() / 255 - 0.5) / 0.5
    assert pixels.shape == (60, 3, 48, 48)
    gray_levels = (pixels - expected).abs() * 255 / 2
    assert gray_levels.mean() <= 0.15
    assert (gray_levels > 1.5).float().mean() <= 0.02
    assert gray_levels.max() <= 16


def test_auto_processor_is_the_same(emoji, processor):
    auto = AutoProcessor.from_pretrained(emoji_model_path())
    image = emoji["noto"]["test"][0]["image"]
    assert type(auto) is CLIPProcessor
    torch.testing.assert_close(
        auto(images=image, return_tensors="pt")["pixel_values"],
        processor(images=image, return_tensors="pt")["pixel_values"],
        atol=0,
        rtol=0,
    )
    assert auto.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert auto.tokenizer("an emoji of a fox.").input_ids == processor.tokenizer("an emoji of a fox.").input_ids


@torch.no_grad()
def test_zero_shot_beats_chance_by_far(emoji, model, processor):
    for style, at_least in FLOORS.items():
        part = emoji[style]["test"]
        inputs = processor(
            text=[f"an emoji of a {name}." for name in CLASSES],
            images=list(part["image"]),
            padding=True,
            return_tensors="pt",
        )
        predictions = model(**inputs).logits_per_image.argmax(1)
        accuracy = (predictions == torch.tensor(part["label"])).float().mean().item()
        assert accuracy >= at_least, (style, accuracy)


def test_cupl_sentences_fit_the_classes_and_the_tower():
    names = load_emoji()["train"].features["label"].names
    prompts = read_prompts(emoji_cupl_path(), names)
    assert sorted(prompts) == sorted(names)
    tokenizer = CLIPTokenizer.from_pretrained(emoji_model_path())
    for name, sentences in prompts.items():
        assert len(sentences) == len(set(sentences)) == 8, name
        assert max(len(ids) for ids in tokenizer(sentences)["input_ids"]) <= 48, name
