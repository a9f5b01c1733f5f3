"""TCP, Textual-based Class-aware Prompts: the class's own embedding becomes tokens inside the text tower.

    T_c = Linear(d/4, M · width) ∘ QuickGELU ∘ Linear(d, d/4) (t⁰_c)

https://arxiv.org/abs/2311.18231, section 3.2: the M tokens T_c take the context's places at the input of text
block 8 (counted from 0). t⁰_c is the normalised class embedding of the hand-written template, so new classes work at
once. Meant to be trained with the KgCoOp objective of weight 8.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from ..checks import check_text, is_int, shown
from ..config import CoOpConfig, PromptConfig
from ..core.families import Family
from .base import Prompts
from .coop import CoOp


__all__ = ["TCP", "TCPConfig"]


@dataclass
class TCPConfig(CoOpConfig, method="tcp"):
    """Configuration of one TCP adapter.

    Args:
        n_ctx (`int`, *optional*, defaults to 4): number of context tokens M, and of class-aware tokens.
        layer (`int`, *optional*): text layer at whose input the class-aware tokens enter. Defaults to 8, the official
            code's, or to the last third of a tower with fewer than 12 layers.
        fixed_words (`str`, *optional*): words that stay in the prompt behind the context, before the class name, as
            "person doing" does for UCF101 in the official code.
        ending (`str`, *optional*, defaults to `"."`): what follows the class name, as ", a type of pet." does there.
        kwargs: as for [`CoOpConfig`]; the context is unified.
    """

    n_ctx: int | None = 4
    layer: int | None = None
    fixed_words: str | None = None
    ending: str = "."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and (not is_int(self.layer) or self.layer < 1):
            raise ValueError(f"`layer` must be a whole number of at least 1, got {shown(self.layer)}.")
        check_text("fixed_words", self.fixed_words, 'Pass words such as "person doing", or None.')
        check_text("ending", self.ending, 'Pass "." or something like ", a type of pet.".', optional=False)
        if self.class_specific:
            raise ValueError(
                "TCP's context is unified; its class-aware tokens come from the class names. Leave out "
                "class_specific=True."
            )


class TCP(CoOp, method="tcp"):
    """The context vectors, and the network (`meta_net`) that turns class embeddings into class-aware tokens."""

    config: TCPConfig
    uses_template = True

    def __init__(self, config: TCPConfig, family: Family, tokenizer: Any):
        super().__init__(config, family, tokenizer)
        hidden = max(1, family.projection_dim // 4)
        self.meta_net = nn.Sequential()
        self.meta_net.add_module("linear1", nn.Linear(family.projection_dim, hidden))
        self.meta_net.add_module("gelu", QuickGELUActivation())
        self.meta_net.add_module("linear2", nn.Linear(hidden, self.context.numel()))

    @classmethod
    def complete(cls, config: PromptConfig, family: Family, tokenizer: Any) -> dict[str, Any]:
        layers = len(family.text_layers)
        layer = getattr(config, "layer", None) or min(8, max(1, 2 * layers // 3))
        if layer >= layers:
            raise ValueError(f"`layer`={layer} is not a layer of this text tower, which has {layers}, counted from 0.")
        return {**super().complete(config, family, tokenizer), "layer": layer}

    def prompts(self, image_embeds: Tensor | None = None, class_embeds: Tensor | None = None) -> Prompts:
        tokens = self.meta_net(class_embeds).unflatten(-1, tuple(self.context.shape))
        assert self.config.layer is not None  # filled in by `complete`
        return Prompts({0: self.context, self.config.layer: tokens})
