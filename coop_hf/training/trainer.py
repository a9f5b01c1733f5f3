"""`CoOpTrainer`: transformers' `Trainer`, with what differs for learned prompts.

Overridden are only: data (images to embeddings, order of rows), the objective, the epoch-wise schedule of the paper,
and files (an adapter and the state of its training instead of a model). The training loop is transformers' own.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DynamoBackend, align_module_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, set_seed
from transformers.utils import logging

from ..data.feature_cache import EmbeddedImages, embed_images
from ..data.few_shot import check_labels, class_counts
from ..data.labelled_images import LabelledImages, collate, is_prepared
from ..modeling import CoOpModel, CoOpOutput
from . import checkpoints
from .adapter_trainer import AdapterTrainer
from .arguments import PAPER_WARMUP_LR, VARIANTS, CoOpTrainingArguments
from .epochs import FROZEN_IMAGE_EMBEDS, EmbeddingBatches, Epochs, GaussianAverage, epoch_cosine, fits_on
from .metrics import make_compute_metrics
from .objectives import Frozen, cross_entropy, sigmoid
from .screen import add_callbacks


__all__ = ["CoOpTrainer"]

logger = logging.get_logger(__name__)


class CoOpTrainer(AdapterTrainer):
    """Trains the active adapter of a [`CoOpModel`].

    Args:
        model (`CoOpModel`): without class names it takes those of the training set.
        args (`CoOpTrainingArguments`, *optional*, defaults to `CoOpTrainingArguments("coop_output")`): the arguments.
        train_dataset (`datasets.Dataset` or `torch.utils.data.Dataset`, *optional*):
            A data set with a column of images and one of labels (named in `args`), also a streamed one; any iterable
            of such dicts or of pairs, image and label; or a data set that gives `pixel_values` or `image_embeds`
            `(projection_dim,)` and `labels`, such as [`LabelledImages`] or [`EmbeddedImages`].
        eval_dataset (the same, or a `dict` of them, *optional*): what `evaluate()` measures.
        compute_metrics (`Callable`, *optional*): defaults to accuracy and macro-F1.
        model_init (`Callable`, *optional*): instead of `model`, what makes a fresh one: `model_init()` or
            `model_init(trial)`, whose `trial` is `None` outside of `hyperparameter_search`. Let all models share one
            loaded base: then the images are embedded once.
        kwargs: as for `transformers.Trainer`.

    Attributes:
        about (`dict`): what the model card should say and only you know: `dataset`, `dataset_id`, `split`, `license`
            (see `coop_hf.files.model_card.make_card`).

    Raises:
        ValueError: at once, before any work: a missing column, a label outside the class list, a class without
            images, an adapter that was loaded without `is_trainable=True`, a parameter that would learn outside the
            adapter, an objective or a way of training that is not supported.
    """

    def __init__(
        self,
        model: CoOpModel | None = None,
        args: CoOpTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        compute_metrics: Callable | None = None,
        model_init: Callable | None = None,
        **kwargs: Any,
    ):
        args = CoOpTrainingArguments("coop_output") if args is None else args
        if not isinstance(args, CoOpTrainingArguments):
            raise TypeError(f"`args` must be CoOpTrainingArguments, got {type(args).__name__}.")
        if model_init is not None:
            if model is not None:
                raise ValueError("pass either `model` or `model_init`, not both.")
            set_seed(args.seed)
            self.model_init = model_init
            try:
                model = super().call_model_init()
            except AttributeError as error:
                if "'NoneType'" not in str(error):
                    raise
                raise TypeError(
                    f"`model_init` is first called with trial=None, outside of a search ({error}): let it make a "
                    "model then, too, as in `n_ctx = trial.suggest_int(...) if trial else 4`."
                ) from error
        if not isinstance(model, CoOpModel):
            raise TypeError(f"CoOpTrainer trains a CoOpModel, got {type(model).__name__}.")
        if args.fsdp or args.deepspeed:
            raise ValueError("FSDP and DeepSpeed shard weights, and a context is a few kilobytes: train without them.")
        if train_dataset is not None:
            checkpoints.check_learned(model)
        if args.n_gpu > 1:
            logger.warning("One process uses one GPU. For all of them: torchrun --nproc_per_node %d ...", args.n_gpu)
            args._n_gpu = 1
        self._image_options: dict[str, Any] = {
            "image_column": args.image_column,
            "label_column": args.label_column,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "on_bad_image": args.on_bad_image,
            "original": args.recipe == "paper" or model.config.original_crop,
        }
        self.about: dict = {}
        self._measured: dict = {}
        self._embedded: dict[tuple, tuple[Dataset, EmbeddedImages]] = {}
        self._frozen: dict = {}  # of the batch
        self._kept: dict = {}  # for all batches
        self.epochs: Epochs | None = None
        self.average: GaussianAverage | None = None
        self._base: Any = None
        self._chooses_optimizer = kwargs.get("optimizer_cls_and_kwargs") is None
        self._counts: np.ndarray | None = None
        if train_dataset is not None:
            augment = args.recipe == "paper" if args.augment is None else args.augment
            train_dataset = self._as_images(train_dataset, model, augment=augment)
            self._counts = class_counts(train_dataset, model.class_names or [])
        num_images = 1 if train_dataset is None else len(train_dataset)
        self._complete(model, args, num_images)
        self._compiles = True
        self._may_fall_back = args.choose_compile(num_images, self._is_steady(model, train_dataset))
        if isinstance(eval_dataset, dict) and not hasattr(eval_dataset, "set_epoch"):
            eval_dataset = {name: self._as_images(part, model) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._as_images(eval_dataset, model)
        if model.class_names is None:
            raise ValueError("the model has no class names: pass `class_names=` when it is made.")
        self._class_names = list(model.class_names)
        kwargs.setdefault("data_collator", _collate)
        kwargs.setdefault("compute_loss_func", self._mean_loss)
        if self._chooses_optimizer:
            kwargs["optimizer_cls_and_kwargs"] = self.optimizer_cls_and_kwargs
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics or make_compute_metrics(model.class_names),
            **kwargs,
        )
        self.model_init = model_init  # type: ignore[assignment]
        self._take(model)
        add_callbacks(self)

    # ------------------------------------------------------------------ models and arguments

    def call_model_init(self, trial: Any = None) -> CoOpModel:
        """As of `transformers.Trainer`; the model is checked and takes the arguments that concern it."""
        model = super().call_model_init(trial)
        if not isinstance(model, CoOpModel):
            raise TypeError(f"`model_init` must return a CoOpModel, got {type(model).__name__}.")
        if model.class_names is None:
            model.set_class_names(self._class_names)
        if model.class_names != self._class_names:
            raise ValueError(
                "`model_init` returned a model of other classes, or in another order, than the first time: labels "
                "would mean something else."
            )
        self._take(model)
        return model

    def _take(self, model: CoOpModel) -> None:
        """Gives a model what the arguments say of it."""
        args = self.args
        if args.text_chunk_size is not None:
            model.text_chunk_size = args.text_chunk_size
        model.text_parallel = args.world_size > 1 and model.text_pass == "shared"
        if self._base is not None and self._base() is not model.base_model:
            self._embedded.clear()
        self._base = weakref.ref(model.base_model)

    def _complete(self, model: CoOpModel, args: CoOpTrainingArguments, num_images: int) -> None:
        """Fills in what the arguments leave to the method, and takes the objective and the optimizer from them."""
        # An adapter that changes the image tower needs the pixels at every step.
        self._is_cached = args.cache_features and not model.adapter.prompts_image_tower
        given = (_embedding_size(model), model.config.method, self._is_cached, _shared_length(model))
        if self._counts is not None:
            args.complete(num_images, int(self._counts.max()), len(self._counts), *given)
            _check_objective(args, self._is_cached)
        elif args.per_device_train_batch_size is None:
            args.complete(1, 1, 1, *given)
        self._objective = args.get_objective(self._counts)
        if self._chooses_optimizer:
            self.optimizer_cls_and_kwargs = None
            if args.variant is not None:
                betas = (args.adam_beta1, args.adam_beta2)
                options = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
                self.optimizer_cls_and_kwargs = (VARIANTS[args.variant][0], options)

    def _is_steady(self, model: CoOpModel, dataset: Any) -> bool:
        """Whether each training step is the same work: learned text prompts against embeddings that lie ready."""
        adapter = model.adapter
        is_text = hasattr(adapter.config, "n_ctx") and not (adapter.reads_image or adapter.prompts_image_tower)
        is_cached = isinstance(dataset, EmbeddedImages) or (isinstance(dataset, LabelledImages) and self._is_cached)
        return is_text and is_cached and not getattr(self._objective, "needs_whole_batch", False)

    def _hp_search_setup(self, trial: Any) -> None:
        """The arguments of a training, once its model is there: those of a trial of `hyperparameter_search`, too."""
        args = self.args
        epochs, steps = args.num_train_epochs, args.max_steps
        super()._hp_search_setup(trial)
        if trial is not None and args.num_train_epochs != epochs and args.max_steps == steps:
            args.max_steps = -1  # epochs were asked for, and the recipe counts steps
        checkpoints.check_learned(self.model)
        if self.model_init is not None:
            self._complete(self.model, args, len(self.train_dataset))
        self.average = None
        if args.average_mean is not None:
            self.average = GaussianAverage(self.model.learned_parameters(), args.average_mean, args.average_std)

    # ------------------------------------------------------------------ data

    def _as_images(self, dataset: Any, model: CoOpModel, augment: bool = False) -> Any:
        """`LabelledImages` of images and labels, checked; what gives inputs of the model already as it is."""
        if is_prepared(dataset):
            is_fine = isinstance(dataset, LabelledImages) or not model.adapter.prompts_image_tower
            if not is_fine and "image_embeds" in dataset[0]:
                raise ValueError(
                    f"{type(dataset).__name__} holds image embeddings, and the adapter {model.active_adapter!r} "
                    "changes the image tower that makes them: pass the images themselves."
                )
            if hasattr(dataset, "labels") and model.class_names is not None:  # here, not in each step on the device
                labels = np.asarray(dataset.labels)
                check_labels(labels[labels != -100], len(model.class_names), "An image")
            return dataset
        images = LabelledImages(
            dataset, model.image_processor, class_names=model.class_names, augment=augment, **self._image_options
        )
        if model.class_names is None:
            model.set_class_names(images.class_names)
        return images

    def _as_embeddings(self, dataset: Any, num_views: int | None) -> Any:
        """Embeddings of images, computed once, if `args` ask for that; any other data set as it is."""
        if not isinstance(dataset, LabelledImages) or not self._is_cached:
            return dataset
        key = (id(dataset), num_views or None)
        if key not in self._embedded:
            logger.info("Image embeddings are computed once and cached (cache_features=True).")
            self._embedded[key] = (dataset, EmbeddedImages(self._embed(dataset, num_views), dataset.labels, True))
        return self._embedded[key][1]

    def _embed(self, dataset: LabelledImages, num_views: int | None) -> Tensor:
        """What the frozen image tower gives: `(num_views or 1, len(dataset), projection_dim)`."""
        with torch.no_grad(), self.accelerator.autocast(), self.model.disable_adapter():
            return embed_images(
                self.model,
                dataset,
                num_views or None,
                cache_dir=self.args.feature_cache_dir,
                batch_size=self.args.per_device_eval_batch_size,
                num_workers=self.args.dataloader_num_workers or None,
                process_index=self.args.process_index,
                num_processes=self.args.world_size,
                barrier=self.accelerator.wait_for_everyone,
                progress=not self.args.disable_tqdm and self.is_local_process_zero(),
            )

    def get_train_dataloader(self) -> DataLoader:
        """The training batches. An incomplete last batch of an epoch is left out, as in the paper's code."""
        args = self.args
        num_images, group = len(self.train_dataset), args.world_size * args.gradient_accumulation_steps
        if num_images < self._train_batch_size * group:
            # Less than one global batch: all processes share what there is, and padding makes the shares equal.
            args.per_device_train_batch_size = -(-num_images // group)
            self._train_batch_size = args.train_batch_size
        batch_size = self._train_batch_size * group
        self.steps_per_epoch = max(1, num_images // batch_size)
        self.num_epochs = math.ceil(args.num_train_epochs)
        if args.max_steps > 0:
            self.num_epochs = math.ceil(args.max_steps / self.steps_per_epoch)
        num_views = args.num_views
        if num_views is None:
            num_views = self.num_epochs if args.recipe == "paper" else 0
        dataset, frozen = self._as_embeddings(self.train_dataset, num_views), None
        if isinstance(dataset, LabelledImages):
            logger.info("Training takes the images themselves through the image tower, at every step.")
            asks = getattr(self._objective, "needs_frozen_images", False) and args.cache_features
            if asks and self.model.adapter.prompts_image_tower:
                frozen = self._embed(dataset, self.num_epochs if dataset.augment else None)
        self.epochs = Epochs(dataset, batch_size, self._image_options["seed"], frozen, args.balanced_sampling)
        if args.torch_compile:
            # Where the tokens stand is found out now: a compiler cannot follow that, and need not.
            with torch.no_grad():
                self.model.get_text_features(torch.ones(1, self.model.family.projection_dim, device=args.device))
        is_plain = type(dataset) is EmbeddedImages and self.data_collator is _collate
        if is_plain and args.world_size == 1 and fits_on(args.device, dataset.image_embeds):
            self.epochs.place(args.device)
            return EmbeddingBatches(self.epochs, self._train_batch_size, _collate)
        return self._get_dataloader(self.epochs, "Training", self._train_batch_size, SequentialSampler, True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The evaluation batches, of plain views."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        return super().get_eval_dataloader(self._as_embeddings(self._as_images(dataset, self.model), None))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The batches of `predict`, of plain views."""
        return super().get_test_dataloader(self._as_embeddings(self._as_images(test_dataset, self.model), None))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As `transformers.Trainer.train`."""
        self._kept.clear()
        if self.args.should_save:
            checkpoints.sweep(self.args.output_dir)
        if self.model_wrapped is self.model and getattr(self.model, "_is_accelerate_prepared", False):
            # An evaluation before the training prepared the model for evaluation, and accelerate would not prepare it
            # again: each process would go its own way.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._measured["seconds"] = output.metrics["train_runtime"]
        return output

    # ------------------------------------------------------------------ loss and schedule

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As of `transformers.Trainer`, with the objective of the arguments."""
        self._frozen = {
            "image_embeds": inputs.pop(FROZEN_IMAGE_EMBEDS, None),
            "images": {name: value for name, value in inputs.items() if name != "labels"},
        }
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _mean_loss(self, outputs: CoOpOutput, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The objective, averaged over the images of the global batch: all processes, all accumulation steps."""
        share: Any = None if num_items_in_batch is None else labels.ne(-100).sum() / num_items_in_batch
        if self.model.training:
            weight = (1.0 if share is None else share) * self.args.world_size
            frozen = Frozen(self.model, outputs, share=weight, kept=self._kept, **self._frozen)
            loss = self._objective(outputs, labels, frozen)
        else:
            loss = self._eval_loss(outputs, labels)
        return loss if share is None else loss * share

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        # A batch that is the whole global batch needs no count: its mean is the mean.
        is_whole = self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1
        return None if is_whole else super()._get_num_items_in_batch(batch_samples, device)

    def _eval_loss(self, outputs: CoOpOutput, labels: Tensor) -> Tensor:
        if self.args.objective == "sigmoid":
            return sigmoid(outputs, labels)
        return cross_entropy(outputs, labels, label_smoothing=self.args.label_smoothing_factor)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As of `transformers.Trainer`; the loss is the mean over the images, each counted once."""
        plugin = self.accelerator.state.dynamo_plugin
        backend, plugin.backend = plugin.backend, DynamoBackend.NO
        try:  # class embeddings are computed once, and batches differ in size: there is nothing to compile for
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            plugin.backend = backend
        whole = isinstance(output.predictions, np.ndarray) and isinstance(output.label_ids, np.ndarray)
        if whole and self.preprocess_logits_for_metrics is None:
            outputs = CoOpOutput(logits=torch.from_numpy(output.predictions))
            loss = self._eval_loss(outputs, torch.from_numpy(output.label_ids))
            output.metrics[f"{metric_key_prefix}_loss"] = loss.item()
        return output

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        if self._may_fall_back and not self._compiles:
            model = self.model
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except Exception as error:
            if not self._may_fall_back or model is self.model:
                raise
            # It was not asked for, so it must not cost the training.
            logger.warning("Training goes on without torch.compile, which failed (%s).", str(error)[:500])
            self._compiles = False
            self.model.zero_grad()
            loss = super().training_step(self.model, inputs, num_items_in_batch)
        if self._looks_at_each_loss:
            self._check_finite(loss, self.state.global_step + 1)
        return loss

    @property
    def _looks_at_each_loss(self) -> bool:
        # On another device every look would wait for the step: there losses are looked at before they are used.
        return self.args.device.type == "cpu"

    def _check_finite(self, loss: Tensor, step: int) -> None:
        value = loss.item()
        if not math.isfinite(value):
            saved = checkpoints.last_checkpoint(self.args.output_dir)
            raise FloatingPointError(
                f"the loss became {value} at step {step}: training is stopped. "
                + (f"The last checkpoint, {saved}, is good. " if saved else "")
                + "Lower the learning rate, check the images, or use bf16 or fp32 instead of fp16."
            )

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self._check_finite(tr_loss, self.state.global_step)  # the sum since the last log
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Only what is learned has a gradient: there is no need to walk through the base at every step.
        if grad_norm is None and getattr(self.accelerator, "scaler", None) is None:
            gradients = [p.grad for p in self.model.learned_parameters().values() if p.grad is not None]
            return gradients[0].norm() if len(gradients) == 1 else torch.nn.utils.get_total_norm(gradients)
        return super()._get_grad_norm(model, grad_norm)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Weight decay applies to all that learns, whatever its name."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        prepared = self.optimizer
        if isinstance(prepared, AcceleratedOptimizer) and prepared.scaler is None and self.args.device.type != "xla":
            # Here the wrapper does nothing but look for a package among the installed ones, twice a step.
            self.optimizer = prepared.optimizer
        if self.lr_scheduler is None and self.args.steps_by_epoch:
            warmup = PAPER_WARMUP_LR / self.args.learning_rate if self.args.learning_rate else 0.0
            factor = epoch_cosine(self.steps_per_epoch, self.num_epochs, warmup)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)


def _collate(examples: Any) -> dict[str, Tensor]:
    batch = collate(examples)
    if not isinstance(examples, dict) and FROZEN_IMAGE_EMBEDS in examples[0]:
        batch[FROZEN_IMAGE_EMBEDS] = torch.stack([example[FROZEN_IMAGE_EMBEDS] for example in examples])
    return batch


def _embedding_size(model: CoOpModel) -> float:
    """Root mean square of the base's token embeddings."""
    embedding = model.family.token_embedding
    with torch.no_grad(), align_module_device(embedding):
        return embedding.weight.float().pow(2).mean().sqrt().item()


def _shared_length(model: CoOpModel) -> int | None:
    """Vectors of the context that all classes share; `None` where each has its own."""
    if getattr(model.config, "class_specific", False):
        return None
    context = getattr(model.adapter, "context", None)
    return 16 if context is None else len(context)


def _check_objective(args: CoOpTrainingArguments, is_cached: bool) -> None:
    """What an objective or an adapter cannot be trained with is told before work starts."""
    objective = args.get_objective()
    if getattr(objective, "needs_whole_batch", False):
        if args.torch_compile:
            raise ValueError(
                f"the objective {args.objective!r} takes two gradients of one step, which torch.compile does not: "
                "leave torch_compile out."
            )
        if args.gradient_accumulation_steps > 1 or args.fp16:
            raise ValueError(
                f"the objective {args.objective!r} needs the gradient of the whole batch at once: leave out "
                "gradient_accumulation_steps (text_chunk_size saves memory, too), and take bf16 or fp32, not fp16."
            )
    if args.cache_features and not is_cached and args.num_views is not None:
        raise ValueError(
            "`num_views` counts cached views, and this adapter changes the image tower, so that nothing is "
            "cached: leave it out. Every epoch sees new views with the paper's recipe."
        )
