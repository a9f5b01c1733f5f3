import pytest
import torch
from conftest import make_base
from reference import reference_features, relative_error

from coop_hf.core.families import get_family
from coop_hf.core.layout import make_layout, tokenize_texts
from coop_hf.core.plain import plain_text_features


POSITIONS = ["end", "middle", "front"]
NAMES = ["cat", "dog (cat)", "sea_lion!", "photo of a dog", "7"]


def random_context(*shape, seed=0):
    return (0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def check(base, tokenizer, context, position, length=None, names=NAMES):
    layout = make_layout(tokenizer, names, context.shape[-2], position)
    features = plain_text_features(base, layout, context, length)
    expected = reference_features(base, tokenizer, names, context, position)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    (gradient,) = torch.autograd.grad((features * weights).sum(), context)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), context)
    assert relative_error(gradient, expected_gradient) < 1e-4


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("shape", [(3, 32), (5, 3, 32)])
@pytest.mark.parametrize("which", ["base", "base_with_eos_id"])
def test_features_and_gradients(request, tokenizer, which, position, shape):
    check(request.getfixturevalue(which), tokenizer, random_context(*shape), position)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_attention_implementations(tokenizer, attn):
    check(make_base(tokenizer, attn=attn), tokenizer, random_context(3, 32), "middle")


def test_columns_behind_eos_change_nothing(base, tokenizer):
    check(base, tokenizer, random_context(3, 32), "middle", length=40)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("which", ["real_base", "real_base_with_eos_id"])
def test_real_tokenizer(request, real_tokenizer, which, position):
    names = ["kite (bird of prey)", "great white shark", "yahoo!", "cat"]
    check(request.getfixturevalue(which), real_tokenizer, random_context(5, 32), position, names=names)


@pytest.mark.parametrize("which", ["base", "base_with_eos_id"])
def test_finished_texts_equal_clip(request, tokenizer, which):
    base = request.getfixturevalue(which)
    texts = ["a photo of a cat.", "dog (cat).", "a", ""]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = base.get_text_features(**inputs).pooler_output
        features = plain_text_features(base, tokenize_texts(tokenizer, texts))
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_context_is_cast_where_it_enters(tokenizer, dtype):
    base = make_base(tokenizer).to(dtype)
    context = random_context(3, 32)
    features = plain_text_features(base, make_layout(tokenizer, NAMES, 3), context)
    assert features.dtype == dtype
    features.float().square().sum().backward()
    assert context.grad.dtype == torch.float32 and context.grad.abs().max() > 0


def test_only_clip_is_accepted(base):
    assert get_family(base).base_model is base
    for other in (base.text_model, None, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"CLIPModel.*got {type(other).__name__}"):
            get_family(other)
