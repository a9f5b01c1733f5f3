"""CoCoOp, Conditional Context Optimization: the context shifts with the image.

    [V]m(x) = [V]m + π(v),    π = Linear(d, d/16) -> ReLU -> Linear(d/16, text width)

https://arxiv.org/abs/2203.05557, section 3.2, where v is the normalised image embedding of x: class embeddings
are computed for each image.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import CoOpConfig
from ..core.families import Family
from .base import Prompts
from .coop import CoOp


__all__ = ["CoCoOp", "CoCoOpConfig"]


@dataclass
class CoCoOpConfig(CoOpConfig, method="cocoop"):
    """Configuration of one CoCoOp adapter; fields as in [`CoOpConfig`], started from words as in the official code."""

    ctx_init: str | None = "a photo of a"


class CoCoOp(CoOp, method="cocoop"):
    """The context vectors, and the meta-network π (`meta_net`) that shifts them."""

    reads_image = True

    def __init__(self, config: CoCoOpConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        hidden = max(1, family.projection_dim // 16)
        self.meta_net = nn.Sequential()
        self.meta_net.add_module("linear1", nn.Linear(family.projection_dim, hidden))
        self.meta_net.add_module("relu", nn.ReLU())
        self.meta_net.add_module("linear2", nn.Linear(hidden, family.text_width))

    def prompts(self, image_embeds: Tensor | None = None, class_embeds: Tensor | None = None) -> Prompts:
        return Prompts({0: self.context + self.meta_net(image_embeds)[:, None, None]})
