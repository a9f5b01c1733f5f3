"""Linear heads on image features that need no training loop: LP++ and GDA."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.families import Family
from ..core.head_scores import gda, lp_plus_plus
from .heads import Head, HeadConfig


__all__ = ["GDA", "GDAConfig", "LPPlusPlus", "LPPlusPlusConfig"]


@dataclass(kw_only=True)
class LPPlusPlusConfig(HeadConfig, method="lp_plus_plus"):
    """Configuration of [`LPPlusPlus`]: nothing to choose."""


class LPPlusPlus(Head, method="lp_plus_plus"):
    """LP++ (https://arxiv.org/abs/2404.02285): logits ⟨v, w_c⟩ + b_c + α_c ⟨v, t⁰_c⟩; see [`lp_plus_plus`]."""

    class_rows = ("weight", "bias", "alpha")

    def __init__(self, config: LPPlusPlusConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        self.weight = nn.Parameter(torch.zeros(self.shape))
        self.bias = nn.Parameter(torch.zeros(self.shape[0]))
        self.alpha = nn.Parameter(torch.zeros(self.shape[0]))

    def _start(self, v: Tensor, labels: Tensor, t0: Tensor) -> None:
        found = lp_plus_plus(v.flatten(0, 1), labels.repeat(len(v)), t0)
        for parameter, value in zip((self.weight, self.bias, self.alpha), found):
            parameter.copy_(value)

    def cosines(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        text = self.alpha * (image_embeds @ self.text(text_embeds).T)
        return (image_embeds @ self.weight.T + self.bias + text) / self.scale


@dataclass(kw_only=True)
class GDAConfig(HeadConfig, method="gda"):
    """Configuration of [`GDA`].

    Args:
        alpha (`float`, *optional*): weight of the discriminant beside the zero-shot logits. The paper chooses it on
            validation, as `search` does. `None`: `fit` sets a sixteenth of the images of a class, views counted,
            because the paper's Σ⁻¹ is a covariance over the number of images.
    """

    alpha: float | None = None


class GDA(Head, method="gda"):
    """GDA (https://arxiv.org/abs/2402.04087): s · v · t⁰ᵀ + α (v · Wᵀ + b), in closed form; see [`gda`]."""

    class_rows = ("weight", "bias")
    weight: Tensor
    bias: Tensor

    def __init__(self, config: GDAConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        self.register_buffer("weight", torch.zeros(self.shape))
        self.register_buffer("bias", torch.zeros(self.shape[0]))

    def _start(self, v: Tensor, labels: Tensor, t0: Tensor) -> None:
        weight, bias = gda(v.flatten(0, 1).double(), labels.repeat(len(v)), self.shape[0])
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        if self.config.alpha is None:
            self.config = replace(self.config, alpha=v.shape[0] * v.shape[1] / (16 * self.shape[0]))

    def cosines(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        linear = image_embeds @ self.weight.T + self.bias
        return image_embeds @ self.text(text_embeds).T + (self.config.alpha or 0.0) / self.scale * linear

    def candidates(self, v: Tensor, t0: Tensor) -> Iterable[tuple[dict[str, float], Tensor]]:
        """α of 10⁻⁴ to 10²."""
        zero_shot, linear, scale = v @ t0.T, v @ self.weight.T + self.bias, self.scale
        for alpha in (10.0**power for power in range(-4, 3)):
            yield {"alpha": alpha}, zero_shot + alpha / scale * linear
