"""CoOp, Context Optimization: learnable vectors where a hand-written prompt has words.

    [SOS] [V]1 ... [V]M [CLASS] . [EOS]

https://arxiv.org/abs/2109.01134, section 3.2: M context vectors, one set for all classes (unified) or one for each
(class-specific), learned by cross-entropy while every weight of the base stays as it is.
"""

from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..config import CoOpConfig, PromptConfig
from ..core.families import Family
from ..core.layout import encode_words
from ..core.texts import is_clip_tokenizer, warn_about_ftfy
from .base import Adapter, Prompts


__all__ = ["CONTEXT_STD", "CoOp", "init_context", "num_context_tokens"]

CONTEXT_STD = 0.02  # standard deviation of the random start, section 4.1 of the paper's code configuration


class CoOp(Adapter, method="coop"):
    """The context vectors `context`: `(n_ctx, text_width)`, class-specific `(num_classes, n_ctx, text_width)`."""

    def __init__(self, config: CoOpConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        num_classes = None if config.class_names is None else len(config.class_names)
        self.context = nn.Parameter(init_context(config, family.token_embedding, tokenizer, num_classes))

    @classmethod
    def complete(cls, config: PromptConfig, family: Family, tokenizer: Any) -> dict[str, Any]:
        assert isinstance(config, CoOpConfig)
        n_ctx = num_context_tokens(config, tokenizer)
        if n_ctx >= family.max_positions:  # before anything of that size is made; with the classes it is exact
            raise ValueError(
                f"`n_ctx`={n_ctx} context tokens do not fit into this text tower's {family.max_positions} positions."
            )
        return {"n_ctx": n_ctx}

    def prompts(self, image_embeds: Tensor | None = None, class_embeds: Tensor | None = None) -> Prompts:
        return Prompts({0: self.context})


def num_context_tokens(config: CoOpConfig, tokenizer: Any) -> int:
    """The number of context tokens M: `config.n_ctx`, or the BPE tokens of `config.ctx_init`.

    Raises:
        ValueError: `ctx_init` has more tokens than `n_ctx` asks for, or none.
    """
    if config.ctx_init is None:
        return config.n_ctx or 0  # the configuration filled it in
    count = len(_word_ids(config, tokenizer))
    if count == 0:
        raise ValueError(f"the tokenizer finds no token in ctx_init={config.ctx_init!r}: pass words, or None.")
    if config.n_ctx is not None and count > config.n_ctx and not config.cuts_words:
        raise ValueError(
            f"ctx_init={config.ctx_init!r} has {count} BPE tokens, more than n_ctx={config.n_ctx}: set n_ctx={count}, "
            "leave n_ctx out, or use fewer words."
        )
    return config.n_ctx or count


def init_context(
    config: CoOpConfig, token_embedding: nn.Embedding, tokenizer: Any, num_classes: int | None = None
) -> Tensor:
    """Context vectors at their start: N(0, 0.02²), or the token embeddings of words.

    Random numbers come from torch's global generator, on the CPU, so that a seed gives the same start on any device.

    Args:
        config (`CoOpConfig`): which context; its `ctx_init` words take the last slots, noise the slots before them.
        token_embedding (`nn.Embedding`): the base model's token embedding.
        tokenizer (`PreTrainedTokenizerBase`): the base model's tokenizer.
        num_classes (`int`, *optional*): needed for a class-specific context.

    Returns:
        `torch.Tensor`, fp32, on the CPU: `(n_ctx, dim)`, or class-specific `(num_classes, n_ctx, dim)`.
    """
    n_ctx, dim = num_context_tokens(config, tokenizer), token_embedding.embedding_dim
    shape = (num_classes or 0, n_ctx, dim) if config.class_specific else (n_ctx, dim)
    context = torch.empty(shape, dtype=torch.float32).normal_(std=CONTEXT_STD)
    if config.ctx_init is not None:
        ids = torch.tensor(_word_ids(config, tokenizer)[:n_ctx])  # more only where `cuts_words`
        with torch.no_grad(), align_module_device(token_embedding):  # which brings offloaded weights
            words = token_embedding.weight[ids.to(token_embedding.weight.device)]
        context[..., n_ctx - len(ids) :, :] = words.float().cpu()
    return context


def _word_ids(config: CoOpConfig, tokenizer: Any) -> list[int]:
    """Tokens of `ctx_init`, with underscores read as spaces, as in the public code."""
    words = str(config.ctx_init).replace("_", " ")
    if is_clip_tokenizer(tokenizer):
        warn_about_ftfy([words])
    return encode_words(tokenizer, [words])[0]
