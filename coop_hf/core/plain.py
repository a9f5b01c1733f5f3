"""The plain pass, the truth that every faster pass is held to: every prompt a padded row through the text tower."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .families import Family, get_family
from .layout import PromptLayout


__all__ = ["TextPrompts", "as_text_prompts", "is_by_image", "plain_text_features"]

# Rows are computed in chunks of about so many tokens, so that memory does not grow with the number of classes.
TOKENS_AT_ONCE = 4096

# Context vectors for layer 0, or by layer.
TextPrompts = Tensor | dict[int, Tensor] | None


def as_text_prompts(prompts: TextPrompts) -> dict[int, Tensor]:
    """Text prompts by layer, each `(images or 1, classes or 1, M, dim)`.

    Args:
        prompts (`torch.Tensor` or `dict[int, torch.Tensor]`, *optional*): `(M, dim)` for all classes, `(classes, M,
            dim)`, or `(images, classes or 1, M, dim)`; a tensor alone is that of layer 0.
    """
    by_layer = prompts if isinstance(prompts, dict) else {} if prompts is None else {0: prompts}
    return {layer: value[(None,) * (4 - value.dim())] for layer, value in by_layer.items()}


def is_by_image(prompts: TextPrompts) -> bool:
    """Whether there are prompts for each of several images."""
    return any(v.dim() == 4 for v in (prompts.values() if isinstance(prompts, dict) else [prompts]) if v is not None)


def plain_text_features(
    base_model: Any,
    layout: PromptLayout,
    prompts: TextPrompts = None,
    length: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Class embeddings by the plain pass.

    Args:
        base_model (`PreTrainedModel` or [`Family`]): the frozen base.
        layout (`PromptLayout`): the prompts.
        prompts (`torch.Tensor` or `dict[int, torch.Tensor]`, *optional*): see [`as_text_prompts`], fp32. Cast to the
            tower's dtype here. Deeper ones replace the context slots' hidden states at the input of their layer.
        length (`int`, *optional*): columns to pad to; defaults to the longest prompt, or to all positions where the
            tower sees its padding. In a causal tower, columns behind EOS change nothing; the public CoOp code always
            takes 77.
        chunk_size (`int`, *optional*): how many classes at a time. With gradients, more than one chunk is computed
            again in the backward pass instead of being kept. Defaults to what keeps memory bounded.

    Returns:
        `torch.Tensor` `(num_classes, projection_dim)`, or `(images, num_classes, projection_dim)` where prompts are
        given by image; projected, not normalised.
    """
    family, by_layer = get_family(base_model), as_text_prompts(prompts)
    length = length or (family.max_positions if family.pads_to_full else layout.max_length)
    images = max([1, *[len(value) for value in by_layer.values()]])
    at_once = chunk_size or max(1, TOKENS_AT_ONCE // length)
    rows = []
    for image in range(images):
        own = {layer: value[image if len(value) > 1 else 0] for layer, value in by_layer.items()}
        features = []
        for start in range(0, layout.num_classes, at_once):
            classes = range(start, min(start + at_once, layout.num_classes))
            if torch.is_grad_enabled() and own and images * layout.num_classes > at_once:
                features.append(
                    checkpoint(
                        _rows_again,
                        family,
                        layout,
                        own,
                        length,
                        classes,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                )
            else:
                features.append(_rows(family, layout, own, length, classes))
        rows.append(torch.cat(features) if len(features) > 1 else features[0])
    return torch.stack(rows) if is_by_image(prompts) else rows[0]


@functools.cache
def _trim_heap() -> Any:
    """glibc's call to give free memory back to the system; one that does nothing elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda padding: 0


def _rows_again(*given: Any) -> Tensor:
    """One of many chunks, which is computed here and once more before its backward pass."""
    if given[0].device.type == "cpu":
        # glibc does not find the holes again that aligned blocks of a few MiB leave: 1,000 classes of SigLIP-base
        # held 13.6 GiB, most of it free.
        _trim_heap()(0)
    return _rows(*given)


def _rows(family: Family, layout: PromptLayout, prompts: dict[int, Tensor], length: int, classes: range) -> Tensor:
    tokens, ends = (x.to(family.device) for x in layout.padded(length, classes))
    columns = torch.arange(length, device=tokens.device)[None]
    starts = torch.tensor([len(layout.tokens[c]) for c in classes], device=tokens.device)[:, None]
    is_token = columns > ends[:, None] - starts
    is_token &= columns <= ends[:, None]
    vectors = _put(family.token_embedding(tokens.clamp_min(0)), tokens, prompts.get(0), classes)
    hidden = family.embed_text(vectors, columns)
    if family.pads_to_full and not layout.masks_padding:  # as the family's own pipeline: what the tokenizer masks
        is_token = torch.ones_like(is_token)
    mask = family.text_mask(hidden, is_token)
    for index, layer in enumerate(family.text_layers):
        if index:
            hidden = _put(hidden, tokens, prompts.get(index), classes)
        hidden = family.run_text_layer(layer, hidden, mask)
    places = family.pooled_position(ends, length).to(hidden.device)
    return family.project_text(hidden[torch.arange(len(places), device=hidden.device), places])


def _put(hidden: Tensor, tokens: Tensor, prompts: Tensor | None, classes: range) -> Tensor:
    """Hidden states `(rows, length, dim)` with `prompts` `(classes or 1, M, dim)` in the first M context slots."""
    if prompts is None:
        return hidden
    slots = (-1 - tokens).clamp(0, prompts.shape[1] - 1)
    if prompts.shape[0] > 1:
        slots = slots + prompts.shape[1] * torch.tensor(classes, device=tokens.device)[:, None]
    vectors = F.embedding(slots.to(prompts.device), prompts.flatten(0, 1)).to(hidden.device, hidden.dtype)
    is_slot = (tokens < 0) & (tokens >= -prompts.shape[1])
    return torch.where(is_slot[..., None].to(hidden.device), vectors, hidden)
