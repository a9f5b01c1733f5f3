"""TPT against its reference, and what it leaves alone."""

import copy
import math

import numpy as np
import pytest
import reference_methods as ref
import torch
from conftest import make_image_processor, picture
from family_kit import fresh_family, make_family
from reference import relative_error
from transformers import CLIPProcessor

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.adapters.cocoop import CoCoOpConfig
from coop_hf.adapters.deep import MaPLeConfig
from coop_hf.adapters.heads import TaskResConfig
from coop_hf.adapters.tpt import _make_views, tpt
from coop_hf.core import shared_prefix
from coop_hf.data.transforms import eval_transform, train_transform


NAMES = ["cat", "Sea_lion", "kite (bird)", "photo of a sea dog at sea"]


@pytest.fixture(scope="module")
def deep_base(tokenizer):
    return ref.make_deep_base(tokenizer)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return CLIPProcessor(image_processor=make_image_processor(16), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def views():
    """Of three images; 25 views, of which 2 are kept."""
    return torch.randn(3, 25, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def make(base, processor, config=None, **options):
    torch.manual_seed(0)
    model = CoOpModel(base, config or CoOpConfig(n_ctx=4), NAMES, processor, **options)
    with torch.no_grad():
        model.context.mul_(25)
    return model


def references(model, views, **options):
    position = model.config.class_token_position
    return [
        ref.tpt(model.base_model, model.tokenizer, NAMES, own, model.context.detach(), position=position, **options)
        for own in views
    ]


def check(model, views):
    before = model.context.detach().clone()
    output, expected = tpt(model, views=views), references(model, views)
    assert output.logits.shape == (3, len(NAMES)) and output.context.shape == (3, 1, *before.shape)
    assert output.kept.tolist() == [e["kept"] for e in expected] and output.kept.shape[1] == 2
    for i, e in enumerate(expected):
        assert abs(output.loss[i].item() - e["loss"]) < 1e-5 * e["loss"]
        # The first step is nearly lr * sign(gradient): where a gradient is tiny, rounding decides.
        sure = e["gradient"].abs() > 1e-4 * e["gradient"].abs().max()
        assert sure.float().mean() > 0.99
        assert torch.allclose(output.context[i, 0][sure], e["context"][sure], atol=1e-6)
        assert relative_error(output.logits[i], e["logits"].detach()) < 1e-4
    assert torch.equal(model.context, before) and model.context.grad is None
    # With a large epsilon the step is the gradient itself.
    for i, e in enumerate(references(model, views, eps=1e3, lr=10.0, weight_decay=0.0)):
        tuned = tpt(model, views=views, adam_epsilon=1e3, learning_rate=10.0, weight_decay=0.0).context[i, 0]
        assert relative_error(tuned - before, -10.0 * e["gradient"] / (e["gradient"].abs() + 1e3)) < 1e-3
    return output


@pytest.mark.parametrize("text_pass", ["shared", "plain"])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_against_the_reference(deep_base, processor, views, position, text_pass):
    config = CoOpConfig(n_ctx=4, class_token_position=position)
    model = make(deep_base, processor, config, text_pass=text_pass)
    output = check(model, views)
    with torch.no_grad():
        plain = model(pixel_values=views[:, 0]).logits
    assert (output.logits - plain).abs().max() > 1e-3, "tuning changes something"
    assert any(0 not in kept for kept in output.kept.tolist()), "the image itself has no special right"


def test_the_context_of_each_image_is_its_own(deep_base, processor, views, monkeypatch):
    model = make(deep_base, processor)
    together = tpt(model, views=views)
    for i in range(3):
        alone = tpt(model, views=views[i : i + 1])
        assert torch.allclose(alone.logits[0], together.logits[i], atol=1e-4)
        assert torch.equal(alone.kept[0], together.kept[i])
    for chunked in (make(deep_base, processor, text_chunk_size=3), make(deep_base, processor, text_pass="plain")):
        assert torch.allclose(tpt(chunked, views=views).logits, together.logits, atol=1e-4)
    monkeypatch.setattr(shared_prefix, "TOKENS_KEPT", 50)
    monkeypatch.setattr("coop_hf.adapters.tpt._IMAGES_AT_ONCE", 2)
    assert torch.allclose(tpt(model, views=views).logits, together.logits, atol=1e-4)


def test_embeddings_instead_of_pixels(deep_base, processor, views):
    model = make(deep_base, processor)
    embeds = model.get_image_features(views.flatten(0, 1)).unflatten(0, (3, 25))
    expected = tpt(model, views=views, batch_size=7)
    assert torch.allclose(tpt(model, views=embeds).logits, expected.logits, atol=1e-4)
    with torch.inference_mode():
        assert torch.allclose(tpt(model, views=embeds).logits, expected.logits, atol=1e-4)


def test_more_steps(deep_base, processor, views):
    """By plain AdamW on the reference's own loss."""
    model = make(deep_base, processor)
    options = {"lr": 0.01, "eps": 1e-3}
    output = tpt(model, views=views, num_steps=3, learning_rate=0.01, adam_epsilon=1e-3)
    for i in range(3):
        context = model.context.detach().clone().requires_grad_()
        optimizer = torch.optim.AdamW([context], **options)
        for _ in range(3):
            text, image = ref.coop_features(deep_base, model.tokenizer, NAMES, views[i], context)
            loss = ref.entropy_of_mean(ref.cosine_logits(deep_base, text, image)[output.kept[i]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch.allclose(output.context[i, 0], context, atol=2e-5)
    assert (output.context[0] - output.context[1]).abs().max() > 1e-3


def test_starts_from_words_while_disabled(deep_base, processor, views):
    model = make(deep_base, processor, MaPLeConfig(ctx_init="a photo"))
    words = ref.word_vectors(deep_base, processor.tokenizer, "a photo of a", 4)
    with model.disable_adapter():
        output = tpt(model, views=views)
        answers = model.predict([picture(0), picture(1)], top_k=1, tpt={"num_views": 8, "share": 0.5})
    for i in range(3):
        expected = ref.tpt(deep_base, model.tokenizer, NAMES, views[i], words)
        assert output.kept[i].tolist() == expected["kept"]
        assert relative_error(output.logits[i], expected["logits"].detach()) < 1e-4
    assert [len(answer) for answer in answers] == [1, 1]


def test_views_of_images(processor):
    """The plain view first, then crops that depend on the seed and on nothing else."""
    images = processor.image_processor
    plain, augment = eval_transform(images), train_transform(images)
    made = [_make_views(picture(i, (40, 50)), plain, augment, 5, seed=3)["pixel_values"] for i in range(2)]
    for i, views in enumerate(made):
        assert views.shape == (5, 3, 16, 16)
        assert torch.equal(views[0], images(images=picture(i, (40, 50)), return_tensors="pt")["pixel_values"][0])
        assert torch.equal(views[2], augment(picture(i, (40, 50)), np.random.default_rng([3, 2])))
    other = _make_views(picture(0, (40, 50)), plain, augment, 5, seed=4)["pixel_values"]
    assert torch.equal(other[0], made[0][0]) and not torch.equal(other[1], made[0][1])


def test_predict(deep_base, processor):
    model = make(deep_base, processor)
    images = [picture(i) for i in range(3)]
    answers = model.predict(images, top_k=None, batch_size=2, tpt=True)
    output = tpt(model, images)
    assert output.kept.shape == (3, 6) and output.kept.max() < 64, "int(0.1 * 64) of 64 views"
    for answer, scores in zip(answers, output.logits.softmax(-1)):
        assert [a["label"] for a in answer] == [NAMES[c] for c in scores.argsort(descending=True)]
        assert torch.allclose(
            torch.tensor([a["score"] for a in answer]), scores.sort(descending=True).values, atol=1e-4
        )
    alone = model.predict(images[2], top_k=None, tpt=True)
    assert all(abs(a["score"] - b["score"]) < 1e-4 for a, b in zip(alone, answers[2])), "whatever stands beside it"
    assert model.predict(images, tpt=False) == model.predict(images) != answers
    assert model.predict(images[0], tpt={"seed": 1}) != model.predict(images[0], tpt={"seed": 2})


def test_nothing_is_left_behind(deep_base, processor, tmp_path):
    model = make(deep_base, processor)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = [picture(i) for i in range(2)]
    answers = model.predict(images)
    torch.manual_seed(5)
    random = torch.get_rng_state()
    first = model.predict(images, tpt=True)
    assert torch.equal(torch.get_rng_state(), random) and model.predict(images, tpt=True) == first
    assert model.predict(images) == answers
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.context.requires_grad
    model.save_pretrained(tmp_path)
    loaded = CoOpModel.from_pretrained(tmp_path, base_model=deep_base, processor=processor)
    assert loaded.predict(images, tpt=True) == first, "an adapter that may not learn is tuned too"


@pytest.mark.parametrize("family", ["siglip", "siglip2_naflex", "metaclip2", "align"])
def test_other_families(family):
    base, processor = make_family(family)
    model = CoOpModel(base, CoOpConfig(n_ctx=2), ["cat", "sea lion", "big red dog"], processor)
    images = [picture(i, (60, 40)) for i in range(2)]
    output = tpt(model, images, num_views=10, share=0.3)
    assert output.kept.shape == (2, 3) and output.logits.isfinite().all()
    for i, answer in enumerate(model.predict(images, top_k=None, tpt={"num_views": 10, "share": 0.3})):
        expected = model.logits_to_probabilities(output.logits)[i].sort(descending=True).values
        assert torch.allclose(torch.tensor([a["score"] for a in answer]), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_base(tokenizer, deep_base, processor, views, dtype):
    """Gradients don't vanish: every entry of the context takes its step."""
    model = make(copy.deepcopy(deep_base).to(dtype), processor)
    output = tpt(model, views=views, weight_decay=0.0)
    steps = (output.context[:, 0] - model.context).abs()
    assert output.context.dtype == output.logits.dtype == torch.float32
    assert (steps > 4e-3).float().mean() > 0.98 and (steps < 5.001e-3).all()


def test_small_gradients_of_a_half_precision_base(deep_base, processor, views):
    """Of an image whose views are all sure, which fp16 alone would round to zero."""
    base = copy.deepcopy(deep_base).half()
    base.logit_scale.fill_(math.log(150))
    model = make(base, processor)
    output = tpt(model, views=views, weight_decay=0.0, adam_epsilon=1e-30)
    assert output.loss[0] < 1e-6
    assert ((output.context[0, 0] - model.context).abs() > 4e-3).float().mean() > 0.98


def test_what_is_refused(deep_base, processor, views):
    specific = make(deep_base, processor, CoOpConfig(n_ctx=2, class_specific=True))
    with pytest.raises(ValueError, match="unified context of a CoOp adapter, and the adapter 'default' is class-spec"):
        tpt(specific, views=views)
    for config in (CoCoOpConfig(), MaPLeConfig(), TaskResConfig()):
        model = CoOpModel(deep_base, config, NAMES, processor)
        with pytest.raises(ValueError, match=rf"of the method '{config.method}': activate .*disable_adapter"):
            model.predict(picture(0), tpt=True)
    model = make(deep_base, processor)
    for options, message in (
        ({}, "either `images` or `views`; got neither"),
        ({"images": [picture(0)], "views": views}, "got both"),
        ({"images": []}, "`images` is empty"),
        ({"views": views, "share": 0.0}, "`share` must be above 0"),
        ({"views": views, "num_steps": 0}, "`num_steps` must be a positive"),
        ({"images": [picture(0)], "num_views": True}, "`num_views` must be a positive"),
        ({"views": views[0]}, r"pixels \(images, views, 3, height, width\).* got \(25, 3, 16, 16\)"),
        ({"images": [picture(0), "nowhere.png"]}, "image 1 .'nowhere.png'. cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            tpt(model, **options)
    nameless = CoOpModel(deep_base, CoOpConfig(n_ctx=2), processor=processor)
    with pytest.raises(ValueError, match="no class names yet"):
        tpt(nameless, views=views)


def test_an_adapter_of_a_base_that_peft_wrapped():
    peft = pytest.importorskip("peft")
    base, processor = fresh_family("clip")
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model = CoOpModel(wrapped, CoOpConfig(n_ctx=2), ["cat", "dog"], processor)
    assert len(model.predict(picture(0), tpt={"num_views": 4})) == 2
