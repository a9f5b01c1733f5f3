"""transformers' `Trainer` where it meets files and the Hub: an adapter and the state of its training, not a model."""

import os
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress

from ..data.few_shot import class_counts
from ..files.model_card import write_card
from ..files.publish import push_to_hub
from . import checkpoints
from .epochs import GaussianAverage


__all__ = ["AdapterTrainer"]


class AdapterTrainer(Trainer):
    """Saves, resumes and pushes the active adapter of a [`CoOpModel`]; what [`CoOpTrainer`] is built on.

    Attributes:
        about (`dict`): what the model card should say and only the user knows.
        average (`GaussianAverage`, *optional*): the mean of the weights that is being taken.
    """

    about: dict
    average: GaussianAverage | None
    _measured: dict

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The active adapter and the arguments; nothing pickled, and never the base."""
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        checkpoints.save_adapter_state(output_dir, self.model)
        with open(os.path.join(output_dir, "training_args.json"), "w", encoding="utf-8") as file:
            file.write(self.args.to_json_string())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the active adapter, its model card and the arguments; with `push_to_hub` on the Hub too."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            self._write_card(output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, **kwargs: Any) -> None:
        """Writes the model card into `output_dir`. What it says comes from the training; a person's edits stay.

        Args:
            kwargs: what only you know, such as `tags`, `license`, `language`, `dataset_name`; kept in `about`.
        """
        self.about.update(kwargs)
        if self.is_world_process_zero():
            self._write_card(self.args.output_dir)

    def _write_card(self, folder: str) -> None:
        names = [self.model.active_adapter]
        repo_id = self.hub_model_id or self.args.hub_model_id
        write_card(folder, self.model, name=repo_id, training=self.summary(), selected_adapters=names)

    def summary(self) -> dict:
        """What is known about the training, as a model card tells it; see `coop_hf.files.model_card.make_card`."""
        summary = {**self.args.describe(self.state.global_step), **self._measured, **self.about}
        if self.train_dataset is not None:
            counts = class_counts(self.train_dataset, self.model.class_names, strict=False)
            summary["num_train"] = len(self.train_dataset)
            if counts.min() == counts.max():
                summary["shots"] = int(counts.max())
        return summary

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
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
            with checkpoints.whole_folder(final) as staging:
                self._save(staging)
                if not self.args.save_only_model:
                    self._save_training_state(staging)
                for callback in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(callback, ExportableState):
                        self.state.stateful_callbacks[type(callback).__name__] = callback.state()
                self.state.save_to_json(os.path.join(staging, checkpoints.TRAINER_STATE))
            checkpoints.rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def _others(self) -> dict:
        """What has a state beside optimizer and scheduler."""
        others = {"scaler": getattr(self.accelerator, "scaler", None), "average": self.average}
        return {name: other for name, other in others.items() if other is not None}

    def _save_training_state(self, folder: str) -> None:
        states = {name: other.state_dict() for name, other in self._others().items()}
        learned = self.model.learned_parameters()
        checkpoints.save_training_state(folder, learned, self.optimizer, self.lr_scheduler, **states)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            learned = self.model.learned_parameters()
            states = checkpoints.load_training_state(checkpoint, learned, self.optimizer, self.lr_scheduler)
            for name, other in self._others().items():
                if states.get(name):
                    other.load_state_dict(states[name])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.read_checkpoint(resume_from_checkpoint)
        checkpoints.load_adapter_state(resume_from_checkpoint, self.model)

    def _load_best_model(self) -> None:
        checkpoints.load_adapter_state(self.state.best_model_checkpoint, self.model)

    # ------------------------------------------------------------------ the Hub

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Puts the active adapter and its card on the Hub, in one commit.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): whether to wait; else a `Future` is returned.
            token, revision, private (*optional*): default to the arguments' `hub_token`, `hub_revision` and
                `hub_private_repo`.
            kwargs: what the card should say and only you know, such as `tags`, `license`, `language`, `dataset_name`;
                kept in `about`.

        Returns:
            `huggingface_hub.CommitInfo`, a `Future` of it, or `None` in processes other than the first.

        Raises:
            OSError: the Hub cannot be reached or refuses. Local files are whole; call it again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.about.update(kwargs)
        token = token if token is not None else self.args.hub_token
        private = private if private is not None else self.args.hub_private_repo
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        repo_id = (
            self.hub_model_id or self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
        )
        options: dict[str, Any] = {
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
        job = checkpoints.push(
            checkpoint_folder, strategy, self.hub_model_id, self.args.hub_token, self.args.hub_revision
        )
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)
