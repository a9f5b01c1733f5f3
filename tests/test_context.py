import pytest
import torch

from coop_hf import CoOpConfig
from coop_hf.adapters.coop import CONTEXT_STD, init_context, num_context_tokens


@pytest.fixture
def embedding(base):
    return base.text_model.embeddings.token_embedding


def words(embedding, tokenizer, text):
    ids = tokenizer(text)["input_ids"][1:-1]
    return embedding.weight[ids]


def test_random_start(tokenizer):
    wide = torch.nn.Embedding(len(tokenizer), 512)
    torch.manual_seed(3)
    context = init_context(CoOpConfig(n_ctx=16), wide, tokenizer)
    assert context.shape == (16, 512) and context.dtype == torch.float32 and not context.requires_grad
    assert abs(context.mean().item()) < 1e-3 and abs(context.std().item() - 0.02) < 5e-4 and CONTEXT_STD == 0.02
    torch.manual_seed(3)
    assert torch.equal(context, init_context(CoOpConfig(), wide, tokenizer)), "16 is the default, and a seed decides"
    specific = init_context(CoOpConfig(n_ctx=4, class_specific=True), wide, tokenizer, 7)
    assert specific.shape == (7, 4, 512)
    assert len({tuple(row.flatten()[:4].tolist()) for row in specific}) == 7, "each class has noise of its own"


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("n_ctx", [None, 4, 6])
def test_words(embedding, tokenizer, class_specific, n_ctx):
    """Words take the last slots, in order, in every class; noise the slots before them."""
    config = CoOpConfig(n_ctx=n_ctx, ctx_init="a photo of a", class_specific=class_specific)
    context = init_context(config, embedding, tokenizer, 3 if class_specific else None)
    total = n_ctx or 4
    assert context.shape == ((3, total, 32) if class_specific else (total, 32))
    expected = words(embedding, tokenizer, "a photo of a")
    assert torch.equal(context[..., total - 4 :, :], expected.expand_as(context[..., total - 4 :, :]))
    noise = context[..., : total - 4, :]
    assert noise.numel() == 0 or (0 < noise.abs().max() < 6 * CONTEXT_STD)


def test_words_of_a_half_precision_base(embedding, tokenizer):
    half = torch.nn.Embedding.from_pretrained(embedding.weight.detach().half())
    context = init_context(CoOpConfig(ctx_init="photo of"), half, tokenizer)
    assert context.dtype == torch.float32
    assert torch.equal(context, words(half, tokenizer, "photo of").float())


def test_word_start_does_not_share_memory_with_the_base(embedding, tokenizer):
    before = embedding.weight.detach().clone()
    init_context(CoOpConfig(ctx_init="photo of"), embedding, tokenizer).zero_()
    assert torch.equal(embedding.weight, before)


def test_tokens_are_counted_not_words(tokenizer):
    """("hat" is 3 tokens here: counting words would give 2.)"""
    assert num_context_tokens(CoOpConfig(ctx_init="a hat"), tokenizer) == 4
    assert num_context_tokens(CoOpConfig(ctx_init="a hat", n_ctx=9), tokenizer) == 9
    assert num_context_tokens(CoOpConfig(n_ctx=5), tokenizer) == 5
    with pytest.raises(ValueError, match=r"ctx_init='a hat' has 4 BPE tokens, more than n_ctx=3: set n_ctx=4"):
        num_context_tokens(CoOpConfig(ctx_init="a hat", n_ctx=3), tokenizer)
    with pytest.raises(ValueError, match="special token"):
        num_context_tokens(CoOpConfig(ctx_init="a <|endoftext|>"), tokenizer)


def test_real_words(real_base, real_tokenizer):
    embedding = real_base.text_model.embeddings.token_embedding
    context = init_context(CoOpConfig(ctx_init="A photo  of a"), embedding, real_tokenizer)
    assert torch.equal(context, embedding.weight[[320, 1125, 539, 320]])
