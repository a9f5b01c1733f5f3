"""The training step: without a look at the device, from embeddings that lie ready."""

import math

import numpy as np
import pytest
import torch
from test_trainer import arguments, embedded, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from coop_hf import CoOpTrainer, modeling
from coop_hf.training import trainer as trainer_module
from coop_hf.training.epochs import EmbeddingBatches, Epochs, fits_on
from coop_hf.training.optimizers import TensorAdam


# ---------------------------------------------------------------------- no look at the device


class NoLooks(TorchDispatchMode):
    """Notes what brings a number from the device to Python, and what has a shape that depends on values."""

    LOOKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item")

    def __init__(self):
        super().__init__()
        self.is_on, self.found, self.calls = False, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += self.is_on
        if self.is_on and func.overloadpacket.__name__ in self.LOOKS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [{}, {"recipe": "paper", "per_device_train_batch_size": 8}, {"objective": "kgcoop"}])
def test_a_step_looks_at_nothing(base, processor, tmp_path, monkeypatch, given):
    # As on a GPU; on a CPU a look costs nothing, and tells bad labels and losses at once.
    monkeypatch.setattr(CoOpTrainer, "_looks_at_each_loss", False)
    monkeypatch.setattr(modeling, "_check_labels", lambda labels, view: None)
    mode = NoLooks()

    class Switch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            mode.is_on = state.global_step >= 1 and state.global_step % 6 != 5  # the first step makes what is kept

        def on_log(self, args, state, control, **kwargs):
            mode.is_on = False

    args = arguments(tmp_path, max_steps=12, logging_strategy="steps", logging_steps=6, **given)
    trainer = CoOpTrainer(model=make_model(base, processor), args=args, train_dataset=embedded(), callbacks=[Switch()])
    with mode:
        trainer.train()
    assert mode.found == []
    assert mode.calls > 500  # it saw the steps
    mode.is_on = True
    with mode:
        torch.ones(3).sum().item()
    assert mode.found == ["aten._local_scalar_dense.default"]  # and would have seen a look


def test_batches_and_optimizer_on_tensors_without_values():
    """On the meta device nothing can be looked at: whatever asks for a value fails."""
    epochs = Epochs(embedded(views=2), 8, seed=0)
    epochs.begin(1)
    epochs.place(torch.device("meta"))
    context = torch.nn.Parameter(torch.zeros(4, 24, device="meta"))
    optimizer = TensorAdam([context], lr=0.1, weight_decay=0.1)
    for start in (0, 8, 16):
        batch = epochs.batch(start, start + 8)
        assert batch["image_embeds"].shape == (8, 24) and batch["labels"].shape == (8,)
        assert batch["image_embeds"].device.type == batch["labels"].device.type == "meta"
        (batch["image_embeds"] @ context.T).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(RuntimeError):
        context.sum().item()


@pytest.mark.parametrize("when", ["save_strategy", "logging_strategy", "end"])
def test_nan_is_told_before_it_is_used(base, processor, tmp_path, monkeypatch, when):
    monkeypatch.setattr(CoOpTrainer, "_looks_at_each_loss", False)
    model = make_model(base, processor)

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                model.context.data[0, 0] = math.nan

    given = (
        {"max_steps": 9} if when == "end" else {"max_steps": 20, when: "steps", "save_steps": 4, "logging_steps": 4}
    )
    args = arguments(tmp_path, **given)
    trainer = CoOpTrainer(model=model, args=args, train_dataset=embedded(), callbacks=[Poison()])
    last = {"save_strategy": "step 8.*checkpoint-4, is good", "logging_strategy": "step 8", "end": "step 9"}[when]
    with pytest.raises(FloatingPointError, match=last):
        trainer.train()
    assert not (tmp_path / "checkpoint-8").exists()


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(("count", "batch_size", "balanced"), [(24, 8, False), (23, 8, False), (23, 5, True)])
def test_batches_are_those_of_a_usual_loader(
    base, processor, tmp_path, monkeypatch, views, count, batch_size, balanced
):
    data = embedded(count, views)
    args = arguments(tmp_path, per_device_train_batch_size=batch_size, balanced_sampling=balanced)
    trainer = CoOpTrainer(model=make_model(base, processor), args=args, train_dataset=data)
    fast = trainer.get_train_dataloader()
    assert isinstance(fast, EmbeddingBatches)
    epochs = trainer.epochs
    monkeypatch.setattr(trainer_module, "fits_on", lambda device, tensor: False)
    usual = trainer.get_train_dataloader()
    assert not isinstance(usual, EmbeddingBatches) and len(usual) == len(fast) == count // batch_size
    for epoch in (0, 1, 4):
        epochs.begin(epoch)
        trainer.epochs.begin(epoch)
        for own, other in zip(fast, usual, strict=True):
            assert torch.equal(own["labels"], other["labels"])
            assert torch.equal(own["image_embeds"], other["image_embeds"])


def test_one_batch_of_all_is_not_copied():
    data = embedded(24, views=2)
    epochs = Epochs(data, 24, seed=3)
    epochs.place(torch.device("cpu"))
    epochs.begin(5)
    batch = next(iter(EmbeddingBatches(epochs, 24, None)))
    assert batch["image_embeds"].data_ptr() == data.image_embeds[1].data_ptr()
    assert torch.equal(batch["labels"], data.labels)
    halves = list(EmbeddingBatches(epochs, 12, None))  # two steps of accumulation
    assert torch.equal(torch.cat([half["image_embeds"] for half in halves]), data.image_embeds[1])
    rows = Epochs(data, 24, seed=3, is_balanced=True)._rows_of(5)
    assert not np.array_equal(rows, np.arange(24))


def test_what_fits_on_a_device(monkeypatch):
    tensor = torch.zeros(1000, dtype=torch.float32)
    assert fits_on(torch.device("cpu"), tensor) and not fits_on(torch.device("meta"), tensor)
    for free, fits in ((16000, True), (15999, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert fits_on(torch.device("cuda"), tensor) == fits
