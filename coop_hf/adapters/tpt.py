"""TPT, Test-time Prompt Tuning: the context is tuned on each image that is to be classified, without a label.

    p(y | x, V) = softmax(s · cos(v, t(V)))    of 64 views of an image x; the surest tenth of them is kept
    V* = V - one AdamW step on the entropy of the mean over the kept views of p(y | x, V)

https://arxiv.org/abs/2209.07511, section 3.2, as in the official code: the prediction is the plain view's, with V*.
The views are what it takes for ImageNet and its variants; AugMix, which it adds on other data sets, is not used.

All images start from one context, so the text tower runs forward once for all of them, and back once for each.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_counts
from ..core import shared_prefix
from ..core.class_prompts import ClassPrompts
from ..core.layout import encode_words, make_layout
from ..data.inputs import open_images, read_image
from ..data.transforms import eval_transform, train_transform


__all__ = ["TPTOutput", "tpt"]

# Keeps an fp16 tower's gradients from underflow, as the official code's scaler does; a power of two changes no bit.
_GRADIENT_SCALE = 1024.0
_IMAGES_AT_ONCE = 32  # that share one forward pass from the common start


@dataclass
class TPTOutput:
    """What [`tpt`] gives.

    Attributes:
        logits (`torch.Tensor`): `(images, num_classes)`, fp32, of the plain views with the tuned contexts.
        context (`torch.Tensor`): `(images, 1, n_ctx, text_width)`, fp32, the tuned contexts.
        kept (`torch.Tensor`): `(images, kept views)`, numbers of the views that were kept, the surest first.
        loss (`torch.Tensor`): `(images,)`, the entropy of their mean prediction before the first step.
    """

    logits: Tensor
    context: Tensor
    kept: Tensor
    loss: Tensor


@torch.no_grad()
def tpt(
    model: Any,
    images: Any = None,
    *,
    views: Tensor | None = None,
    num_views: int = 64,
    share: float = 0.1,
    num_steps: int = 1,
    learning_rate: float = 5e-3,
    weight_decay: float = 0.01,
    adam_epsilon: float = 1e-8,
    seed: int = 0,
    ctx_init: str = "a photo of a",
    batch_size: int = 32,
    _view: Any = None,
) -> TPTOutput:
    """Tunes a context for each image, and classifies the image with it. The model stays as it is.

    Starts from the context of the active adapter, a unified one of CoOp; within `model.disable_adapter()` from the
    words `ctx_init`, as the official code does without a learned prompt. Predictions are softmaxes, on SigLIP too.

    Args:
        model (`CoOpModel`): the model.
        images (*optional*): one image or several, as for `CoOpModel.predict`.
        views (`torch.Tensor`, *optional*): instead of images, pixels `(images, views, 3, height, width)` or image
            embeddings `(images, views, projection_dim)`; the first view of an image is the image itself.
        num_views (`int`, *optional*, defaults to 64): the plain view, and random resized crops, flipped in half of the
            cases.
        share (`float`, *optional*, defaults to 0.1): how many of the views are kept, those of the lowest entropy.
        num_steps (`int`, *optional*, defaults to 1): of AdamW, which starts afresh for each image.
        learning_rate (`float`, *optional*, defaults to 5e-3): of AdamW.
        weight_decay (`float`, *optional*, defaults to 0.01): of AdamW.
        adam_epsilon (`float`, *optional*, defaults to 1e-8): of AdamW.
        seed (`int`, *optional*, defaults to 0): of the crops. They are the same for every image, so that no answer
            depends on the images beside it.
        ctx_init (`str`, *optional*, defaults to `"a photo of a"`): words to start from while the adapter is disabled.
        batch_size (`int`, *optional*, defaults to 32): views that go through the image tower at a time.

    Returns:
        `TPTOutput`.

    Raises:
        ValueError: an adapter that is not a unified CoOp context, a bad option, or an image that cannot be read.
    """
    check_counts(num_views=num_views, num_steps=num_steps, batch_size=batch_size)
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be above 0 and at most 1, got {share!r}.")
    if (images is None) == (views is None):
        raise ValueError(f"pass either `images` or `views`; got {'neither' if views is None else 'both'}.")
    start, prompts = _start(model, _view or model.view(), ctx_init)
    if views is None:
        images = list(open_images(images)[0])
        if not images:
            raise ValueError("`images` is empty: pass at least one image.")
    parts = []
    for first in range(0, len(images if views is None else views), _IMAGES_AT_ONCE):
        if views is None:
            indices = range(first, min(first + _IMAGES_AT_ONCE, len(images)))
            embeds = _embed_images(model, images, indices, num_views, seed, batch_size)
        else:
            embeds = _embed_views(model, views[first : first + _IMAGES_AT_ONCE], batch_size)
        with torch.inference_mode(False):  # the clones may learn, also where the caller is in inference mode
            embeds, context = F.normalize(embeds.float(), dim=-1).clone(), start.clone()
            adamw = functools.partial(torch.optim.AdamW, lr=learning_rate, weight_decay=weight_decay, eps=adam_epsilon)
            parts.append(_tune(model, prompts, context, embeds, share, num_steps, adamw))
    return TPTOutput(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TPTOutput)})


def _start(model: Any, view: Any, ctx_init: str) -> tuple[Tensor, ClassPrompts]:
    """The context to start from, `(n_ctx, text_width)`, and the prompts that it stands in."""
    adapter = view.adapter
    if view.classes is None:
        raise ValueError("the model has no class names yet: call `model.set_class_names([...])`.")
    if view.is_disabled:
        ids = encode_words(model.tokenizer, [ctx_init])[0]
        if not ids:
            raise ValueError(f"the tokenizer finds no token in ctx_init={ctx_init!r}: pass words.")
        words = model.family.token_embedding(torch.tensor(ids, device=model.device)).float()
        names = view.classes.class_names
        layout = make_layout(model.tokenizer, names, len(ids), max_positions=model.family.max_positions)
        return words, ClassPrompts(model.family, layout)
    if adapter.method != "coop" or adapter.is_class_bound:
        kind = "is class-specific" if adapter.method == "coop" else f"is of the method {adapter.method!r}"
        raise ValueError(
            f"TPT tunes the unified context of a CoOp adapter, and the adapter {model.active_adapter!r} {kind}: "
            f"activate another, or call it within `model.disable_adapter()` to start from {ctx_init!r}."
        )
    return adapter.context.detach(), view.classes


def _embed_views(model: Any, views: Tensor, batch_size: int) -> Tensor:
    """Image embeddings `(images, views, projection_dim)`, of pixels or as they are."""
    if views.dim() == 3 and views.shape[-1] == model.family.projection_dim:
        return views.to(model.device)
    if views.dim() != 5:
        raise ValueError(
            "`views` must be pixels (images, views, 3, height, width) or image embeddings (images, views, "
            f"{model.family.projection_dim}), got {tuple(views.shape)}."
        )
    parts = [model.get_image_features(part) for part in torch.split(views.flatten(0, 1), batch_size)]
    return torch.cat(parts).view(*views.shape[:2], -1)


def _embed_images(model: Any, images: Any, indices: range, num_views: int, seed: int, batch_size: int) -> Tensor:
    augment = train_transform(model.image_processor, resample=PIL.Image.Resampling.BILINEAR)
    make = functools.partial(
        _make_views,
        plain=eval_transform(model.image_processor, model.config.original_crop),
        augment=augment,
        num_views=num_views,
        seed=seed,
    )
    rows = []
    for index in indices:
        views = read_image(images[index], index, make)
        batches = zip(*(torch.split(value, batch_size) for value in views.values()))
        rows.append(torch.cat([model.get_image_features(**dict(zip(views, batch))) for batch in batches]))
    return torch.stack(rows)


def _make_views(image: PIL.Image.Image, plain: Any, augment: Any, num_views: int, seed: int) -> dict[str, Tensor]:
    made = [plain(image), *(augment(image, np.random.default_rng([seed, k])) for k in range(1, num_views))]
    made = [view if isinstance(view, dict) else {"pixel_values": view} for view in made]
    return {name: torch.stack([view[name] for view in made]) for name in made[0]}


def _tune(
    model: Any,
    prompts: ClassPrompts,
    start: Tensor,
    embeds: Tensor,
    share: float,
    num_steps: int,
    adamw: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> TPTOutput:
    """`tpt` of normalised view embeddings `(images, views, projection_dim)`."""

    def logits_of(features: Tensor, image_embeds: Tensor) -> Tensor:
        """`(..., views, num_classes)` of class embeddings `(..., num_classes, projection_dim)`."""
        text = F.normalize(features.float(), dim=-1).to(image_embeds.device)
        logits = model.logit_scale.to(text.device) * image_embeds @ text.transpose(-1, -2)
        bias = model.family.logit_bias
        return logits if bias is None else logits + bias.to(text.device)

    def features_of(context: Tensor) -> Tensor:
        return prompts.features({0: context}, model.text_pass, model.text_chunk_size)

    with torch.enable_grad():
        shared = start.requires_grad_()
        features = features_of(shared)
        leaf = features.detach().requires_grad_()
        log_p = logits_of(leaf, embeds).log_softmax(dim=-1)
        entropies = -(log_p.detach().exp() * log_p.detach()).sum(-1)
        kept = entropies.argsort(dim=-1, stable=True)[:, : max(1, int(embeds.shape[1] * share))]
        losses = _entropy_of_mean(log_p.gather(1, kept[..., None].expand(-1, -1, log_p.shape[-1])))
        tops = [torch.autograd.grad(loss * _GRADIENT_SCALE, leaf, retain_graph=True)[0] for loss in losses]
        gradients = [torch.autograd.grad(features, shared, top, retain_graph=True)[0] for top in tops]
    gradient = torch.stack(gradients)[:, None] / _GRADIENT_SCALE
    del features, log_p
    rows = torch.arange(len(embeds), device=embeds.device)[:, None]
    surest = embeds[rows, kept]
    # As many images at a time as the shared pass keeps without computing them again.
    at_once = max(1, shared_prefix.TOKENS_KEPT // sum(map(len, prompts.layout.tokens)))
    contexts, logits = [], []
    for part, views, first in zip(*(torch.split(x, at_once) for x in (gradient, surest, embeds[:, :1]))):
        context = shared.detach().expand(len(part), 1, -1, -1).clone().requires_grad_()
        optimizer = adamw([context])
        context.grad = part
        optimizer.step()
        for _ in range(num_steps - 1):
            with torch.enable_grad():
                loss = _entropy_of_mean(logits_of(features_of(context), views).log_softmax(dim=-1)).sum()
                context.grad = torch.autograd.grad(loss * _GRADIENT_SCALE, context)[0] / _GRADIENT_SCALE
            optimizer.step()
        contexts.append(context.detach())
        logits.append(logits_of(features_of(contexts[-1]), first)[:, 0])
    return TPTOutput(torch.cat(logits), torch.cat(contexts), kept, losses.detach())


def _entropy_of_mean(log_p: Tensor) -> Tensor:
    """Entropy `(images,)` of the mean over views of probabilities, of their logarithms `(images, views, classes)`."""
    mean = (log_p.logsumexp(dim=1) - np.log(log_p.shape[1])).clamp_min(torch.finfo(log_p.dtype).min)
    return -(mean.exp() * mean).sum(-1)
