"""CLIP-LoRA (https://arxiv.org/abs/2405.18541): low-rank weights in the attention of both towers, a reference line.

    W' = W + α/√r · B·A    for the query, key and value of every layer, r = 2, α = 1; B starts at 0

Cross-entropy of the hand-written template's class embeddings, which the towers compute anew in every step. The layers
are PEFT's own, in a copy of the base; nothing of this is an adapter of this library.
"""

import copy
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import set_seed

from ..core.families import get_family
from ..core.layout import fill_template, tokenize_texts
from ..core.plain import plain_text_features
from ..data.labelled_images import LabelledImages, collate


__all__ = ["fit_clip_lora"]

# Names of the query, key and value in the families' attentions; ALIGN's image tower has none.
TARGETS = ["q_proj", "k_proj", "v_proj", "query", "key", "value"]


def _with_lora(base: Any, rank: int, alpha: float, dropout: float) -> Any:
    """A copy of the base with LoRA layers."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("CLIP-LoRA needs PEFT, which is not installed: `pip install coop_hf[peft]`.") from error
    names = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = [name for name in TARGETS if name in names]
    if not targets:
        raise ValueError(f"{type(base).__name__} has no layers called {', '.join(TARGETS)}, which CLIP-LoRA changes.")
    scale: Any = alpha
    config = LoraConfig(r=rank, lora_alpha=scale, use_rslora=True, lora_dropout=dropout, target_modules=targets)
    return get_peft_model(copy.deepcopy(base), config)


def fit_clip_lora(
    model: Any,
    images: LabelledImages,
    template: str,
    num_steps: int,
    batch_size: int = 32,
    learning_rate: float = 2e-4,
    weight_decay: float = 1e-2,
    rank: int = 2,
    alpha: float = 1.0,
    dropout: float = 0.25,
    seed: int = 0,
) -> Any:
    """Trains LoRA layers on few images, by the official code's values; the last step counts.

    Args:
        model (`CoOpModel`): gives base and tokenizer; neither is changed.
        images (`LabelledImages`): what is learned from, augmented if it says so.
        template (`str`): the hand-written prompt.
        num_steps (`int`): steps; the official code takes 500 for each shot.
        batch_size (`int`, *optional*, defaults to 32): images in a step.
        learning_rate (`float`, *optional*, defaults to 2e-4): of AdamW, at the start of a cosine that ends at 1e-6.
        weight_decay (`float`, *optional*, defaults to 0.01): of the LoRA matrices.
        rank, alpha, dropout (*optional*, default to 2, 1.0 and 0.25): of the LoRA layers; their scale is
            `alpha / sqrt(rank)`.
        seed (`int`, *optional*, defaults to 0): of start, order and dropout.

    Returns:
        `peft.PeftModel`: a copy of the base with the trained layers, in evaluation mode; a base model like others.

    Raises:
        ImportError: PEFT is missing (`pip install coop_hf[peft]`).
        ValueError: a base without attention layers of known names, or no steps.
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
    set_seed(seed)
    base = _with_lora(model.get_base_model(), rank, alpha, dropout).train()
    family = get_family(base)
    layout = tokenize_texts(model.tokenizer, fill_template(template, images.class_names), family.max_positions)
    learned = [parameter for parameter in base.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, eta_min=1e-6)
    scale, bias = family.logit_scale, family.logit_bias
    step = epoch = 0
    while step < num_steps:
        images.set_epoch(epoch)
        for batch in DataLoader(images, batch_size, shuffle=True, collate_fn=collate):
            labels = batch.pop("labels").to(family.device)
            texts = F.normalize(plain_text_features(family, layout).float(), dim=-1)
            found = F.normalize(family.image_features(batch.pop("pixel_values"), None, **batch).float(), dim=-1)
            logits = scale.to(found.device) * found @ texts.T
            loss = F.cross_entropy(logits if bias is None else logits + bias.to(logits.device), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == num_steps:
                break
        epoch += 1
    return base.eval().requires_grad_(False)
