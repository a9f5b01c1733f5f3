import copy
import io
import pickle
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_base
from datasets import Dataset, Image
from reference import (
    reference_features,
    reference_logits,
    relative_error,
    zero_shot_features,
)
from transformers import CLIPModel

from coop_hf import CoOpConfig, CoOpModel


POSITIONS = ["end", "middle", "front"]
NAMES = ["cat", "dog (cat)", "sea_lion!", "photo of a dog", "7", "hat"]
REAL_NAMES = ["kite (bird of prey)", "great_white_shark", "yahoo!", "missile", "Jack-o'-lantern"]
PASSES = [("plain", None), ("shared", None), ("shared", 2)]
LABELS = torch.tensor([0, 1, 2, 3, 4, 1, 0])


@pytest.fixture(scope="session")
def image_embeds():
    return torch.randn(7, 24, generator=torch.Generator().manual_seed(5))


def make_model(base, processor, names=NAMES, seed=0, **kwargs):
    options = {k: kwargs.pop(k) for k in ("adapter_name", "text_pass", "text_chunk_size", "context") if k in kwargs}
    torch.manual_seed(seed)
    return CoOpModel(base, CoOpConfig(**kwargs), names, processor, **options)


def expected_logits(model, image_embeds, names=None):
    """The reference's logits for a model's active adapter."""
    features = reference_features(
        model.base_model,
        model.tokenizer,
        names or model.class_names,
        model.context,
        model.config.class_token_position,
    )
    return reference_logits(model.base_model, features, image_embeds)


def snapshot(base):
    """Everything that could be changed in a base: values, keys, dtypes, configuration."""
    return {k: v.clone() for k, v in base.state_dict().items()}, copy.deepcopy(base.config.to_dict())


def assert_untouched(base, before):
    state, config = before
    assert list(base.state_dict()) == list(state)
    for key, value in base.state_dict().items():
        assert value.dtype == state[key].dtype and torch.equal(value, state[key]), key
    assert base.config.to_dict() == config
    assert not base.text_model.embeddings.token_embedding._forward_hooks


class CountTextTower:
    """Counts how often the text tower's first layer runs its key projection: every pass needs it.

    The base is shared: `count_text_tower` takes the hook off it again.
    """

    def __init__(self, model):
        projection = model.base_model.text_model.encoder.layers[0].self_attn.k_proj
        self.calls = 0
        self.hook = projection.register_forward_hook(self.count)

    def count(self, *args):
        self.calls += 1

    def since(self):
        calls, self.calls = self.calls, 0
        return calls


@pytest.fixture
def count_text_tower():
    counters = []

    def count(model):
        counters.append(CountTextTower(model))
        return counters[-1]

    yield count
    for counter in counters:
        counter.hook.remove()


# ---------------------------------------------------------------- every variant against the reference


def check_variant(base, tokenizer, names, image_embeds, position, class_specific, n_ctx, ctx_init):
    before = snapshot(base)
    for text_pass, chunk in PASSES:
        model = make_model(
            base,
            tokenizer,
            names,
            n_ctx=n_ctx,
            class_token_position=position,
            class_specific=class_specific,
            ctx_init=ctx_init,
            text_pass=text_pass,
            text_chunk_size=chunk,
        )
        assert model.context.shape == ((len(names), n_ctx, 32) if class_specific else (n_ctx, 32))
        output = model(image_embeds=image_embeds, labels=LABELS)
        expected = expected_logits(model, image_embeds)
        assert (output.logits - expected).abs().max() <= 1e-5
        assert output.logits.dtype == torch.float32 and output.logits.shape == (7, len(names))
        expected_loss = torch.nn.functional.cross_entropy(expected, LABELS)
        assert (output.loss - expected_loss).abs() <= 1e-5
        (gradient,) = torch.autograd.grad(output.loss, model.context)
        (expected_gradient,) = torch.autograd.grad(expected_loss, model.context)
        assert relative_error(gradient, expected_gradient) <= 1e-4
        with torch.no_grad():  # the kept class embeddings
            assert (model(image_embeds=image_embeds).logits - expected).abs().max() <= 1e-5
    assert_untouched(base, before)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("n_ctx", [1, 4, 16])
@pytest.mark.parametrize("start", ["noise", "words"])
@pytest.mark.parametrize("eos_rule", ["base", "base_with_eos_id"])
def test_variants(request, tokenizer, image_embeds, eos_rule, position, class_specific, n_ctx, start):
    ctx_init = {"noise": None, "words": "photo" if n_ctx == 1 else "a photo of a"}[start]
    base = request.getfixturevalue(eos_rule)
    check_variant(base, tokenizer, NAMES, image_embeds, position, class_specific, n_ctx, ctx_init)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("n_ctx", [1, 4, 16])
@pytest.mark.parametrize("start", ["noise", "words"])
def test_variants_with_the_real_tokenizer(
    real_base, real_base_with_eos_id, real_tokenizer, image_embeds, position, class_specific, n_ctx, start
):
    ctx_init = {"noise": None, "words": "photo" if n_ctx == 1 else "a photo of a"}[start]
    base = real_base if n_ctx == 4 else real_base_with_eos_id
    check_variant(base, real_tokenizer, REAL_NAMES, image_embeds, position, class_specific, n_ctx, ctx_init)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_attention_implementations(tokenizer, image_embeds, attn):
    check_variant(make_base(tokenizer, attn=attn), tokenizer, NAMES, image_embeds, "middle", False, 3, None)


@pytest.mark.parametrize("position", POSITIONS)
def test_the_longest_context_that_fits(base, tokenizer, image_embeds, position):
    """40 positions hold SOS, EOS, the 4 tokens of "photo of a dog", the full stop, and 33 context vectors."""
    names = ["cat", "photo of a dog", "sea", "dog", "7"]
    check_variant(base, tokenizer, names, image_embeds, position, False, 33, None)
    with pytest.raises(ValueError, match=r"n_ctx=34 .* 40 positions: 'photo of a dog' \(by 1 token\)"):
        make_model(base, tokenizer, names, n_ctx=34, class_token_position=position)


def test_output(base, tokenizer, image_embeds):
    model = make_model(base, tokenizer, n_ctx=2)
    output = model(image_embeds=image_embeds)
    assert output.loss is None and set(output.keys()) == {"logits", "text_embeds", "image_embeds"}
    ones = torch.ones(7)
    torch.testing.assert_close(output.image_embeds.norm(dim=-1), ones)
    torch.testing.assert_close(output.text_embeds.norm(dim=-1), ones[:6])
    torch.testing.assert_close(output.text_embeds, torch.nn.functional.normalize(model.get_text_features(), dim=-1))
    torch.testing.assert_close(
        output.logits, base.logit_scale.exp() * output.image_embeds @ output.text_embeds.T, rtol=0, atol=1e-5
    )
    # The length of an image embedding does not matter.
    torch.testing.assert_close(model(image_embeds=7 * image_embeds).logits, output.logits, rtol=0, atol=1e-5)
    assert model.get_text_features().shape == (6, 24)
    torch.testing.assert_close(model.logit_scale, base.logit_scale.exp())


def test_images(base, processor):
    model = make_model(base, processor, n_ctx=2)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = base.get_image_features(pixel_values=pixels).pooler_output
    # The last layer's products have fewer rows, which may round otherwise.
    torch.testing.assert_close(model.get_image_features(pixels), expected, rtol=1e-6, atol=1e-6)
    output = model(pixel_values=pixels, labels=torch.tensor([0, 1, -100]))
    torch.testing.assert_close(output.logits, model(image_embeds=expected).logits)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits[:2], torch.tensor([0, 1])))
    output.loss.backward()
    assert all(p.grad is None for p in base.parameters()) and model.context.grad is not None


@pytest.mark.parametrize(("values", "message"), [((), "got neither"), (("pixel_values", "image_embeds"), "got both")])
def test_forward_arguments(base, tokenizer, values, message):
    model = make_model(base, tokenizer)
    with pytest.raises(ValueError, match=message):
        model(**{name: torch.zeros(1) for name in values})


@pytest.mark.parametrize("text_pass", ["plain", "shared"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_bases(tokenizer, image_embeds, dtype, tolerance, text_pass):
    """Logits are 10 times a cosine, which is known to about 1 % (bf16) and 0.1 % (fp16)."""
    exact = make_model(make_base(tokenizer), tokenizer, n_ctx=4)
    model = make_model(make_base(tokenizer).to(dtype), tokenizer, n_ctx=4, text_pass=text_pass)
    assert model.context.dtype == torch.float32 and torch.equal(model.context, exact.context)
    output, expected = (m(image_embeds=image_embeds, labels=LABELS) for m in (model, exact))
    assert output.logits.dtype == output.loss.dtype == torch.float32
    assert (output.logits - expected.logits).abs().max() < 10 * tolerance
    output.loss.backward(), expected.loss.backward()
    assert model.context.grad.dtype == torch.float32
    assert relative_error(model.context.grad, exact.context.grad) < 2 * tolerance
    assert model.get_image_features(torch.zeros(1, 3, 16, 16)).dtype == dtype


@pytest.mark.parametrize("text_pass", ["plain", "shared"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_autocast(base, tokenizer, image_embeds, text_pass, chunk):
    model = make_model(base, tokenizer, n_ctx=4, text_pass=text_pass, text_chunk_size=chunk)
    exact = model(image_embeds=image_embeds, labels=LABELS)
    (expected,) = torch.autograd.grad(exact.loss, model.context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(image_embeds=image_embeds, labels=LABELS)
    assert output.logits.dtype == torch.float32
    assert 0 < (output.logits - exact.logits).abs().max() < 0.3
    output.loss.backward()
    assert model.context.grad.dtype == torch.float32 and relative_error(model.context.grad, expected) < 6e-2
    with torch.no_grad():  # what is kept under autocast is not used without, nor the other way round
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.get_text_features().dtype == torch.bfloat16
        assert model.get_text_features().dtype == torch.float32
        torch.testing.assert_close(model(image_embeds=image_embeds).logits, exact.logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- making a model


def test_arguments(base, tokenizer):
    model = CoOpModel(base, class_names=NAMES, processor=tokenizer)
    assert model.config.n_ctx == 16 and model.class_names == NAMES and model.active_adapter == "default"
    assert CoOpModel(base, CoOpConfig(class_names=["cat"]), processor=tokenizer).class_names == ["cat"]
    assert CoOpModel(base, CoOpConfig(class_names=["cat"]), ["dog"], tokenizer).class_names == ["dog"]
    with pytest.raises(TypeError, match="CLIPModel.*got CLIPText"):
        CoOpModel(base.text_model, class_names=NAMES, processor=tokenizer)
    for processor in (None, 3, "tokenizer"):
        with pytest.raises(TypeError, match=f"needs `processor`.*got {type(processor).__name__}"):
            CoOpModel(base, class_names=NAMES, processor=processor)
    with pytest.raises(ValueError, match="`text_pass` must be one of 'auto', 'shared', 'plain', got 'fast'"):
        CoOpModel(base, class_names=NAMES, processor=tokenizer, text_pass="fast")
    for size in (0, -1, 2.0, "2"):
        with pytest.raises(ValueError, match="`text_chunk_size` must be a positive whole number"):
            CoOpModel(base, class_names=NAMES, processor=tokenizer, text_chunk_size=size)
    with pytest.warns(UserWarning, match=r"same prompt: 'cat' \(0\), 'CAT' \(1\)\."):
        CoOpModel(base, class_names=["cat", "CAT"], processor=tokenizer)


def test_the_callers_configuration_is_not_changed(base, tokenizer):
    config = CoOpConfig(ctx_init="a photo")
    model = CoOpModel(base, config, NAMES, tokenizer)
    assert config == CoOpConfig(ctx_init="a photo")
    assert model.config.n_ctx == 2 and model.config is not config


def test_a_seed_gives_the_same_start(base, tokenizer):
    first, again, other = (make_model(base, tokenizer, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.context, again.context) and not torch.equal(first.context, other.context)


def test_a_given_context(base, tokenizer):
    start = torch.randn(2, 32)
    model = make_model(base, tokenizer, n_ctx=2, context=start)
    assert torch.equal(model.context, start)
    with torch.no_grad():
        model.context.zero_()
    assert start.abs().max() > 0, "copied"
    with pytest.raises(ValueError, match="have 31 dimensions.* have 32"):
        make_model(base, tokenizer, n_ctx=2, context=torch.randn(2, 31))
    with pytest.raises(ValueError, match=r"shape \(3, 32\), its configuration says \(2, 32\)"):
        make_model(base, tokenizer, n_ctx=2, context=torch.randn(3, 32))
    with pytest.raises(ValueError, match=r"says \(6, 2, 32\)"):
        make_model(base, tokenizer, n_ctx=2, class_specific=True, context=start)


def test_class_names_may_come_later(base, tokenizer, image_embeds):
    model = make_model(base, tokenizer, None, n_ctx=2)
    for call in (lambda: model(image_embeds=image_embeds), model.get_text_features, lambda: model.predict("x.png")):
        with pytest.raises(ValueError, match=r"'default' has no class names yet.*set_class_names"):
            call()
    model.set_class_names(NAMES)
    assert model(image_embeds=image_embeds).logits.shape == (7, 6)
    with pytest.raises(ValueError, match="class-specific context has one set of vectors for each class"):
        make_model(base, tokenizer, None, class_specific=True)


# ---------------------------------------------------------------- changing classes


def test_new_classes_on_a_unified_context(base, tokenizer, image_embeds):
    model = make_model(base, tokenizer, n_ctx=3)
    before = model.context.detach().clone()
    model(image_embeds=image_embeds)
    new = ["sea dog", "hat (hat)", "8"]
    model.set_class_names(new)
    assert model.class_names == new == model.config.class_names
    assert torch.equal(model.context, before)
    for _ in range(2):
        logits = model(image_embeds=image_embeds).logits
        assert (logits - expected_logits(model, image_embeds, new)).abs().max() <= 1e-5
    for bad, message in (
        ([], "at least one"),
        (["cat " * 40], "by 6 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_class_names(bad)
        assert model.class_names == new, "a failed change changes nothing"
    assert torch.equal(model(image_embeds=image_embeds).logits, logits)


@pytest.mark.parametrize("no_grad", [False, True])
def test_classes_of_a_class_specific_context(base, tokenizer, image_embeds, no_grad):
    model = make_model(base, tokenizer, n_ctx=3, class_specific=True)
    order = [3, 0, 5, 1, 2, 4]
    context = model.context.detach().clone()
    parameter = model.context
    with torch.set_grad_enabled(not no_grad):
        logits = model(image_embeds=image_embeds).logits
        model.set_class_names([NAMES[i] for i in order])
        assert torch.equal(model.context, context[order]) and model.context is parameter
        new = model(image_embeds=image_embeds).logits
    torch.testing.assert_close(new, logits[:, order], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"it has no vectors for 'cow', 'pig'; the new list lacks 'cat', 'hat'\."):
        model.set_class_names(["cow", "pig", *NAMES[1:5]])
    with pytest.raises(ValueError, match="lacks 'hat'"):
        model.set_class_names(NAMES[:-1])
    with pytest.raises(ValueError, match="no vectors for 'cow'") as error:
        model.set_class_names([*NAMES, "cow"])
    assert "lacks" not in str(error.value)
    assert model.class_names == [NAMES[i] for i in order] and torch.equal(model.context, context[order])
    model.set_class_names([NAMES[i].replace("_", " ") for i in order])  # the same classes, spelt otherwise
    assert torch.equal(model.context, context[order])


# ---------------------------------------------------------------- adapters


def test_adapters(base, tokenizer, image_embeds):
    model = make_model(base, tokenizer, n_ctx=3)
    torch.manual_seed(1)
    model.add_adapter("flowers", CoOpConfig(n_ctx=2, class_token_position="front"), ["sea", "dog"])
    model.add_adapter("own", CoOpConfig(n_ctx=2, class_specific=True, class_names=["cat", "hat", "sea"]))
    assert list(model.adapters) == ["default", "flowers", "own"]
    assert model.active_adapter == "default" and model.active_adapters == ["default"], "adding does not activate"
    first = model(image_embeds=image_embeds).logits
    for name, classes in (("flowers", 2), ("own", 3), ("default", 6)):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert {n: a.context.requires_grad for n, a in model.adapters.items()} == {
            n: n == name for n in ("default", "flowers", "own")
        }
        logits = model(image_embeds=image_embeds).logits
        assert logits.shape == (7, classes)
        assert (logits - expected_logits(model, image_embeds)).abs().max() <= 1e-5
    assert torch.equal(logits, first)
    model.set_class_names(["7"], "flowers")
    assert model.class_names == NAMES and model.adapters["flowers"].config.class_names == ["7"]

    model.delete_adapter("default")
    assert model.active_adapter == "flowers" and model.context.requires_grad
    model.delete_adapter("own")
    assert model.active_adapter == "flowers"
    with pytest.raises(ValueError, match="'flowers' is the only adapter"):
        model.delete_adapter("flowers")
    model.add_adapter("own", CoOpConfig(n_ctx=2), ["cat"])  # a deleted name is free


def test_adapter_names(base, tokenizer):
    model = make_model(base, tokenizer)
    for bad in ("", "a/b", "..", "a.b", " a", "a" * 129, 3, None, "a\n"):
        with pytest.raises(ValueError, match="must be made of letters"):
            model.add_adapter(bad, class_names=["cat"])
    for bad in ("keys", "forward", "training"):
        with pytest.raises(ValueError, match="cannot name an adapter"):
            model.add_adapter(bad, class_names=["cat"])
    with pytest.raises(ValueError, match="'default' already"):
        model.add_adapter("default", class_names=["cat"])
    for call in (model.set_adapter, model.delete_adapter, lambda name: model.set_class_names(["cat"], name)):
        with pytest.raises(ValueError, match="no adapter named 'nobody'; this model has 'default'"):
            call("nobody")
    with pytest.raises(ValueError, match="40 positions"):
        model.add_adapter("late", CoOpConfig(n_ctx=50), ["cat"])
    assert list(model.adapters) == ["default"] and model.active_adapter == "default"


def test_trainable_parameters(base, tokenizer, capsys):
    model = make_model(base, tokenizer, n_ctx=3)
    total = sum(p.numel() for p in base.parameters())
    assert model.get_nb_trainable_parameters() == (96, total + 96)
    model.add_adapter("own", CoOpConfig(n_ctx=2, class_specific=True), NAMES)
    assert model.get_nb_trainable_parameters() == (96, total + 96 + 384)
    model.set_adapter("own")
    assert model.get_nb_trainable_parameters() == (384, total + 96 + 384)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["adapters.own.context"]
    model.print_trainable_parameters()
    share = 100 * 384 / (total + 480)
    assert capsys.readouterr().out == (
        f"trainable params: 384 || all params: {total + 480:,} || trainable%: {share:.4f}\n"
    )


@pytest.mark.parametrize("eos_rule", ["base", "base_with_eos_id"])
@pytest.mark.parametrize("text_pass", ["plain", "shared"])
def test_disabled_adapter_is_zero_shot_clip(request, tokenizer, image_embeds, eos_rule, text_pass):
    base = request.getfixturevalue(eos_rule)
    model = make_model(base, tokenizer, n_ctx=3, template="a dog of {}, photo (of).", text_pass=text_pass)
    features = zero_shot_features(base, tokenizer, NAMES, "a dog of {}, photo (of).")
    expected = reference_logits(base, features, image_embeds)
    learned = model(image_embeds=image_embeds).logits
    with model.disable_adapter() as same:
        assert same is model
        output = model(image_embeds=image_embeds, labels=LABELS)
        assert (output.logits - expected).abs().max() <= 1e-5
        assert not output.loss.requires_grad
        torch.testing.assert_close(model.get_text_features(), features, rtol=0, atol=1e-5)
        with model.disable_adapter():
            pass
        assert torch.equal(model(image_embeds=image_embeds).logits, output.logits), "nested: still disabled"
    assert torch.equal(model(image_embeds=image_embeds).logits, learned)
    with pytest.raises(KeyError):
        with model.disable_adapter():
            raise KeyError
    assert torch.equal(model(image_embeds=image_embeds).logits, learned), "an error enables it again"


def test_disabled_adapter_follows_adapter_and_classes(base, tokenizer, image_embeds):
    model = make_model(base, tokenizer, n_ctx=3)
    model.add_adapter("other", CoOpConfig(n_ctx=2, template="{}!"), ["sea", "dog (dog)"])
    with model.disable_adapter():
        for adapter, names, template in (
            ("default", NAMES, "a photo of a {}."),
            ("other", ["sea", "dog (dog)"], "{}!"),
            ("other", ["hat", "cat", "7"], "{}!"),
        ):
            model.set_adapter(adapter)
            model.set_class_names(names)
            features = zero_shot_features(base, tokenizer, names, template)
            expected = reference_logits(base, features, image_embeds)
            assert (model(image_embeds=image_embeds).logits - expected).abs().max() <= 1e-5


# ---------------------------------------------------------------- the base stays as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_base_is_untouched(processor, image_embeds, tmp_path, dtype):
    base = make_base(processor.tokenizer).to(dtype)
    before = snapshot(base)
    model = make_model(base, processor, n_ctx=3)
    assert model.get_base_model() is base
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=5e-4)
    start = model.context.detach().clone()
    model(image_embeds=image_embeds, labels=LABELS).loss.backward()
    optimizer.step()
    assert not torch.equal(model.context, start)
    model.eval()
    model.predict(PIL.Image.new("RGB", (20, 30), "red"))
    with model.disable_adapter():
        model(image_embeds=image_embeds)
    model.add_adapter("second", class_names=["cat"])
    model.save_pretrained(tmp_path)
    CoOpModel.from_pretrained(tmp_path, base_model=base, processor=processor)
    assert_untouched(base, before)


def test_two_models_on_one_base(base, tokenizer, image_embeds):
    first = make_model(base, tokenizer, n_ctx=3)
    alone = first(image_embeds=image_embeds).logits
    second = make_model(base, tokenizer, ["sea", "hat"], n_ctx=2, seed=1, class_token_position="front")
    second(image_embeds=image_embeds, labels=LABELS % 2).loss.backward()
    assert torch.equal(first(image_embeds=image_embeds).logits, alone)
    first(image_embeds=image_embeds, labels=LABELS).loss.backward()
    assert (second(image_embeds=image_embeds).logits - expected_logits(second, image_embeds)).abs().max() <= 1e-5


def test_training_mode(base, tokenizer):
    model = make_model(base, tokenizer)
    assert model.training and not any(m.training for m in base.modules())
    assert model.train() is model and model.training
    assert not any(m.training for m in base.modules())
    assert model.eval() is model and not model.training and not model.adapters["default"].training


# ---------------------------------------------------------------- kept class embeddings


@pytest.mark.parametrize("text_pass", ["plain", "shared"])
def test_class_embeddings_are_computed_once(tokenizer, image_embeds, text_pass, count_text_tower):
    model = make_model(make_base(tokenizer), tokenizer, n_ctx=3, text_pass=text_pass).eval()
    counter = count_text_tower(model)
    with torch.no_grad():
        first = model(image_embeds=image_embeds).logits
        assert counter.since() > 0
        for _ in range(5):
            assert torch.equal(model(image_embeds=image_embeds).logits, first)
        assert counter.since() == 0
    for parameter in model.parameters():  # a frozen context: nothing to learn, with gradients on too
        parameter.requires_grad_(False)
    model(image_embeds=image_embeds)
    assert counter.since() == 0
    model.train()
    model(image_embeds=image_embeds)
    assert counter.since() == 0


def change_by_optimizer(model):
    with torch.enable_grad():
        model.get_text_features().sum().backward()
    torch.optim.SGD([model.context], lr=0.1).step()


def change_data(model):
    model.context.data.copy_(model.context.data + 0.1)


def change_in_place(model):
    with torch.no_grad():
        model.context[0, 0] += 1.0


def change_data_pointer(model):
    model.context.data = model.context.data + 0.1


def change_base_layer(model):
    with torch.no_grad():
        model.base_model.text_model.encoder.layers[1].mlp.fc1.weight.mul_(1.3)


def change_base_projection(model):
    with torch.no_grad():
        model.base_model.text_projection.weight[0] *= 3.0


def change_base_norm(model):
    with torch.no_grad():
        model.base_model.text_model.final_layer_norm.weight[0] *= 3.0


def change_base_state(model):
    state = {k: 1.05 * v for k, v in model.base_model.state_dict().items()}
    model.base_model.load_state_dict(state)


def change_base_state_assign(model):
    state = {k: 1.05 * v for k, v in model.base_model.state_dict().items()}
    model.base_model.load_state_dict(state, assign=True)


def change_base_data(model):
    model.base_model.text_model.encoder.layers[1].mlp.fc1.weight.data.mul_(1.3)


def change_to_half(model):
    model.half()


def change_to_half_and_back(model):
    model.half().float()


def change_classes(model):
    model.set_class_names(["sea", "hat", "7"])


def change_adapter(model):
    model.add_adapter("other", CoOpConfig(n_ctx=2), ["sea", "hat"])
    model.set_adapter("other")


CHANGES = [
    change_by_optimizer,
    change_data,
    change_in_place,
    change_data_pointer,
    change_base_layer,
    change_base_projection,
    change_base_norm,
    change_base_state,
    change_base_state_assign,
    pytest.param(
        change_base_data,
        marks=pytest.mark.xfail(reason="a write through `.data` leaves no trace in PyTorch", strict=True),
    ),
    change_to_half,
    change_to_half_and_back,
    change_classes,
    change_adapter,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("position", ["end", "front"])
def test_kept_class_embeddings_follow_every_change(tokenizer, image_embeds, change, position):
    model = make_model(make_base(tokenizer), tokenizer, n_ctx=3, class_token_position=position).eval()
    with torch.no_grad():
        before = model(image_embeds=image_embeds).logits
        change(model)
        after = model(image_embeds=image_embeds).logits
        assert after.shape != before.shape or not torch.equal(after, before)
        tolerance = 0.05 if model.base_model.dtype == torch.float16 else 1e-5
        assert (after - expected_logits(model, image_embeds)).abs().max() <= tolerance
        assert (model(image_embeds=image_embeds).logits - after).abs().max() == 0


def test_kept_class_embeddings_of_the_disabled_adapter(tokenizer, image_embeds, count_text_tower):
    model = make_model(make_base(tokenizer), tokenizer, n_ctx=3).eval()
    counter = count_text_tower(model)
    with torch.no_grad():
        learned = model(image_embeds=image_embeds).logits
        with model.disable_adapter():
            zero_shot = model(image_embeds=image_embeds).logits
        counter.since()
        for _ in range(3):
            assert torch.equal(model(image_embeds=image_embeds).logits, learned)
            with model.disable_adapter():
                assert torch.equal(model(image_embeds=image_embeds).logits, zero_shot)
        assert counter.since() == 0, "both are kept"
        change_base_layer(model)
        with model.disable_adapter():
            after = model(image_embeds=image_embeds).logits
        features = zero_shot_features(model.base_model, tokenizer, NAMES, "a photo of a {}.")
        assert (after - reference_logits(model.base_model, features, image_embeds)).abs().max() <= 1e-5


def test_changing_a_returned_embedding_does_not_change_the_kept_one(base, tokenizer):
    """`features /= features.norm(...)` is what CLIP's own examples do with class embeddings."""
    model = make_model(base, tokenizer, n_ctx=3).eval()
    with torch.no_grad():
        features = model.get_text_features()
        before = features.clone()
        features /= features.norm(dim=-1, keepdim=True)
        assert torch.equal(model.get_text_features(), before)


def test_training_uses_no_kept_embeddings(base, tokenizer, image_embeds):
    """Evaluate, train, evaluate, as a Trainer does."""
    model = make_model(base, tokenizer, n_ctx=3)
    optimizer = torch.optim.SGD([model.context], lr=0.05)
    losses = []
    for _ in range(6):
        model.eval()
        with torch.no_grad():
            evaluated = model(image_embeds=image_embeds, labels=LABELS).loss
        model.train()
        loss = model(image_embeds=image_embeds, labels=LABELS).loss
        torch.testing.assert_close(loss.detach(), evaluated, rtol=0, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_training_after_inference_mode(base, processor, image_embeds):
    model = make_model(base, processor, n_ctx=3)
    with torch.inference_mode():
        model.predict(PIL.Image.new("RGB", (20, 20)))
        with model.disable_adapter():
            model(image_embeds=image_embeds)
    model(image_embeds=image_embeds, labels=LABELS).loss.backward()
    assert torch.isfinite(model.context.grad).all()


def test_half_keeps_the_context_and_its_gradient_fp32(tokenizer, image_embeds):
    model = make_model(make_base(tokenizer), tokenizer, n_ctx=3)
    before = model.context.detach().clone()
    model(image_embeds=image_embeds, labels=LABELS).loss.backward()
    for cast in (model.half, model.bfloat16, model.double, lambda: model.to(torch.float16), model.float):
        cast()
        assert model.context.dtype == torch.float32 and torch.equal(model.context, before)
        assert model.context.grad.dtype == torch.float32
    assert model.context.requires_grad and model.context.is_leaf


# ---------------------------------------------------------------- copies, compilation, devices


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(base, tokenizer, image_embeds, copier, class_specific):
    """A copy gives the same, stands on a base of its own, and goes its own way."""
    model = make_model(base, tokenizer, n_ctx=3, class_token_position="front", class_specific=class_specific)
    with torch.no_grad():
        before = model(image_embeds=image_embeds).logits
    twin = copier(model)
    assert twin.base_model is not base and twin.config == model.config
    with torch.no_grad():
        assert torch.equal(twin(image_embeds=image_embeds).logits, before)
        twin.context.add_(0.5)
        change_base_layer(twin)
        after = twin(image_embeds=image_embeds).logits
        assert (after - expected_logits(twin, image_embeds)).abs().max() <= 1e-5
        assert not torch.equal(after, before)
        assert torch.equal(model(image_embeds=image_embeds).logits, before)
    twin(image_embeds=image_embeds, labels=LABELS).loss.backward()
    assert twin.context.grad is not None and model.context.grad is None
    twin.set_class_names(twin.class_names[::-1])
    assert twin(image_embeds=image_embeds).logits.shape == (7, 6)


@pytest.mark.parametrize(("text_pass", "backend"), [("plain", "eager"), ("shared", "aot_eager")])
def test_compile(base, tokenizer, image_embeds, text_pass, backend):
    model = make_model(base, tokenizer, n_ctx=3, text_pass=text_pass)
    expected = model(image_embeds=image_embeds, labels=LABELS)
    (gradient,) = torch.autograd.grad(expected.loss, model.context)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        output = compiled(image_embeds=image_embeds, labels=LABELS)
        assert (output.logits - expected.logits).abs().max() <= 1e-5
        assert relative_error(torch.autograd.grad(output.loss, model.context)[0], gradient) <= 1e-4
    with torch.no_grad():
        model.context.add_(0.3)
        logits = compiled(image_embeds=image_embeds).logits
        assert (logits - expected_logits(model, image_embeds)).abs().max() <= 1e-5, "follows the context"
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compile_with_inductor(base, tokenizer, image_embeds):
    model = make_model(base, tokenizer, n_ctx=3)
    expected = model(image_embeds=image_embeds, labels=LABELS)
    (gradient,) = torch.autograd.grad(expected.loss, model.context)
    output = torch.compile(model)(image_embeds=image_embeds, labels=LABELS)
    assert (output.logits - expected.logits).abs().max() <= 1e-5
    assert relative_error(torch.autograd.grad(output.loss, model.context)[0], gradient) <= 1e-4


def test_activation_checkpointing(base, tokenizer, image_embeds):
    names = [f"cat {i}" for i in range(150)]
    model = make_model(base, tokenizer, names, n_ctx=3)
    expected = model(image_embeds=image_embeds, labels=LABELS).loss
    (gradient,) = torch.autograd.grad(expected, model.context)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert model.text_chunk_size == 128
    loss = model(image_embeds=image_embeds, labels=LABELS).loss
    assert (loss - expected).abs() <= 1e-5
    assert relative_error(torch.autograd.grad(loss, model.context)[0], gradient) <= 1e-4


# ---------------------------------------------------------------- prediction


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return [
        PIL.Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((20, 30), (16, 16), (40, 18))
    ]


@pytest.fixture
def predictor(base, processor):
    return make_model(base, processor, n_ctx=2).eval()


def expected_prediction(model, picture, top_k):
    pixels = model.processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scores = model(pixel_values=pixels).logits.softmax(-1)[0].tolist()
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
    return [{"label": model.class_names[i], "score": pytest.approx(scores[i], abs=1e-6)} for i in ranked]


def test_one_image(predictor, pictures, tmp_path):
    expected = expected_prediction(predictor, pictures[0], 5)
    path = tmp_path / "image.png"
    pictures[0].save(path)
    array = np.asarray(pictures[0])
    for picture in (pictures[0], path, str(path), array, torch.tensor(array), path.read_bytes()):
        assert predictor.predict(picture) == expected
    assert predictor.predict(pictures[0], top_k=2) == expected[:2]
    for top_k in (6, 100, None):
        everything = predictor.predict(pictures[0], top_k=top_k)
        assert len(everything) == 6 and sum(p["score"] for p in everything) == pytest.approx(1)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_many_images(predictor, pictures, batch_size, tmp_path):
    expected = [expected_prediction(predictor, picture, 3) for picture in pictures]
    paths = []
    for index, picture in enumerate(pictures):
        paths.append(str(tmp_path / f"{index}.png"))
        picture.save(paths[-1])
    column = Dataset.from_dict({"image": paths}).cast_column("image", Image())["image"]
    for images in (
        pictures,
        tuple(pictures),
        paths,
        column,
        [np.asarray(p) for p in pictures],
        [*pictures[:2], paths[2]],
    ):
        assert predictor.predict(images, top_k=3, batch_size=batch_size) == expected
    assert predictor.predict(pictures[:1], top_k=3) == expected[:1], "a list of one stays a list"


def test_a_stack_of_arrays(predictor, pictures):
    stack = np.stack([np.asarray(p.resize((20, 16))) for p in pictures])
    together = predictor.predict(stack)
    for array, prediction in zip(stack, together):
        assert prediction == expected_prediction(predictor, PIL.Image.fromarray(array), 5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_modes_of_images(predictor, pictures, mode):
    picture = pictures[0].convert(mode)
    (prediction,) = predictor.predict([picture], top_k=1)
    # Opaque, so that converting it to RGB by hand, as `expected_prediction` does, gives the same.
    assert prediction == expected_prediction(predictor, picture, 1)


def test_exif_orientation(predictor, pictures, tmp_path):
    """An image that a phone stored lying on its side is turned upright."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    stored = pictures[0].transpose(PIL.Image.Transpose.ROTATE_90)
    path = tmp_path / "phone.png"
    stored.save(path, exif=exif)
    assert predictor.predict(path) == expected_prediction(predictor, pictures[0], 5)
    assert predictor.predict(path) != expected_prediction(predictor, stored, 5)


def test_unreadable_images(predictor, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for bad in (broken, str(tmp_path / "missing.jpg"), None, np.full((4, 4, 3), 0.5), {"a": 1}, 7):
        with pytest.raises(ValueError, match="^image 2"):
            predictor.predict([pictures[0], pictures[1], bad], batch_size=2)
    with pytest.raises(ValueError, match=r"^image 0 \(.*broken\.png'?\)* cannot be read"):
        predictor.predict(broken)
    buffer = io.BytesIO()
    pictures[0].save(buffer, "PNG")
    with pytest.raises(ValueError, match="^image 0"):
        predictor.predict(buffer.getvalue()[:-200])


def test_arguments_of_predict(predictor, pictures, base, tokenizer):
    with pytest.raises(ValueError, match="`images` is empty"):
        predictor.predict([])
    for top_k in (0, -1, 1.5, "3"):
        with pytest.raises(ValueError, match="`top_k` must be a positive whole number or None"):
            predictor.predict(pictures, top_k=top_k)
    for batch_size in (0, 2.0, None):
        with pytest.raises(ValueError, match="`batch_size` must be a positive whole number"):
            predictor.predict(pictures, batch_size=batch_size)
    with pytest.raises(ValueError, match="made with a tokenizer alone"):
        make_model(base, tokenizer).predict(pictures)


def test_prediction_changes_nothing(base, processor, pictures, count_text_tower):
    model = make_model(base, processor, n_ctx=2)
    model.predict(pictures)
    assert model.training and model.context.requires_grad
    counter = count_text_tower(model)
    model.predict(pictures * 4, batch_size=1)
    assert counter.since() == 0, "class embeddings are computed once, not for each batch"


def test_prediction_of_a_disabled_adapter(predictor, pictures):
    with predictor.disable_adapter():
        assert predictor.predict(pictures[0]) == expected_prediction(predictor, pictures[0], 5)
        zero_shot = predictor.predict(pictures[0])
    assert zero_shot != predictor.predict(pictures[0])


def test_devices(base, tokenizer):
    assert isinstance(base, CLIPModel)
    assert make_model(base, tokenizer).device == torch.device("cpu")
