"""Several adapters on one base model, under PEFT's names: add, load, activate, disable, give classes, count, save."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_class_names
from ..config import CoOpConfig, PromptConfig
from ..core.class_prompts import ClassPrompts
from ..core.families import Family
from ..files.adapter_files import Shapes, check_adapter, read_adapter
from ..files.publish import push_to_hub, save_adapters, save_pretrained
from .average import add_weighted_adapter
from .base import Adapter, get_adapter_class
from .naming import check_new_name, class_order


__all__ = ["AdapterModel"]

logger = logging.getLogger(__name__)

# The models whose adapters are disabled here, once for each block of `disable_adapter` that this thread or task is in.
_DISABLED: ContextVar[tuple[object, ...]] = ContextVar("coop_hf_disabled", default=())

# Changes of adapters and classes, in any model, come one after the other. Predictions never wait for it.
_CHANGES = threading.RLock()
_COUNTING = threading.Lock()


class Key:
    """Tells a model from its copies."""


class View:
    """What one prediction reads of a model, read once: the adapter, its classes, and whether it is disabled.

    Args:
        adapter (`Adapter`): the active adapter.
        is_disabled (`bool`): whether the template stands in for it.

    Attributes:
        classes (`ClassPrompts`, *optional*): its classes.
    """

    def __init__(self, adapter: Adapter, is_disabled: bool):
        self.adapter, self.is_disabled = adapter, is_disabled
        self.read()

    def read(self) -> None:
        """Reads the classes, once no other thread is putting what was learned for them into another order."""
        while self.adapter.order_version % 2:
            time.sleep(0.0001)
        self.version = self.adapter.order_version
        self.classes = self.adapter.class_prompts

    @property
    def is_current(self) -> bool:
        """Whether what was learned still stands in the order of the classes that were read."""
        return self.version == self.adapter.order_version


class AdapterModel(nn.Module):
    """A frozen base model with adapters; what [`CoOpModel`] is built on.

    Threads: any number may predict while others call `disable_adapter`, `set_adapter`, `set_class_names`,
    `add_adapter` or `delete_adapter`. A prediction reads adapter and classes once, at its start, and gives the answer
    of those. `disable_adapter` counts for the thread or asyncio task that entered it. Training, `to` and the like, and
    changes within a compiled model's call are for one thread at a time.

    Attributes:
        base_model (`PreTrainedModel`): the base, as it was given.
        family (`Family`): what is known about it.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): its processor, or its tokenizer alone.
        adapters (`nn.ModuleDict`): adapters by name.
    """

    base_model: Any
    family: Family
    processor: Any
    text_chunk_size: int | None

    def __init__(self, base_model: Any, family: Family, processor: Any):
        super().__init__()
        self.base_model = base_model.eval().requires_grad_(False)
        self.family = family
        self.processor = processor
        self.adapters = nn.ModuleDict()
        self._active = "default"
        self._key, self._blocks = Key(), 0

    def view(self) -> View:
        """What a prediction reads of the model, at this moment."""
        return View(self.adapter, self.is_disabled)

    @property
    def adapter(self) -> Adapter:
        """The active adapter."""
        return self.adapters[self._active]  # type: ignore[return-value]

    @property
    def context(self) -> nn.Parameter:
        """The active adapter's context vectors: `(n_ctx, dim)`, class-specific `(num_classes, n_ctx, dim)`; fp32.

        Raises:
            ValueError: its method has none.
        """
        if not isinstance(getattr(self.adapter, "context", None), nn.Parameter):
            raise ValueError(f"an adapter of the method {self.adapter.method!r} has no context vectors.")
        return self.adapter.context  # type: ignore[return-value]

    @property
    def config(self) -> Any:
        """The active adapter's configuration."""
        return self.adapter.config

    def learned_parameters(self) -> dict[str, nn.Parameter]:
        """What requires gradients in the active adapter, by name."""
        return self.adapter.learned_parameters()

    # ------------------------------------------------------------------ adapters, under PEFT's names

    def add_adapter(
        self,
        adapter_name: str | PromptConfig,
        config: PromptConfig | str | None = None,
        class_names: list[str] | None = None,
        context: Tensor | None = None,
    ) -> None:
        """Adds an adapter beside the others, without activating it.

        Args:
            adapter_name (`str`): a new name.
            config (`PromptConfig`, *optional*, defaults to `CoOpConfig()`): which method and how; it is copied. The
                two in the order of transformers, `add_adapter(config, name)`, are understood as well.
            class_names (`list[str]`, *optional*, defaults to `config.class_names`): its classes.
            context (`torch.Tensor`, *optional*): `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`, vectors to start from
                instead of those that `config` describes.

        Raises:
            ValueError: a name that is taken or unfit, classes that don't fit, or a context of another shape.
        """
        if isinstance(adapter_name, PromptConfig) and (config is None or isinstance(config, str)):
            adapter_name, config = config or "default", adapter_name
        tensors = None if context is None else {"prompt_embeddings": context}
        self._add(adapter_name, config, class_names, tensors)  # type: ignore[arg-type]  # checked there

    def _add(
        self,
        adapter_name: str,
        config: PromptConfig | None,
        class_names: list[str] | None = None,
        tensors: dict[str, Tensor] | Callable[[Shapes], dict[str, Tensor]] | None = None,
        is_trainable: bool = True,
    ) -> None:
        check_new_name(adapter_name, self.adapters)
        if config is not None and not isinstance(config, PromptConfig):
            raise TypeError(
                f"`config` must be a CoOpConfig or the configuration of another method, got {type(config).__name__}: "
                f"{str(config)[:80]}."
            )
        config = config or CoOpConfig()
        adapter_class = get_adapter_class(config.method)
        config = self._complete(config, config.class_names if class_names is None else class_names)
        if tensors is None:
            adapter = adapter_class(config, self.family, self.tokenizer)
        else:
            with torch.random.fork_rng(devices=[]):  # the start that is drawn here is not used
                if callable(tensors):
                    tensors = tensors(self._expected_shapes(config))
                adapter = adapter_class(config, self.family, self.tokenizer)
            adapter.load_learned_state(tensors)
        adapter.is_trainable = is_trainable
        if config.class_names is not None:
            adapter.class_prompts = self._make_prompts(adapter, config.class_names)
        adapter.to(self.device)
        with _CHANGES:
            check_new_name(adapter_name, self.adapters)
            self.adapters[adapter_name] = adapter
            self._set_trainable()

    def _expected_shapes(self, config: PromptConfig) -> Shapes:
        """What a file must hold, told without memory for it: a stranger's configuration may ask for any size."""
        adapter_class = get_adapter_class(config.method)
        try:
            bare = replace(config, ctx_init=None) if isinstance(config, CoOpConfig) else config
            with torch.device("meta"):
                return adapter_class(bare, self.family, self.tokenizer).expected_shapes()
        except (NotImplementedError, RuntimeError):  # a method of one's own that computes with the base's weights
            return adapter_class(config, self.family, self.tokenizer).expected_shapes()

    def load_adapter(
        self,
        name_or_path: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        class_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads a saved adapter beside the others, without activating it.

        Args:
            name_or_path (`str` or `os.PathLike`): folder or Hub id.
            adapter_name (`str`): a new name.
            is_trainable (`bool`, *optional*, defaults to `False`): whether it may learn on.
            class_names (`list[str]`, *optional*): other classes than those it was learned on.
            kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            ValueError: the adapter is damaged, or was made for a base of another width.
        """
        check_new_name(adapter_name, self.adapters)
        config = check_adapter(name_or_path, **kwargs)
        own, other = self.base_model.config._name_or_path, config.base_model_name_or_path
        if own and other and own != other:
            logger.warning(
                "The adapter %s was learned on %s, and the base here is %s. On other weights its scores mean little.",
                os.fspath(name_or_path),
                other,
                own,
            )
        self._add(
            adapter_name,
            config,
            tensors=lambda expected: read_adapter(name_or_path, expected, config=config, **kwargs)[1],
            is_trainable=is_trainable,
        )
        if class_names is not None:
            try:
                self.set_class_names(class_names, adapter_name)
            except ValueError:
                del self.adapters[adapter_name]
                raise

    def _complete(self, config: PromptConfig, class_names: list[str] | None) -> PromptConfig:
        """Fills in what only the model knows, and checks that the classes fit the kind of context."""
        if class_names is None and getattr(config, "class_specific", False):
            raise ValueError(
                "a class-specific context has one set of vectors for each class: pass `class_names` when it is made."
            )
        base = self.base_model
        own = get_adapter_class(config.method).complete(config, self.family, self.tokenizer)
        return replace(
            config,
            class_names=None if class_names is None else check_class_names(class_names),
            base_model_name_or_path=config.base_model_name_or_path or base.config._name_or_path or None,
            **own,
        )

    def _known(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise ValueError(
                f"there is no adapter named {name!r}; this model has {', '.join(map(repr, self.adapters))}."
            )
        return self.adapters[name]  # type: ignore[return-value]

    def _set_trainable(self) -> None:
        for name in self.adapters:
            adapter = self._known(name)
            adapter.set_trainable(name == self._active and adapter.is_trainable)

    def set_adapter(self, adapter_name: str) -> None:
        """Makes an adapter the active one: the one that scores, and the only one that learns.

        It is active for all threads. Predictions that are running end with the one that they began with.
        """
        with _CHANGES:
            self._known(adapter_name)
            self._active = adapter_name
            self._set_trainable()

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was active, the first of the others becomes active; the last cannot be removed."""
        with _CHANGES:
            self._known(adapter_name)
            if len(self.adapters) == 1:
                raise ValueError(f"{adapter_name!r} is the only adapter; use `get_base_model()` for CLIP without one.")
            if self._active == adapter_name:
                self.set_adapter(next(name for name in self.adapters if name != adapter_name))
            del self.adapters[adapter_name]

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter."""
        return self._active

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; always one."""
        return [self._active]

    @contextmanager
    def disable_adapter(self) -> Iterator["AdapterModel"]:
        """Inside this context the model is the zero-shot base with the active adapter's hand-written template.

        It counts for the thread or asyncio task that entered it, and for tasks that this one starts inside, not for
        other threads: they keep predicting with the adapter. Blocks may be nested and may overlap.
        """
        with _COUNTING:
            self._blocks += 1
        _DISABLED.set((*_DISABLED.get(), self._key))
        try:
            yield self
        finally:
            with _COUNTING:
                self._blocks -= 1
            blocks = list(_DISABLED.get())
            if self._key in blocks:
                blocks.remove(self._key)
            _DISABLED.set(tuple(blocks))

    @property
    def is_disabled(self) -> bool:
        """Whether this thread or task is inside `disable_adapter()` of this model."""
        # Without an open block anywhere it is enough to look at a number, which torch.compile can trace.
        return self._blocks > 0 and self._key in _DISABLED.get()

    def get_base_model(self) -> Any:
        """The base model, as it was given."""
        return self.base_model

    unload = get_base_model  # PEFT's other name for it; nothing has to be taken out of the base

    @property
    def peft_config(self) -> dict[str, PromptConfig]:
        """The configurations of all adapters by name, where PEFT has them."""
        return {name: self._known(name).config for name in self.adapters}

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of values, as of a model of transformers.

        Args:
            only_trainable (`bool`, *optional*, defaults to `False`): only those that learn.
            exclude_embeddings (`bool`, *optional*, defaults to `False`): without those of `nn.Embedding`.
        """
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding) and exclude_embeddings}
        counted = [p for p in self.parameters() if id(p) not in embeddings and (p.requires_grad or not only_trainable)]
        return sum(p.numel() for p in counted)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(number of values that learn, number of all values)."""
        counts = [(p.numel() * p.requires_grad, p.numel()) for p in self.parameters()]
        return sum(c[0] for c in counts), sum(c[1] for c in counts)

    def print_trainable_parameters(self) -> None:
        """Prints how many values learn, in PEFT's form."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # ------------------------------------------------------------------ files

    # Functions of their own rooms, and nothing to add.
    save_pretrained = save_pretrained
    save_adapters = save_adapters
    push_to_hub = push_to_hub
    add_weighted_adapter = add_weighted_adapter

    # ------------------------------------------------------------------ classes

    @property
    def class_names(self) -> list[str] | None:
        """The active adapter's class names."""
        return self.config.class_names

    def set_class_names(self, class_names: list[str], adapter_name: str | None = None) -> None:
        """Gives an adapter another list of classes.

        A unified context takes any list at once: base to new classes, or another data set. What is learned for single
        classes belongs to them; there the same names in another order are accepted, and the adapter follows. Of a name
        that stands there several times, the first stays the first.

        The change counts for all threads. A prediction that is running ends with the classes that it began with.

        Args:
            class_names (`list[str]`): the classes, in the order of the labels.
            adapter_name (`str`, *optional*, defaults to the active adapter): which adapter.

        Raises:
            ValueError: names that don't fit; for a class-specific context, says which ones differ.
        """
        adapter = self._known(adapter_name or self._active)
        class_names = check_class_names(class_names)
        with _CHANGES:
            order = None
            if adapter.is_class_bound and adapter.config.class_names is not None:
                order = class_order(adapter, class_names)
            prompts = self._make_prompts(adapter, class_names)  # checks lengths before anything is changed
            config = replace(adapter.config, class_names=class_names)
            if order is None or order == list(range(len(order))):
                adapter.config, adapter.class_prompts = config, prompts
                return
            adapter.order_version += 1  # odd: readers wait; those that began before read once more
            try:
                adapter.select_classes(order)
                adapter.config, adapter.class_prompts = config, prompts
            finally:
                adapter.order_version += 1

    def _make_prompts(self, adapter: Adapter, class_names: list[str]) -> ClassPrompts:
        layout = adapter.layout(self.tokenizer, class_names, self.family.max_positions)
        specific = bool(getattr(adapter.config, "class_specific", False))
        return ClassPrompts(self.family, layout, specific, class_names)

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def image_processor(self) -> Any:
        """The base's image processor.

        Raises:
            ValueError: the model was made with a tokenizer alone.
        """
        if not hasattr(self.processor, "image_processor"):
            raise ValueError(
                "this model was made with a tokenizer alone and cannot prepare images: pass the base's CLIPProcessor "
                "as `processor=`, or give `pixel_values` or `image_embeds` yourself."
            )
        return self.processor.image_processor

    # ------------------------------------------------------------------ what Trainer and PyTorch ask for

    def train(self, mode: bool = True) -> "AdapterModel":
        """Sets training mode. The base stays in evaluation mode: it is frozen, and must give the same embeddings."""
        self.training = mode
        self.adapters.train(mode)
        if self.base_model.training:
            self.base_model.eval()
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the adapters; nothing else has any."""
        self.adapters.zero_grad(set_to_none)

    @property
    def device(self) -> torch.device:
        """Where the base's embeddings are."""
        return self.family.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype; what is learned is fp32."""
        return self.base_model.dtype

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """What `gradient_checkpointing=True` asks for: computes the classes in chunks of 128 where no size was set."""
        self.text_chunk_size = self.text_chunk_size or 128

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name in older versions of transformers
