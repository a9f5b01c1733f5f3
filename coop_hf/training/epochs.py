"""What goes by epochs: order and views of the images, the paper's learning rate, the average of the weights."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from ..data.few_shot import labels_of


__all__ = ["EmbeddingBatches", "EpochCallback", "Epochs", "GaussianAverage", "epoch_cosine", "fits_on"]

FROZEN_IMAGE_EMBEDS = "frozen_image_embeds"


class Epochs(Dataset):
    """The rows of a data set in the order of an epoch, in whole global batches.

    The order is a function of seed and epoch alone, the same in every process; where one batch holds all rows, the
    data set's own. An incomplete last batch of an epoch is left out, as in the public code; with less than one batch,
    rows that count for nothing (label -100) fill it.

    Args:
        dataset (`Dataset`): the images or their embeddings.
        batch_size (`int`): the global batch: of all processes and accumulation steps.
        seed (`int`): seed of the order.
        frozen (`torch.Tensor`, *optional*): `(num_views, len(dataset), projection_dim)`, what the frozen image tower
            gives for view e mod num_views, handed out beside the pixels.
        is_balanced (`bool`, *optional*, defaults to `False`): whether an epoch holds as many rows of each class.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int,
        frozen: torch.Tensor | None = None,
        is_balanced: bool = False,
    ):
        self.dataset, self.seed, self.frozen = dataset, seed, frozen
        self.labels = labels_of(dataset) if is_balanced else None
        self.size = max(1, len(dataset) // batch_size) * batch_size
        self.is_whole = batch_size == len(dataset) and not is_balanced
        self._tensors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that are running see it, too
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._rows: tuple[int, torch.Tensor] = (-1, torch.empty(0))
        self.epoch = 0  # as this process sees it, without asking a tensor

    # Not named `set_epoch`: loaders would call it with the number of their iterations, which is wrong after a resume.
    def begin(self, epoch: int) -> None:
        """Chooses order and views."""
        self.epoch = epoch
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def _draw(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, `(len(dataset),)`."""
        rng = np.random.default_rng([self.seed, epoch])
        size = len(self.dataset)
        if self.is_whole:
            return np.arange(size)
        if self.labels is None:
            return rng.permutation(size)
        classes = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels[self.labels >= 0])]
        # What does not divide goes to other classes in each epoch.
        shares = np.full(len(classes), size // len(classes))
        shares[rng.permutation(len(classes))[: size % len(classes)]] += 1
        rows = [
            # Whole rounds through the class's rows, then a part of one.
            np.concatenate([np.repeat(own, share // len(own)), rng.permutation(own)[: share % len(own)]])
            for own, share in zip(classes, shares)
        ]
        return rng.permutation(np.concatenate(rows))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def _rows_of(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, self._draw(epoch))
        return self._order[1]

    def place(self, device: torch.device) -> None:
        """Puts embeddings and labels of [`EmbeddedImages`] on a device, where `batch` looks them up."""
        self._tensors = self.dataset.image_embeds.to(device), self.dataset.labels.to(device)

    def batch(self, start: int, stop: int) -> Any:
        """Rows `start` to `stop - 1` of the epoch as one batch, where `place` put them; nothing waits for the device.

        Returns:
            `dict[str, torch.Tensor]`: `image_embeds` `(stop - start, projection_dim)` and `labels` `(stop - start,)`.
        """
        assert self._tensors is not None
        if stop > len(self.dataset):  # with rows that fill it
            return self.__getitems__(list(range(start, stop)))
        image_embeds, labels = self._tensors
        view = image_embeds[self.epoch % len(image_embeds)]
        if self.is_whole:  # nothing is copied
            return {"image_embeds": view[start:stop], "labels": labels[start:stop]}
        if self._rows[0] != self.epoch:
            rows = torch.from_numpy(self._rows_of(self.epoch))
            if labels.device.type == "cuda":
                rows = rows.pin_memory().to(labels.device, non_blocking=True)
            self._rows = (self.epoch, rows)
        rows = self._rows[1][start:stop]
        return {"image_embeds": view[rows], "labels": labels[rows]}

    def __getitems__(self, indices: list[int]) -> Any:
        epoch, size = int(self._epoch), len(self.dataset)
        places = np.asarray(indices)
        rows = self._rows_of(epoch)[places % size]
        if hasattr(self.dataset, "__getitems__"):
            batch = self.dataset.__getitems__(rows.tolist())
        else:
            batch = [dict(self.dataset[row]) for row in rows.tolist()]
        for place in np.flatnonzero(places >= size).tolist():
            if isinstance(batch, dict):
                batch["labels"][place] = -100
            else:
                batch[place]["labels"] = -100
        if self.frozen is not None:
            for place, row in enumerate(rows.tolist()):
                batch[place][FROZEN_IMAGE_EMBEDS] = self.frozen[epoch % len(self.frozen), row]
        return batch


class EmbeddingBatches(DataLoader):
    """The batches of [`Epochs`] of embeddings for one process, looked up where they lie.

    Neither workers nor copies to the device nor collation: what a `DataLoader` does for each batch would cost more
    than a small step. To whom asks it is one all the same: to resume within an epoch, accelerate makes a usual one of
    the rows that are left, which gives the same batches.

    Args:
        epochs (`Epochs`): of [`EmbeddedImages`], on a device (`Epochs.place`).
        batch_size (`int`): rows of a batch.
        collate_fn (`Callable`): for the usual one.
    """

    dataset: Epochs

    def __init__(self, epochs: Epochs, batch_size: int, collate_fn: Callable):
        super().__init__(epochs, batch_size, collate_fn=collate_fn)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        size = self.batch_size or 1
        return (self.dataset.batch(start, start + size) for start in range(0, len(self.dataset), size))


def fits_on(device: torch.device, tensor: torch.Tensor) -> bool:
    """Whether a tensor may stay on a device: always on the CPU, on a GPU up to a quarter of its free memory."""
    if device.type != "cuda":
        return device.type == "cpu"
    return 4 * tensor.numel() * tensor.element_size() <= torch.cuda.mem_get_info(device)[0]


class EpochCallback(TrainerCallback):
    """Tells the data which epoch begins, seeds each step, and averages the weights at the end of each epoch."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.epochs.begin(state.global_step // self.trainer.steps_per_epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What an adapter draws (dropout) is a function of seed, step and process, as everything else is.
        seed = (args.seed * 2**40 + state.global_step * 2**14 + args.process_index) % 2**63
        # Not `torch.manual_seed`: where there is no GPU it notes a call for later, with a traceback, at every step.
        torch.default_generator.manual_seed(seed)
        if args.device.type != "cpu":
            torch.get_device_module(args.device).manual_seed(seed)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        average = self.trainer.average
        if average is not None and state.global_step % self.trainer.steps_per_epoch == 0:
            average.add(state.global_step // self.trainer.steps_per_epoch)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.average is not None:
            self.trainer.average.use()


class GaussianAverage:
    """Mean of the learned weights over the ends of epochs i = 1, 2 ..., weighted by exp(-(i - mean)² / (2 std²)).

    PromptSRC, https://arxiv.org/abs/2307.06948, section 3.3.

    Args:
        parameters (`dict[str, nn.Parameter]`): what learns, by name.
        mean, std (`float`): of the Gaussian, in epochs.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], mean: float, std: float):
        self.parameters, self.mean, self.std = parameters, mean, std
        self.total = 0.0
        self.averages: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, epoch: int) -> None:
        """Takes up the weights at the end of an epoch, counted from 1."""
        weight = math.exp(-0.5 * ((epoch - self.mean) / self.std) ** 2)
        self.total += weight
        share = weight / self.total if self.total else 1.0  # so far below the mean that nothing counts: the last
        for name, parameter in self.parameters.items():
            value = parameter.detach().double()
            average = self.averages.get(name, value).to(value.device)
            self.averages[name] = average + share * (value - average)

    @torch.no_grad()
    def use(self) -> None:
        """Writes the mean into the parameters."""
        for name, average in self.averages.items():
            self.parameters[name].copy_(average)

    def state_dict(self) -> dict:
        """The sum of the weights and the averages so far, in float64."""
        return {"total": self.total, **self.averages}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state_dict()`."""
        self.total = state["total"]
        self.averages = {name: average for name, average in state.items() if name != "total"}


def epoch_cosine(steps_per_epoch: int, epochs: int, warmup: float) -> Callable[[int], float]:
    """The public code's factor of the learning rate: `warmup` in the first epoch, then a cosine that moves once an
    epoch."""

    def factor(step: int) -> float:
        epoch = min(step // steps_per_epoch, epochs - 1)
        return warmup if epoch == 0 else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))

    return factor
