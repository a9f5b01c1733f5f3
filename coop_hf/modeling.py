"""`CoOpModel`: a frozen CLIP-like model with a learned adapter.

    class names -> prompt layout -> prompts of the adapter put into it -> text tower -> class embeddings
    images -> image tower -> image embeddings
    cosine of the two x scale (+ bias) -> logits -> loss

Only what the adapter holds learns; for CoOp its context vectors (https://arxiv.org/abs/2109.01134, equations 2 and 3).
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .adapters.base import Adapter
from .adapters.model import AdapterModel, View
from .adapters.tpt import tpt as tune
from .checks import is_int
from .config import ADAPTER_CONFIG_NAME, CoOpConfig, PromptConfig
from .core.class_prompts import TEXT_PASSES, ClassPrompts
from .core.families import check_tokenizer, get_family
from .core.layout import fill_template, tokenize_texts
from .data.inputs import open_images, read_batches
from .data.labelled_images import collate
from .data.transforms import eval_transform
from .deploy.export import ImageClassifier, as_image_classifier
from .deploy.merging import merge_and_unload
from .files.adapter_files import Shapes, check_adapter, read_adapter
from .files.coop_checkpoint import read_coop_checkpoint
from .files.coop_conversion import checkpoint_to_adapter
from .files.load_base import check_is_base, load_base, load_base_of_adapter, take_config
from .hub import has_file


__all__ = ["CoOpModel", "CoOpOutput"]


@dataclass
class CoOpOutput(ModelOutput):
    """What `CoOpModel` returns.

    Args:
        loss (`torch.Tensor`, *optional*): scalar; mean cross-entropy over the batch, if labels were given.
        logits (`torch.Tensor`): `(batch, num_classes)`, fp32; the cosine times the base's scale, plus its bias if it
            has one.
        text_embeds (`torch.Tensor`): `(num_classes, projection_dim)`, normalised; with an adapter that reads the image
            `(batch, num_classes, projection_dim)`.
        image_embeds (`torch.Tensor`): `(batch, projection_dim)`, normalised.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class CoOpModel(AdapterModel):
    """A CLIP-like model with learned prompts; everything else is frozen.

    Several adapters, each with its own classes, may stand on one base, and several models on one base too.

    Args:
        base_model (`PreTrainedModel`): the base: `CLIPModel`, `SiglipModel` and the others that
            `coop_hf.core.families` knows, or one that PEFT has wrapped. It is frozen and put in evaluation mode;
            nothing in it is changed.
        config (`PromptConfig`, *optional*, defaults to `CoOpConfig()`): the first adapter.
        class_names (`list[str]`, *optional*, defaults to `config.class_names`): its classes.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): the base's processor, or its tokenizer alone;
            `predict` and training on images need a processor.
        adapter_name (`str`, *optional*, defaults to `"default"`): the adapter's name.
        text_pass (`str`, *optional*, defaults to `"auto"`): how class embeddings are computed. `"shared"`: what the
            prompts have in common runs once, nothing is padded (`coop_hf.core.shared_prefix`). `"plain"`: every prompt
            is a padded row. Both are exact. `"auto"` takes `"shared"` where the tower allows it.
        text_chunk_size (`int`, *optional*): how many classes are computed at a time in training; bounds memory, leaves
            the numbers unchanged, costs about a third more time.
        context (`torch.Tensor`, *optional*): `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`, vectors to start from
            instead of those that `config` describes.
        tensors (`dict[str, torch.Tensor]` or `Callable`, *optional*): the same for any method, under their names in
            files; or what gives them when it is told the shapes that are expected.

    Raises:
        TypeError: the base is of no supported family, or no processor was given.
        ValueError: bad class names, or prompts longer than the tower's positions.
    """

    # Several processes share the work of a training step's class embeddings. `CoOpTrainer` sets it, because then all
    # of them must take every step together.
    text_parallel = False
    # Read by transformers.Trainer: the loss is the mean over the batch given, and takes no `num_items_in_batch`.
    accepts_loss_kwargs = False

    def __init__(
        self,
        base_model: Any,
        config: PromptConfig | None = None,
        class_names: list[str] | None = None,
        processor: Any = None,
        adapter_name: str = "default",
        text_pass: str = "auto",
        text_chunk_size: int | None = None,
        context: Tensor | None = None,
        tensors: dict[str, Tensor] | Callable[[Shapes], dict[str, Tensor]] | None = None,
    ):
        family = get_family(base_model)
        if processor is None or not callable(getattr(processor, "tokenizer", processor)):
            raise TypeError(
                "CoOpModel needs `processor`: the base's processor (CLIPProcessor for CLIP), or its tokenizer alone; "
                f"got {type(processor).__name__}. `CoOpModel.from_pretrained(...)` loads it by itself."
            )
        check_tokenizer(family, getattr(processor, "tokenizer", processor))
        if text_pass not in TEXT_PASSES:
            raise ValueError(f"`text_pass` must be one of {', '.join(map(repr, TEXT_PASSES))}, got {text_pass!r}.")
        if text_chunk_size is not None and (not is_int(text_chunk_size) or text_chunk_size < 1):
            raise ValueError(f"`text_chunk_size` must be a positive whole number or None, got {text_chunk_size!r}.")
        if text_pass == "shared" and not family.has_shared_pass:
            raise ValueError(
                "text_pass='shared' needs a causal text tower of layers that it knows (transformers' CLIPEncoderLayer "
                "or MetaClip2EncoderLayer); use 'plain'."
            )
        super().__init__(base_model, family, processor)
        self.text_pass = ("shared" if family.has_shared_pass else "plain") if text_pass == "auto" else text_pass
        self.text_chunk_size = text_chunk_size
        self.adapters = nn.ModuleDict()
        self._active: str = adapter_name
        self._add(
            adapter_name, config, class_names, {"prompt_embeddings": context} if context is not None else tensors
        )

    # ------------------------------------------------------------------ the method

    def forward(
        self,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        _view: View | None = None,
        **image_inputs: Tensor,
    ) -> CoOpOutput:
        """Scores images against the classes.

        Args:
            pixel_values (`torch.Tensor`, *optional*): `(batch, 3, height, width)`, as the image processor gives them.
            image_embeds (`torch.Tensor`, *optional*): `(batch, projection_dim)`, from `get_image_features`, normalised
                or not; instead of `pixel_values`.
            labels (`torch.Tensor`, *optional*): `(batch,)`, class indices; -100 is ignored. On the CPU they are
                checked; on another device that would stop every step to wait for it, so there data sets check them.
            image_inputs: what else the image processor gives (NaFlex: `pixel_attention_mask`, `spatial_shapes`).

        Returns:
            `CoOpOutput`.
        """
        if (pixel_values is None) == (image_embeds is None):
            given = "neither" if pixel_values is None else "both"
            raise ValueError(f"pass either `pixel_values` or `image_embeds`; got {given}.")
        view = _view or self.view()
        if labels is not None:
            _check_labels(labels, view)
        if pixel_values is not None:
            image_embeds = self.get_image_features(pixel_values, _view=view, **image_inputs)
        assert image_embeds is not None
        if image_embeds.dim() != 2 or image_embeds.shape[-1] != self.family.projection_dim:
            raise ValueError(
                f"`image_embeds` must be (batch, {self.family.projection_dim}), as `get_image_features` gives them, "
                f"got {tuple(image_embeds.shape)}: were they made by another model?"
            )
        # Cosines in fp32 whatever the towers' dtype: in fp16 a logit of 30 is only known to 1/64.
        with torch.autocast(self.device.type, enabled=False):
            image_embeds = F.normalize(image_embeds.to(self.device).float(), dim=-1)
        text_embeds, logits = self._score(image_embeds, view)
        while not view.is_current:  # another thread put what was learned for the classes into another order
            view.read()
            text_embeds, logits = self._score(image_embeds, view)
        with torch.autocast(logits.device.type, enabled=False):
            loss = None if labels is None else F.cross_entropy(logits, labels.to(logits.device))
        image_embeds = image_embeds.to(text_embeds.device)
        return CoOpOutput(loss=loss, logits=logits, text_embeds=text_embeds, image_embeds=image_embeds)

    def _score(self, image_embeds: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Normalised class embeddings, and logits `(batch, num_classes)`, of normalised image embeddings."""
        text_embeds = self._text_features(image_embeds, view)
        with torch.autocast(text_embeds.device.type, enabled=False):
            text_embeds = F.normalize(text_embeds.float(), dim=-1)
            image_embeds = image_embeds.to(text_embeds.device)
            score = Adapter.cosines if view.is_disabled else type(view.adapter).cosines
            logits = self.logit_scale.to(text_embeds.device) * score(view.adapter, image_embeds, text_embeds)
            if self.family.logit_bias is not None:
                logits = logits + self.family.logit_bias.to(logits.device)
        return text_embeds, logits

    def logits_to_probabilities(self, logits: Tensor) -> Tensor:
        """Scores `(..., num_classes)` of logits: their softmax, or on SigLIP their sigmoid, of each class alone."""
        return self.family.probabilities(logits)

    def get_text_features(self, image_embeds: Tensor | None = None, _view: View | None = None) -> Tensor:
        """Class embeddings of the active adapter, or of its hand-written template while it is disabled.

        With gradients where the adapter learns; otherwise computed once and kept until it or the classes change.

        Args:
            image_embeds (`torch.Tensor`, *optional*): `(batch, projection_dim)`, normalised; needed by adapters that
                read the image.

        Returns:
            `torch.Tensor` `(num_classes, projection_dim)`, projected, not normalised; for adapters that read the image
            `(batch, num_classes, projection_dim)`.
        """
        view = _view or self.view()
        features = self._text_features(image_embeds, view)
        while not view.is_current:
            view.read()
            features = self._text_features(image_embeds, view)
        return features

    def _text_features(self, image_embeds: Tensor | None, view: View) -> Tensor:
        if view.is_disabled:
            return self._template_features(view)
        adapter, class_prompts = view.adapter, self._class_prompts(view)
        if adapter.reads_image and image_embeds is None:
            raise ValueError(
                f"the class embeddings of the method {adapter.method!r} depend on the image: pass `image_embeds`, or "
                "call the model with images."
            )
        class_embeds = None
        if adapter.uses_template:
            with torch.no_grad():
                class_embeds = F.normalize(self._template_features(view).float(), dim=-1)
        prompts = adapter.prompts(image_embeds, class_embeds).text
        learns = torch.is_grad_enabled() and any(value.requires_grad for value in prompts.values())
        if learns or adapter.reads_image or torch.compiler.is_compiling():
            parallel = self.text_parallel and learns and self.training and not adapter.reads_image
            return class_prompts.features(prompts, self.text_pass, self.text_chunk_size, parallel)
        return class_prompts.kept_features(prompts, self.text_pass, self.text_chunk_size)

    def _template_features(self, view: View) -> Tensor:
        """Class embeddings of the hand-written template, not normalised."""
        classes, adapter = self._class_prompts(view), view.adapter
        template = classes.template_prompts
        if template is None:
            texts = fill_template(adapter.config.template, classes.class_names)
            layout = tokenize_texts(self.tokenizer, texts, self.family.max_positions)
            template = classes.template_prompts = ClassPrompts(self.family, layout)
        return template.kept_features(None, self.text_pass, self.text_chunk_size)

    def get_image_features(self, pixel_values: Tensor, _view: View | None = None, **image_inputs: Tensor) -> Tensor:
        """Image embeddings `(batch, projection_dim)`, projected, not normalised, in the base's dtype."""
        view, prompts = _view or self.view(), None
        if view.adapter.prompts_image_tower and not view.is_disabled:
            prompts = view.adapter.prompts().vision
        return self.family.image_features(pixel_values, prompts, **image_inputs)

    @torch.no_grad()
    def template_embeds(self, templates: list[str] | None = None) -> Tensor:
        """Normalised class embeddings `(num_classes, projection_dim)` of hand-written templates, fp32.

        Args:
            templates (`list[str]`, *optional*, defaults to the active adapter's one template): of several, the
                normalised mean of the normalised embeddings, as in CLIP.
        """
        if templates is None:
            return F.normalize(self._template_features(self.view()).float(), dim=-1)
        layouts = [
            tokenize_texts(self.tokenizer, fill_template(template, self.class_names or []), self.family.max_positions)
            for template in templates
        ]
        each = [ClassPrompts(self.family, layout).features(None, self.text_pass) for layout in layouts]
        return F.normalize(torch.stack([F.normalize(e.float(), dim=-1) for e in each]).mean(dim=0), dim=-1)

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied by (CLIP: exp(logit_scale)), fp32."""
        return self.family.logit_scale

    def _class_prompts(self, view: View) -> ClassPrompts:
        if view.classes is None:
            raise ValueError(
                f"the adapter {self._active!r} has no class names yet: pass `class_names=[...]` when the model "
                "is made, or call `model.set_class_names([...])`."
            )
        return view.classes

    # ------------------------------------------------------------------ prediction

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        top_k: int | None = 5,
        batch_size: int = 32,
        tpt: bool | dict[str, Any] = False,
        on_bad_image: str = "raise",
        image_column: str = "image",
    ) -> Any:
        """Classifies images.

        Args:
            images: an image (`PIL.Image.Image`, path, URL, encoded `bytes`, array `(height, width[, channels])` of 0
                to 255, or float tensor `(3, height, width)` as the image processor gives it); several: a list, an
                array stack, what an image processor returns, a data set (also streamed), or any iterable of images,
                of `{"image": ...}` or of pairs of image and label; or a folder, with those below it.
            top_k (`int`, *optional*, defaults to 5): how many classes to return, best first; `None`: all.
            batch_size (`int`, *optional*, defaults to 32): images that go through the image tower at a time.
            tpt (`bool` or `dict`, *optional*, defaults to `False`): tune the context on each image before it is
                classified, `True` or the options of [`~coop_hf.adapters.tpt.tpt`]; the adapter stays as it is.
            on_bad_image (`str`, *optional*, defaults to `"raise"`): `"skip"` gives `None` for an image that cannot be
                read, and warns.
            image_column (`str`, *optional*, defaults to `"image"`): column, or key of dicts, that holds the images.

        Returns:
            `list[dict]` for one image, `[{"label": str, "score": float}, ...]` with scores that are probabilities
            over all classes (on SigLIP, as in its own pipeline, of each class alone: they need not add up to one); for
            several images a list of such lists; for a folder a `dict` of them by file.

        Raises:
            ValueError: no images, a bad `top_k`, missing class names, or an image that cannot be read (says which).
        """
        if top_k is not None and (not is_int(top_k) or top_k < 1):
            raise ValueError(f"`top_k` must be a positive whole number or None, got {top_k!r}.")
        if not is_int(batch_size) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive whole number, got {batch_size!r}.")
        view = self.view()  # one for all images: other classes may be set meanwhile
        self._class_prompts(view)
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"`on_bad_image` must be 'raise' or 'skip', got {on_bad_image!r}.")
        values, is_single, files = open_images(images, image_column)
        transform = None if tpt else eval_transform(self.image_processor, view.adapter.config.original_crop)
        batches = read_batches(values, batch_size, transform, on_bad_image)
        options = {"batch_size": batch_size, **(tpt if isinstance(tpt, dict) else {})} if tpt else None
        results = _predictions(self, view, batches, top_k, options)
        return results[0] if is_single else results if files is None else dict(zip(files, results))

    merge_and_unload = merge_and_unload  # a function of its own room, and nothing to add

    def as_image_classifier(self) -> ImageClassifier:
        """Image tower and class embeddings as one plain module, for export; see `coop_hf.deploy.export`."""
        return as_image_classifier(self)

    @classmethod
    def from_coop_checkpoint(
        cls,
        path: str | os.PathLike,
        base_model: Any,
        class_names: list[str] | None = None,
        class_token_position: str = "end",
        *,
        processor: Any = None,
        epoch: int | None = None,
        check_base: bool = True,
        template: str | None = None,
        **kwargs: Any,
    ) -> "CoOpModel":
        """A model with what a checkpoint of the public code holds, which may learn on.

        Of CoOp, CoCoOp, KgCoOp, ProGrad, MaPLe, VPT, IVLP, PromptSRC and TCP; which it is shows in the file.

        Args:
            path (`str` or `os.PathLike`): the checkpoint, or the folder of the training's output.
            base_model (`PreTrainedModel`, `str` or `os.PathLike`): the CLIP model that it was learned on.
            class_names, class_token_position, check_base, template: see
                `coop_hf.files.coop_conversion.checkpoint_to_adapter`.
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
        embedding = model.family.token_embedding.weight
        positions = getattr(model.family.text_embeddings, "position_embedding", None)
        config, tensors = checkpoint_to_adapter(
            checkpoint,
            embedding,
            model.tokenizer,
            class_names,
            class_token_position,
            check_base,
            template,
            None if positions is None else positions.weight,
        )
        named = {"base_model_name_or_path": model.config.base_model_name_or_path, "revision": model.config.revision}
        options: dict[str, Any] = {"text_pass": model.text_pass, "text_chunk_size": model.text_chunk_size}
        options["adapter_name"] = model.active_adapter
        return cls(
            model.base_model,
            replace(config, **named),
            processor=model.processor,
            tensors=tensors,
            **options,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        config: PromptConfig | None = None,
        class_names: list[str] | None = None,
        *,
        adapter_name: str = "default",
        is_trainable: bool = False,
        base_model: Any = None,
        processor: Any = None,
        text_pass: str = "auto",
        text_chunk_size: int | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **base_model_kwargs: Any,
    ) -> "CoOpModel":
        """A fresh adapter on a base model, or a learned one with its base.

        A folder or repository that holds `adapter_config.json` is an adapter, any other a base model, whose
        `config.json` says of which family it is.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub id of a base model or an adapter.
            config (`PromptConfig`, *optional*): for a base model, which method and how; not for an adapter, which has
                its own.
            class_names (`list[str]`, *optional*, defaults to the configuration's): the classes.
            adapter_name (`str`, *optional*, defaults to `"default"`): the adapter's name in the model.
            is_trainable (`bool`, *optional*, defaults to `False`): whether a learned adapter may learn on. A fresh one
                always may.
            base_model (`PreTrainedModel`, `str` or `os.PathLike`, *optional*): for an adapter, the base to use instead
                of the one that it names.
            processor (*optional*): for example a tokenizer alone; defaults to the base's own.
            text_pass, text_chunk_size: as for `CoOpModel`.
            revision (`str`, *optional*): revision of what is named; an adapter itself names its base's revision.
            subfolder (`str`, *optional*): folder of the adapter in its repository.
            token, cache_dir, local_files_only, force_download: as for `huggingface_hub.hf_hub_download`.
            base_model_kwargs: passed to the base's `from_pretrained`: `dtype`, `device_map`, `attn_implementation` ...
                Fields of `CoOpConfig`, such as `n_ctx=4`, stand for a `config` of their own; `device` is where the
                model is moved.

        Raises:
            ValueError, OSError: says what was not found, damaged or contradictory; a base that is not supported.
        """
        name = os.fspath(pretrained_model_name_or_path)
        config, device = take_config(config, base_model_kwargs), base_model_kwargs.pop("device", None)
        download: dict[str, Any] = {"token": token, "cache_dir": cache_dir}
        download |= {"local_files_only": local_files_only, "force_download": force_download}
        download = {key: value for key, value in download.items() if value is not None and value is not False}
        options: dict[str, Any] = {"adapter_name": adapter_name, "text_pass": text_pass}
        options["text_chunk_size"] = text_chunk_size
        source = {**download, **({"revision": revision} if revision else {})}
        if not has_file(name, ADAPTER_CONFIG_NAME, subfolder=subfolder, **source):
            check_is_base(name, subfolder, source)
            if base_model is not None:
                raise ValueError(f"{name!r} is not an adapter, so `base_model` has no place: pass one or the other.")
            config = replace(config or CoOpConfig(), base_model_name_or_path=name, revision=revision)
            base, processor = load_base(name, processor, source, base_model_kwargs)
            model = cls(base, config, class_names, processor, **options)
            return model if device is None else model.to(device)

        if config is not None:
            raise ValueError(
                f"{name!r} is an adapter and has its own configuration: leave `config` out, or name a base model to "
                "start afresh."
            )
        checked = own = check_adapter(name, subfolder=subfolder, **source)  # refused before a large base is loaded
        base, processor = load_base_of_adapter(name, own, base_model, processor, download, base_model_kwargs)
        if base_model is not None:  # saved again, the adapter names the base that it stands on
            here = base.config._name_or_path or own.base_model_name_or_path
            own = replace(own, base_model_name_or_path=here, revision=None)

        def tensors(expected: Shapes) -> dict[str, Tensor]:
            return read_adapter(name, expected, config=checked, subfolder=subfolder, **source)[1]

        model = cls(base, own, None, processor, tensors=tensors, **options)
        model.adapter.is_trainable = is_trainable
        model._set_trainable()
        if class_names is not None:
            model.set_class_names(class_names)
        return model if device is None else model.to(device)


def _predictions(
    model: CoOpModel, view: View, batches: Iterator[list], top_k: int | None, tpt: dict[str, Any] | None
) -> list[Any]:
    """The classes of each image, best first; `None` where there is no image."""
    results: list[Any] = []
    for batch in batches:
        read: Any = [image for image in batch if image is not None]
        guesses: Iterator = iter(())
        if read:
            logits = tune(model, read, _view=view, **tpt).logits if tpt else model(_view=view, **collate(read)).logits
            names = model._class_prompts(view).class_names
            best = model.logits_to_probabilities(logits).topk(min(top_k or len(names), len(names)), dim=-1)
            pairs = [zip(*pair) for pair in zip(best.values.tolist(), best.indices.tolist())]
            guesses = ([{"label": names[c], "score": value} for value, c in pair] for pair in pairs)
        results += [None if image is None else next(guesses) for image in batch]
    return results


def _check_labels(labels: Tensor, view: View) -> None:
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.is_floating_point():
        return
    num_classes = len(view.classes.class_names) if view.classes else 0
    outside = ((labels < 0) & (labels != -100)) | (labels >= num_classes)
    if num_classes and outside.any():
        place = int(outside.flatten().nonzero()[0, 0])
        raise ValueError(
            f"label {int(labels.flatten()[place])} at position {place} is outside the {num_classes} classes: "
            f"labels go from 0 to {num_classes - 1} (-100 is ignored). Correct the labels, or name all classes."
        )
