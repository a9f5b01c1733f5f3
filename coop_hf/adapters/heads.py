"""Heads on image features: adapters that change the scores and leave both towers alone.

v are normalised image embeddings, t⁰ normalised class embeddings (of the hand-written template, an ensemble of
templates, sentences, or a learned prompt), s the base model's logit scale. A head gives scores before the scale,

    logits = s · cosines(v, t⁰).

`fit(image_embeds, labels, class_embeds)` takes what the shots alone give: the whole solution of Tip-Adapter, LP++ and
GDA, the start of the others, which learn by `CoOpTrainer` ([`~coop_hf.training.heads.fit_head`] does both).
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import is_int, shown
from ..config import PromptConfig
from ..core.families import Family
from ..core.head_scores import adapter_scores, cache_scores, clap_weights, residual_scores
from .base import Adapter


__all__ = [
    "CLAP",
    "CLAPConfig",
    "CLIPAdapter",
    "CLIPAdapterConfig",
    "Head",
    "HeadConfig",
    "TaskRes",
    "TaskResConfig",
    "TipAdapter",
    "TipAdapterConfig",
    "TipAdapterF",
    "TipAdapterFConfig",
    "ZSLP",
    "ZSLPConfig",
]


MAX_KEYS = 2_000_000  # what a stranger's file may ask for: more than ImageNet's training images


# ---------------------------------------------------------------------- what the heads have in common


@dataclass(kw_only=True)
class HeadConfig(PromptConfig):
    """What the configurations of all heads share.

    Args:
        stores_class_embeds (`bool`, *optional*, defaults to `False`): whether the head holds the class embeddings that
            it stands on. `fit` sets it; without, they are those of the template.
    """

    stores_class_embeds: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"`{field.name}` must be True or False, got {shown(value)}.")
            is_optional = field.type == float | None and value is None
            is_finite = is_number and abs(value) <= sys.float_info.max  # an int may be too large to be a float
            if field.type in (float, float | None) and not is_optional and not is_finite:
                raise ValueError(f"`{field.name}` must be a finite number, got {shown(value)}.")
        super().__post_init__()


class Head(Adapter):
    """An adapter that scores image embeddings by more than their cosine with the class embeddings.

    Attributes:
        class_embeds (`torch.Tensor`, *optional*): t⁰ `(num_classes, projection_dim)`, normalised; `None`: of the
            template.
        recipe (`dict`): arguments of `CoOpTrainingArguments` that the head learns with; empty: `fit` is all.
    """

    card_kind: ClassVar[str] = "A learned head on image features"
    recipe: ClassVar[dict[str, Any]] = {}
    class_rows: ClassVar[tuple[str, ...]] = ()  # tensors with one row for each class
    class_embeds: Tensor | None
    config: Any

    def __init__(self, config: HeadConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        if config.class_names is None:
            raise ValueError(f"a head ({config.method!r}) belongs to its classes: pass `class_names=[...]` with it.")
        self.scale = float(family.logit_scale)  # s; the base is frozen
        self.dim = family.projection_dim
        self.register_buffer("class_embeds", torch.zeros(self.shape) if config.stores_class_embeds else None)

    @property
    def is_class_bound(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, int]:
        """`(num_classes, projection_dim)`."""
        return len(self.config.class_names or ()), self.dim

    def text(self, text_embeds: Tensor) -> Tensor:
        """t⁰: the class embeddings that are stored, or else those that the model gives."""
        return text_embeds if self.class_embeds is None else self.class_embeds

    @classmethod
    def arguments(cls, num_shots: int) -> dict[str, Any]:
        """What the head learns with, as arguments of `CoOpTrainingArguments`; empty where `fit` is all."""
        return dict(cls.recipe)

    @torch.no_grad()
    def fit(self, image_embeds: Tensor, labels: Tensor, class_embeds: Tensor) -> "Head":
        """Takes what the shots alone give.

        Args:
            image_embeds (`torch.Tensor`): `(num_images, dim)`, or `(num_views, num_images, dim)` for augmented views.
            labels (`torch.Tensor`): `(num_images,)`, class indices; every class needs an image.
            class_embeds (`torch.Tensor`): `(num_classes, dim)`, which class embeddings the head stands on.

        Returns:
            the head itself.

        Raises:
            ValueError: shapes or labels that do not fit, NaN, or a class without images.
        """
        v, labels, t0 = check_shots(image_embeds, labels, class_embeds, self.shape)
        device = next(t.device for t in [*self.parameters(), *self.buffers()])
        self.config = replace(self.config, stores_class_embeds=True)
        self.class_embeds = t0.to(device)
        self._start(v.to(device), labels.to(device), self.class_embeds)
        return self

    def _start(self, v: Tensor, labels: Tensor, t0: Tensor) -> None:
        """Sets what is learned from views `(num_views, num_images, dim)`, labels and t⁰."""

    @torch.no_grad()
    def search(self, image_embeds: Tensor, labels: Tensor) -> dict[str, float]:
        """Chooses the published grid's best values on validation images; the first of equals.

        Args:
            image_embeds (`torch.Tensor`): `(num_images, dim)`; papers take min(shots, 4) images of each class.
            labels (`torch.Tensor`): `(num_images,)`.

        Returns:
            `dict`: the values chosen, also in `config`; empty where the head has no grid.
        """
        if self.class_embeds is None:
            raise ValueError("the head has not been fitted: call `fit(image_embeds, labels, class_embeds)` first.")
        v, labels, t0 = check_shots(image_embeds, labels, self.class_embeds, self.shape, all_classes=False)
        labels, most = labels.to(t0.device), -1
        chosen: dict[str, float] = {}
        for values, scores in self.candidates(v[0].to(t0.device), t0):
            right = int((scores.argmax(dim=-1) == labels).sum())
            if right > most:
                chosen, most = values, right
        self.config = replace(self.config, **chosen)
        return chosen

    def candidates(self, v: Tensor, t0: Tensor) -> Iterable[tuple[dict[str, float], Tensor]]:
        """The values that the paper tries on validation, and the scores `(images, C)` that they give."""
        return ()

    def select_classes(self, order: list[int]) -> None:
        rows = torch.tensor(order)
        for name in ("class_embeds", *self.class_rows):
            tensor = getattr(self, name)
            if tensor is not None:
                tensor.data = tensor.data[rows.to(tensor.device)]


def check_shots(
    image_embeds: Any, labels: Any, class_embeds: Any, shape: tuple[int, int], all_classes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised views `(num_views, num_images, dim)`, labels and normalised class embeddings, or a `ValueError`."""
    v, labels = torch.as_tensor(image_embeds).detach().float(), torch.as_tensor(labels).detach().long()
    t0 = torch.as_tensor(class_embeds).detach().float()
    v = v[None] if v.dim() == 2 else v
    if t0.shape != shape:
        raise ValueError(f"`class_embeds` must be (num_classes, dim) = {tuple(shape)}, got {tuple(t0.shape)}.")
    if v.dim() != 3 or v.shape[2] != shape[1] or 0 in v.shape:
        raise ValueError(
            f"`image_embeds` must be (num_images, {shape[1]}) or (num_views, num_images, {shape[1]}), got "
            f"{tuple(image_embeds.shape)}: were they made by another model?"
        )
    if labels.shape != v.shape[1:2]:
        raise ValueError(
            f"`labels` must be {v.shape[1]} class indices, one for each image, got {tuple(labels.shape)}."
        )
    if labels.min() < 0 or labels.max() >= shape[0]:
        raise ValueError(
            f"`labels` go from {labels.min()} to {labels.max()}; class indices go from 0 to {shape[0] - 1}."
        )
    if not (torch.isfinite(v).all() and torch.isfinite(t0).all()):
        raise ValueError("image or class embeddings hold NaN or infinity: check the base model and its dtype.")
    empty = (torch.bincount(labels, minlength=shape[0]) == 0).nonzero()[:, 0].tolist()
    if all_classes and empty:
        raise ValueError(
            f"{len(empty)} of {shape[0]} classes have no image, the first is class {empty[0]}: a head needs shots of "
            "every class."
        )
    return F.normalize(v, dim=-1), labels, F.normalize(t0, dim=-1)


# ---------------------------------------------------------------------- Tip-Adapter


@dataclass(kw_only=True)
class TipAdapterConfig(HeadConfig, method="tip_adapter"):
    """Configuration of [`TipAdapter`].

    Args:
        alpha (`float`, *optional*, defaults to 1.17): weight of the cache; the official code's for ImageNet, its
            largest data set, and the lowest of its starts.
        beta (`float`, *optional*, defaults to 1.0): sharpness, the official code's.
        num_keys (`int`, *optional*, defaults to 0): images in the cache; `fit` sets it.
    """

    alpha: float = 1.17
    beta: float = 1.0
    num_keys: int = 0

    def __post_init__(self) -> None:
        if not is_int(self.num_keys) or not 0 <= self.num_keys <= MAX_KEYS:
            raise ValueError(f"`num_keys` must be a whole number from 0 to {MAX_KEYS:,}, got {shown(self.num_keys)}.")
        super().__post_init__()


class TipAdapter(Head, method="tip_adapter"):
    """Tip-Adapter (https://arxiv.org/abs/2207.09519): the shots are keys of a cache, nothing is trained.

    Logits s · v · t⁰ᵀ + α · exp(−β (1 − v · Kᵀ)) · L; a key is the normalised mean over the views of one shot.
    """

    learns_keys: ClassVar[bool] = False
    keys: Tensor
    key_labels: Tensor

    def __init__(self, config: TipAdapterConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        self._set_cache(torch.zeros(config.num_keys, family.projection_dim), torch.zeros(config.num_keys))

    def _set_cache(self, keys: Tensor, labels: Tensor) -> None:
        if self.learns_keys:
            learns = self.keys.requires_grad if hasattr(self, "keys") else True
            self.keys = nn.Parameter(keys, requires_grad=learns)
        else:
            self.register_buffer("keys", keys)
        self.register_buffer("key_labels", labels.float())  # fp32 like all that is saved: exact up to 2²⁴ classes

    def _start(self, v: Tensor, labels: Tensor, t0: Tensor) -> None:
        self.config = replace(self.config, num_keys=len(labels))
        self._set_cache(F.normalize(v.mean(dim=0), dim=-1), labels)

    def _cache_scores(self, products: Tensor, beta: float) -> Tensor:
        return cache_scores(products, self.key_labels.long(), self.shape[0], beta)

    def cosines(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        t0 = self.text(text_embeds)
        cache = self._cache_scores(image_embeds @ self.keys.T, self.config.beta)
        return image_embeds @ t0.T + self.config.alpha / self.scale * cache

    def candidates(self, v: Tensor, t0: Tensor) -> Iterable[tuple[dict[str, float], Tensor]]:
        """200 values of β from 0.1 to 7, and of α 20 from 0.1 to 3."""
        zero_shot, products, scale = v @ t0.T, v @ self.keys.T, self.scale
        for beta in (0.1 + i * 6.9 / 200 for i in range(200)):
            cache = self._cache_scores(products, beta)
            for alpha in (0.1 + i * 2.9 / 20 for i in range(20)):
                yield {"alpha": alpha, "beta": beta}, zero_shot + alpha / scale * cache

    def select_classes(self, order: list[int]) -> None:
        super().select_classes(order)
        self.key_labels = torch.tensor(order, device=self.key_labels.device).argsort()[self.key_labels.long()].float()

    def load_learned_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_learned_state(tensors)
        if not ((self.key_labels >= 0) & (self.key_labels < self.shape[0]) & (self.key_labels % 1 == 0)).all():
            raise ValueError(f"`key_labels` must be class indices from 0 to {self.shape[0] - 1}: the file is damaged.")


@dataclass(kw_only=True)
class TipAdapterFConfig(TipAdapterConfig, method="tip_adapter_f"):
    """Configuration of [`TipAdapterF`]: as [`TipAdapterConfig`]."""


class TipAdapterF(TipAdapter, method="tip_adapter_f"):
    """Tip-Adapter-F (https://arxiv.org/abs/2207.09519): Tip-Adapter whose keys learn, by cross-entropy."""

    learns_keys = True
    recipe = {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 256,
        "num_train_epochs": 20,
    }


# ---------------------------------------------------------------------- residuals on the class embeddings


@dataclass(kw_only=True)
class TaskResConfig(HeadConfig, method="taskres"):
    """Configuration of [`TaskRes`].

    Args:
        alpha (`float`, *optional*, defaults to 0.5): weight of the residual.
        text_norm (`float`, *optional*, defaults to 10.0): length that class embeddings have before the residual is
            added. The official code adds to what the text tower gives, of about this length; step sizes and penalties
            belong to it.
    """

    alpha: float = 0.5
    text_norm: float = 10.0


class TaskRes(Head, method="taskres"):
    """TaskRes (https://arxiv.org/abs/2211.10277): w_c = t⁰_c + α · x_c, x starts at 0; cross-entropy."""

    class_rows: ClassVar[tuple[str, ...]] = ("residual",)
    recipe = {
        "recipe": "paper",  # the learning rate's cosine by epochs
        "optim": "adamw_torch",
        "learning_rate": 2e-3,
        "weight_decay": 0.0,
        "per_device_train_batch_size": 256,
        "num_train_epochs": 200,
    }

    def __init__(self, config: HeadConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        self.residual = nn.Parameter(torch.zeros(self.shape))

    def _start(self, v: Tensor, labels: Tensor, t0: Tensor) -> None:
        self.residual.zero_()

    def cosines(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        config = self.config
        alpha = getattr(config, "alpha", 1.0)
        return residual_scores(image_embeds, self.text(text_embeds), self.residual, alpha, config.text_norm)

    @classmethod
    def arguments(cls, num_shots: int) -> dict[str, Any]:
        return {**cls.recipe, "num_train_epochs": 100 if num_shots <= 4 else 200}


@dataclass(kw_only=True)
class ZSLPConfig(HeadConfig, method="zs_lp"):
    """Configuration of [`ZSLP`]. Args: `text_norm`, as in [`TaskResConfig`]."""

    text_norm: float = 10.0


class ZSLP(TaskRes, method="zs_lp"):
    """ZS-LP (https://arxiv.org/abs/2312.12730): a linear probe by cosine, s · cos(v, w_c), that starts at t⁰."""

    recipe = {
        "recipe": "paper",
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 0.1,
        "weight_decay": 0.0,
        "per_device_train_batch_size": 256,
        "num_train_epochs": 300,
    }

    @classmethod
    def arguments(cls, num_shots: int) -> dict[str, Any]:
        return dict(cls.recipe)


@dataclass(kw_only=True)
class CLAPConfig(ZSLPConfig, method="clap"):
    """Configuration of [`CLAP`]. Args: `text_norm`, as in [`TaskResConfig`]."""


class CLAP(ZSLP, method="clap"):
    """CLAP (https://arxiv.org/abs/2312.12730): ZS-LP and mean_c λ_c ‖w_c − t⁰_c‖², which needs no validation set.

    λ_c is the mean zero-shot probability of class c on its own shots, fixed from the start.
    """

    class_rows = ("residual", "multipliers")
    multipliers: Tensor

    def __init__(self, config: CLAPConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        self.register_buffer("multipliers", torch.zeros(self.shape[0]))

    def _start(self, v: Tensor, labels: Tensor, t0: Tensor) -> None:
        super()._start(v, labels, t0)
        self.multipliers.copy_(clap_weights(v.flatten(0, 1), labels.repeat(len(v)), t0, self.scale))

    def penalty(self) -> Tensor:
        """mean_c λ_c ‖w_c − t⁰_c‖².

        Raises:
            ValueError: λ is not known, because the head has not seen the shots.
        """
        if self.class_embeds is None:
            raise ValueError("CLAP's penalty comes from the shots: call `model.adapter.fit(...)` before training.")
        return (self.multipliers * self.residual.square().sum(dim=-1)).mean()


# ---------------------------------------------------------------------- CLIP-Adapter


@dataclass(kw_only=True)
class CLIPAdapterConfig(HeadConfig, method="clip_adapter"):
    """Configuration of [`CLIPAdapter`].

    Args:
        ratio (`float`, *optional*, defaults to 0.2): weight of the network beside the image embedding.
        reduction (`int`, *optional*, defaults to 4): how much narrower the hidden layer is.
    """

    ratio: float = 0.2
    reduction: int = 4

    def __post_init__(self) -> None:
        if not is_int(self.reduction) or self.reduction < 1:
            raise ValueError(f"`reduction` must be a whole number of at least 1, got {shown(self.reduction)}.")
        super().__post_init__()


class CLIPAdapter(Head, method="clip_adapter"):
    """CLIP-Adapter (https://arxiv.org/abs/2110.04544): image embeddings and a two-layer network of them, mixed.

    Learned by CoOp's recipe, in batches of 256 at eight times its learning rate for 32. The network starts at random
    when the head is made, and learns on when it is fitted again.
    """

    recipe = {
        "recipe": "paper",
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 1.6e-2,
        "weight_decay": 5e-4,
        "per_device_train_batch_size": 256,
    }

    def __init__(self, config: CLIPAdapterConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        dim = family.projection_dim
        hidden = max(1, dim // config.reduction)
        self.down = nn.Parameter(torch.empty(hidden, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.up = nn.Parameter(torch.empty(dim, hidden).uniform_(-(hidden**-0.5), hidden**-0.5))

    @property
    def is_class_bound(self) -> bool:
        return self.config.stores_class_embeds

    def cosines(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        return adapter_scores(image_embeds, self.text(text_embeds), self.down, self.up, self.config.ratio)
