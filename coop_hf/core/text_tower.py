"""How a text tower turns prompts into class embeddings: the plain pass, the truth that every faster pass is held to.

Everything runs through the base model's own modules, so any checkpoint, dtype, quantised linear layer or device map
keeps working, and nothing in the base is changed.
"""

import torch
from torch.nn import functional as F
from transformers import CLIPModel
from transformers.masking_utils import create_causal_mask

from .layout import PromptLayout


__all__ = ["check_base_model", "plain_text_features", "prompt_embeddings"]


def check_base_model(base_model) -> None:
    """Raises `TypeError` unless `base_model` is a `CLIPModel`, whose text tower is causal and pools at EOS."""
    if not isinstance(base_model, CLIPModel):
        raise TypeError(
            f"CoOp runs on transformers' CLIPModel (OpenAI CLIP, OpenCLIP, MetaCLIP and others in that format); got "
            f"{type(base_model).__name__}. Load the base with `CLIPModel.from_pretrained(...)`."
        )


def prompt_embeddings(
    text_model, tokens: torch.Tensor, context: torch.Tensor | None, positions=None, class_index=None
) -> torch.Tensor:
    """Token plus position embeddings, with the context vectors in their slots.

    Args:
        text_model (`CLIPTextModel`): the base model's text tower.
        tokens (`torch.Tensor`): `(rows, length)`; ids, or -1 - k for context slot k.
        context (`torch.Tensor`, *optional*): `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`, fp32. Cast here, and only
            here, to the tower's dtype.
        positions (`torch.Tensor`, *optional*): `(rows, length)`, defaults to 0, 1, 2 ... in each row.
        class_index (`torch.Tensor`, *optional*): `(rows, length)`, the class of each token, for a class-specific
            context; defaults to the row.

    Returns:
        `torch.Tensor` `(rows, length, dim)`.
    """
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    embeddings = text_model.embeddings.token_embedding(tokens.clamp_min(0))
    if context is not None:
        slots = (-1 - tokens).clamp_min(0)
        if context.dim() == 3:
            if class_index is None:
                class_index = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
            slots = slots + class_index * context.shape[1]
        vectors = F.embedding(slots.to(context.device), context.flatten(0, -2))
        is_slot = (tokens < 0)[..., None].to(embeddings.device)
        embeddings = torch.where(is_slot, vectors.to(embeddings.device, embeddings.dtype), embeddings)
    return embeddings + text_model.embeddings.position_embedding(positions)


def plain_text_features(
    base_model: CLIPModel, layout: PromptLayout, context: torch.Tensor | None = None, length: int | None = None
) -> torch.Tensor:
    """Class embeddings by the plain pass: every prompt a row, every row padded.

    Args:
        base_model (`CLIPModel`): the frozen base.
        layout (`PromptLayout`): the prompts.
        context (`torch.Tensor`, *optional*): `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`.
        length (`int`, *optional*, defaults to the longest prompt): columns to pad to. The tower is causal, so columns
            behind EOS change nothing; the public CoOp code always takes 77.

    Returns:
        `torch.Tensor` `(num_classes, projection_dim)`, projected, not normalised.
    """
    text_model = base_model.text_model
    tokens, eos_positions = layout.padded(length)
    device = text_model.embeddings.position_ids.device
    tokens, eos_positions = tokens.to(device), eos_positions.to(device)
    hidden_states = prompt_embeddings(text_model, tokens, context)
    mask = create_causal_mask(
        config=text_model.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=None
    )
    hidden_states = text_model.encoder(
        inputs_embeds=hidden_states, attention_mask=mask, is_causal=True
    ).last_hidden_state
    rows = torch.arange(len(eos_positions), device=hidden_states.device)
    pooled = hidden_states[rows, eos_positions.to(hidden_states.device)]
    return base_model.text_projection(text_model.final_layer_norm(pooled))
