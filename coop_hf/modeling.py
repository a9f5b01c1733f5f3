"""`CoOpModel`: a frozen CLIP with learned prompts.

    class names -> prompt layout -> context vectors put into it -> text tower -> class embeddings
    images -> image tower -> image embeddings
    cosine of the two x exp(logit_scale) -> logits -> cross-entropy

Only the context vectors learn (https://arxiv.org/abs/2109.01134, equations 2 and 3).
"""

import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.utils import ModelOutput

from .adapters.coop import init_context, num_context_tokens
from .checks import check_class_names, clean_class_name, is_int
from .config import ADAPTER_CONFIG_NAME, CoOpConfig
from .core.layout import PromptLayout, fill_template, make_layout, tokenize_texts
from .core.shared_prefix import SharedPrefixPass, class_parallel_features
from .core.text_tower import check_base_model, plain_text_features
from .data.transforms import decode_image, eval_transform
from .files.adapter_files import WEIGHTS_KEY, base_of, read_adapter, write_adapter
from .files.coop_checkpoint import checkpoint_to_adapter, read_coop_checkpoint
from .files.model_card import write_card
from .files.publish import push_to_hub
from .hub import find_file, has_file, hub_errors, is_hub_id


__all__ = ["CoOpModel", "CoOpOutput"]

logger = logging.getLogger(__name__)

TEXT_PASSES = ("auto", "shared", "plain")


@dataclass
class CoOpOutput(ModelOutput):
    """What `CoOpModel` returns.

    Args:
        loss (`torch.Tensor`, *optional*): scalar; mean cross-entropy over the batch, if labels were given.
        logits (`torch.Tensor`): `(batch, num_classes)`, fp32; exp(logit_scale) times the cosine.
        text_embeds (`torch.Tensor`): `(num_classes, projection_dim)`, normalised.
        image_embeds (`torch.Tensor`): `(batch, projection_dim)`, normalised.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None


class _Adapter(nn.Module):
    """One context, its configuration, and the prompts of its classes (`None` until class names are known)."""

    def __init__(self, config: CoOpConfig, context: torch.Tensor):
        super().__init__()
        self.config = config
        self.context = nn.Parameter(context)
        self.is_trainable = True  # while it is the active adapter
        self.prompts: _Prompts | None = None
        self.hand_prompts: _Prompts | None = None

    def _apply(self, fn, recurse=True):
        # The context and its gradient stay in fp32 through .half(), .bfloat16() and .to(dtype), every bit of them.
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self


class _Prompts:
    """The prompts of a list of classes, and the class embeddings that they gave last."""

    def __init__(self, base_model: CLIPModel, layout: PromptLayout, class_specific: bool = False):
        self.base_model = base_model
        self.layout = layout
        self.shared_pass = SharedPrefixPass(base_model, layout, class_specific)
        self._kept: tuple | None = None

    def features(
        self, context: torch.Tensor | None, text_pass: str, chunk_size: int | None, parallel: bool = False
    ) -> torch.Tensor:
        if text_pass == "plain":
            return plain_text_features(self.base_model, self.layout, context)
        if parallel:
            return class_parallel_features(self.shared_pass, context, chunk_size)
        return self.shared_pass(context, chunk_size)

    def kept_features(self, context: torch.Tensor | None, text_pass: str, chunk_size: int | None) -> torch.Tensor:
        """`features` without gradient, computed again only when the context or the base's weights have changed."""
        state = (text_pass, self.shared_pass.weights_state())
        if self._kept is not None:
            kept_state, kept_context, features = self._kept
            # Values are compared, not version counters: writing to `context.data` leaves no trace in those.
            same_context = context is None or (
                kept_context.device == context.device and torch.equal(kept_context, context)
            )
            if kept_state == state and same_context:
                return features.clone()  # the caller may write to it
        with torch.inference_mode(False), torch.no_grad():
            features = self.features(context, text_pass, chunk_size)
        self._kept = (state, None if context is None else context.detach().clone(), features)
        return features.clone()

    def forget(self) -> None:
        """Drops what was computed from the base's weights."""
        self._kept = None
        self.shared_pass._constants.clear()

    def __getstate__(self):
        return {**self.__dict__, "_kept": None}


class CoOpModel(nn.Module):
    """A CLIP model whose class prompts are learned; everything else is frozen.

    Several adapters, each a context with its own classes, may stand on one base, and several models on one base too.

    Args:
        base_model (`CLIPModel`): the base. It is frozen and put in evaluation mode; nothing in it is changed.
        config (`CoOpConfig`, *optional*, defaults to `CoOpConfig()`): the first adapter.
        class_names (`list[str]`, *optional*, defaults to `config.class_names`): its classes.
        processor (`CLIPProcessor` or `PreTrainedTokenizerBase`): the base's processor, or its tokenizer alone;
            `predict` and training on images need a processor.
        adapter_name (`str`, *optional*, defaults to `"default"`): the adapter's name.
        text_pass (`str`, *optional*, defaults to `"auto"`): how class embeddings are computed. `"shared"`: what the
            prompts have in common runs once, nothing is padded (`coop_hf.core.shared_prefix`). `"plain"`: every prompt
            is a padded row. Both are exact. `"auto"` takes `"shared"` where the tower allows it.
        text_chunk_size (`int`, *optional*): with the shared pass, how many classes are computed at a time in
            training; bounds memory, leaves the numbers unchanged, costs about a third more time.
        context (`torch.Tensor`, *optional*): `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`, vectors to start from
            instead of those that `config` describes.

    Raises:
        TypeError: the base is no `CLIPModel`, or no processor was given.
        ValueError: bad class names, or prompts longer than the tower's positions.
    """

    # Several processes share the work of a training step's class embeddings. `CoOpTrainer` sets it, because then all
    # of them must take every step together.
    text_parallel = False
    # Read by transformers.Trainer: the loss is the mean over the batch given, and takes no `num_items_in_batch`.
    accepts_loss_kwargs = False

    def __init__(
        self,
        base_model: CLIPModel,
        config: CoOpConfig | None = None,
        class_names: list[str] | None = None,
        processor=None,
        adapter_name: str = "default",
        text_pass: str = "auto",
        text_chunk_size: int | None = None,
        context: torch.Tensor | None = None,
    ):
        super().__init__()
        check_base_model(base_model)
        if processor is None or not callable(getattr(processor, "tokenizer", processor)):
            raise TypeError(
                "CoOpModel needs `processor`: the base's CLIPProcessor, or its tokenizer alone; got "
                f"{type(processor).__name__}. `CoOpModel.from_pretrained(...)` loads it by itself."
            )
        if text_pass not in TEXT_PASSES:
            raise ValueError(f"`text_pass` must be one of {', '.join(map(repr, TEXT_PASSES))}, got {text_pass!r}.")
        if text_chunk_size is not None and (not is_int(text_chunk_size) or text_chunk_size < 1):
            raise ValueError(f"`text_chunk_size` must be a positive whole number or None, got {text_chunk_size!r}.")
        has_known_layers = all(isinstance(layer, CLIPEncoderLayer) for layer in base_model.text_model.encoder.layers)
        if text_pass == "shared" and not has_known_layers:
            raise ValueError("text_pass='shared' needs a text tower of transformers' CLIPEncoderLayer; use 'plain'.")
        self.base_model = base_model.eval().requires_grad_(False)
        self.processor = processor
        self.text_pass = ("shared" if has_known_layers else "plain") if text_pass == "auto" else text_pass
        self.text_chunk_size = text_chunk_size
        self.adapters = nn.ModuleDict()
        self._active: str | None = None
        self._disabled = False
        self.add_adapter(adapter_name, config, class_names, context)
        self.set_adapter(adapter_name)

    # ------------------------------------------------------------------ the method

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> CoOpOutput:
        """Scores images against the classes.

        Args:
            pixel_values (`torch.Tensor`, *optional*): `(batch, 3, height, width)`, as the image processor gives them.
            image_embeds (`torch.Tensor`, *optional*): `(batch, projection_dim)`, from `get_image_features`, normalised
                or not; instead of `pixel_values`.
            labels (`torch.Tensor`, *optional*): `(batch,)`, class indices; -100 is ignored.

        Returns:
            `CoOpOutput`.
        """
        if (pixel_values is None) == (image_embeds is None):
            given = "neither" if pixel_values is None else "both"
            raise ValueError(f"pass either `pixel_values` or `image_embeds`; got {given}.")
        if image_embeds is None:
            image_embeds = self.get_image_features(pixel_values)
        elif image_embeds.dim() != 2 or image_embeds.shape[-1] != self.base_model.config.projection_dim:
            raise ValueError(
                f"`image_embeds` must be (batch, {self.base_model.config.projection_dim}), as `get_image_features` "
                f"gives them, got {tuple(image_embeds.shape)}: were they made by another model?"
            )
        text_embeds = self.get_text_features()
        # Cosines in fp32 whatever the towers' dtype: in fp16 a logit of 30 is only known to 1/64.
        with torch.autocast(text_embeds.device.type, enabled=False):
            text_embeds = F.normalize(text_embeds.float(), dim=-1)
            image_embeds = F.normalize(image_embeds.to(text_embeds.device).float(), dim=-1)
            logits = self.logit_scale.to(text_embeds.device) * image_embeds @ text_embeds.T
            loss = None if labels is None else F.cross_entropy(logits, labels.to(logits.device))
        return CoOpOutput(loss=loss, logits=logits, text_embeds=text_embeds, image_embeds=image_embeds)

    def get_text_features(self) -> torch.Tensor:
        """Class embeddings of the active adapter, or of its hand-written template while it is disabled.

        With gradients where the context learns; otherwise computed once and kept until context or classes change.

        Returns:
            `torch.Tensor` `(num_classes, projection_dim)`, projected, not normalised.
        """
        prompts = self._active_prompts()
        context = None if self._disabled else self.context
        learns = context is not None and context.requires_grad and torch.is_grad_enabled()
        if learns or torch.compiler.is_compiling():
            parallel = self.text_parallel and learns and self.training
            return prompts.features(context, self.text_pass, self.text_chunk_size, parallel)
        return prompts.kept_features(context, self.text_pass, self.text_chunk_size)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image embeddings `(batch, projection_dim)`, projected, not normalised, in the base's dtype."""
        embeddings = self.base_model.vision_model.embeddings.patch_embedding
        pixel_values = pixel_values.to(self.device, embeddings.weight.dtype)
        return self.base_model.get_image_features(pixel_values=pixel_values).pooler_output

    @property
    def logit_scale(self) -> torch.Tensor:
        """exp(logit_scale) of the base, fp32."""
        with align_module_device(self.base_model):
            return self.base_model.logit_scale.float().exp()

    @property
    def context(self) -> nn.Parameter:
        """The active adapter's context vectors: `(n_ctx, dim)`, class-specific `(num_classes, n_ctx, dim)`; fp32."""
        return self.adapters[self.active_adapter].context

    @property
    def config(self) -> CoOpConfig:
        """The active adapter's configuration."""
        return self.adapters[self.active_adapter].config

    def _active_prompts(self) -> _Prompts:
        adapter = self.adapters[self.active_adapter]
        if adapter.config.class_names is None:
            raise ValueError(
                f"the adapter {self.active_adapter!r} has no class names yet: pass `class_names=[...]` when the model "
                "is made, or call `model.set_class_names([...])`."
            )
        if not self._disabled:
            return adapter.prompts
        if adapter.hand_prompts is None:
            texts = fill_template(adapter.config.template, adapter.config.class_names)
            layout = tokenize_texts(self.tokenizer, texts, self._max_positions)
            adapter.hand_prompts = _Prompts(self.base_model, layout)
        return adapter.hand_prompts

    # ------------------------------------------------------------------ classes

    @property
    def class_names(self) -> list[str] | None:
        """The active adapter's class names."""
        return self.config.class_names

    def set_class_names(self, class_names: list[str], adapter_name: str | None = None) -> None:
        """Gives an adapter another list of classes.

        A unified context takes any list at once: base to new classes, or another data set. A class-specific one
        belongs to its classes; for it the same names in another order are accepted, and the context follows.

        Args:
            class_names (`list[str]`): the classes, in the order of the labels.
            adapter_name (`str`, *optional*, defaults to the active adapter): which adapter.

        Raises:
            ValueError: names that don't fit; for a class-specific context, says which ones differ.
        """
        adapter = self.adapters[self._known(adapter_name or self.active_adapter)]
        class_names = check_class_names(class_names)
        config = adapter.config
        order = None
        if config.class_specific:
            own = {clean_class_name(name): index for index, name in enumerate(config.class_names)}
            new = [clean_class_name(name) for name in class_names]
            if set(own) != set(new):
                missing = [repr(name) for name in own if name not in set(new)]
                unknown = [repr(name) for name in new if name not in own]
                parts = [
                    f"{what} {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}"
                    for what, names in (("it has no vectors for", unknown), ("the new list lacks", missing))
                    if names
                ]
                raise ValueError(
                    "a class-specific context holds vectors for its own classes alone: "
                    f"{'; '.join(parts)}. Learn a unified context (class_specific=False) to change classes."
                )
            order = [own[name] for name in new]
        prompts = self._make_prompts(config, class_names)  # checks lengths before anything is changed
        if order is not None and order != list(range(len(order))):
            adapter.context.data = adapter.context.data[order]
        adapter.config = replace(config, class_names=class_names)
        adapter.prompts, adapter.hand_prompts = prompts, None

    def _make_prompts(self, config: CoOpConfig, class_names: list[str]) -> _Prompts:
        layout = make_layout(
            self.tokenizer, class_names, config.n_ctx, config.class_token_position, self._max_positions
        )
        return _Prompts(self.base_model, layout, config.class_specific)

    @property
    def tokenizer(self):
        """The base's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def image_processor(self):
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

    @property
    def _max_positions(self) -> int:
        return self.base_model.config.text_config.max_position_embeddings

    # ------------------------------------------------------------------ prediction

    @torch.no_grad()
    def predict(self, images, top_k: int | None = 5, batch_size: int = 32):
        """Classifies images.

        Args:
            images: an image (`PIL.Image.Image`, path, or array `(height, width[, channels])` of 0 to 255), or a list,
                array stack or `datasets` image column of them.
            top_k (`int`, *optional*, defaults to 5): how many classes to return, best first; `None`: all.
            batch_size (`int`, *optional*, defaults to 32): images that go through the image tower at a time.

        Returns:
            `list[dict]` for one image, `[{"label": str, "score": float}, ...]` with scores that are probabilities
            over all classes; for several images a list of such lists.

        Raises:
            ValueError: no images, a bad `top_k`, missing class names, or an image that cannot be read (says which).
        """
        if top_k is not None and (not is_int(top_k) or top_k < 1):
            raise ValueError(f"`top_k` must be a positive whole number or None, got {top_k!r}.")
        if not is_int(batch_size) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive whole number, got {batch_size!r}.")
        names = self._active_prompts() and self.class_names
        transform = eval_transform(self.image_processor)
        is_single = _is_one_image(images)
        images = [images] if is_single else images
        if len(images) == 0:
            raise ValueError("`images` is empty: pass at least one image.")
        results = []
        for start in range(0, len(images), batch_size):
            indices = range(start, min(start + batch_size, len(images)))
            pixels = torch.stack([_read_image(images, index, transform) for index in indices])
            scores = self(pixel_values=pixels).logits.softmax(dim=-1)
            best = scores.topk(min(top_k or len(names), len(names)), dim=-1)
            for values, classes in zip(best.values.tolist(), best.indices.tolist()):
                results.append([{"label": names[c], "score": value} for c, value in zip(classes, values)])
        return results[0] if is_single else results

    # ------------------------------------------------------------------ adapters, under PEFT's names

    def add_adapter(
        self,
        adapter_name: str,
        config: CoOpConfig | None = None,
        class_names: list[str] | None = None,
        context: torch.Tensor | None = None,
    ) -> None:
        """Adds a context beside the others, without activating it.

        Args:
            adapter_name (`str`): a new name.
            config (`CoOpConfig`, *optional*, defaults to `CoOpConfig()`): which context; it is copied.
            class_names (`list[str]`, *optional*, defaults to `config.class_names`): its classes.
            context (`torch.Tensor`, *optional*): `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`, vectors to start from
                instead of those that `config` describes.

        Raises:
            ValueError: a name that is taken or unfit, classes that don't fit, or a context of another shape.
        """
        self._check_new_name(adapter_name)
        if config is not None and not isinstance(config, CoOpConfig):
            raise TypeError(f"`config` must be a CoOpConfig, got {type(config).__name__}: {str(config)[:80]}.")
        config = replace(config) if config is not None else CoOpConfig()
        config = self._complete(config, config.class_names if class_names is None else class_names)
        num_classes = None if config.class_names is None else len(config.class_names)
        embedding = self.base_model.text_model.embeddings.token_embedding
        expected = (*((num_classes,) if config.class_specific else ()), config.n_ctx, embedding.embedding_dim)
        prompts = None if num_classes is None else self._make_prompts(config, config.class_names)
        if context is None:
            context = init_context(config, embedding, self.tokenizer, num_classes)
        elif context.shape[-1] != expected[-1]:
            raise ValueError(
                f"the context's vectors have {context.shape[-1]} dimensions, and the base's token embeddings have "
                f"{expected[-1]}: it was learned on another model ({config.base_model_name_or_path!r}). Use that one."
            )
        elif context.shape != expected:
            raise ValueError(f"the context has the shape {tuple(context.shape)}, its configuration says {expected}.")
        adapter = _Adapter(config, context.detach().to(self.device, torch.float32, copy=True))
        adapter.prompts = prompts
        self.adapters[adapter_name] = adapter
        self._set_trainable()

    def load_adapter(
        self,
        name_or_path: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        class_names: list[str] | None = None,
        **kwargs,
    ) -> None:
        """Loads a saved adapter beside the others, without activating it.

        Args:
            name_or_path (`str` or `os.PathLike`): folder or Hub id.
            adapter_name (`str`): a new name.
            is_trainable (`bool`, *optional*, defaults to `False`): whether its context may learn on.
            class_names (`list[str]`, *optional*): other classes than those it was learned on.
            kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            ValueError: the adapter is damaged, or was made for a base of another width.
        """
        self._check_new_name(adapter_name)
        config, tensors = read_adapter(name_or_path, **kwargs)
        own, other = self.base_model.config._name_or_path, config.base_model_name_or_path
        if own and other and own != other:
            logger.warning(
                "The adapter %s was learned on %s, and the base here is %s. On other weights its scores mean little.",
                os.fspath(name_or_path),
                other,
                own,
            )
        self.add_adapter(adapter_name, config, context=tensors[WEIGHTS_KEY])
        try:
            self._finish_loading(adapter_name, is_trainable, class_names)
        except ValueError:
            del self.adapters[adapter_name]
            raise

    def _finish_loading(self, adapter_name: str, is_trainable: bool, class_names) -> None:
        self.adapters[adapter_name].is_trainable = is_trainable
        self._set_trainable()
        if class_names is not None:
            self.set_class_names(class_names, adapter_name)

    def _complete(self, config: CoOpConfig, class_names) -> CoOpConfig:
        """Fills in what only the model knows, and checks that the classes fit the kind of context."""
        if class_names is None and config.class_specific:
            raise ValueError(
                "a class-specific context has one set of vectors for each class: pass `class_names` when it is made."
            )
        base = self.base_model
        return replace(
            config,
            n_ctx=num_context_tokens(config, self.tokenizer),
            class_names=None if class_names is None else check_class_names(class_names),
            base_model_name_or_path=config.base_model_name_or_path or base.config._name_or_path or None,
        )

    def _check_new_name(self, name: str) -> None:
        ok = isinstance(name, str) and 0 < len(name) <= 128
        if not ok or any(not (c.isalnum() or c in "-_ ") for c in name) or name != name.strip():
            raise ValueError(
                f"an adapter's name must be made of letters, digits, spaces, '-' and '_', as it names a folder; got "
                f"{name!r}."
            )
        if name in self.adapters:
            raise ValueError(f"there is an adapter named {name!r} already; take another name, or delete it first.")
        if hasattr(self.adapters, name):
            raise ValueError(f"{name!r} cannot name an adapter (it is an attribute of nn.ModuleDict); take another.")

    def _known(self, name: str) -> str:
        if name not in self.adapters:
            raise ValueError(
                f"there is no adapter named {name!r}; this model has {', '.join(map(repr, self.adapters))}."
            )
        return name

    def _set_trainable(self) -> None:
        for name, adapter in self.adapters.items():
            adapter.context.requires_grad_(name == self._active and adapter.is_trainable)

    def set_adapter(self, adapter_name: str) -> None:
        """Makes an adapter the active one: the one that scores, and the only one that learns."""
        self._active = self._known(adapter_name)
        self._set_trainable()

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was active, the first of the others becomes active; the last cannot be removed."""
        self._known(adapter_name)
        if len(self.adapters) == 1:
            raise ValueError(f"{adapter_name!r} is the only adapter; use `get_base_model()` for CLIP without one.")
        del self.adapters[adapter_name]
        if self._active == adapter_name:
            self.set_adapter(next(iter(self.adapters)))

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter."""
        return self._active

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; always one."""
        return [self._active]

    @contextmanager
    def disable_adapter(self):
        """Inside this context the model is zero-shot CLIP with the active adapter's hand-written template."""
        before, self._disabled = self._disabled, True
        try:
            yield self
        finally:
            self._disabled = before

    @property
    def is_disabled(self) -> bool:
        """Whether the model is inside `disable_adapter()`."""
        return self._disabled

    def get_base_model(self) -> CLIPModel:
        """The base model, as it was given."""
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(number of values that learn, number of all values)."""
        counts = [(p.numel() * p.requires_grad, p.numel()) for p in self.parameters()]
        return sum(c[0] for c in counts), sum(c[1] for c in counts)

    def print_trainable_parameters(self) -> None:
        """Prints how many values learn, in PEFT's form."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # ------------------------------------------------------------------ files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        selected_adapters: list[str] | None = None,
        training: dict | None = None,
    ) -> None:
        """Saves adapters: `default` into the folder itself, others into a subfolder of their name. Never the base.

        A model card, `README.md`, is written beside them; what a person changed in an earlier one stays.

        Args:
            save_directory (`str` or `os.PathLike`): the folder; made if missing.
            selected_adapters (`list[str]`, *optional*, defaults to all): which adapters.
            training (`dict`, *optional*): what the card says of the training, see
                `coop_hf.files.model_card.make_card`.
        """
        selected = self.save_adapters(save_directory, selected_adapters)
        if selected:
            write_card(save_directory, self, training=training, selected_adapters=selected)

    def save_adapters(
        self, save_directory: str | os.PathLike, selected_adapters: list[str] | None = None
    ) -> list[str]:
        """The files of `save_pretrained` without the model card.

        Args:
            save_directory (`str` or `os.PathLike`): the folder; made if missing.
            selected_adapters (`list[str]`, *optional*, defaults to all): which adapters.

        Returns:
            `list[str]`: the names of those written.

        Raises:
            ValueError: the folder is a file, an unknown adapter, or a context with NaN.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, and {os.fspath(save_directory)!r} is a file.")
        if isinstance(selected_adapters, str):
            raise ValueError(f"`selected_adapters` must be a list of names, got the string {selected_adapters!r}.")
        names = list(self.adapters) if selected_adapters is None else list(selected_adapters)
        for name in [self._known(name) for name in names]:
            adapter = self.adapters[name]
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            write_adapter(folder, adapter.config, {WEIGHTS_KEY: adapter.context})
        return names

    push_to_hub = push_to_hub  # `coop_hf.files.publish.push_to_hub(model, repo_id, ...)`, and nothing to add

    def merge_and_unload(self) -> tuple[CLIPModel, CLIPProcessor]:
        """A stock CLIP model and processor with the context vectors as added tokens; see `coop_hf.deploy.merging`."""
        from .deploy.merging import merge_and_unload

        return merge_and_unload(self)

    def as_image_classifier(self) -> nn.Module:
        """Image tower and class embeddings as one plain module, for export; see `coop_hf.deploy.export`."""
        from .deploy.export import as_image_classifier

        return as_image_classifier(self)

    @classmethod
    def from_coop_checkpoint(
        cls,
        path: str | os.PathLike,
        base_model: "CLIPModel | str | os.PathLike",
        class_names: list[str] | None = None,
        class_token_position: str = "end",
        *,
        processor=None,
        epoch: int | None = None,
        check_base: bool = True,
        **kwargs,
    ) -> "CoOpModel":
        """A model with the context of a checkpoint of the original CoOp code, which may learn on.

        Args:
            path (`str` or `os.PathLike`): the checkpoint, or the folder of the training's output.
            base_model (`CLIPModel`, `str` or `os.PathLike`): the CLIP model that the context was learned on.
            class_names, class_token_position, check_base: see
                `coop_hf.files.coop_checkpoint.checkpoint_to_adapter`.
            processor (*optional*): needed with a loaded `base_model`.
            epoch (`int`, *optional*): which checkpoint of a folder.
            kwargs: for `CoOpModel.from_pretrained` if `base_model` is a name: `revision`, `token` ...; else for
                `CoOpModel`.

        Raises:
            ValueError: the checkpoint is unusable, was learned on another base, or does not go with the class names.
        """
        CoOpConfig(class_token_position=class_token_position)  # refused before anything is read
        checkpoint = read_coop_checkpoint(path, epoch)
        load = cls.from_pretrained if isinstance(base_model, (str, os.PathLike)) else cls
        with torch.random.fork_rng(devices=[]):  # the start that is drawn here is not used
            model = load(base_model, CoOpConfig(n_ctx=1), processor=processor, **kwargs)
        embedding = model.base_model.text_model.embeddings.token_embedding.weight
        config, tensors = checkpoint_to_adapter(
            checkpoint, embedding, model.tokenizer, class_names, class_token_position, check_base
        )
        named = {"base_model_name_or_path": model.config.base_model_name_or_path, "revision": model.config.revision}
        options = {"text_pass": model.text_pass, "text_chunk_size": model.text_chunk_size}
        options["adapter_name"] = model.active_adapter
        return cls(
            model.base_model,
            replace(config, **named),
            processor=model.processor,
            context=tensors[WEIGHTS_KEY],
            **options,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        config: CoOpConfig | None = None,
        class_names: list[str] | None = None,
        *,
        adapter_name: str = "default",
        is_trainable: bool = False,
        base_model: "CLIPModel | str | os.PathLike | None" = None,
        processor=None,
        text_pass: str = "auto",
        text_chunk_size: int | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **base_model_kwargs,
    ) -> "CoOpModel":
        """A fresh context on a base model, or a learned one with its base.

        A folder or repository that holds `adapter_config.json` is an adapter, any other a base model.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub id of a CLIP model or an adapter.
            config (`CoOpConfig`, *optional*): for a base model, which context; not for an adapter, which has its own.
            class_names (`list[str]`, *optional*, defaults to the configuration's): the classes.
            adapter_name (`str`, *optional*, defaults to `"default"`): the adapter's name in the model.
            is_trainable (`bool`, *optional*, defaults to `False`): whether a learned context may learn on. A fresh one
                always may.
            base_model (`CLIPModel`, `str` or `os.PathLike`, *optional*): for an adapter, the base to use instead of
                the one that it names.
            processor (*optional*): for example a tokenizer alone; defaults to the base's own.
            text_pass, text_chunk_size: as for `CoOpModel`.
            revision (`str`, *optional*): revision of what is named; an adapter itself names its base's revision.
            subfolder (`str`, *optional*): folder of the adapter in its repository.
            token, cache_dir, local_files_only, force_download: as for `huggingface_hub.hf_hub_download`.
            base_model_kwargs: passed to `CLIPModel.from_pretrained`: `dtype`, `device_map`, `attn_implementation` ...

        Raises:
            ValueError, OSError: says what was not found, damaged or contradictory.
        """
        name = os.fspath(pretrained_model_name_or_path)
        download = {
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        download = {key: value for key, value in download.items() if value is not None and value is not False}
        options = {"adapter_name": adapter_name, "text_pass": text_pass, "text_chunk_size": text_chunk_size}
        source = {**download, **({"revision": revision} if revision else {})}
        if not has_file(name, ADAPTER_CONFIG_NAME, subfolder=subfolder, **source):
            _check_is_base(name, subfolder, source)
            if base_model is not None:
                raise ValueError(f"{name!r} is no adapter, so `base_model` has no place: pass one or the other.")
            config = replace(config or CoOpConfig(), base_model_name_or_path=name, revision=revision)
            base, processor = _load_base(name, processor, source, base_model_kwargs)
            return cls(base, config, class_names, processor, **options)

        if config is not None:
            raise ValueError(
                f"{name!r} is an adapter and has its own configuration: leave `config` out, or name a base model to "
                "start afresh."
            )
        config, tensors = read_adapter(name, subfolder=subfolder, **source)
        if isinstance(base_model, CLIPModel):
            if processor is None:
                raise ValueError("with a loaded `base_model`, pass its `processor` too.")
            base = base_model
        else:
            base_name = os.fspath(base_model) if base_model is not None else base_of(config, name)
            base_source = {**download, **({"revision": config.revision} if config.revision and not base_model else {})}
            try:
                base, processor = _load_base(base_name, processor, base_source, base_model_kwargs)
            except OSError as error:
                raise OSError(
                    f"the base model {base_name!r} of the adapter {name!r} could not be loaded ({error}). If it lies "
                    "elsewhere now, pass `base_model=` with its folder or Hub id."
                ) from error
        if base_model is not None:  # saved again, the adapter names the base that it stands on
            here = base.config._name_or_path or config.base_model_name_or_path
            config = replace(config, base_model_name_or_path=here, revision=None)
        model = cls(base, config, None, processor, context=tensors[WEIGHTS_KEY], **options)
        model._finish_loading(adapter_name, is_trainable, class_names)
        return model

    # ------------------------------------------------------------------ what Trainer and PyTorch ask for

    def train(self, mode: bool = True) -> "CoOpModel":
        """Sets training mode. The base stays in evaluation mode: it is frozen, and must give the same embeddings."""
        self.training = mode
        self.adapters.train(mode)
        if self.base_model.training:
            self.base_model.eval()
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the contexts; nothing else has any."""
        self.adapters.zero_grad(set_to_none)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for adapter in self.adapters.values():  # casting there and back changes weights without a trace
            for prompts in filter(None, (adapter.prompts, adapter.hand_prompts)):
                prompts.forget()
        return self

    @property
    def device(self) -> torch.device:
        """Where the base's embeddings are."""
        return self.base_model.text_model.embeddings.position_ids.device  # weights may be offloaded

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs) -> None:
        """What `gradient_checkpointing=True` asks for: computes the classes in chunks of 128 where no size was set."""
        self.text_chunk_size = self.text_chunk_size or 128


def _check_is_base(name: str, subfolder: str | None, source: dict) -> None:
    """Raises unless the folder or repository holds a model's `config.json`."""
    if not os.path.isdir(name) and not is_hub_id(name):
        find_file(name, "config.json")  # raises, and says that this is neither a folder nor a Hub id
    if subfolder is not None or not has_file(name, "config.json", **source):
        where = f"{name!r}" + (f", folder {subfolder!r}," if subfolder else "")
        hint = ""
        if os.path.isdir(name):
            inside = sorted(d for d in os.listdir(name) if os.path.isfile(os.path.join(name, d, ADAPTER_CONFIG_NAME)))
            hint = f" It holds the adapters {', '.join(map(repr, inside))}: pass `subfolder=`." if inside else ""
        raise FileNotFoundError(
            f"{where} holds neither an adapter ({ADAPTER_CONFIG_NAME}) nor a base model (config.json).{hint}"
        )


def _load_base(name: str, processor, source: dict, kwargs: dict):
    """The CLIP model and, unless given, its processor, or its tokenizer alone if no image processor lies beside it."""
    find_file(name, "config.json", **source)  # its errors say more
    with hub_errors(name):
        base = CLIPModel.from_pretrained(name, **source, **kwargs)
    check_base_model(base)
    if processor is None:
        if has_file(name, "preprocessor_config.json", **source) or has_file(name, "processor_config.json", **source):
            processor = CLIPProcessor.from_pretrained(name, **source)
        else:
            processor = AutoTokenizer.from_pretrained(name, **source)
    return base, processor


def _is_one_image(images) -> bool:
    if isinstance(images, (str, bytes, os.PathLike, dict)) or not hasattr(images, "__len__"):
        return True
    return getattr(images, "ndim", None) in (2, 3)


def _read_image(images, index: int, transform) -> torch.Tensor:
    try:
        return transform(decode_image(images[index]))
    except Exception as error:
        shown = f" ({images[index]!r})" if isinstance(images[index], (str, os.PathLike)) else ""
        raise ValueError(
            f"image {index}{shown} cannot be read: {error}. Pass a PIL image, the path of an image, or an array of "
            "numbers from 0 to 255."
        ) from error
