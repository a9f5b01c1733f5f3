"""CLIP-LoRA: PEFT's layers where the method wants them, trained by its recipe, on a copy of the base."""

import copy

import pytest
import torch
from conftest import COLOUR_NAMES, COLOUR_OPTIONS
from torch.nn import functional as F

from coop_hf.baselines.clip_lora import fit_clip_lora
from coop_hf.data.labelled_images import LabelledImages
from coop_hf.experiments.methods import METHODS
from coop_hf.experiments.tasks import draw_few_shot
from coop_hf.training.arguments import RECIPES


pytest.importorskip("peft")


@pytest.fixture(scope="module")
def images(model, splits):
    return LabelledImages(splits["train"], model.image_processor)


def reference(model, lora, pixels):
    """Logits of a stock model whose q, k and v were added to by hand: W + α/√r · B·A."""
    base = copy.deepcopy(model.get_base_model())
    weights = {name.removeprefix("base_model.model."): value for name, value in lora.state_dict().items()}
    changed = 0
    for name, module in base.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            a, b = (weights[f"{name}.lora_{part}.default.weight"] for part in "AB")
            assert a.shape[0] == b.shape[1] == 2
            module.weight.data += b @ a / 2**0.5
            changed += 1
    assert changed == 3 * (2 + 1) and sum("lora_" in name for name in weights) == 2 * changed
    tokens = model.tokenizer([f"a {name}." for name in COLOUR_NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        texts = F.normalize(base.get_text_features(**tokens).pooler_output, dim=-1)
        found = F.normalize(base.get_image_features(pixels).pooler_output, dim=-1)
    return base.logit_scale.exp() * found @ texts.T


def test_the_layers_are_those_of_the_method(model, images):
    before = {key: value.clone() for key, value in model.get_base_model().state_dict().items()}
    torch.manual_seed(3)
    lora = fit_clip_lora(model, images, "a {}.", 5, learning_rate=0.05, seed=1)
    after = model.get_base_model().state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())
    pixels = torch.stack([images[i]["pixel_values"] for i in range(4)])
    from coop_hf.baselines import class_embeddings, zero_shot_logits

    embeds = class_embeddings(lora, model.tokenizer, COLOUR_NAMES, "a {}.")
    found = zero_shot_logits(lora, embeds, pixels)
    expected = reference(model, lora, pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    own = zero_shot_logits(model, class_embeddings(model, None, COLOUR_NAMES, "a {}."), pixels)
    assert (found - own).abs().max() > 0.1
    torch.manual_seed(4)  # the seed given is what counts
    again = fit_clip_lora(model, images, "a {}.", 5, learning_rate=0.05, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), again.parameters()))
    with pytest.raises(ValueError, match="num_steps"):
        fit_clip_lora(model, images, "a {}.", 0)


def test_the_recipe(model, images, monkeypatch):
    """AdamW, 2e-4 and 1e-2, along a cosine to 1e-6."""
    seen = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            group = self.param_groups[0]
            seen.append((group["lr"], group["weight_decay"], len(group["params"])))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    fit_clip_lora(model, images, "a {}.", 4)
    cosine = [1e-6 + (2e-4 - 1e-6) * (1 + torch.cos(torch.tensor(torch.pi * k / 4)).item()) / 2 for k in range(4)]
    assert [lr for lr, *_ in seen] == pytest.approx(cosine) and {(d, n) for _, d, n in seen} == {(0.01, 18)}


def test_it_learns_in_a_protocol(model, task, monkeypatch):
    monkeypatch.setitem(RECIPES["fast"], "max_steps", 30)
    steps = []
    from coop_hf.experiments import methods

    def quick(*args, **kwargs):
        steps.append(args[3])
        return fit_clip_lora(*args, **{**kwargs, "learning_rate": 0.02})

    monkeypatch.setattr(methods, "fit_clip_lora", quick)
    few = draw_few_shot(task, 4, seed=1, with_images=True)
    predict = METHODS["clip_lora"].fit(model, few, COLOUR_OPTIONS)
    assert steps == [30] and predict.learned_values == sum(
        2 * (m.in_features + m.out_features)
        for n, m in model.get_base_model().named_modules()
        if n.endswith(("q_proj", "k_proj", "v_proj"))
    )
    embeds, labels = task.parts["test"]
    zero_shot = METHODS["zero_shot"].fit(model, None, COLOUR_OPTIONS)(embeds, COLOUR_NAMES)
    loss = F.cross_entropy(predict(task.views["test"], COLOUR_NAMES), labels)
    assert loss < F.cross_entropy(zero_shot, labels) - 0.2
    assert predict(task.views["test"], ["dog", "sea"]).shape == (48, 2)
