"""Objectives: what a training lowers. Functions `(output, labels, frozen, **weights) -> loss`, on any adapter.

`output` is the `CoOpOutput` of the model that learns, `frozen` a [`Frozen`]: what the frozen model says of the same
images and classes. A loss is the mean over the images of the batch; labels of -100 count for nothing.

Notation: t_c the class embeddings, v the image embeddings, both normalised, p = softmax(logits); t⁰, v⁰, p⁰ the same
of the frozen model with the hand-written template.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..baselines.zero_shot import IMAGENET_80_TEMPLATES
from ..checks import shown
from ..core.class_prompts import ClassPrompts
from ..core.layout import fill_template, tokenize_texts


__all__ = [
    "OBJECTIVES",
    "PROMPTSRC_TEMPLATES",
    "Frozen",
    "clap",
    "cross_entropy",
    "get_objective",
    "kgcoop",
    "prograd",
    "promptsrc",
    "sigmoid",
]

# Of CLIP's 80, those that PromptSRC's public code averages.
PROMPTSRC_TEMPLATES = tuple(IMAGENET_80_TEMPLATES[i] for i in (*range(29), *range(37, 63), 74, 75, 76, 78, 79))


class Frozen:
    """What the frozen model says of a batch. Each part is computed when it is asked for, without gradients.

    Args:
        model (`CoOpModel`): the model; its own class embeddings of templates are kept by it.
        output (`CoOpOutput`): what the learning model said.
        images (`dict`, *optional*): the inputs that the images came with, without labels.
        image_embeds (`torch.Tensor`, *optional*): `(batch, projection_dim)`, if they are known.
        share (`torch.Tensor` or `float`, *optional*, defaults to 1): weight of this batch in the mean over processes.
        kept (`dict`, *optional*): what stays from step to step.

    Attributes:
        parameters (`list[nn.Parameter]`): what learns.
    """

    def __init__(
        self,
        model: Any,
        output: Any,
        images: dict[str, Tensor] | None = None,
        image_embeds: Tensor | None = None,
        share: Tensor | float = 1.0,
        kept: dict | None = None,
    ):
        self._model, self._output, self._images, self._image_embeds = model, output, images, image_embeds
        self._share, self._kept = share, {} if kept is None else kept

    @functools.cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._model.learned_parameters().values())

    @property
    def penalty(self) -> Tensor:
        """The head's own penalty, with gradients; only [`CLAP`] has one."""
        return self._model.adapter.penalty()

    @property
    def text_embeds(self) -> Tensor:
        """`(num_classes, projection_dim)`: embeddings of the template prompts, normalised."""
        if () not in self._kept:
            self._kept[()] = self._model.template_embeds()
        return self._kept[()].to(self._output.logits.device)

    def ensemble_embeds(self, templates: Sequence[str]) -> Tensor:
        """`(num_classes, projection_dim)`: mean over templates of the features, normalised."""
        if tuple(templates) not in self._kept:
            self._kept[tuple(templates)] = _mean_template_embeds(self._model, templates)
        return self._kept[tuple(templates)].to(self._output.logits.device)

    @property
    def image_embeds(self) -> Tensor:
        """`(batch, projection_dim)`: normalised. The learning model's own where its image tower is the frozen one."""
        if self._image_embeds is None:
            self._image_embeds = self._output.image_embeds
            if self._model.adapter.prompts_image_tower:
                with torch.no_grad(), self._model.disable_adapter():
                    self._image_embeds = self._model.get_image_features(**(self._images or {}))
        return F.normalize(self._image_embeds.detach().to(self._output.logits.device).float(), dim=-1)

    @property
    def logits(self) -> Tensor:
        """`(batch, num_classes)`: scores of the images against the template prompts."""
        return self.scores(self.text_embeds)

    def scores(self, text_embeds: Tensor) -> Tensor:
        """`(batch, num_classes)`: scores of the images against class embeddings."""
        family = self._model.family
        with torch.autocast(text_embeds.device.type, enabled=False):
            scores = self._model.logit_scale.to(text_embeds.device) * self.image_embeds @ text_embeds.T
            return scores if family.logit_bias is None else scores + family.logit_bias.to(scores.device)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Gradients of the mean over processes of `loss` by each of `parameters`; all processes call it together."""
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        gradients = list(torch.autograd.grad(loss * self._share, self.parameters, **options))
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return gradients
        gradients = [gradient.clone() for gradient in gradients]  # two of them may be one tensor
        for gradient in gradients:
            dist.all_reduce(gradient)
        return [gradient / dist.get_world_size() for gradient in gradients]


@torch.no_grad()
def _mean_template_embeds(model: Any, templates: Sequence[str]) -> Tensor:
    """Normalised means over templates of the class features, which are not normalised before."""
    total: Any = 0.0
    for template in templates:
        texts = fill_template(template, model.class_names)
        layout = tokenize_texts(model.tokenizer, texts, model.family.max_positions)
        total = total + ClassPrompts(model.family, layout).features(None, model.text_pass).float()
    return F.normalize(total, dim=-1)


def _mean(losses: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean over the images that count, of losses `(batch,)`, each times the weight of its class."""
    counts = labels.ne(-100)
    if class_weights is not None:
        losses = losses * class_weights.to(losses.device)[labels.clamp_min(0)]
    return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp_min(1)


def cross_entropy(
    output: Any,
    labels: Tensor,
    frozen: Any = None,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """-log p of the true class (CoOp, https://arxiv.org/abs/2109.01134, equation 3).

    Args:
        output, labels, frozen: see the module.
        label_smoothing (`float`, *optional*, defaults to 0): share of the target that is spread over all classes.
        class_weights (`torch.Tensor`, *optional*): `(num_classes,)`; an image's loss is multiplied by that of its
            class. It is divided by the number of images, and not, as in torch, by the sum of their weights, which
            differs from batch to batch: parts of a batch add up to the whole.
    """
    if class_weights is not None:
        losses = F.cross_entropy(output.logits, labels, reduction="none", label_smoothing=label_smoothing)
        return _mean(losses, labels, class_weights)
    total = F.cross_entropy(output.logits, labels, reduction="sum", label_smoothing=label_smoothing)
    return total / labels.ne(-100).sum().clamp_min(1)


def kgcoop(
    output: Any,
    labels: Tensor,
    frozen: Frozen,
    weight: float = 8.0,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy + weight · mean_c(1 - cos(t_c, t⁰_c)) (KgCoOp, https://arxiv.org/abs/2303.13283).

    As the public code has it; the paper's squared distance of normalised embeddings is twice 1 - cos.

    Args:
        output, labels, frozen, label_smoothing, class_weights: see [`cross_entropy`].
        weight (`float`, *optional*, defaults to 8): λ.
    """
    distance = (1 - F.cosine_similarity(output.text_embeds, frozen.text_embeds, dim=-1)).mean(dim=-1)
    distance = _mean(distance, labels) if distance.dim() else distance  # class embeddings for each image
    return cross_entropy(output, labels, None, label_smoothing, class_weights) + weight * distance


def prograd(
    output: Any,
    labels: Tensor,
    frozen: Frozen,
    weight: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy whose gradient keeps to what the frozen model knows (ProGrad, https://arxiv.org/abs/2205.14865).

    With g_d = ∇CE and g_g = ∇(-T² Σ_c p⁰_c log p_c), both softmaxes of logits / T: where ⟨g_d, g_g⟩ < 0 the gradient
    is g_d - weight · ⟨g_d, ĝ_g⟩ ĝ_g, ĝ_g = g_g / |g_g|, else g_d. Each parameter is projected for itself, as in the
    public code. Both are gradients over the whole batch, so it is refused with gradient accumulation.

    Returns a loss whose value is the cross-entropy and whose gradient is the projected one.

    Args:
        output, labels, frozen, label_smoothing, class_weights: see [`cross_entropy`].
        weight (`float`, *optional*, defaults to 1): λ.
        temperature (`float`, *optional*, defaults to 1): T.
    """
    loss = cross_entropy(output, labels, None, label_smoothing, class_weights)
    if not loss.requires_grad:
        return loss
    target = (frozen.logits / temperature).softmax(dim=-1)
    general = F.cross_entropy(output.logits / temperature, target, reduction="none") * temperature**2
    surrogate: Any = 0.0
    for p, g, general_g in zip(
        frozen.parameters, frozen.gradients(loss), frozen.gradients(_mean(general, labels)), strict=True
    ):
        unit = general_g / general_g.norm().clamp_min(1e-30)
        surrogate = surrogate + (p * (g - weight * (g * unit).sum().clamp_max(0) * unit)).sum()
    return loss.detach() + surrogate - surrogate.detach()


def promptsrc(
    output: Any,
    labels: Tensor,
    frozen: Frozen,
    text_weight: float = 25.0,
    image_weight: float = 10.0,
    logit_weight: float = 1.0,
    templates: Sequence[str] = PROMPTSRC_TEMPLATES,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy + text_weight · mean|t - t⁰| + image_weight · mean|v - v⁰| + logit_weight · mean_c KL(p⁰‖p).

    PromptSRC, https://arxiv.org/abs/2307.06948, as its public code has it: absolute differences are means over
    vectors and dimensions, KL is divided by images and classes, and t⁰ is the normalised mean of the features of many
    templates, in p⁰ too.

    Args:
        output, labels, frozen, label_smoothing, class_weights: see [`cross_entropy`].
        text_weight, image_weight, logit_weight (`float`, *optional*, default to 25, 10 and 1): of the three terms.
        templates (`list[str]`, *optional*, defaults to the public code's 60): empty for the adapter's own alone.
    """
    text_embeds = frozen.ensemble_embeds(templates) if templates else frozen.text_embeds
    text = (output.text_embeds - text_embeds).abs().mean(dim=(-2, -1))
    text = _mean(text, labels) if text.dim() else text  # class embeddings for each image
    image = _mean((output.image_embeds - frozen.image_embeds).abs().mean(dim=-1), labels)
    log_p, log_p0 = output.logits.log_softmax(dim=-1), frozen.scores(text_embeds).log_softmax(dim=-1)
    divergence = _mean((log_p0.exp() * (log_p0 - log_p)).mean(dim=-1), labels)
    loss = cross_entropy(output, labels, None, label_smoothing, class_weights)
    return loss + text_weight * text + image_weight * image + logit_weight * divergence


def sigmoid(output: Any, labels: Tensor, frozen: Any = None, class_weights: Tensor | None = None) -> Tensor:
    """-Σ_c log σ(±logit_c), + for the true class (SigLIP, https://arxiv.org/abs/2303.15343), bias included.

    Args:
        output, labels, frozen, class_weights: see [`cross_entropy`].
    """
    signs = 2 * F.one_hot(labels.clamp_min(0), output.logits.shape[-1]) - 1
    return _mean(-F.logsigmoid(signs * output.logits).sum(dim=-1), labels, class_weights)


def clap(
    output: Any,
    labels: Tensor,
    frozen: Frozen,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy + mean_c λ_c ‖w_c - t⁰_c‖², of the head that learns (CLAP, https://arxiv.org/abs/2312.12730).

    Args:
        output, labels, frozen, label_smoothing, class_weights: see [`cross_entropy`].
    """
    return cross_entropy(output, labels, None, label_smoothing, class_weights) + frozen.penalty


# Read by the trainer: gradients of the whole batch are needed at once; the frozen image tower is asked.
prograd.needs_whole_batch = True  # type: ignore[attr-defined]
prograd.needs_frozen_images = promptsrc.needs_frozen_images = True  # type: ignore[attr-defined]

OBJECTIVES: dict[str, Callable] = {f.__name__: f for f in (clap, cross_entropy, kgcoop, prograd, promptsrc, sigmoid)}


def scaled_class_weights(class_weights: str | Sequence[float], counts: np.ndarray) -> Tensor:
    """Weights of the classes `(num_classes,)`, fp32, whose mean over the training images is 1.

    Args:
        class_weights (`str` or `list[float]`): `"balanced"`, which is 1 / count, or a number for each class.
        counts (`np.ndarray`): training images of each class, `(num_classes,)`.

    Raises:
        ValueError: neither, or not one number of at least 0 for each class, or all images at 0.
    """
    if isinstance(class_weights, str):
        weights = 1 / np.maximum(counts, 1)
    else:
        weights = np.asarray(class_weights)
        if weights.shape != counts.shape or weights.dtype.kind not in "iuf" or not (weights >= 0).all():
            raise ValueError(
                f"`class_weights` must be 'balanced' or {len(counts)} numbers of at least 0, one for each class in "
                f"the order of the class names; got {shown(class_weights)}."
            )
    total = (weights * counts).sum()
    if not 0 < total < np.inf:
        raise ValueError(f"`class_weights` leave no image a weight: got {shown(class_weights)}.")
    return torch.from_numpy(weights * counts.sum() / total).float()


def get_objective(objective: str | Callable, **kwargs: Any) -> Callable:
    """The objective of a name, or a function as it is, with its keyword arguments filled in.

    Raises:
        ValueError: an unknown name, or a keyword argument that it does not take.
    """
    if not callable(objective) and objective not in OBJECTIVES:
        raise ValueError(
            f"`objective` must be one of {', '.join(map(repr, OBJECTIVES))}, or a function "
            f"(output, labels, frozen) -> loss; got {objective!r}."
        )
    function = objective if callable(objective) else OBJECTIVES[objective]
    try:
        inspect.signature(function).bind(None, None, None, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"the objective {getattr(function, '__name__', function)!r} is called as (output, labels, frozen"
            f"{''.join(f', {name}={value!r}' for name, value in kwargs.items())}), and cannot be: {error}. "
            f"Its signature is {inspect.signature(function)}."
        ) from None
    return functools.wraps(function)(functools.partial(function, **kwargs))
