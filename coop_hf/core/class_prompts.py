"""The prompts of one list of classes, and the class embeddings that they gave last."""

from typing import Any

import torch
from torch import Tensor

from .families import Family
from .layout import PromptLayout
from .plain import TextPrompts, plain_text_features
from .shared_prefix import SharedPrefixPass, class_parallel_features


__all__ = ["TEXT_PASSES", "ClassPrompts"]

TEXT_PASSES = ("auto", "shared", "plain")


class ClassPrompts:
    """Where the prompts of some classes stand, and how they become class embeddings.

    One object holds all that a prediction needs to know of its classes, so that other classes are a swap of one object
    and no prediction sees a part of them.

    Args:
        family (`Family`): the base model.
        layout (`PromptLayout`): the prompts.
        class_specific (`bool`, *optional*, defaults to `False`): whether each class has its own context.
        class_names (`list[str]`, *optional*): the classes.

    Attributes:
        template_prompts (`ClassPrompts`, *optional*): the same classes in the hand-written template, once they were
            asked for.
    """

    def __init__(
        self,
        family: Family,
        layout: PromptLayout,
        class_specific: bool = False,
        class_names: list[str] | None = None,
    ):
        self.class_names = class_names or []
        self.template_prompts: ClassPrompts | None = None
        self.family = family
        self.layout = layout
        self.shared_pass = SharedPrefixPass(family, layout, class_specific) if family.has_shared_pass else None
        self._kept: tuple[Any, dict[int, Tensor], Tensor] | None = None

    def features(
        self, prompts: TextPrompts, text_pass: str = "shared", chunk_size: int | None = None, parallel: bool = False
    ) -> Tensor:
        """Class embeddings `(num_classes, projection_dim)`, or by image; projected, not normalised.

        Args:
            prompts (`torch.Tensor` or `dict[int, torch.Tensor]`, *optional*): see
                `coop_hf.core.plain.as_text_prompts`.
            text_pass (`str`, *optional*, defaults to `"shared"`): `"shared"` or `"plain"`.
            chunk_size (`int`, *optional*): classes at a time.
            parallel (`bool`, *optional*, defaults to `False`): whether processes share the classes.
        """
        if text_pass == "plain" or self.shared_pass is None:
            return plain_text_features(self.family, self.layout, prompts, chunk_size=chunk_size)
        if parallel:
            return class_parallel_features(self.shared_pass, prompts, chunk_size)
        return self.shared_pass(prompts, chunk_size)

    def kept_features(self, prompts: TextPrompts, text_pass: str = "shared", chunk_size: int | None = None) -> Tensor:
        """`features` without gradient, computed again only when the prompts or the base's weights have changed."""
        by_layer = prompts if isinstance(prompts, dict) else {} if prompts is None else {0: prompts}
        state = (text_pass, self.family.text_state(), tuple((k, v.device, v.shape) for k, v in by_layer.items()))
        kept = self._kept  # read once: another thread may drop it
        if kept is not None:
            kept_state, kept_prompts, features = kept
            # Values are compared, not version counters: writing to `context.data` leaves no trace in those.
            if kept_state == state and all(torch.equal(kept_prompts[k], v) for k, v in by_layer.items()):
                return features.clone()  # the caller may write to it
        with torch.inference_mode(False), torch.no_grad():
            features = self.features(by_layer, text_pass, chunk_size)
        self._kept = (state, {k: v.detach().clone() for k, v in by_layer.items()}, features)
        return features.clone()

    def forget(self) -> None:
        """Drops what was computed from the base's weights."""
        self._kept = None
        if self.template_prompts is not None:
            self.template_prompts.forget()
        if self.shared_pass is not None:
            self.shared_pass.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}
