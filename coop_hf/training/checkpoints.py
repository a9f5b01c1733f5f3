"""Checkpoints of a training: the active adapter and the state of the training, whole or not there; nothing pickled.

A checkpoint is written beside its place and moved there when it is whole. What learns is known by its name, so that
optimizer states find their parameters again.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import HubStrategy, sort_checkpoints
from transformers.utils import logging

from ..atomic import save_tensors
from ..checks import shown
from ..files.adapter_files import read_adapter, write_adapter
from ..files.publish import without_local_bases
from ..hub import bounded_waits


__all__ = [
    "check_learned",
    "last_checkpoint",
    "load_adapter_state",
    "load_training_state",
    "push",
    "read_checkpoint",
    "rotate",
    "save_adapter_state",
    "save_training_state",
    "sweep",
    "whole_folder",
]

logger = logging.get_logger(__name__)

TRAINER_STATE = "trainer_state.json"

TRAINING_STATE_JSON = "training_state.json"

TRAINING_STATE_TENSORS = "training_state.safetensors"

_STAGING = ".saving-"

# What may differ between a checkpoint and the model that goes on from it: where things come from, and the start.
_FREE = {"base_model_name_or_path", "revision", "format_version", "coop_hf_version", "ctx_init"}


# ---------------------------------------------------------------------- what is learned


def check_learned(model: Any) -> None:
    """Raises `ValueError` unless something learns, and nothing outside the active adapter does."""
    learned = {id(parameter) for parameter in model.learned_parameters().values()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in learned]
    if outside:
        raise ValueError(
            f"{', '.join(outside[:5])}{' ...' if len(outside) > 5 else ''} would learn outside the active adapter, "
            f"{model.active_adapter!r}: it would be neither saved nor resumed. Make it a part of the adapter, or "
            "freeze it with requires_grad_(False)."
        )
    if not learned:
        why = "was loaded for prediction: load it with is_trainable=True to train it on"
        if model.adapter.is_trainable:
            why = f"is of the method {model.config.method!r} and has nothing that learns by gradients"
        raise ValueError(f"the adapter {model.active_adapter!r} {why}.")


def _subfolder(model: Any) -> str | None:
    """Where `save_pretrained` puts the active adapter."""
    return None if model.active_adapter == "default" else model.active_adapter


def save_adapter_state(folder: str, model: Any) -> None:
    """Writes the active adapter's files."""
    write_adapter(os.path.join(folder, _subfolder(model) or ""), model.config, model.adapter.learned_state())


def load_adapter_state(folder: str, model: Any) -> None:
    """Reads the active adapter's files into it.

    Raises:
        ValueError: they are damaged, or were made with another configuration or on another base.
    """
    config, tensors = _read(folder, "", lambda _: read_adapter(folder, subfolder=_subfolder(model)))
    theirs, own = ({**c.to_dict(), "method": c.method} for c in (config, model.config))
    for name in ["method", *sorted((own.keys() | theirs.keys()) - _FREE)]:
        if theirs.get(name) != own.get(name):
            raise ValueError(
                f"the checkpoint {folder} was made with {name}={shown(theirs.get(name))}, and the model has "
                f"{name}={shown(own.get(name))}: resume with the same configuration."
            )
    model.adapter.load_learned_state(tensors)


# ---------------------------------------------------------------------- the state of a training


def _names_in_order(learned: dict[str, nn.Parameter], optimizer: Any) -> list[str]:
    names = {id(parameter): name for name, parameter in learned.items()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def save_training_state(
    folder: str, learned: dict[str, nn.Parameter], optimizer: Any, scheduler: Any, **others: dict
) -> None:
    """Writes optimizer, scheduler and whatever else has a state: numbers as JSON, tensors as safetensors.

    Args:
        folder (`str`): the folder.
        learned (`dict[str, nn.Parameter]`): what learns, by name.
        optimizer, scheduler: their states are written, the optimizer's by parameter names.
        others (`dict`, *optional*): further states under names of their own; their tensors one level deep.
    """
    state = optimizer.state_dict()
    names = _names_in_order(learned, optimizer)
    parts = {f"optimizer.{names[index]}": values for index, values in state["state"].items()} | others
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for part, values in parts.items():
        kept = {key: v.detach().cpu().contiguous() for key, v in values.items() if isinstance(v, torch.Tensor)}
        tensors.update({f"{part}/{key}": value for key, value in kept.items()})
        numbers[part] = {key: value for key, value in values.items() if key not in kept}
    numbers |= {"param_names": names, "param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    save_tensors(tensors, os.path.join(folder, TRAINING_STATE_TENSORS))
    with open(os.path.join(folder, TRAINING_STATE_JSON), "w", encoding="utf-8") as file:
        json.dump(numbers, file, default=float, indent=1)


def load_training_state(
    folder: str, learned: dict[str, nn.Parameter], optimizer: Any, scheduler: Any
) -> dict[str, dict]:
    """Reads what `save_training_state` wrote into optimizer and scheduler, and returns the other states."""
    parts = _read_training_state(folder)
    names = _names_in_order(learned, optimizer)
    if parts["param_names"] != names:
        raise ValueError(
            f"the checkpoint {folder} holds the training of {shown(parts['param_names'])}, and here {shown(names)} "
            "learn: resume with the same model."
        )
    states = {index: parts.pop(f"optimizer.{name}", None) for index, name in enumerate(names)}
    states = {index: state for index, state in states.items() if state is not None}
    optimizer.load_state_dict({"state": states, "param_groups": parts["param_groups"]})
    scheduler.load_state_dict(parts["scheduler"])
    return parts


def _read_training_state(folder: str) -> dict:
    parts = _read(folder, TRAINING_STATE_JSON, _read_json)
    tensors = _read(folder, TRAINING_STATE_TENSORS, load_file)
    for name, tensor in tensors.items():
        part, _, key = name.rpartition("/")
        parts.setdefault(part, {})[key] = tensor
    return parts


def _read_json(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    if not {"param_names", "param_groups", "scheduler"} <= set(values):
        raise ValueError("it does not say what learned; was it written by another version?")
    return values


def read_checkpoint(folder: str) -> TrainerState:
    """The trainer's state in a checkpoint, after a look at the training's: damage is told before work starts.

    Raises:
        ValueError: a file is missing or damaged; names it and the checkpoint to take instead.
    """
    _read_training_state(folder)
    return _read(folder, TRAINER_STATE, TrainerState.load_from_json)


def _read(folder: str, name: str, reader: Callable[[str], Any]) -> Any:
    path = os.path.join(folder, name) if name else folder
    try:
        return reader(path)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        earlier = [p for p in _checkpoints(os.path.dirname(os.path.abspath(folder))) if _step(p) < _step(folder)]
        hint = f"Resume from {earlier[-1]}" if earlier else "There is no earlier one: start afresh"
        missing = " (with save_only_model=True it is left out)" if name.startswith("training") else ""
        is_missing = name and isinstance(error, FileNotFoundError)
        what = f"missing{missing}" if is_missing else f"damaged ({str(error)[:300]})"
        raise ValueError(f"the checkpoint cannot be resumed from: {path} is {what}. {hint}.") from error


# ---------------------------------------------------------------------- folders


def _step(folder: str) -> int:
    digits = os.path.basename(os.path.normpath(folder)).rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _checkpoints(run_dir: str, best: str | None = None) -> list[str]:
    """The checkpoints in a folder, oldest first; the best one, if it is given, last but one."""
    return [path for path in sort_checkpoints(run_dir, best_model_checkpoint=best) if _step(path) >= 0]


def last_checkpoint(run_dir: str) -> str | None:
    """The newest checkpoint in a folder."""
    return next(reversed(_checkpoints(run_dir)), None)


@contextmanager
def whole_folder(final: str) -> Iterator[str]:
    """A folder to write into, moved to `final` when all that is in it is on the disk.

    Raises:
        OSError: it could not be written; says which checkpoint is the last whole one.
    """
    staging = os.path.join(os.path.dirname(final), f"{_STAGING}{uuid.uuid4().hex}")
    try:
        yield staging
        for root, _, names in os.walk(staging):
            for name in names:
                with open(os.path.join(root, name), "rb") as file:
                    os.fsync(file.fileno())
        if os.path.isdir(final):  # left by an earlier run
            _remove(final)
        os.replace(staging, final)
    except OSError as error:
        saved = last_checkpoint(os.path.dirname(final))
        raise OSError(
            f"the checkpoint {final} could not be written ({error}). "
            + (f"The last whole one is {saved}; " if saved else "There is none before it; ")
            + "free space or choose another `output_dir`, and resume from it."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def rotate(run_dir: str, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond `limit`; the best and the newest stay.

    As transformers' `rotate_checkpoints`, but a checkpoint that is removed leaves its place first, so that a half
    removed one never stands there.
    """
    paths = _checkpoints(run_dir, best)
    if limit and limit > 0:
        kept = 2 if best in paths[:-1] else 1
        for path in paths[: -max(limit, kept)]:
            _remove(path)


def _remove(path: str) -> None:
    hidden = os.path.join(os.path.dirname(path), f"{_STAGING}{uuid.uuid4().hex}")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(run_dir: str) -> None:
    """Removes what a process left that was killed while it saved."""
    for name in os.listdir(run_dir) if os.path.isdir(run_dir) else []:
        if name.startswith(_STAGING):
            shutil.rmtree(os.path.join(run_dir, name), ignore_errors=True)


def push(folder: str, strategy: HubStrategy, repo_id: str, token: str | None, revision: str | None) -> Future:
    """Pushes a checkpoint in the background: the adapter, and with it the whole, as `strategy` says.

    What is sent is read now: the folder may be gone before. The name of a base on this machine is left out. A push
    that fails, or that nobody answers (see `coop_hf.hub.bounded_waits`), is told and does not stop the training.
    """
    files = {}
    with tempfile.TemporaryDirectory(prefix="coop_hf_push_") as place:
        copy = os.path.join(place, "checkpoint")
        shutil.copytree(folder, copy)
        without_local_bases(copy)
        for root, _, names in os.walk(copy):
            for name in names:
                with open(os.path.join(root, name), "rb") as file:
                    files[os.path.relpath(os.path.join(root, name), copy).replace(os.sep, "/")] = file.read()
    sent = {path: content for path, content in files.items() if os.path.basename(path).startswith("adapter_")}
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else os.path.basename(folder)
        sent |= {f"{place}/{path}": content for path, content in files.items()}
    operations = [CommitOperationAdd(path, content) for path, content in sent.items()]
    api = HfApi(token=token)

    def commit() -> CommitInfo | None:
        try:
            message = f"Training in progress, {os.path.basename(folder)}"
            with bounded_waits():
                return api.create_commit(repo_id, operations, commit_message=message, revision=revision)
        except Exception as error:
            logger.warning("%s was not pushed (%s); it is whole on this machine.", folder, error)
            return None

    return api.run_as_future(commit)
