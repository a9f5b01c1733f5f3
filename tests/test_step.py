"""The training step: as one compiled graph, without a look at the device, from embeddings that lie ready."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import make_base
from reference import relative_error
from test_trainer import NAMES, arguments, embedded, make_model, trained
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from coop_hf import CoOpConfig, CoOpModel, CoOpTrainer, CoOpTrainingArguments, modeling
from coop_hf.adapters.deep import DeepTextConfig
from coop_hf.config import PromptConfig
from coop_hf.training import arguments as arguments_module
from coop_hf.training import trainer as trainer_module
from coop_hf.training.epochs import EmbeddingBatches, Epochs, fits_on
from coop_hf.training.optimizers import TensorAdam


POSITIONS = ["end", "middle", "front"]
CONFIGS = {
    **{f"unified-{p}": CoOpConfig(n_ctx=3, class_token_position=p) for p in POSITIONS},
    **{f"specific-{p}": CoOpConfig(n_ctx=3, class_token_position=p, class_specific=True) for p in POSITIONS},
    "deep_text": DeepTextConfig(n_ctx=2, depth=2, ctx_init=None),
    "deep_text-specific": DeepTextConfig(n_ctx=2, depth=2, ctx_init=None, class_specific=True),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fresh(base, processor, config: PromptConfig):
    torch.manual_seed(0)
    return CoOpModel(base, copy.deepcopy(config), class_names=NAMES, processor=processor)


# ---------------------------------------------------------------------- one graph


def steps(model, forward, count=5):
    """Losses, class embeddings and gradients of some steps of gradient descent."""
    data, losses, found = embedded(), [], []
    for _ in range(count):
        output = forward(image_embeds=data.image_embeds[0], labels=data.labels)
        learned = list(model.learned_parameters().values())
        gradients = torch.autograd.grad(output.loss, learned)
        with torch.no_grad():
            for parameter, gradient in zip(learned, gradients):
                parameter.sub_(0.01 * gradient)
        losses.append(output.loss.item())
        found.append((output.text_embeds.detach().clone(), gradients))
    return losses, found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_is_one_graph(base, processor, name):
    eager, model = fresh(base, processor, CONFIGS[name]).train(), fresh(base, processor, CONFIGS[name]).train()
    losses, expected = steps(eager, eager)
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        model.get_text_features()  # finds out where the tokens stand, as the Trainer does
    compiled = torch.compile(model, fullgraph=True, backend=counter)  # a `.item()` would break the graph
    compiled_losses, found = steps(model, compiled)
    assert compiled_losses == pytest.approx(losses, rel=1e-6)
    for (embeds, gradients), (expected_embeds, expected_gradients) in zip(found, expected):
        assert (embeds - expected_embeds).abs().max() <= 1e-6
        for gradient, own in zip(gradients, expected_gradients, strict=True):
            assert relative_error(gradient, own) <= 1e-5
    assert counter.frame_count == 1  # compiled once for all five


def test_the_step_in_bf16_with_a_context_in_fp32(tokenizer, processor):
    base = make_base(tokenizer).to(torch.bfloat16)
    eager, model = fresh(base, processor, CONFIGS["unified-end"]), fresh(base, processor, CONFIGS["unified-end"])
    losses, expected = steps(eager.train(), eager)
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        model.get_text_features()
    compiled_losses, found = steps(model.train(), torch.compile(model, fullgraph=True, backend=counter))
    assert counter.frame_count == 1 and model.context.dtype == torch.float32
    assert found[0][1][0].dtype == torch.float32
    assert compiled_losses == pytest.approx(losses, rel=0.02)  # bf16 rounds to 1/256
    assert relative_error(found[0][1][0], expected[0][1][0]) < 0.05


# ---------------------------------------------------------------------- the Trainer


@pytest.mark.parametrize("evaluates_first", [False, True])
def test_compiled_through_the_trainer(base, processor, tmp_path, evaluates_first):
    expected = trained(make_model(base, processor), tmp_path / "eager", embedded(), max_steps=6)
    model = make_model(base, processor)
    given = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 6, "save_strategy": "steps"}
    args = arguments(tmp_path / "compiled", save_steps=3, **given)
    trainer = CoOpTrainer(model=model, args=args, train_dataset=embedded(), eval_dataset=embedded(6, seed=1))
    before = trainer.evaluate() if evaluates_first else {}
    torch._dynamo.utils.counters.clear()
    trainer.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and trainer.model is model
    torch.testing.assert_close(model.context.detach(), expected, rtol=1e-5, atol=1e-6)
    after = trainer.evaluate()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # evaluation is not compiled
    assert math.isfinite(after["eval_loss"]) and after["eval_loss"] != before.get("eval_loss")
    again = make_model(base, processor)
    resumed = CoOpTrainer(model=again, args=args, train_dataset=embedded())
    resumed.train(resume_from_checkpoint=str(tmp_path / "compiled" / "checkpoint-3"))
    assert torch.equal(again.context, model.context)


def test_what_compiles_by_itself_may_fail(base, processor, tmp_path, monkeypatch):
    expected = trained(make_model(base, processor), tmp_path / "eager", embedded(), max_steps=4)

    # As on a GPU whose compiler is broken.
    monkeypatch.setattr(CoOpTrainingArguments, "choose_compile", lambda args, num_images, is_steady: is_steady)
    calls = []

    class Broken(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            calls.append(1)
            raise RuntimeError("no ptxas")

    monkeypatch.setattr(CoOpTrainer, "_wrap_model", lambda self, model, **kwargs: Broken(model))
    warned = []
    monkeypatch.setattr(trainer_module.logger, "warning", lambda text, *values: warned.append(text % values))
    args = arguments(tmp_path, max_steps=4)
    model = make_model(base, processor)
    trainer = CoOpTrainer(model=model, args=args, train_dataset=embedded())
    trainer.train()
    assert torch.equal(model.context.detach(), expected)
    assert len(calls) == 1 and len([text for text in warned if "no ptxas" in text]) == 1


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"max_steps": 4999}, False),
        ({"max_steps": -1, "num_train_epochs": 5000}, True),
        ({"max_steps": -1, "num_train_epochs": 4999}, False),
        ({"is_steady": False}, False),
        ({"text_chunk_size": 4}, False),
        ({"torch_compile": False}, False),
        ({"device": "cpu"}, False),
        ({"has_triton": False}, False),
    ],
)
def test_where_compiling_pays(tmp_path, monkeypatch, changed, expected):
    values = {"max_steps": 5000, "is_steady": True, "device": "cuda", "has_triton": True, **changed}
    given = {k: v for k, v in values.items() if k not in ("is_steady", "device", "has_triton")}
    args = arguments(tmp_path, per_device_train_batch_size=24, **given)
    monkeypatch.setattr(arguments_module, "has_triton", lambda: values["has_triton"])
    monkeypatch.setattr(CoOpTrainingArguments, "device", torch.device(values["device"]))
    assert args.choose_compile(24, values["is_steady"]) == expected
    assert bool(args.torch_compile) == expected
    if expected:
        assert (args.torch_compile_backend, args.torch_compile_mode) == ("inductor", "reduce-overhead")


def test_never_compiled_on_a_cpu_unless_asked(base, processor, tmp_path):
    model = make_model(base, processor)
    trainer = CoOpTrainer(model=model, args=arguments(tmp_path, max_steps=6000), train_dataset=embedded())
    assert trainer._is_steady(model, embedded()) and trainer.args.torch_compile is False


def test_prograd_is_not_compiled(base, processor, tmp_path):
    args = arguments(tmp_path, objective="prograd", torch_compile=True, torch_compile_backend="aot_eager")
    with pytest.raises(ValueError, match="two gradients of one step.*leave torch_compile out"):
        CoOpTrainer(model=make_model(base, processor), args=args, train_dataset=embedded())


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
