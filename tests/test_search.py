"""`model_init` and `hyperparameter_search` with the real optuna, and trackers with the real tensorboard and wandb."""

import json
import os

import pytest
import torch
from test_trainer import NAMES, arguments, embedded, make_model, pictures

from coop_hf import CoOpConfig, CoOpModel, CoOpTrainer
from coop_hf.data.labelled_images import LabelledImages


optuna = pytest.importorskip("optuna")


def maker(base, processor, seen=None):
    def model_init(trial):
        n_ctx = trial.suggest_int("n_ctx", 1, 4) if trial else 2
        specific = trial.suggest_categorical("class_specific", [True, False]) if trial else False
        config = CoOpConfig(n_ctx=n_ctx, class_specific=specific)
        model = CoOpModel(base, config, NAMES, processor)
        if seen is not None:
            seen.append((trial, model))
        return model

    return model_init


def test_a_search_over_arguments_and_configuration(base, processor, tmp_path):
    seen, objectives, rates = [], [], []

    def space(trial):
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
            "objective": trial.suggest_categorical("objective", ["cross_entropy", "kgcoop"]),
        }

    class Watched(CoOpTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            assert [id(p) for p in given] == [id(p) for p in self.model.learned_parameters().values()]
            rates.append(optimizer.param_groups[0]["lr"])
            objectives.append(self.args.objective)
            return optimizer

    args = arguments(tmp_path, max_steps=3)
    trainer = Watched(
        model_init=maker(base, processor, seen), args=args, train_dataset=embedded(), eval_dataset=embedded(9, seed=1)
    )
    best = trainer.hyperparameter_search(
        hp_space=space,
        n_trials=6,
        direction="maximize",
        backend="optuna",
        compute_objective=lambda metrics: metrics["eval_accuracy"],
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    trials = [(trial, model) for trial, model in seen if trial is not None]
    assert len(trials) == 6
    for (trial, model), rate, objective in zip(trials, rates, objectives):
        assert model.config.n_ctx == trial.params["n_ctx"]
        assert model.config.class_specific == trial.params["class_specific"]
        assert (rate, objective) == (trial.params["learning_rate"], trial.params["objective"])
    assert len({model.config.n_ctx for _, model in trials}) > 1 and set(objectives) == {"cross_entropy", "kgcoop"}
    assert set(best.hyperparameters) == {"n_ctx", "class_specific", "learning_rate", "objective"}

    # What was best, trained by itself, is what the search measured.
    chosen = optuna.trial.FixedTrial(best.hyperparameters)
    args = arguments(tmp_path, max_steps=3, **space(chosen))
    torch.manual_seed(args.seed)
    model = maker(base, processor)(chosen)
    again = CoOpTrainer(model, args, embedded(), embedded(9, seed=1))
    again.train()
    assert again.evaluate()["eval_accuracy"] == pytest.approx(best.objective)


def test_model_init_alone(base, processor, tmp_path):
    """Each `train()` begins afresh, with the start that the seed gives."""
    args = arguments(tmp_path, max_steps=2)
    trainer = CoOpTrainer(model_init=maker(base, processor), args=args, train_dataset=embedded())
    contexts = []
    for _ in range(2):
        trainer.train()
        contexts.append(trainer.model.context.detach().clone())
    assert torch.equal(*contexts)
    torch.manual_seed(args.seed)
    other = CoOpTrainer(maker(base, processor)(None), arguments(tmp_path, max_steps=2), embedded())
    other.train()
    assert torch.equal(other.model.context, contexts[0])


def test_epochs_in_a_search(base, processor, tmp_path):
    steps = []

    class Watched(CoOpTrainer):
        def train(self, *args, **kwargs):
            output = super().train(*args, **kwargs)
            steps.append(self.state.global_step)
            return output

    args = arguments(tmp_path, per_device_train_batch_size=8)  # the fast recipe counts steps
    trainer = Watched(model_init=maker(base, processor), args=args, train_dataset=embedded(), eval_dataset=embedded(9))
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"num_train_epochs": trial.suggest_int("num_train_epochs", 2, 2)},
        n_trials=1,
        backend="optuna",
    )
    assert steps == [2 * (len(embedded()) // 8)]


def test_images_are_embedded_once_in_a_search(base, processor, tmp_path, monkeypatch):
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path / "cache"))
    embeddings = []
    embed = CoOpTrainer._embed
    monkeypatch.setattr(CoOpTrainer, "_embed", lambda self, *args: embeddings.append(1) or embed(self, *args))
    args = arguments(tmp_path, max_steps=1)
    trainer = CoOpTrainer(
        model_init=maker(base, processor), args=args, train_dataset=pictures(), eval_dataset=pictures()
    )
    assert isinstance(trainer.train_dataset, LabelledImages)
    trainer.hyperparameter_search(hp_space=lambda trial: {}, n_trials=3, backend="optuna")
    assert len(embeddings) == 2, "the training set and the evaluation set"


def test_what_model_init_may_not_do(base, processor, tmp_path):
    args = arguments(tmp_path, max_steps=1)
    with pytest.raises(TypeError, match="first called with trial=None.*if trial else 4"):
        CoOpTrainer(
            model_init=lambda trial: CoOpModel(base, CoOpConfig(n_ctx=trial.suggest_int("n", 1, 2)), NAMES, processor),
            args=args,
        )
    with pytest.raises(TypeError, match="trains a CoOpModel, got CLIPModel"):
        CoOpTrainer(model_init=lambda: base, args=args)
    with pytest.raises(ValueError, match="either `model` or `model_init`"):
        CoOpTrainer(make_model(base, processor), args, model_init=maker(base, processor))
    names = [NAMES, NAMES[::-1]]
    trainer = CoOpTrainer(
        model_init=lambda: CoOpModel(base, None, names.pop(0), processor), args=args, train_dataset=embedded()
    )
    with pytest.raises(ValueError, match="of other classes, or in another order"):
        trainer.train()


# ---------------------------------------------------------------- trackers


def test_tensorboard(base, processor, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    args = arguments(tmp_path, max_steps=2, logging_strategy="steps", logging_steps=1, report_to="tensorboard")
    trainer = CoOpTrainer(make_model(base, processor), args, embedded(), embedded(9, seed=1))
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    scalars, texts = {}, {}
    for path in (tmp_path / "logs").rglob("events.*"):
        events = EventAccumulator(str(path)).Reload()
        scalars |= {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        for tag in events.Tags()["tensors"]:
            texts[tag] = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert [event.step for event in scalars["train/loss"]] == [1, 2]
    assert scalars["eval/accuracy"][0].value == pytest.approx(accuracy)
    logged = next(text for tag, text in texts.items() if "model_config" in tag)
    assert json.loads(logged) == trainer.model.config.to_dict()


def test_wandb_offline(base, processor, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    args = arguments(
        tmp_path, max_steps=2, logging_strategy="steps", logging_steps=1, report_to="wandb", run_name="a prompt"
    )
    trainer = CoOpTrainer(make_model(base, processor), args, embedded(), embedded(9, seed=1))
    try:
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
        config, summary = dict(wandb.run.config), dict(wandb.run.summary)
        assert wandb.run.name == "a prompt" and wandb.run.settings.mode == "offline"
    finally:
        wandb.finish()
    model = trainer.model
    assert config["model/num_parameters"] == model.num_parameters()
    assert config["n_ctx"] == model.config.n_ctx and config["learning_rate"] == args.learning_rate
    assert config["class_names"] == NAMES and "default" in config["peft_config"]
    assert summary["eval/accuracy"] == pytest.approx(accuracy) and summary["train/global_step"] == 2
    assert list(tmp_path.rglob("*.wandb")), f"written below {os.listdir(tmp_path)}"
