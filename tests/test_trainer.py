import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, EarlyStoppingCallback, TrainerCallback

from coop_hf import CoOpConfig, CoOpModel, CoOpTrainer, CoOpTrainingArguments, EmbeddedImages, LabelledImages
from coop_hf.adapters.base import Prompts
from coop_hf.adapters.cocoop import CoCoOpConfig
from coop_hf.adapters.coop import CoOp
from coop_hf.adapters.deep import DeepTextConfig, IVLPConfig, MaPLeConfig, VPTConfig
from coop_hf.adapters.tcp import TCPConfig
from coop_hf.files.adapter_files import read_adapter


NAMES = ["cat", "dog", "sea"]
CHECKPOINT_FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "trainer_state.json",
    "training_args.json",
    "training_state.json",
    "training_state.safetensors",
]


def make_model(base, processor, seed=0, **config):
    torch.manual_seed(seed)
    return CoOpModel(base, CoOpConfig(**{"n_ctx": 4, **config}), class_names=NAMES, processor=processor)


def embedded(count=24, views=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return EmbeddedImages(torch.randn(views, count, 24, generator=generator), [i % 3 for i in range(count)])


def pictures(count=12, names=NAMES, seed=0):
    rng = np.random.default_rng(seed)
    images = [PIL.Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    labels = [i % len(names) for i in range(count)]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def arguments(folder, **given):
    defaults = {"save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    defaults["feature_cache_dir"] = str(Path(folder) / "cache")
    return CoOpTrainingArguments(str(folder), **{**defaults, **given})


def trained(model, folder, train, **given):
    trainer = CoOpTrainer(model=model, args=arguments(folder, **given), train_dataset=train)
    trainer.train()
    return model.context.detach().clone()


def read_context(folder):
    return read_adapter(folder)[1]["prompt_embeddings"]


# ---------------------------------------------------------------------- what is computed


def hand_written_training(model, data, epochs, batch_size, seed, learning_rate=2e-3, momentum=0.9, decay=5e-4):
    """The paper's recipe written out: no Trainer, no optimizer class, no scheduler class."""
    context = model.context.detach().clone()
    velocity = None
    for epoch in range(epochs):
        if epoch == 0:
            rate = 1e-5
        else:
            rate = learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
        order = np.random.default_rng([seed, epoch]).permutation(len(data))
        embeddings = data.image_embeds[epoch % len(data.image_embeds)]
        for start in range(0, len(data) - batch_size + 1, batch_size):
            rows = torch.as_tensor(order[start : start + batch_size])
            context.requires_grad_()
            with torch.no_grad():
                model.context.copy_(context)
            output = model(image_embeds=embeddings[rows], labels=data.labels[rows])
            (gradient,) = torch.autograd.grad(output.loss, model.context)
            gradient = gradient + decay * context.detach()
            velocity = gradient if velocity is None else momentum * velocity + gradient
            context = context.detach() - rate * velocity
    return context


@pytest.mark.parametrize(
    "config, steps, rate",
    [
        ({}, 40, 0.1),
        ({"n_ctx": 16}, 20, 0.05),
        ({"ctx_init": "a cat", "n_ctx": None}, 40, 0.05 * 8**0.5),  # two tokens
        ({"class_specific": True}, 20, 0.05),
    ],
)
def test_the_default_recipe_looks_at_the_contexts_length(base, processor, tmp_path, config, steps, rate):
    trainer = CoOpTrainer(make_model(base, processor, **config), arguments(tmp_path), train_dataset=embedded(3))
    size = base.text_model.embeddings.token_embedding.weight.pow(2).mean().sqrt().item()
    assert trainer.args.learning_rate == pytest.approx(rate * size)
    assert trainer.train().global_step == steps


@pytest.mark.parametrize("config", [{}, {"class_specific": True, "class_token_position": "middle"}])
def test_the_papers_recipe_step_by_step(base, processor, tmp_path, config):
    data = embedded(count=23, views=2)
    expected = hand_written_training(make_model(base, processor, **config), data, epochs=4, batch_size=8, seed=5)
    result = trained(
        make_model(base, processor, **config),
        tmp_path,
        data,
        recipe="paper",
        num_train_epochs=4,
        per_device_train_batch_size=8,
        seed=5,
    )
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)


def test_weight_decay_reaches_a_context_of_any_name(base, processor, tmp_path):
    # transformers exempts parameters with "bias" or "norm" in their names.
    results = []
    for name in ("default", "bias", "layernorm"):
        torch.manual_seed(0)
        model = CoOpModel(base, CoOpConfig(n_ctx=4), NAMES, processor, adapter_name=name)
        given = {"recipe": "paper", "weight_decay": 5.0, "num_train_epochs": 2, "per_device_train_batch_size": 8}
        results.append(trained(model, tmp_path, embedded(), **given))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("config", [{}, {"class_specific": True}])
def test_the_fast_recipe_is_full_batch_and_written_out(base, processor, tmp_path, config):
    data = embedded()
    model = make_model(base, processor, **config)
    context = model.context.detach().clone().double()
    first, second = torch.zeros_like(context), 0.0
    for step in range(6):
        rate = 0.02 * 0.5 * (1 + math.cos(math.pi * step / 6))
        with torch.no_grad():
            model.context.copy_(context)
        loss = model(image_embeds=data.image_embeds[0], labels=data.labels).loss
        gradient = torch.autograd.grad(loss, model.context)[0].double()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * float((gradient**2).sum()) / (context.shape[-2] * context.shape[-1])
        root = math.sqrt(second / (1 - 0.999 ** (step + 1)))
        context = context - rate * first / (1 - 0.9 ** (step + 1)) / (root + 1e-8)
    model = make_model(base, processor, **config)
    result = trained(model, tmp_path, data, recipe="fast", max_steps=6, learning_rate=0.02)
    torch.testing.assert_close(result, context.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [24, 21])
def test_accumulated_gradients_equal_one_batch(base, processor, tmp_path, count):
    # 21 images are one batch of 12 in an epoch: an incomplete global batch is left out, as in the public code.
    given = {"recipe": "paper", "num_train_epochs": 3, "learning_rate": 0.1}
    whole = trained(make_model(base, processor), tmp_path, embedded(count), per_device_train_batch_size=12, **given)
    parts = trained(
        make_model(base, processor),
        tmp_path,
        embedded(count),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        **given,
    )
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("given", [{"max_steps": 7}, {"num_train_epochs": 2.4}])
def test_the_papers_schedule_of_a_part_of_an_epoch(base, processor, tmp_path, given):
    # 12 images in batches of 4: epochs of 3 steps, the last one cut off. Its rate is that of the whole schedule.
    rates = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    args = arguments(tmp_path, recipe="paper", per_device_train_batch_size=4, **given)
    CoOpTrainer(make_model(base, processor), args, embedded(12), callbacks=[Watch()]).train()
    epochs = [1e-5, 2e-3, 2e-3 * 0.5 * (1 + math.cos(math.pi / 3))]
    expected = [epochs[step // 3] for step in range(len(rates))]
    assert len(rates) == (7 if "max_steps" in given else 8)
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    "given, views", [({"max_steps": 7}, 3), ({"num_train_epochs": 2.4}, 3), ({"num_views": 2}, 2)]
)
def test_no_more_views_are_embedded_than_are_seen(base, processor, tmp_path, given, views):
    args = arguments(tmp_path, recipe="paper", per_device_train_batch_size=4, **given)
    trainer = CoOpTrainer(make_model(base, processor), args, pictures(12))
    trainer.get_train_dataloader()
    assert trainer.epochs.dataset.image_embeds.shape[0] == views


def test_fewer_images_than_a_batch(base, processor, tmp_path):
    data = embedded(7)
    expected = hand_written_training(make_model(base, processor), data, epochs=3, batch_size=7, seed=42)
    for accumulation in (1, 3):
        result = trained(
            make_model(base, processor),
            tmp_path,
            data,
            recipe="paper",
            num_train_epochs=3,
            gradient_accumulation_steps=accumulation,
        )
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_views_equal_images_decoded_at_every_step(base, processor, tmp_path, workers):
    given = {"recipe": "paper", "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 0.1}
    cached = trained(make_model(base, processor), tmp_path, pictures(), **given)
    decoded = trained(
        make_model(base, processor),
        tmp_path,
        pictures(),
        cache_features=False,
        dataloader_num_workers=workers,
        **given,
    )
    torch.testing.assert_close(decoded, cached, rtol=1e-4, atol=1e-6)
    plain = trained(make_model(base, processor), tmp_path, pictures(), num_views=0, **given)
    assert not torch.allclose(plain, cached, atol=1e-4)


def test_test_images_are_cropped_as_in_the_public_code_with_its_recipe(base, processor, tmp_path):
    # 24 x 19 becomes 20 x 16: a rest of 4; 21 x 17 becomes 19 x 16, a rest of 3, of which the processor takes 1 and
    # torchvision 2 from the left.
    pixels = np.random.default_rng(0).integers(0, 256, (17, 21, 3), dtype=np.uint8)
    data = datasets.Dataset.from_dict({"image": [PIL.Image.fromarray(pixels)], "label": [0]})
    data = data.cast_column("image", datasets.Image())
    views = {}
    for recipe in ("paper", "fast"):
        args = arguments(tmp_path, recipe=recipe, cache_features=False)
        trainer = CoOpTrainer(make_model(base, processor), args, eval_dataset=data)
        views[recipe] = trainer.eval_dataset[0]["pixel_values"]
    own = processor(images=data["image"][:], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(views["fast"], own)
    torch.testing.assert_close(views["paper"][:, :, :-1], own[:, :, 1:])  # one pixel further to the right


def test_label_smoothing(base, processor, tmp_path):
    data = embedded(6)
    model = make_model(base, processor)
    logits = model(image_embeds=data.image_embeds[0]).logits.log_softmax(-1)
    expected = -(0.8 * logits[range(6), data.labels] + 0.2 * logits.mean(-1)).mean()
    trainer = CoOpTrainer(
        model=model, args=arguments(tmp_path, label_smoothing_factor=0.2), train_dataset=data, eval_dataset=data
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_bf16_autocast_keeps_the_context_in_fp32(base, processor, tmp_path):
    full = trained(make_model(base, processor), tmp_path, embedded(), recipe="fast", max_steps=3, learning_rate=0.01)
    mixed = trained(
        make_model(base, processor), tmp_path, embedded(), recipe="fast", max_steps=3, learning_rate=0.01, bf16=True
    )
    assert mixed.dtype == torch.float32 and not torch.equal(mixed, full)
    torch.testing.assert_close(mixed, full, atol=0.05, rtol=0)


def test_many_classes_in_chunks(base, processor, tmp_path):
    whole = trained(make_model(base, processor), tmp_path, embedded(), recipe="fast", max_steps=5)
    name = "activation_checkpointing"  # its name in older versions of transformers: gradient_checkpointing
    name = name if hasattr(CoOpTrainingArguments, name) else "gradient_checkpointing"
    for given in ({"text_chunk_size": 2}, {name: True}):
        model = make_model(base, processor)
        chunked = trained(model, tmp_path, embedded(), recipe="fast", max_steps=5, **given)
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)
        assert model.text_chunk_size in (2, 128)


def test_only_the_active_adapter_learns(base, processor, tmp_path):
    model = make_model(base, processor)
    model.add_adapter("other", CoOpConfig(n_ctx=2), class_names=NAMES)
    other = model.adapters["other"].context.detach().clone()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    start = model.context.detach().clone()
    assert not torch.equal(trained(model, tmp_path, embedded(), max_steps=2), start)
    assert torch.equal(model.adapters["other"].context, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


# ---------------------------------------------------------------------- evaluation


def test_evaluation_encodes_the_classes_once(base, processor, tmp_path, monkeypatch):
    data = embedded(40)
    model = make_model(base, processor)
    trainer = CoOpTrainer(model=model, args=arguments(tmp_path, per_device_eval_batch_size=4), eval_dataset=data)
    calls = []
    real = base.text_projection.forward
    monkeypatch.setattr(base.text_projection, "forward", lambda x: (calls.append(x[..., 0].numel()), real(x))[1])
    metrics = trainer.evaluate()
    assert calls == [3]
    with torch.no_grad():
        predicted = model(image_embeds=data.image_embeds[0]).logits.argmax(-1)
    assert metrics["eval_accuracy"] == pytest.approx((predicted == data.labels).float().mean().item())
    assert "eval_macro_f1" in metrics and len(calls) == 1


def test_zero_shot_beside_the_learned_prompt(base, processor, tmp_path):
    model = make_model(base, processor)
    data = pictures(9)
    trainer = CoOpTrainer(model=model, args=arguments(tmp_path), eval_dataset=data)
    with model.disable_adapter():
        metrics = trainer.evaluate(metric_key_prefix="zero_shot")
    inputs = processor(
        text=[f"a photo of a {name}." for name in NAMES], images=data["image"][:], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        predicted = base(**inputs).logits_per_image.argmax(-1)
    assert metrics["zero_shot_accuracy"] == pytest.approx((predicted == torch.tensor(data["label"])).float().mean())


def test_a_test_set_with_its_classes_in_another_order(base, processor, tmp_path):
    model = make_model(base, processor)
    data = pictures(9)
    other = data.cast_column("label", datasets.Value("int64")).map(lambda row: {"label": 2 - row["label"]})
    other = other.cast_column("label", datasets.ClassLabel(names=NAMES[::-1]))
    trainer = CoOpTrainer(model=model, args=arguments(tmp_path), eval_dataset={"one": data, "two": other})
    metrics = trainer.evaluate()
    assert metrics["eval_one_accuracy"] == metrics["eval_two_accuracy"]
    assert metrics["eval_one_loss"] == pytest.approx(metrics["eval_two_loss"])


def test_predict_gives_logits(base, processor, tmp_path):
    model = make_model(base, processor)
    data = embedded(5)
    output = CoOpTrainer(model=model, args=arguments(tmp_path)).predict(data)
    with torch.no_grad():
        expected = model(image_embeds=data.image_embeds[0]).logits
    np.testing.assert_allclose(output.predictions, expected.numpy(), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- files


def test_a_checkpoint_holds_adapter_and_state_alone(base, processor, tmp_path):
    model = make_model(base, processor)
    trained(model, tmp_path, embedded(), recipe="fast", max_steps=4, save_strategy="steps", save_steps=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    files = sorted(p.name for p in (tmp_path / "checkpoint-4").iterdir())
    assert files == CHECKPOINT_FILES
    loaded = CoOpModel.from_pretrained(tmp_path / "checkpoint-4", base_model=base, processor=processor)
    assert torch.equal(loaded.context, model.context)


@pytest.mark.parametrize("recipe", ["paper", "fast"])
@pytest.mark.parametrize("stop", [3, 4, 7])  # in the middle and at the end of an epoch of 4 steps
@pytest.mark.parametrize("kind", ["embeddings", "images"])
def test_resumed_training_ends_with_the_same_bits(base, processor, tmp_path, recipe, stop, kind):
    data = embedded(17, views=3) if kind == "embeddings" else pictures(17)
    given = {
        "recipe": recipe,
        "max_steps": 11,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 0.05,
        "cache_features": kind == "embeddings",
    }
    if kind == "images":
        given["augment"] = True
    straight = trained(make_model(base, processor), tmp_path / "a", data, **given)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop

    first = CoOpTrainer(
        model=make_model(base, processor),
        args=arguments(tmp_path / "b", **given),
        train_dataset=data,
        callbacks=[Stop()],
    )
    first.train()
    assert first.state.global_step == stop
    second_model = make_model(base, processor, seed=99)  # what it starts from is overwritten
    second = CoOpTrainer(model=second_model, args=arguments(tmp_path / "b", **given), train_dataset=data)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 11
    assert torch.equal(second_model.context, straight)


def test_resuming_with_another_configuration_is_refused(base, processor, tmp_path):
    given = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trained(make_model(base, processor), tmp_path, embedded(), **given)
    other = make_model(base, processor, n_ctx=5)
    trainer = CoOpTrainer(model=other, args=arguments(tmp_path, **given), train_dataset=embedded())
    with pytest.raises(ValueError, match="n_ctx=4.*n_ctx=5"):
        trainer.train(resume_from_checkpoint=True)


def test_best_model_and_early_stopping(base, processor, tmp_path):
    model = make_model(base, processor)
    seen = {}

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen[state.global_step] = (metrics["eval_loss"], model.context.detach().clone())

    given = {
        "max_steps": 30,
        "learning_rate": 3.0,  # far too high: the loss goes up and down
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "save_total_limit": 2,
    }
    trainer = CoOpTrainer(
        model=model,
        args=arguments(tmp_path, **given),
        train_dataset=embedded(24),
        eval_dataset=embedded(30, seed=1),
        callbacks=[EarlyStoppingCallback(3), Watch()],
    )
    trainer.train()
    best = min(seen, key=lambda step: seen[step][0])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert torch.equal(model.context, seen[best][1])
    assert max(seen) == best + 3 < 30  # stopped early
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"checkpoint-{best}", f"checkpoint-{best + 3}"])


def test_a_loss_of_nan_stops_and_leaves_the_last_checkpoint(base, processor, tmp_path):
    model = make_model(base, processor)

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                model.context.data[0, 0] = math.nan

    trainer = CoOpTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=9, save_strategy="steps", save_steps=2),
        train_dataset=embedded(),
        callbacks=[Poison()],
    )
    with pytest.raises(FloatingPointError, match="step 4.*checkpoint-2.* is good"):
        trainer.train()
    context = read_context(tmp_path / "checkpoint-2")
    assert torch.isfinite(context).all()


def test_a_failed_save_says_so_and_leaves_the_last_checkpoint(base, processor, tmp_path, monkeypatch):
    model = make_model(base, processor)
    trainer = CoOpTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=9, save_strategy="steps", save_steps=2),
        train_dataset=embedded(),
    )
    real = trainer._save_training_state

    def full_disk(folder):
        real(folder)
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_training_state", full_disk)
    with pytest.raises(OSError, match="checkpoint-4 could not be written.*No space left.*checkpoint-2"):
        trainer.train()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    read_adapter(tmp_path / "checkpoint-2")


class Spoil(TrainerCallback):
    """Does something to the machine before the checkpoint of step 4 is written."""

    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.action()


def spoiled(base, processor, folder, action):
    """Trains with a checkpoint every second step; `action` runs before the second one."""
    trainer = CoOpTrainer(
        model=make_model(base, processor),
        args=arguments(folder, max_steps=6, save_strategy="steps", save_steps=2),
        train_dataset=embedded(),
        callbacks=[Spoil(action)],
    )
    trainer.train()


def test_a_read_only_folder_is_told_and_the_last_checkpoint_is_whole(base, processor, tmp_path):
    run = Path(tempfile.mkdtemp(prefix="coop_hf_read_only_"))  # a place that another user can reach, too
    is_root = os.geteuid() == 0  # may write everywhere, so it becomes nobody for a moment

    def lock():
        run.chmod(0o555)
        if is_root:
            os.seteuid(65534)

    try:
        with pytest.raises(OSError, match="checkpoint-4 could not be written.*Permission denied.*checkpoint-2"):
            spoiled(base, processor, run, lock)
    finally:
        if is_root:
            os.seteuid(0)
        run.chmod(0o755)
    try:
        assert [p.name for p in run.iterdir() if p.name.startswith(("checkpoint", "."))] == ["checkpoint-2"]
        assert sorted(os.listdir(run / "checkpoint-2")) == CHECKPOINT_FILES
        read_adapter(run / "checkpoint-2")
    finally:
        shutil.rmtree(run)


def test_a_file_that_cannot_grow_is_told_and_the_last_checkpoint_is_whole(base, processor, tmp_path):
    # The kernel refuses to write beyond the limit, as it does on a full disk.
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="checkpoint-4 could not be written.*checkpoint-2"):
            spoiled(base, processor, tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (256, before[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    read_adapter(tmp_path / "checkpoint-2")


def test_a_folder_that_vanished_is_made_again(base, processor, tmp_path):
    spoiled(base, processor, tmp_path / "run", lambda: shutil.rmtree(tmp_path / "run"))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoint-6")) == CHECKPOINT_FILES


def test_a_folder_that_became_a_file_is_told(base, processor, tmp_path):
    def replace():
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").write_text("")

    with pytest.raises(OSError, match="checkpoint-4 could not be written.*There is none before it"):
        spoiled(base, processor, tmp_path / "run", replace)
    read_adapter(tmp_path / "moved" / "checkpoint-2")


def test_the_final_model_is_an_adapter(base_folder, tmp_path):
    model = CoOpModel.from_pretrained(base_folder, class_names=NAMES)
    trainer = CoOpTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=embedded())
    trainer.train()
    trainer.save_model()
    again = CoOpModel.from_pretrained(tmp_path)
    assert torch.equal(again.context, model.context) and again.class_names == NAMES
    assert again.predict(pictures(1)["image"][0], top_k=2) == model.predict(pictures(1)["image"][0], top_k=2)


# ---------------------------------------------------------------------- damaged checkpoints


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_checkpoint_is_told_with_the_one_to_take(base, processor, tmp_path, name, damage):
    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trained(make_model(base, processor), tmp_path, embedded(), **given)
    path = tmp_path / "checkpoint-4" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 40 if damage == "cut" else 0])
    trainer = CoOpTrainer(make_model(base, processor), arguments(tmp_path, **given), embedded())
    if name == "training_args.json":  # for people to read
        trainer.train(resume_from_checkpoint=True)
        return
    with pytest.raises(ValueError, match=f"checkpoint-4.*({name}|config).*Resume from .*checkpoint-2"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_only_checkpoint_is_damaged(base, processor, tmp_path):
    given = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trained(make_model(base, processor), tmp_path, embedded(), save_only_model=True, **given)
    trainer = CoOpTrainer(make_model(base, processor), arguments(tmp_path, **given), embedded())
    with pytest.raises(ValueError, match="training_state.json is missing .with save_only_model=True.*start afresh"):
        trainer.train(resume_from_checkpoint=True)


# ---------------------------------------------------------------------- other methods than CoOp


@dataclass
class GatedConfig(CoOpConfig, method="gated"):
    """A method of a user: more parameters than the context, one that does not learn, and chance."""


class Gated(CoOp, method="gated"):
    def __init__(self, config, family, tokenizer):
        super().__init__(config, family, tokenizer)
        self.gate = torch.nn.Linear(family.text_width, family.text_width)
        self.fixed = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.dropout = torch.nn.Dropout(0.5)

    def prompts(self, image_embeds=None, class_embeds=None):
        return Prompts({0: self.context + self.dropout(self.gate(self.context))})


METHODS = {
    "cocoop": CoCoOpConfig(n_ctx=2, ctx_init=None),
    "deep_text": DeepTextConfig(n_ctx=2, ctx_init=None, depth=2),
    "vpt": VPTConfig(n_vision=2, depth=2),
    "ivlp": IVLPConfig(n_ctx=2, ctx_init=None, n_vision=2, depth=2),
    "maple": MaPLeConfig(n_ctx=2, ctx_init=None, depth=2),
    "tcp": TCPConfig(n_ctx=2, layer=1),
    "gated": GatedConfig(n_ctx=2),
}
OF_THE_IMAGE_TOWER = ("vpt", "ivlp", "maple")


@pytest.fixture(scope="module")
def deep_base(base):
    """Both towers of two layers, with weights that matter."""
    values = base.config.to_dict()
    values["vision_config"]["num_hidden_layers"] = 2
    torch.manual_seed(5)
    deep = CLIPModel(CLIPConfig(**values)).eval()
    with torch.no_grad():
        for parameter in deep.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        deep.logit_scale.fill_(math.log(10.0))
    return deep


def make_method(method, base, processor, seed=0):
    torch.manual_seed(seed)
    return CoOpModel(base, METHODS[method], class_names=NAMES, processor=processor)


@pytest.mark.parametrize("method", METHODS)
def test_all_that_a_method_learns_is_trained_counted_saved_and_resumed(deep_base, processor, tmp_path, method):
    given = {"recipe": "paper", "learning_rate": 0.05, "lr_scheduler_type": "constant", "num_train_epochs": 2}
    given |= {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    given |= {"logging_strategy": "steps", "logging_steps": 1}
    model, norms = make_method(method, deep_base, processor), []
    start = {name: value.clone() for name, value in model.adapter.learned_state().items()}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients = [p.grad.flatten() for p in model.adapter.parameters() if p.requires_grad]
            norms.append(torch.cat(gradients).norm().item())

    trainer = CoOpTrainer(model, arguments(tmp_path / "a", **given), pictures(), callbacks=[Watch()])
    trainer.train()
    assert [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log] == pytest.approx(norms)
    end = model.adapter.learned_state()
    for name in end:
        assert torch.equal(end[name], start[name]) == (name == "fixed"), name
    saved = read_adapter(tmp_path / "a" / "checkpoint-6")[1]
    assert saved.keys() == end.keys() and all(torch.equal(saved[name], end[name]) for name in end)
    for stop in (2, 3):
        again = make_method(method, deep_base, processor, seed=99)
        resumed = CoOpTrainer(again, arguments(tmp_path / "b", **given), pictures())
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
        state = again.adapter.learned_state()
        assert all(torch.equal(state[name], end[name]) for name in end), stop


def test_a_checkpoint_of_another_method_is_refused(deep_base, processor, tmp_path):
    given = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    CoOpTrainer(make_method("tcp", deep_base, processor), arguments(tmp_path, **given), pictures()).train()
    trainer = CoOpTrainer(make_method("cocoop", deep_base, processor), arguments(tmp_path, **given), pictures())
    with pytest.raises(ValueError, match="method='tcp'.*method='cocoop'"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_train_what_leaves_the_image_tower_alone(deep_base, processor, tmp_path, method):
    model = make_method(method, deep_base, processor)
    if method in OF_THE_IMAGE_TOWER:
        for given in ({"train_dataset": embedded()}, {"eval_dataset": embedded()}):
            with pytest.raises(ValueError, match="changes the image tower.*pass the images themselves"):
                CoOpTrainer(model, arguments(tmp_path), **given)
        with pytest.raises(ValueError, match="`num_views` counts cached views"):
            CoOpTrainer(model, arguments(tmp_path, num_views=2), pictures())
    else:
        CoOpTrainer(model, arguments(tmp_path, max_steps=1), embedded()).train()


@pytest.mark.parametrize("method", OF_THE_IMAGE_TOWER)
def test_what_changes_the_image_tower_is_evaluated_on_images(deep_base, processor, tmp_path, method):
    model, data = make_method(method, deep_base, processor), pictures(9)
    trainer = CoOpTrainer(model, arguments(tmp_path, max_steps=3, learning_rate=0.3), data, eval_dataset=data)
    trainer.train()
    pixels = processor(images=data["image"][:], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model.eval()(pixel_values=pixels).logits
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(data["label"]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_frozen_features_of_each_view_are_computed_once(deep_base, processor, tmp_path, recipe, monkeypatch):
    given = {"recipe": recipe, "objective": "promptsrc", "learning_rate": 0.05, "per_device_train_batch_size": 4}
    given |= {"num_train_epochs": 3, "max_steps": -1}
    results, calls = [], []
    for cached in (True, False):
        model = make_method("ivlp", deep_base, processor)
        args = arguments(tmp_path, cache_features=cached, augment=None if cached else recipe == "paper", **given)
        trainer = CoOpTrainer(model, args, pictures())
        frozen = []

        def watched(*args, of=model, seen=frozen, real=model.get_image_features, **kwargs):
            seen.append(of.is_disabled)
            return real(*args, **kwargs)

        monkeypatch.setattr(model, "get_image_features", watched)
        trainer.train()
        calls.append((frozen.count(True), frozen.count(False)))
        results.append(model.adapter.learned_state())
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)
    # 12 images in batches of 4: 9 steps; the frozen tower sees 36 or 12 views, 16 a time, or every batch beside them
    assert calls == [(3 if recipe == "paper" else 1, 9), (9, 9)]


def test_adam_of_tcp_has_its_decay_in_the_gradient(deep_base, processor, tmp_path):
    model = make_method("tcp", deep_base, processor)
    args = arguments(tmp_path, recipe="paper", max_steps=1, weight_decay=0.1)
    trainer = CoOpTrainer(model, args, pictures())
    trainer.train()
    optimizer = trainer.optimizer
    assert type(optimizer) is torch.optim.Adam
    group = optimizer.param_groups[0]
    assert (group["eps"], group["weight_decay"], args.objective) == (1e-3, 0.1, "kgcoop")
    assert "adam with weight decay" in trainer.summary()["hyperparameters"]["optimizer"]


# ---------------------------------------------------------------------- the average over epochs


def test_the_gaussian_average_over_epochs(base, processor, tmp_path):
    given = {"recipe": "paper", "num_train_epochs": 5, "per_device_train_batch_size": 8, "learning_rate": 0.1}
    given |= {"average_mean": 3.0, "average_std": 0.8, "save_strategy": "steps", "save_steps": 1}
    model, ends = make_model(base, processor), []

    class Watch(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            ends.append(model.context.detach().double().numpy().copy())

    trainer = CoOpTrainer(model, arguments(tmp_path / "a", **given), embedded(), callbacks=[Watch()])
    trainer.train()
    weights = np.exp(-0.5 * ((np.arange(1, 6) - 3.0) / 0.8) ** 2)
    expected = np.einsum("e,eij->ij", weights / weights.sum(), np.stack(ends))
    np.testing.assert_allclose(model.context.detach().numpy(), expected, rtol=1e-6, atol=1e-8)
    trainer.save_model()
    assert torch.equal(read_context(tmp_path / "a"), model.context)
    for stop in (4, 6, 15):  # in an epoch, at the end of one, at the end of the training
        again = make_model(base, processor, seed=99)
        resumed = CoOpTrainer(again, arguments(tmp_path / "b", **given), embedded())
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
        assert torch.equal(again.context, model.context), stop


def test_an_average_and_a_best_checkpoint_exclude_each_other(base, processor, tmp_path):
    given = {"average_mean": 3.0, "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="describe one Gaussian"):
        arguments(tmp_path, **given)
    args = arguments(tmp_path, average_std=1.0, **given)
    with pytest.raises(ValueError, match="leave one out"):
        CoOpTrainer(make_model(base, processor), args, embedded(), eval_dataset=embedded())


# ---------------------------------------------------------------------- several processes


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_trainer as t
from conftest import make_base, make_tokenizer
from transformers import CLIPImageProcessor, CLIPProcessor
torch.set_num_threads(1)
tokenizer = make_tokenizer()
size = {{"height": 16, "width": 16}}
image_processor = CLIPImageProcessor(size={{"shortest_edge": 16}}, crop_size=size)
processor = CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
model = t.make_model(make_base(tokenizer), processor, class_specific={class_specific})
data = t.{data}({count}, seed={seed})
args = t.arguments({folder!r}, **{given!r})
trainer = t.CoOpTrainer(model=model, args=args, train_dataset=data, eval_dataset=t.pictures(11, seed=1))
with model.disable_adapter():
    trainer.evaluate()  # before the training, too
trainer.train()
metrics = trainer.evaluate()
trainer.save_model()
if trainer.is_world_process_zero():
    assert args.world_size == {processes}, args.world_size
    torch.save(metrics, {folder!r} + "/metrics.pt")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # its threads may end a process that just exits ("terminate called")
"""


def run_processes(folder, processes, count, given):
    folder.mkdir()
    script = folder / "script.py"
    values = {"tests": str(Path(__file__).parent), "count": count, "folder": str(folder), "given": given}
    values |= {"class_specific": False, "data": "pictures", "seed": 0}
    values |= {name: given.pop(name) for name in ("class_specific", "data", "seed") if name in given}
    script.write_text(SCRIPT.format(processes=processes, **values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return read_context(folder), torch.load(folder / "metrics.pt", weights_only=True)


# Embeddings with which the gradient of the data and that of the frozen model contradict each other.
CONFLICT = {"objective": "prograd", "lr_scheduler_type": "constant", "data": "embedded", "seed": 4}


def test_prograd_projects_in_what_follows(base, processor, tmp_path):
    given = {"recipe": "paper", "num_train_epochs": 4, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    results = [
        trained(make_model(base, processor), tmp_path, embedded(24, seed=4), objective=objective, **given)
        for objective in ("prograd", "cross_entropy")
    ]
    assert (results[0] - results[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    "count, given",
    [
        (19, {"recipe": "paper", "num_train_epochs": 4, "learning_rate": 0.1, "global_batch": 6}),
        (13, {"recipe": "fast", "max_steps": 6, "class_specific": True}),  # all at once, an odd number
        (24, {"recipe": "paper", "num_train_epochs": 4, "learning_rate": 0.1, **CONFLICT}),
    ],
)
def test_two_processes_equal_one(tmp_path, count, given):
    # The same numbers are added up in another order, and Adam magnifies what differs: 1e-5, where values are of 1e-2.
    results = []
    for processes in (1, 2):
        local = {key: value for key, value in given.items() if key != "global_batch"}
        if "global_batch" in given:
            local["per_device_train_batch_size"] = given["global_batch"] // processes
        results.append(run_processes(tmp_path / str(processes), processes, count, local))
    (one, one_metrics), (two, two_metrics) = results
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert two_metrics["eval_accuracy"] == one_metrics["eval_accuracy"]
    assert two_metrics["eval_loss"] == pytest.approx(one_metrics["eval_loss"], rel=1e-5)  # 11 images: one is padding
    assert two_metrics["eval_macro_f1"] == pytest.approx(one_metrics["eval_macro_f1"])


# ---------------------------------------------------------------------- bad input, before any work


def test_class_names_come_from_the_data(base, processor, tmp_path):
    model = CoOpModel(base, CoOpConfig(n_ctx=4), processor=processor)
    CoOpTrainer(model=model, args=arguments(tmp_path), train_dataset=pictures())
    assert model.class_names == NAMES


def test_bad_data(base, processor, tmp_path):
    def make(dataset, model=None, **given):
        model = model or make_model(base, processor)
        return CoOpTrainer(model=model, args=arguments(tmp_path, **given), train_dataset=dataset)

    with pytest.raises(ValueError, match="'photo'.*image"):
        make(pictures(), image_column="photo")
    with pytest.raises(ValueError, match="'kind'.*label"):
        make(pictures(), label_column="kind")
    with pytest.raises(ValueError, match="1 of 3 classes have no image.*'sea'"):
        make(pictures().filter(lambda row: row["label"] != 2))
    with pytest.raises(ValueError, match="label 3|Row 0"):
        make(pictures().cast_column("label", datasets.Value("int64")).map(lambda row: {"label": row["label"] + 3}))
    with pytest.raises(ValueError, match="3 names.*4 classes"):
        make(pictures(names=["x", "y", "z", "w"]))
    broken = pictures().cast_column("image", datasets.Image(decode=False))
    damage = {"bytes": b"no image"}
    broken = broken.map(
        lambda row, i: {"image": {**row["image"], **damage} if i == 5 else row["image"]}, with_indices=True
    )
    broken = broken.cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="row 5"):
        make(broken, max_steps=1).train()
    skipping = make(broken, max_steps=1, on_bad_image="skip")
    assert isinstance(skipping.train_dataset, LabelledImages) and skipping.train_dataset.skipped == [5]
    skipping.train()
    make(pictures().rename_columns({"image": "img", "label": "y"}), image_column="img", label_column="y", max_steps=1)


def test_what_would_learn_outside_the_adapter_is_refused(base, processor, tmp_path):
    model = make_model(base, processor)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra.weight, extra.bias would learn outside the active adapter, 'default'"):
        CoOpTrainer(model, arguments(tmp_path), embedded())
    model.extra.requires_grad_(False)
    trainer = CoOpTrainer(model, arguments(tmp_path, max_steps=1), embedded())
    base.logit_scale.requires_grad_(True)
    try:
        with pytest.raises(ValueError, match="base_model.logit_scale would learn"):
            trainer.train()
    finally:
        base.logit_scale.requires_grad_(False)


def test_the_configuration_as_trackers_ask_for_it(base, processor):
    config = make_model(base, processor).config
    config.use_cache = False  # transformers.Trainer sets it on any model's configuration
    assert json.loads(config.to_json_string()) == config.to_dict()


def test_bad_models_and_arguments(base, base_folder, processor, tmp_path):
    with pytest.raises(TypeError, match="CoOpModel, got CLIPModel"):
        CoOpTrainer(model=base, args=arguments(tmp_path))
    with pytest.raises(TypeError, match="CoOpTrainingArguments, got dict"):
        CoOpTrainer(model=make_model(base, processor), args={})
    CoOpModel.from_pretrained(base_folder, class_names=NAMES).save_pretrained(tmp_path / "adapter")
    for_prediction = CoOpModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        CoOpTrainer(model=for_prediction, args=arguments(tmp_path), train_dataset=embedded())
    CoOpTrainer(model=for_prediction, args=arguments(tmp_path), eval_dataset=embedded())
    trainable = CoOpModel.from_pretrained(tmp_path / "adapter", is_trainable=True)
    trained(trainable, tmp_path / "more", embedded(), max_steps=1)
    with pytest.raises(ValueError, match="no class names"):
        CoOpTrainer(model=CoOpModel(base, processor=processor), args=arguments(tmp_path))
