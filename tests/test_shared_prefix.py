import contextlib

import pytest
import torch
from conftest import make_base
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import reference_features, relative_error

from coop_hf.core import shared_prefix
from coop_hf.core.few_tokens import MAX_TOKENS, LinearLayers
from coop_hf.core.layout import make_layout, tokenize_texts
from coop_hf.core.plain import plain_text_features
from coop_hf.core.shared_prefix import SharedPrefixPass


POSITIONS = ["end", "middle", "front"]
NAMES = ["cat", "dog (cat)", "sea_lion!", "photo of a dog", "7", "a", ")", "of (of) of (of)", "hat", "camera"]


def random_context(*shape, seed=0):
    return (0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def gradient_of(features, context):
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((features.float() * weights).sum(), context)[0]


def check(base, tokenizer, names, context, position, chunk_size=None, expected=None):
    """Features within 1e-5 and gradients within 1e-4 of the independent implementation."""
    layout = make_layout(
        tokenizer, names, context.shape[-2], position, base.config.text_config.max_position_embeddings
    )
    shared = SharedPrefixPass(base, layout, context.dim() == 3)
    features = shared(context, chunk_size)
    if expected is None:
        expected = reference_features(base, tokenizer, names, context, position)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    assert relative_error(gradient_of(features, context), gradient_of(expected, context)) < 1e-4
    with torch.no_grad():  # chunks take another way without gradients, and constants are kept by now
        torch.testing.assert_close(shared(context, chunk_size), expected.detach(), rtol=0, atol=1e-5)
    return shared


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("which", ["base", "base_with_eos_id"])
def test_chunks(request, tokenizer, which, class_specific, position):
    base = request.getfixturevalue(which)
    context = random_context(*([len(NAMES)] if class_specific else []), 3, 32)
    for chunk_size in (None, 1, 3, len(NAMES) - 1, len(NAMES), 1000):
        check(base, tokenizer, NAMES, context, position, chunk_size)


words = st.lists(st.sampled_from(["cat", "dog", "sea", "(a)", "!", "hat", "of", "7"]), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(words.map(" ".join), min_size=1, max_size=12, unique=True),
    n_ctx=st.integers(1, 9),
    position=st.sampled_from(POSITIONS),
    class_specific=st.booleans(),
    chunk_size=st.none() | st.integers(1, 13),
    block_size=st.sampled_from([1, 2, 7, 8, 16, 64, 1000]),
    seed=st.integers(0, 3),
)
@example(["cat"], 1, "middle", False, None, 1, 0)  # ⌊1 / 2⌋ = 0: nothing is shared but SOS
@example(["cat"], 1, "end", True, 1, 64, 0)
@example(["cat", "dog"], 1, "front", False, None, 3, 0)  # live: [V] . [EOS], exactly one block each
@example(["cat", "dog"], 1, "front", False, None, 6, 0)  # exactly one block for both
@example(["cat", "sea sea sea sea sea sea sea sea"], 4, "middle", False, None, 8, 0)  # one class longer than a block
def test_any_classes(base, tokenizer, names, n_ctx, position, class_specific, chunk_size, block_size, seed):
    before, shared_prefix.BLOCK_SIZE = shared_prefix.BLOCK_SIZE, block_size
    try:
        context = random_context(*([len(names)] if class_specific else []), n_ctx, 32, seed=seed)
        check(base, tokenizer, names, context, position, chunk_size)
    finally:
        shared_prefix.BLOCK_SIZE = before


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True])
def test_names_that_fill_the_tower(long_base, tokenizer, class_specific, position):
    """All 77 positions, so a class is longer than a block of 64 tokens."""
    names = ["cat " * 66 + "dog", "cat", "dog " * 60, "sea"]
    context = random_context(*([4] if class_specific else []), 7, 32)
    shared = check(long_base, tokenizer, names, context, position)
    assert max(map(len, shared.layout.tokens)) == 77


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True])
def test_many_classes(base, tokenizer, class_specific, position):
    names = [f"{'sea ' * (i % 5)}{i}" for i in range(200)]
    context = random_context(*([200] if class_specific else []), 4, 32)
    shared = check(base, tokenizer, names, context, position)
    check(base, tokenizer, names, context, position, chunk_size=64)
    blocks = shared._part(range(200), shared.num_prefix)
    live = sum(len(row) - start for row, start in zip(shared.layout.tokens, shared.live_starts))
    assert blocks.tokens.numel() < 1.15 * live + 64, "packed, not padded"


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True])
def test_a_share_of_the_classes(base, tokenizer, class_specific, position):
    """What one of several processes computes; unequal shares, and in chunks."""
    context = random_context(*([len(NAMES)] if class_specific else []), 3, 32)
    shared = SharedPrefixPass(base, make_layout(tokenizer, NAMES, 3, position), class_specific)
    everything = shared(context)
    for classes in (range(0, 4), range(4, 10), range(9, 10)):
        for chunk_size in (None, 1, 3):
            part = shared(context, chunk_size, classes=classes)
            torch.testing.assert_close(part, everything[classes.start : classes.stop], rtol=0, atol=1e-5)
    parts = torch.cat([shared(context, 2, classes=c) for c in (range(0, 3), range(3, 10))])
    assert relative_error(gradient_of(parts, context), gradient_of(everything, context)) < 1e-4


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_attention_implementations_and_activations(tokenizer, attn, hidden_act):
    base = make_base(tokenizer, attn=attn, hidden_act=hidden_act)
    for position in POSITIONS:
        check(base, tokenizer, NAMES, random_context(3, 32), position)


@pytest.mark.parametrize("layers", [1, 4])
def test_depths(tokenizer, layers):
    """With one layer, the first is the last."""
    base = make_base(tokenizer, layers=layers)
    for position in POSITIONS:
        check(base, tokenizer, NAMES, random_context(3, 32), position)
        check(base, tokenizer, NAMES, random_context(len(NAMES), 3, 32), position, chunk_size=4)


def test_finished_texts(base, tokenizer):
    """Without context slots, as for hand-written prompts."""
    texts = ["a photo of a cat.", "dog (cat).", "a", ""]
    shared = SharedPrefixPass(base, tokenize_texts(tokenizer, texts))
    with torch.no_grad():
        expected = base.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
        for chunk_size in (None, 1, 3):
            torch.testing.assert_close(shared(None, chunk_size), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(tokenizer, dtype, tolerance, autocast, class_specific, position):
    """As near to the fp32 result as the plain pass in the same precision; context and gradient stay fp32.

    bf16 keeps 8 bits and fp16 11, so after 2 layers about 1 % and 0.1 % are left of the norm; `tolerance` is 2 to 4
    times that.
    """
    base = make_base(tokenizer)
    context = random_context(*([len(NAMES)] if class_specific else []), 3, 32)
    layout = make_layout(tokenizer, NAMES, 3, position)
    exact = reference_features(base, tokenizer, NAMES, context, position)
    exact_gradient = gradient_of(exact, context)
    if not autocast:
        base = base.to(dtype)
    precision = torch.autocast("cpu", dtype=dtype) if autocast else contextlib.nullcontext()
    shared_pass = SharedPrefixPass(base, layout, class_specific)
    with precision:
        plain = plain_text_features(base, layout, context)
        results = [shared_pass(context), shared_pass(context, 4)]
    for features in results:
        assert features.dtype == plain.dtype == dtype
        assert relative_error(features, exact) < tolerance
        assert relative_error(features, plain) < 2 * tolerance
        gradient = gradient_of(features, context)
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, exact_gradient) < 2 * tolerance


@pytest.mark.parametrize("position", ["end", "front"])
def test_constants_are_kept_until_the_weights_change(tokenizer, position):
    base = make_base(tokenizer)
    names = NAMES
    context = random_context(len(names), 3, 32)
    shared = check(base, tokenizer, names, context, position)
    calls = []
    handle = base.text_model.encoder.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    shared(context)
    shared(context)
    handle.remove()
    assert len(calls) == 2, "one run over the live tokens for each call, none over constants"
    with torch.no_grad():
        for parameter in base.text_model.parameters():
            parameter.mul_(1.1)
    expected = reference_features(base, tokenizer, names, context, position)
    torch.testing.assert_close(shared(context), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert shared(context).dtype == torch.bfloat16
    torch.testing.assert_close(shared(context), expected, rtol=0, atol=1e-5)
    base.double()
    assert shared(context).dtype == torch.float64
    assert relative_error(shared(context), expected) < 1e-5


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True])
def test_training_after_inference_mode(base, tokenizer, class_specific, position):
    """What was kept in inference mode must not get in the way of gradients."""
    context = random_context(*([len(NAMES)] if class_specific else []), 3, 32)
    shared = SharedPrefixPass(base, make_layout(tokenizer, NAMES, 3, position), class_specific)
    with torch.inference_mode():
        shared(context)
    for chunk_size in (None, 3):
        gradient = gradient_of(shared(context, chunk_size), context)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


@pytest.mark.parametrize("position", POSITIONS)
def test_two_backward_passes_through_one_pass(base, tokenizer, position):
    """As in gradient accumulation: the constants are no part of any graph."""
    context = random_context(3, 32)
    shared = SharedPrefixPass(base, make_layout(tokenizer, NAMES, 3, position))
    first, second = shared(context), shared(context)
    assert torch.equal(gradient_of(first, context), gradient_of(second, context))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_the_base_gets_no_gradient(tokenizer, position, chunk_size):
    base = make_base(tokenizer).requires_grad_(False)
    context = random_context(3, 32)
    SharedPrefixPass(base, make_layout(tokenizer, NAMES, 3, position))(context, chunk_size).sum().backward()
    assert all(parameter.grad is None for parameter in base.parameters())


def test_quick_gelu():
    """The hand-written gradient, against autograd and finite differences, on more rows than one slice holds."""
    x = torch.randn(300, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(shared_prefix._QuickGELU.apply(x), x * torch.sigmoid(1.702 * x))
    weights = torch.randn(300, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((shared_prefix._QuickGELU.apply(x) * weights).sum(), x)
    (expected,) = torch.autograd.grad((x * torch.sigmoid(1.702 * x) * weights).sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert torch.autograd.gradcheck(shared_prefix._QuickGELU.apply, (x[:3].detach().requires_grad_(),))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30), data=st.data())
def test_equal_shares(base, tokenizer, lengths, data):
    """Every process gets classes, every class a process, and no share is far above the mean."""
    names = [f"{i} " + "cat " * (length - 1) for i, length in enumerate(lengths)]
    shared = SharedPrefixPass(base, make_layout(tokenizer, names, 3))
    shares = data.draw(st.integers(1, min(8, len(names))))
    bounds = shared.equal_shares(shares)
    assert len(bounds) == shares + 1 and bounds[0] == 0 and bounds[-1] == len(names)
    assert all(start < stop for start, stop in zip(bounds, bounds[1:]))
    live = [len(row) - start for row, start in zip(shared.layout.tokens, shared.live_starts)]
    loads = [sum(live[start:stop]) for start, stop in zip(bounds, bounds[1:])]
    assert max(loads) <= sum(live) / shares + 2 * max(live)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), extra=st.integers(0, 30))
def test_first_fit(lengths, extra):
    capacity = max(lengths) + extra
    bins = shared_prefix._first_fit(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths))), "each class once"
    loads = [sum(lengths[i] for i in members) for members in bins]
    assert max(loads) <= capacity
    assert sum(load <= capacity / 2 for load in loads) <= 1, "two half-empty bins would be one"


def test_few_tokens_take_ordered_weights(tokenizer):
    """Frozen fp32 layers on a CPU do, until the weights change; the numbers are the plain pass's."""
    base = make_base(tokenizer).requires_grad_(False)
    layout = make_layout(tokenizer, NAMES[:2], 3, "end", base.config.text_config.max_position_embeddings)
    shared, context = SharedPrefixPass(base, layout), random_context(3, 32)
    for _ in range(2):
        features = shared(context)
        expected = plain_text_features(base, layout, context)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
        assert relative_error(gradient_of(features, context), gradient_of(expected, context)) < 1e-4
        assert len(shared._linear._ordered) == 6 * base.config.text_config.num_hidden_layers
        with torch.no_grad():
            base.text_model.encoder.layers[0].mlp.fc1.weight.mul_(1.5)
    shared.forget()
    assert not shared._linear._ordered


@pytest.mark.parametrize("why", ["many", "no gradient", "hook", "subclass", "bf16", "not frozen"])
def test_other_layers_are_called_as_they_are(why):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers, tokens = LinearLayers(), MAX_TOKENS + 1 if why == "many" else 5
    dtype = torch.bfloat16 if why == "bf16" else torch.float32
    layer = (Doubled if why == "subclass" else torch.nn.Linear)(8, 4).to(dtype).requires_grad_(why == "not frozen")
    if why == "hook":
        layer.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(tokens, 8, dtype=dtype).requires_grad_(why != "no gradient")
    found, expected = layers(layer, x), layer(x)
    assert torch.equal(found, expected) and not layers._ordered
    assert type(found.grad_fn) is type(expected.grad_fn)
