"""The default recipe beside the paper's, on embeddings by OpenAI's ViT-B/32 and a stand-in for its text tower."""

import numpy as np
import pytest
import torch
from conftest import SHARED
from transformers import CLIPModel

from coop_hf import CoOpConfig, CoOpModel, CoOpTrainer, CoOpTrainingArguments, EmbeddedImages


def read_sets(names):
    """As of `read_set`, the classes of several sets as those of one."""
    sets = [read_set(name) for name in names]
    first = np.cumsum([0, *(len(class_names) for class_names, _, _ in sets)])
    parts = []
    for part in (1, 2):
        embeds = np.concatenate([one[part][0] for one in sets])
        parts.append((embeds, np.concatenate([one[part][1] + start for one, start in zip(sets, first)])))
    return [name for one in sets for name in one[0]], *parts


def read_set(name):
    """Class names, training images by class, and the validation images that had no part in the stand-in's making."""
    file = np.load(SHARED / "clip_vit_b32_features" / f"{name}_openai_clip_vitb32_image.npz")
    labels, held = file["val_labels"], np.zeros(len(file["val_labels"]), dtype=bool)
    for c in range(len(file["classnames"])):
        held[np.flatnonzero(labels == c)[1::2]] = True
    val = (file["val_features"][held], labels[held])
    return [str(name) for name in file["classnames"]], (file["train_features"], file["train_labels"]), val


def accuracy(model, embeds, labels):
    with torch.no_grad():
        guess = model(image_embeds=torch.from_numpy(embeds).float()).logits.argmax(dim=1)
    return 100 * (guess.numpy() == labels).mean()


APART, TOGETHER = [["dtd"], ["oxford_pets"]], [["dtd", "oxford_pets"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, shots, seeds, sets",
    [
        ({}, 1, (1, 2), APART),
        ({"class_specific": True}, 1, (1,), APART),
        ({"ctx_init": "a photo of a"}, 4, (1, 2), APART),
        ({"ctx_init": "a photo of a"}, 1, (1, 2), TOGETHER),
    ],
    ids=["unified", "class-specific", "words", "84 classes"],
)
def test_the_default_is_as_good_as_the_papers_recipe_at_few_shots(
    tmp_path, real_tokenizer, config, shots, seeds, sets
):
    if not (SHARED / "student_clip").is_dir():
        pytest.skip("no stand-in for CLIP's text tower in ../shared/data/student_clip")
    base = CLIPModel.from_pretrained(SHARED / "student_clip", dtype=torch.bfloat16)
    found = {"fast": [], "paper": [], "untrained": []}
    for group in sets:
        names, (embeds, labels), (val_embeds, val_labels) = read_sets(group)
        for seed in seeds:
            random = np.random.default_rng(seed)
            order = np.array([random.permutation(np.flatnonzero(labels == c)) for c in range(len(names))])
            drawn, rest = order[:, :shots].ravel(), order[:, shots:].ravel()
            held = np.concatenate([val_embeds, embeds[rest]]), np.concatenate([val_labels, labels[rest]])
            for recipe in ("fast", "paper"):
                torch.manual_seed(seed)
                model = CoOpModel(base, CoOpConfig(**config), names, real_tokenizer)
                if recipe == "fast":
                    found["untrained"].append(accuracy(model, *held))
                args = CoOpTrainingArguments(
                    str(tmp_path), recipe=recipe, seed=seed, save_strategy="no", disable_tqdm=True, use_cpu=True
                )
                train = EmbeddedImages(torch.from_numpy(embeds[drawn]).float(), labels[drawn].tolist())
                CoOpTrainer(model, args, train_dataset=train).train()
                found[recipe].append(accuracy(model, *held))
    fast, paper, untrained = (np.mean(found[name]) for name in ("fast", "paper", "untrained"))
    assert fast > paper - 0.7 and fast > untrained + 3, found
