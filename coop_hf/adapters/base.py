"""What all adapters share: what is learned, and where it enters the towers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PromptConfig
from ..core.class_prompts import ClassPrompts
from ..core.families import Family
from ..core.layout import PromptLayout, fill_template, make_layout, tokenize_texts, warn_about_equal_prompts


__all__ = ["ADAPTERS", "Adapter", "Prompts", "get_adapter_class"]

ADAPTERS: dict[str, type["Adapter"]] = {}  # method -> its adapter
_KEYS = {"context": "prompt_embeddings"}  # parameters that have another name in files


@dataclass
class Prompts:
    """What enters the towers; either may be empty.

    Attributes:
        text (`dict[int, torch.Tensor]`): by layer of the text tower (0: the token embeddings), what stands in the
            context slots: `(M, text_width)` for all classes, `(num_classes, M, text_width)`, or
            `(images, 1 or num_classes, M, text_width)`.
        vision (`dict[int, torch.Tensor]`): by layer of the image tower, visual prompts `(n, vision_width)`.
    """

    text: dict[int, Tensor] = field(default_factory=dict)
    vision: dict[int, Tensor] = field(default_factory=dict)


class Adapter(nn.Module):
    """What is learned, its configuration, and the prompts of its classes.

    A method is a subclass, registered by the name of its configuration's method:

        class CoOp(Adapter, method="coop"): ...

    It makes its parameters in `__init__`, in fp32, and says in `prompts` where they enter. Whatever of it requires
    gradients is trained, saved, resumed and pushed.

    Args:
        config (`PromptConfig`): its configuration.
        family (`Family`): the base model.
        tokenizer (`PreTrainedTokenizerBase`): the base's tokenizer.

    Attributes:
        reads_image (`bool`): whether class embeddings are computed for each image.
        prompts_image_tower (`bool`): whether image embeddings change with what is learned, and cannot be cached.
        uses_template (`bool`): whether `prompts` reads `class_embeds`.
        class_bound (`tuple[str]`): parameters and buffers with a row for each class, in class-bound adapters.
    """

    method: ClassVar[str] = ""
    reads_image: ClassVar[bool] = False
    prompts_image_tower: ClassVar[bool] = False
    uses_template: ClassVar[bool] = False
    class_bound: ClassVar[tuple[str, ...]] = ("context",)

    # Given by the model, one object for one list of classes; and how often their order was changed, odd while it is.
    class_prompts: ClassPrompts | None = None
    order_version: int = 0

    def __init__(self, config: PromptConfig, family: Family, tokenizer: Any):
        super().__init__()
        self.config = config
        self.is_trainable = True  # while it is the active adapter
        self._seen: dict[str, bool] = {}  # whether each parameter is to learn

    def __init_subclass__(cls, method: str = "", **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if method:
            cls.method = method
            ADAPTERS[method] = cls

    # ------------------------------------------------------------------ what a method says

    def prompts(self, image_embeds: Tensor | None = None, class_embeds: Tensor | None = None) -> Prompts:
        """What enters the towers.

        Args:
            image_embeds (`torch.Tensor`, *optional*): `(images, projection_dim)`, normalised, for methods that read
                the image.
            class_embeds (`torch.Tensor`, *optional*): `(num_classes, projection_dim)`, normalised class embeddings of
                the hand-written template.
        """
        return Prompts()

    def cosines(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Scores `(images, num_classes)` before the logit scale, of normalised embeddings."""
        if text_embeds.dim() == 3:  # class embeddings for each image
            return torch.einsum("bd,bcd->bc", image_embeds, text_embeds)
        return image_embeds @ text_embeds.T

    @property
    def is_class_bound(self) -> bool:
        """Whether what is learned belongs to the list of classes."""
        return bool(getattr(self.config, "class_specific", False))

    @classmethod
    def complete(cls, config: PromptConfig, family: Family, tokenizer: Any) -> dict[str, Any]:
        """Values of the configuration that depend on the base model, checked against it."""
        return {}

    def layout(self, tokenizer: Any, class_names: list[str], max_positions: int) -> PromptLayout:
        """Where everything stands in the prompts of some classes; the template's where there is no context."""
        config = self.config
        if not hasattr(config, "n_ctx"):
            layout = tokenize_texts(tokenizer, fill_template(config.template, class_names), max_positions)
            warn_about_equal_prompts(layout, class_names)
            return layout
        position, words = getattr(config, "class_token_position", "end"), getattr(config, "fixed_words", None)
        ending, merged = getattr(config, "ending", "."), getattr(config, "merge_full_stop", False)
        return make_layout(tokenizer, class_names, config.n_ctx, position, max_positions, words, ending, merged)

    # ------------------------------------------------------------------ what is learned

    def learned_parameters(self) -> dict[str, nn.Parameter]:
        """What requires gradients while the adapter is active and trainable, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def learned_state(self) -> dict[str, Tensor]:
        """All that is saved, detached, fp32, on the CPU, under its names in files."""
        state = self.state_dict()
        return {_KEYS.get(name, name): value.detach().float().cpu() for name, value in state.items()}

    def load_learned_state(self, tensors: dict[str, Tensor]) -> None:
        """Copies `learned_state` of another adapter of the same kind into this one.

        Raises:
            ValueError: other names or shapes.
        """
        own = {_KEYS.get(name, name): value for name, value in self.state_dict(keep_vars=True).items()}
        self.check_shapes({name: tuple(value.shape) for name, value in tensors.items()})
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[name])

    def expected_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The shapes of `learned_state` by name; of the context's width, a mistake in which has a message of its own,
        `None`."""
        own = {_KEYS.get(name, name): tuple(value.shape) for name, value in self.state_dict().items()}
        return {k: (*shape[:-1], None) if k == _KEYS["context"] else shape for k, shape in own.items()}

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises `ValueError` unless names and shapes are those of what this adapter learns."""
        own = {_KEYS.get(name, name): tuple(value.shape) for name, value in self.state_dict().items()}
        if set(own) != set(shapes):
            raise ValueError(
                f"the adapter holds {sorted(shapes)[:8]}, and its method {self.method!r} {sorted(own)[:8]}."
            )
        for name, shape in shapes.items():
            if shape == own[name]:
                continue
            what = "context" if name == _KEYS["context"] else name
            if what == "context" and shape[-1:] != own[name][-1:]:
                raise ValueError(
                    f"the context's vectors have {shape[-1]} dimensions, and the base's token embeddings have "
                    f"{own[name][-1]}: it was learned on another model ({self.config.base_model_name_or_path!r}). Use "
                    "that one."
                )
            raise ValueError(f"the {what} has the shape {shape}, its configuration says {own[name]}.")

    def select_classes(self, order: list[int]) -> None:
        """Puts what belongs to single classes into another order; for class-bound adapters."""
        for name in self.class_bound:
            tensor = getattr(self, name)
            tensor.data = tensor.data[order]

    def set_trainable(self, trainable: bool) -> None:
        """Whether what the method learns requires gradients now; what it made without stays without."""
        for name, parameter in self.named_parameters():
            learns = self._seen.setdefault(name, parameter.requires_grad)
            parameter.requires_grad_(trainable and learns)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        # What is learned and its gradient stay fp32 through .half(), .bfloat16() and .to(dtype), every bit of them.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self.forget()
        return self

    def forget(self) -> None:
        """Drops class embeddings computed before: casting there and back changes weights without a trace."""
        if self.class_prompts is not None:
            self.class_prompts.forget()


def get_adapter_class(method: str) -> type[Adapter]:
    """The adapter of a method.

    Raises:
        ValueError: an unknown method; lists the known ones.
    """
    if method not in ADAPTERS:
        raise ValueError(f"there is no method {method!r}; known are {', '.join(map(repr, sorted(ADAPTERS)))}.")
    return ADAPTERS[method]
