"""`CoOpTrainer`: transformers' `Trainer`, with what differs for a learned context.

Overridden are only: data (images to embeddings, order of rows), the epoch-wise schedule of the paper, and files (an
adapter and the state of its training instead of a model). The training loop is transformers' own.
"""

import json
import math
import os
import shutil
import uuid

import numpy as np
import torch
from accelerate.utils import align_module_device
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..atomic import save_tensors
from ..data.feature_cache import EmbeddedImages, embed_images
from ..data.labelled_images import LabelledImages, collate
from ..files.adapter_files import WEIGHTS_KEY, read_adapter, write_adapter
from ..files.model_card import write_card
from ..files.publish import push_to_hub
from ..modeling import CoOpModel
from .arguments import PAPER_WARMUP_LR, CoOpTrainingArguments
from .metrics import make_compute_metrics


__all__ = ["CoOpTrainer"]

logger = logging.get_logger(__name__)

TRAINING_STATE_JSON = "training_state.json"

TRAINING_STATE_TENSORS = "training_state.safetensors"

TRAINER_STATE = "trainer_state.json"

_STAGING = ".saving-"


class CoOpTrainer(Trainer):
    """Trains the active adapter of a [`CoOpModel`].

    Args:
        model (`CoOpModel`):
            The model. Without class names it takes those of the training set.
        args (`CoOpTrainingArguments`, *optional*):
            Defaults to `CoOpTrainingArguments("coop_output")`.
        train_dataset (`datasets.Dataset` or `torch.utils.data.Dataset`, *optional*):
            A data set with a column of images and one of labels (named in `args`), or anything that gives
            `pixel_values` or `image_embeds` `(projection_dim,)` and `labels`, such as [`LabelledImages`] or
            [`EmbeddedImages`].
        eval_dataset (the same, or a `dict` of them, *optional*):
            What `evaluate()` measures.
        compute_metrics (`Callable`, *optional*):
            Defaults to accuracy and macro-F1.
        kwargs: as for `transformers.Trainer`.

    Attributes:
        about (`dict`): what the model card should say and only you know: `dataset`, `dataset_id`, `split`, `license`
            (see `coop_hf.files.model_card.make_card`).

    Raises:
        ValueError: at once, before any work: a missing column, a label outside the class list, a class without
            images, an adapter that was loaded without `is_trainable=True`, a way of training that is not supported.
    """

    def __init__(
        self,
        model: CoOpModel | None = None,
        args: CoOpTrainingArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        compute_metrics=None,
        **kwargs,
    ):
        if not isinstance(model, CoOpModel):
            raise TypeError(f"CoOpTrainer trains a CoOpModel, got {type(model).__name__}.")
        args = CoOpTrainingArguments("coop_output") if args is None else args
        if not isinstance(args, CoOpTrainingArguments):
            raise TypeError(f"`args` must be CoOpTrainingArguments, got {type(args).__name__}.")
        if args.fsdp or args.deepspeed:
            raise ValueError("FSDP and DeepSpeed shard weights, and a context is a few kilobytes: train without them.")
        if train_dataset is not None and not model.context.requires_grad:
            raise ValueError(
                f"the adapter {model.active_adapter!r} was loaded for prediction: load it with is_trainable=True to "
                "train it on."
            )
        if args.n_gpu > 1:
            logger.warning("One process uses one GPU. For all of them: torchrun --nproc_per_node %d ...", args.n_gpu)
            args._n_gpu = 1
        if args.text_chunk_size is not None:
            model.text_chunk_size = args.text_chunk_size
        seed = args.data_seed if args.data_seed is not None else args.seed
        self._image_options = {
            "image_column": args.image_column,
            "label_column": args.label_column,
            "seed": seed,
            "on_bad_image": args.on_bad_image,
        }
        self.about: dict = {}
        self._measured: dict = {}
        self._embedded: dict[int, tuple[Dataset, EmbeddedImages]] = {}
        if train_dataset is not None:
            augment = args.recipe == "paper" if args.augment is None else args.augment
            train_dataset = self._as_images(train_dataset, model, augment=augment)
            labels = _labels_of(train_dataset)
            counts = np.bincount(labels, minlength=len(model.class_names))
            if (counts == 0).any():
                empty = [repr(model.class_names[c]) for c in np.flatnonzero(counts == 0)]
                raise ValueError(
                    f"{len(empty)} of {len(counts)} classes have no image in the training set: "
                    f"{', '.join(empty[:10])}{' ...' if len(empty) > 10 else ''}. Add images, or leave these "
                    "classes out of the class names while training."
                )
            args.complete(len(train_dataset), int(counts.max()), len(counts), _embedding_size(model))
        elif args.per_device_train_batch_size is None:
            args.complete(1, 1, 1, _embedding_size(model))
        if isinstance(eval_dataset, dict) and not hasattr(eval_dataset, "set_epoch"):
            eval_dataset = {name: self._as_images(part, model) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._as_images(eval_dataset, model)
        if model.class_names is None:
            raise ValueError("the model has no class names: pass `class_names=` when it is made.")
        kwargs.setdefault("data_collator", collate)
        kwargs.setdefault("compute_loss_func", self._mean_loss)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics or make_compute_metrics(model.class_names),
            **kwargs,
        )
        model.text_parallel = args.world_size > 1 and model.text_pass == "shared"
        self.add_callback(_EpochCallback(self))

    # ------------------------------------------------------------------ data

    def _as_images(self, dataset, model: CoOpModel, augment: bool = False):
        """`LabelledImages` of a `datasets.Dataset`, checked; any other data set as it is."""
        if not hasattr(dataset, "column_names"):
            return dataset
        images = LabelledImages(
            dataset, model.image_processor, class_names=model.class_names, augment=augment, **self._image_options
        )
        if model.class_names is None:
            model.set_class_names(images.class_names)
        return images

    def _as_embeddings(self, dataset, num_views: int | None):
        """Embeddings of images, computed once, if `args` ask for that; any other data set as it is."""
        if not isinstance(dataset, LabelledImages) or not self.args.cache_features:
            return dataset
        if id(dataset) not in self._embedded:
            logger.info("Image embeddings are computed once and cached (cache_features=True).")
            with torch.no_grad(), self.accelerator.autocast():
                embeddings = embed_images(
                    self.model,
                    dataset,
                    num_views or None,
                    cache_dir=self.args.feature_cache_dir,
                    batch_size=self.args.per_device_eval_batch_size,
                    num_workers=self.args.dataloader_num_workers,
                    process_index=self.args.process_index,
                    num_processes=self.args.world_size,
                    barrier=self.accelerator.wait_for_everyone,
                    progress=not self.args.disable_tqdm and self.is_local_process_zero(),
                )
            self._embedded[id(dataset)] = (dataset, EmbeddedImages(embeddings, dataset.labels))
        return self._embedded[id(dataset)][1]

    def get_train_dataloader(self):
        """The training batches. An incomplete last batch of an epoch is left out, as in the paper's code."""
        args = self.args
        num_views = args.num_views
        if num_views is None:
            num_views = math.ceil(args.num_train_epochs) if args.recipe == "paper" else 0
        dataset = self._as_embeddings(self.train_dataset, num_views)
        group = args.world_size * args.gradient_accumulation_steps
        if len(dataset) < args.per_device_train_batch_size * group:
            # Less than one global batch: all processes share what there is, and padding makes the shares equal.
            args.per_device_train_batch_size = -(-len(dataset) // group)
            self._train_batch_size = args.train_batch_size
            dataset = _Padded(dataset, args.per_device_train_batch_size * group)
        self._epoch_dataset = dataset
        whole, drop_last = self.train_dataset, args.dataloader_drop_last
        self.train_dataset, args.dataloader_drop_last = dataset, True
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, args.dataloader_drop_last = whole, drop_last

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self._sampler = _EpochShuffle(len(dataset), self._image_options["seed"])
        return self._sampler

    def get_eval_dataloader(self, eval_dataset=None):
        """The evaluation batches, of plain views."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        return super().get_eval_dataloader(self._as_embeddings(self._as_images(dataset, self.model), None))

    def get_test_dataloader(self, test_dataset):
        """The batches of `predict`, of plain views."""
        return super().get_test_dataloader(self._as_embeddings(self._as_images(test_dataset, self.model), None))

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As `transformers.Trainer.train`."""
        if self.args.should_save and os.path.isdir(self.args.output_dir):
            for name in os.listdir(self.args.output_dir):
                if name.startswith(_STAGING):  # left by a process that was killed while it saved
                    shutil.rmtree(os.path.join(self.args.output_dir, name), ignore_errors=True)
        if self.model_wrapped is self.model and getattr(self.model, "_is_accelerate_prepared", False):
            # An evaluation before the training prepared the model for evaluation, and accelerate would not prepare it
            # again: each process would go its own way.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._measured["seconds"] = output.metrics["train_runtime"]
        return output

    # ------------------------------------------------------------------ loss and schedule

    def _mean_loss(self, outputs, labels, num_items_in_batch=None):
        """Cross-entropy, averaged over the images of the global batch: all processes, all accumulation steps."""
        smoothing = self.args.label_smoothing_factor
        total = F.cross_entropy(outputs.logits, labels, reduction="sum", label_smoothing=smoothing)
        return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            saved = _last_checkpoint(self.args.output_dir)
            raise FloatingPointError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}: training is stopped. "
                + (f"The last checkpoint, {saved}, is good. " if saved else "")
                + "Lower the learning rate, check the images, or use bf16 or fp32 instead of fp16."
            )
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        # Only the context has a gradient: there is no need to walk through the base at every step.
        if grad_norm is None and getattr(self.accelerator, "scaler", None) is None:
            return self.model.context.grad.norm()
        return super()._get_grad_norm(model, grad_norm)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay applies to the context, whatever its adapter is called."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and self.args.steps_by_epoch:
            epochs = max(1, math.ceil(self.args.num_train_epochs))
            if self.args.max_steps > 0:
                steps_per_epoch = max(1, len(self._epoch_dataset) // self.args.train_batch_size // self._group())
                epochs = math.ceil(self.args.max_steps / steps_per_epoch)
            steps_per_epoch = max(1, round(num_training_steps / epochs))
            warmup = PAPER_WARMUP_LR / self.args.learning_rate if self.args.learning_rate else 0.0

            def factor(step):
                epoch = min(step // steps_per_epoch, epochs - 1)
                return warmup if epoch == 0 else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _group(self) -> int:
        return self.args.world_size * self.args.gradient_accumulation_steps

    # ------------------------------------------------------------------ files

    @property
    def _subfolder(self) -> str | None:
        """Where `save_pretrained` puts the active adapter."""
        return None if self.model.active_adapter == "default" else self.model.active_adapter

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """The active adapter and the arguments; nothing pickled, and never the base."""
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        folder = os.path.join(output_dir, self._subfolder or "")
        write_adapter(folder, self.model.config, {WEIGHTS_KEY: self.model.context})
        with open(os.path.join(output_dir, "training_args.json"), "w", encoding="utf-8") as file:
            file.write(self.args.to_json_string())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the active adapter, its model card and the arguments; with `push_to_hub` on the Hub too."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            self._write_card(output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, **kwargs) -> None:
        """Writes the model card into `output_dir`. What it says comes from the training; a person's edits stay."""
        if self.is_world_process_zero():
            self._write_card(self.args.output_dir)

    def _write_card(self, folder: str) -> None:
        names = [self.model.active_adapter]
        repo_id = self.hub_model_id or self.args.hub_model_id
        write_card(folder, self.model, name=repo_id, training=self.summary(), selected_adapters=names)

    def summary(self) -> dict:
        """What is known about the training, as a model card tells it; see `coop_hf.files.model_card.make_card`."""
        args = self.args
        summary = {
            "seed": args.seed,
            "hyperparameters": {
                "recipe": args.recipe,
                "optimizer": f"{args.optim.value}{f' ({args.optim_args})' if args.optim_args else ''}",
                "learning rate": args.learning_rate,
                "weight decay": args.weight_decay,
                "images a step": args.train_batch_size * self._group(),
                "steps": self.state.global_step,
                "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
                "processes": args.world_size,
            },
            "hardware": _hardware(args.device),
            **self._measured,
            **self.about,
        }
        if self.train_dataset is not None:
            counts = np.bincount(_labels_of(self.train_dataset), minlength=len(self.model.class_names))
            summary["num_train"] = len(self.train_dataset)
            if counts.min() == counts.max():
                summary["shots"] = int(counts.max())
        return summary

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As `transformers.Trainer.evaluate`. The model card tells the last result with and without the adapter."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        name = "zero_shot_metrics" if self.model.is_disabled else "metrics"
        kept = {key: metrics.get(f"{metric_key_prefix}_{key}") for key in ("accuracy", "macro_f1")}
        if all(value is not None for value in kept.values()):
            self._measured[name] = kept
            dataset = self.eval_dataset if eval_dataset is None else eval_dataset
            if hasattr(dataset, "__len__") and not isinstance(dataset, (dict, str)):
                self._measured["num_eval"] = len(dataset)
        return metrics

    def _save_checkpoint(self, model, trial) -> None:
        """Writes `checkpoint-N` beside its place and moves it there when it is whole, so that none is ever half."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = self._get_output_dir(trial=trial)
        final = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            if self.state.best_global_step:
                best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
                if os.path.isdir(best) or best == final:
                    self.state.best_model_checkpoint = best
            staging = os.path.join(run_dir, f"{_STAGING}{uuid.uuid4().hex}")
            try:
                self._save(staging)
                if not self.args.save_only_model:
                    self._save_training_state(staging)
                for callback in [*self.callback_handler.callbacks, self.control]:
                    if hasattr(callback, "state") and type(callback).__name__ in self.state.stateful_callbacks:
                        self.state.stateful_callbacks[type(callback).__name__] = callback.state()
                self.state.save_to_json(os.path.join(staging, TRAINER_STATE))
                _sync_folder(staging)
                if os.path.isdir(final):  # left by an earlier run
                    _remove_checkpoint(final)
                os.replace(staging, final)
            except OSError as error:
                saved = _last_checkpoint(run_dir)
                raise OSError(
                    f"the checkpoint {final} could not be written ({error}). "
                    + (f"The last whole one is {saved}; " if saved else "There is none before it; ")
                    + "free space or choose another `output_dir`, and resume from it."
                ) from error
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            self._rotate(run_dir)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def _rotate(self, run_dir: str) -> None:
        """Removes the oldest checkpoints beyond `save_total_limit`; the best and the newest stay."""
        limit = self.args.save_total_limit
        if not limit or limit < 1:
            return
        checkpoints = _checkpoints(run_dir)
        best = self.state.best_model_checkpoint
        kept = {checkpoints[-1], *([best] if best else [])}
        removable = [path for path in checkpoints if path not in kept]
        for path in removable[: max(0, len(checkpoints) - max(limit, len(kept)))]:
            _remove_checkpoint(path)

    def _save_training_state(self, folder: str) -> None:
        """Optimizer, scheduler and gradient scaler: numbers as JSON, tensors as safetensors."""
        tensors = {}
        optimizer = self.optimizer.state_dict()
        for index, state in optimizer["state"].items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
        numbers = {
            "optimizer": {
                "state": {
                    str(index): {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
                    for index, state in optimizer["state"].items()
                },
                "param_groups": optimizer["param_groups"],
            },
            "scheduler": self.lr_scheduler.state_dict(),
        }
        if getattr(self.accelerator, "scaler", None) is not None:
            numbers["scaler"] = self.accelerator.scaler.state_dict()
        save_tensors(tensors, os.path.join(folder, TRAINING_STATE_TENSORS))
        with open(os.path.join(folder, TRAINING_STATE_JSON), "w", encoding="utf-8") as file:
            json.dump(numbers, file, default=float, indent=1)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not os.path.isfile(os.path.join(checkpoint, TRAINING_STATE_JSON)):
            return
        with open(os.path.join(checkpoint, TRAINING_STATE_JSON), encoding="utf-8") as file:
            numbers = json.load(file)
        state = {int(index): values for index, values in numbers["optimizer"]["state"].items()}
        for name, tensor in load_file(os.path.join(checkpoint, TRAINING_STATE_TENSORS)).items():
            index, key = name.split(".", 1)
            state[int(index)][key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": numbers["optimizer"]["param_groups"]})
        self.lr_scheduler.load_state_dict(numbers["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        path = os.path.join(checkpoint or "", TRAINING_STATE_JSON)
        if checkpoint is None or getattr(self.accelerator, "scaler", None) is None or not os.path.isfile(path):
            return
        with open(path, encoding="utf-8") as file:
            scaler = json.load(file).get("scaler")
        if scaler:
            self.accelerator.scaler.load_state_dict(scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to restore: order and views are functions of seed, epoch and row, and a step draws no number."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        config, tensors = read_adapter(resume_from_checkpoint, subfolder=self._subfolder)
        context = tensors[WEIGHTS_KEY]
        own = self.model.config
        for name in ("n_ctx", "class_token_position", "class_specific", "class_names"):
            if getattr(config, name) != getattr(own, name):
                raise ValueError(
                    f"the checkpoint {resume_from_checkpoint} was made with {name}={_short(getattr(config, name))}, "
                    f"and the model has {name}={_short(getattr(own, name))}: resume with the same configuration."
                )
        if context.shape != self.model.context.shape:
            raise ValueError(
                f"the context in {resume_from_checkpoint} has the shape {tuple(context.shape)}, and the model's has "
                f"{tuple(self.model.context.shape)}: resume with the same base model."
            )
        with torch.no_grad():
            self.model.context.copy_(context)

    def _load_best_model(self) -> None:
        logger.info("Loading the best context, %s.", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ------------------------------------------------------------------ the Hub

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Puts the active adapter and its card on the Hub, in one commit.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): whether to wait; else a `Future` is returned.
            token, revision, private (*optional*): default to the arguments' `hub_token`, `hub_revision` and
                `hub_private_repo`.

        Returns:
            `huggingface_hub.CommitInfo`, a `Future` of it, or `None` in processes other than the first.

        Raises:
            OSError: the Hub cannot be reached or refuses. Local files are whole; call it again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        private = private if private is not None else self.args.hub_private_repo
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        repo_id = (
            self.hub_model_id or self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
        )
        options = {
            "private": private,
            "token": token,
            "revision": revision if revision is not None else self.args.hub_revision,
            "commit_message": commit_message,
            "selected_adapters": [self.model.active_adapter],
            "training": self.summary(),
        }
        if blocking:
            return push_to_hub(self.model, repo_id, **options)
        return HfApi(token=token).run_as_future(push_to_hub, self.model, repo_id, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a checkpoint in the background, as `hub_strategy` says. A push that fails does not stop training."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None:
            if not self.push_in_progress.is_done():
                return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        files = {}
        for folder, _, names in os.walk(checkpoint_folder):  # read now: the checkpoint may be gone before it is sent
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    files[os.path.relpath(os.path.join(folder, name), checkpoint_folder)] = file.read()
        operations = [
            CommitOperationAdd(path.replace(os.sep, "/"), content)
            for path, content in files.items()
            if os.path.basename(path).startswith("adapter_")
        ]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else os.path.basename(checkpoint_folder)
            operations += [
                CommitOperationAdd(f"{place}/{path.replace(os.sep, '/')}", content) for path, content in files.items()
            ]
        api = HfApi(token=self.args.hub_token)

        def push():
            try:
                return api.create_commit(
                    self.hub_model_id,
                    operations,
                    commit_message=f"Training in progress, {os.path.basename(checkpoint_folder)}",
                    revision=self.args.hub_revision,
                )
            except Exception as error:
                logger.warning("%s was not pushed (%s); it is whole on this machine.", checkpoint_folder, error)

        job = api.run_as_future(push)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)


class _EpochCallback(TrainerCallback):
    """Tells data set and sampler which epoch begins; accelerate's loaders don't always do."""

    def __init__(self, trainer: CoOpTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int((state.epoch or 0.0) + 1e-6)  # in the middle of an epoch after a resume
        self.trainer._sampler.set_epoch(epoch)
        if hasattr(self.trainer._epoch_dataset, "set_epoch"):
            self.trainer._epoch_dataset.set_epoch(epoch)


class _EpochShuffle(Sampler):
    """A new order in each epoch, a function of seed and epoch alone; the same in every process."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self._epoch = size, seed, 0

    # Not `set_epoch`-driven by loaders: those count iterations, and would be wrong after a resume.
    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
        return iter(np.random.default_rng([self.seed, self._epoch]).permutation(self.size).tolist())


class _Padded(Dataset):
    """A data set made longer by rows that count for nothing (label -100)."""

    def __init__(self, dataset, size: int):
        self.dataset, self.size = dataset, size

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        item = dict(self.dataset[index % len(self.dataset)])
        if index >= len(self.dataset):
            item["labels"] = -100
        return item

    def __getitems__(self, indices):
        if not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        indices = torch.as_tensor(indices)
        batch = dict(self.dataset.__getitems__((indices % len(self.dataset)).tolist()))
        batch["labels"] = batch["labels"].masked_fill(indices >= len(self.dataset), -100)
        return batch


def _embedding_size(model: CoOpModel) -> float:
    """Root mean square of the base's token embeddings."""
    embedding = model.get_base_model().text_model.embeddings.token_embedding
    with torch.no_grad(), align_module_device(embedding):
        return embedding.weight.float().pow(2).mean().sqrt().item()


def _labels_of(dataset) -> np.ndarray:
    if hasattr(dataset, "labels"):
        return np.asarray(dataset.labels)
    return np.asarray([int(dataset[index]["labels"]) for index in range(len(dataset))])


def _checkpoints(run_dir: str) -> list[str]:
    """The checkpoints in a folder, oldest first."""
    found = []
    for name in os.listdir(run_dir) if os.path.isdir(run_dir) else []:
        prefix, _, step = name.rpartition("-")
        if prefix == PREFIX_CHECKPOINT_DIR and step.isdigit():
            found.append((int(step), os.path.join(run_dir, name)))
    return [path for _, path in sorted(found)]


def _last_checkpoint(run_dir: str) -> str | None:
    return next(reversed(_checkpoints(run_dir)), None)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (one of {torch.cuda.device_count()})"
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"


def _remove_checkpoint(path: str) -> None:
    """Removes a checkpoint; first out of its place, so that a half removed one never stands there."""
    hidden = os.path.join(os.path.dirname(path), f"{_STAGING}{uuid.uuid4().hex}")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sync_folder(folder: str) -> None:
    """Makes sure that the files of a folder are on the disk before the folder is moved to its place."""
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as file:
            os.fsync(file.fileno())


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
