"""Deep and visual prompts: vectors that enter at several layers of the text tower, the image tower, or both.

Deep text prompts take the context's places at the input of text layers 1 ... J-1. Visual prompts stand behind the
patches, after the position embeddings and before the first norm; at the input of image layers 1 ... J-1 they are
replaced, without position embeddings. All start at N(0, 0.02²), the first text prompt from words.

- deep text prompts: the text tower alone;
- VPT (https://arxiv.org/abs/2203.12119, as MaPLe's code has it): the image tower alone, beside the template prompt;
- IVLP: both towers, independent of each other;
- MaPLe (https://arxiv.org/abs/2210.03117): the visual prompt of each layer is a linear function of its text prompt.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_text, is_int, shown
from ..config import MAX_CONTEXT_TOKENS, CoOpConfig, PromptConfig
from ..core.families import Family
from .base import Adapter, Prompts
from .coop import CONTEXT_STD, CoOp


__all__ = ["IVLP", "VPT", "DeepText", "DeepTextConfig", "IVLPConfig", "MaPLe", "MaPLeConfig", "VPTConfig"]


def _check_count(config: PromptConfig, name: str) -> None:
    value = getattr(config, name)
    if value is not None and (not is_int(value) or not 1 <= value <= MAX_CONTEXT_TOKENS):
        raise ValueError(f"`{name}` must be a whole number from 1 to {MAX_CONTEXT_TOKENS}, got {shown(value)}.")


@dataclass
class DeepTextConfig(CoOpConfig, method="deep_text"):
    """Configuration of one adapter of deep text prompts.

    Args:
        n_ctx (`int`, *optional*, defaults to 4): text prompts of a layer.
        ctx_init (`str`, *optional*, defaults to `"a photo of a"`): words that the first layer's start from; of more
            tokens than `n_ctx` the first ones are taken, as in the official codes.
        depth (`int`, *optional*): layers J with prompts of their own, the first one included. Defaults to the official
            code's 12 (9 for MaPLe), or to all layers of a tower that has fewer.
        fixed_words (`str`, *optional*): words that stay in the prompt behind the context, before the class name.
        kwargs: as for [`CoOpConfig`]. With `class_specific` each class has a first text prompt of its own.
    """

    n_ctx: int | None = 4
    ctx_init: str | None = "a photo of a"
    depth: int | None = None
    fixed_words: str | None = None

    cuts_words: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "depth")
        check_text("fixed_words", self.fixed_words, 'Pass words such as "of a", or None.')


@dataclass
class IVLPConfig(DeepTextConfig, method="ivlp"):
    """Configuration of one IVLP adapter; defaults as in MaPLe's code: two prompts in each tower, and "of a" stays.

    Args:
        n_ctx (`int`, *optional*, defaults to 2): see [`DeepTextConfig`].
        ctx_init (`str`, *optional*, defaults to `"a photo"`): see [`DeepTextConfig`].
        fixed_words (`str`, *optional*, defaults to `"of a"`): see [`DeepTextConfig`].
        n_vision (`int`, *optional*, defaults to 2): visual prompts of a layer.
        vision_depth (`int`, *optional*, defaults to `depth`): layers with visual prompts.
    """

    n_ctx: int | None = 2
    ctx_init: str | None = "a photo"
    fixed_words: str | None = "of a"
    n_vision: int = 2
    vision_depth: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "n_vision")
        _check_count(self, "vision_depth")


@dataclass
class MaPLeConfig(DeepTextConfig, method="maple"):
    """Configuration of one MaPLe adapter; defaults as in its official code.

    Args:
        n_ctx (`int`, *optional*, defaults to 2): prompts of a layer, in each tower.
        ctx_init (`str`, *optional*, defaults to `"a photo"`), fixed_words (`str`, *optional*, defaults to `"of a"`):
            the official code starts from the first two tokens of "a photo of a" and leaves the others in the prompt.
        depth (`int`, *optional*): defaults to 9.
    """

    n_ctx: int | None = 2
    ctx_init: str | None = "a photo"
    fixed_words: str | None = "of a"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_specific:
            raise ValueError(
                "MaPLe's visual prompts are functions of its text prompts, which all classes share: "
                "leave out class_specific=True, or take the method 'ivlp'."
            )


@dataclass
class VPTConfig(PromptConfig, method="vpt"):
    """Configuration of one VPT adapter.

    Args:
        n_vision (`int`, *optional*, defaults to 8): visual prompts of a layer.
        depth (`int`, *optional*): layers with prompts of their own; 1 is VPT-shallow. Defaults to 12, or to all layers
            of a tower that has fewer.
        kwargs: as for [`PromptConfig`]; class embeddings are those of `template`.
    """

    n_vision: int = 8
    depth: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "n_vision")
        _check_count(self, "depth")


def _depth(config: Any, usual: int, towers: dict[str, int], field: str = "depth") -> int:
    """How many layers have prompts; checked against each tower's number of layers."""
    given = getattr(config, field)
    for name, layers in towers.items():
        if not layers:
            raise ValueError(
                f"this base's {name} tower is not a transformer, so it has no layers that the prompts of "
                f"{config.method!r} could enter: take a method of the text tower, such as 'coop'."
            )
        if given is not None and given > layers:
            raise ValueError(f"`{field}`={given}, and the {name} tower has {layers} layers: lower it.")
    return given or min(usual, *towers.values())


def _vectors(*shape: int) -> nn.Parameter:
    # Of no rows, at depth 1, it enters nowhere and has no gradient.
    return nn.Parameter(torch.empty(shape).normal_(std=CONTEXT_STD), requires_grad=0 not in shape)


class DeepText(CoOp, method="deep_text"):
    """The context vectors, and `deep_text` `(depth - 1, n_ctx, text_width)` for the layers behind the first."""

    usual_depth = 12

    def __init__(self, config: Any, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        self.deep_text = _vectors(config.depth - 1, *self.context.shape[-2:])

    @classmethod
    def complete(cls, config: PromptConfig, family: Family, tokenizer: Any) -> dict[str, Any]:
        towers = {"text": len(family.text_layers)}
        towers |= {"image": len(family.vision_layers)} if cls.prompts_image_tower else {}
        return {**super().complete(config, family, tokenizer), "depth": _depth(config, cls.usual_depth, towers)}

    def prompts(self, image_embeds: Tensor | None = None, class_embeds: Tensor | None = None) -> Prompts:
        return Prompts(dict(enumerate([self.context, *self.deep_text])))


class IVLP(DeepText, method="ivlp"):
    """Deep text prompts, and `visual` `(vision_depth, n_vision, vision_width)`."""

    prompts_image_tower = True

    def __init__(self, config: IVLPConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        self.visual = _vectors(config.vision_depth or 0, config.n_vision, family.vision_width)

    @classmethod
    def complete(cls, config: Any, family: Family, tokenizer: Any) -> dict[str, Any]:
        if config.vision_depth is None:
            own = super().complete(config, family, tokenizer)
            return {**own, "vision_depth": own["depth"]}
        vision_depth = _depth(config, cls.usual_depth, {"image": len(family.vision_layers)}, "vision_depth")
        text = DeepText.complete(config, family, tokenizer)
        return {**text, "vision_depth": vision_depth}

    def prompts(self, image_embeds: Tensor | None = None, class_embeds: Tensor | None = None) -> Prompts:
        return Prompts(super().prompts().text, dict(enumerate(self.visual)))


class MaPLe(DeepText, method="maple"):
    """Deep text prompts, and `couplings`, for each layer a linear map from text to visual prompts."""

    prompts_image_tower = True
    usual_depth = 9

    def __init__(self, config: MaPLeConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        first, deep = (nn.Linear(family.text_width, family.vision_width) for _ in range(2))
        # As in the official code, the deeper maps start from one draw.
        self.couplings = nn.ModuleList([first, *(copy.deepcopy(deep) for _ in self.deep_text)])

    def prompts(self, image_embeds: Tensor | None = None, class_embeds: Tensor | None = None) -> Prompts:
        text = super().prompts().text
        return Prompts(text, {k: couple(text[k]) for k, couple in enumerate(self.couplings)})


class VPT(Adapter, method="vpt"):
    """`visual` `(depth, n_vision, vision_width)`, beside the hand-written template."""

    prompts_image_tower = True

    def __init__(self, config: VPTConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        self.visual = _vectors(config.depth or 0, config.n_vision, family.vision_width)

    @classmethod
    def complete(cls, config: PromptConfig, family: Family, tokenizer: Any) -> dict[str, Any]:
        return {"depth": _depth(config, 12, {"image": len(family.vision_layers)})}

    def prompts(self, image_embeds: Tensor | None = None, class_embeds: Tensor | None = None) -> Prompts:
        return Prompts({}, dict(enumerate(self.visual)))
