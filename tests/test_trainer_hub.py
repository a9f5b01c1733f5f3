"""What the Trainer puts on the Hub, over HTTP against the server in `hub_server.py`."""

import huggingface_hub
import pytest
import torch
import yaml
from hub_server import HubServer
from test_hub import set_endpoint
from test_trainer import CHECKPOINT_FILES, NAMES, arguments, embedded, make_model

from coop_hf import CoOpConfig, CoOpModel, CoOpTrainer
from coop_hf.hub import REQUEST_SECONDS


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        set_endpoint(monkeypatch, server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        # Made once, with the endpoint of its time; older versions of transformers have none.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        yield server


def train(hub, base, processor, tmp_path, strategy, **given):
    model = make_model(base, processor)
    defaults = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "hub_always_push": True}
    args = arguments(
        tmp_path / "out",
        push_to_hub=True,
        hub_model_id="ada/prompt",
        hub_token=hub.add_user("ada"),
        hub_strategy=strategy,
        **{**defaults, **given},
    )
    trainer = CoOpTrainer(model=model, args=args, train_dataset=embedded(), eval_dataset=embedded(9, seed=1))
    return model, trainer


def files_on(hub, args):
    return sorted(huggingface_hub.HfApi(token=args.hub_token).list_repo_files("ada/prompt"))


def test_at_the_end(hub, base, processor, tmp_path):
    model, trainer = train(hub, base, processor, tmp_path, "end")
    trainer.train()
    with model.disable_adapter():
        before = trainer.evaluate(metric_key_prefix="zero_shot")["zero_shot_accuracy"]
    after = trainer.evaluate()["eval_accuracy"]
    trainer.push_to_hub()
    files = files_on(hub, trainer.args)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or "training_" in name]
    token = trainer.args.hub_token
    again = CoOpModel.from_pretrained(
        "ada/prompt", base_model=base, processor=processor, token=token, cache_dir=tmp_path / "cache"
    )
    assert torch.equal(again.context, model.context) and again.class_names == NAMES
    path = huggingface_hub.hf_hub_download("ada/prompt", "README.md", token=token, cache_dir=tmp_path / "cache")
    with open(path) as file:
        card = file.read()
    optimizer = "one second moment for a tensor"
    for part in (f"{100 * before:.1f}", f"{100 * after:.1f}", "8 images of each class", optimizer, "ada/prompt"):
        assert part in card, part


@pytest.mark.parametrize(
    "strategy, folders",
    [
        ("every_save", []),
        ("checkpoint", ["last-checkpoint"]),
        ("all_checkpoints", ["checkpoint-2", "checkpoint-4"]),
    ],
)
def test_while_training(hub, base, processor, tmp_path, strategy, folders):
    model, trainer = train(hub, base, processor, tmp_path, strategy)
    trainer.train()
    files = files_on(hub, trainer.args)
    expected = ["adapter_config.json", "adapter_model.safetensors"]
    expected += [f"{folder}/{name}" for folder in folders for name in CHECKPOINT_FILES]
    assert [name for name in files if name not in (".gitattributes", "README.md")] == sorted(expected)
    token = trainer.args.hub_token
    config = CoOpConfig.from_pretrained("ada/prompt", token=token, cache_dir=tmp_path / "cache")
    assert config.class_names == NAMES


def test_a_failing_hub_does_not_stop_training(hub, base, processor, tmp_path, monkeypatch):
    model, trainer = train(hub, base, processor, tmp_path, "every_save")
    set_endpoint(monkeypatch, "http://127.0.0.1:9")  # nobody listens there
    trainer.train()
    assert trainer.state.global_step == 4
    assert (tmp_path / "out" / "checkpoint-4" / "adapter_model.safetensors").is_file()


def test_what_push_to_hub_is_told_reaches_the_card(hub, base, processor, tmp_path):
    _, trainer = train(hub, base, processor, tmp_path, "end", max_steps=1)
    trainer.push_to_hub(tags=["garden"], license="mit", language="en", dataset_name="Flowers 102")
    card = hub.files("ada/prompt")["README.md"].decode()
    values = yaml.safe_load(card.split("---\n")[1])
    assert values["license"] == "mit" and values["language"] == ["en"] and "garden" in values["tags"]
    assert "`Flowers 102`" in card
    with open(tmp_path / "out" / "README.md") as file:
        assert yaml.safe_load(file.read().split("---\n")[1])["license"] == "mit", "the card on this machine, too"


def test_a_background_push_has_a_time_out_and_no_local_path(hub, base, base_folder, processor, tmp_path, monkeypatch):
    model, trainer = train(hub, base, processor, tmp_path, "checkpoint")
    model.config.base_model_name_or_path = str(base_folder)
    limits = []
    commit = huggingface_hub.HfApi.create_commit

    def watched(self, *args, **kwargs):
        limits.append(huggingface_hub.get_session().timeout.read)
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", watched)
    with pytest.warns(UserWarning, match="is a folder on this machine"):
        trainer.train()
    trainer._finish_current_push()
    assert limits and set(limits) == {REQUEST_SECONDS}
    assert huggingface_hub.get_session().timeout.read is None, "and nothing else has it"
    files = hub.files("ada/prompt")
    assert "last-checkpoint/adapter_config.json" in files
    assert not [path for path, data in files.items() if str(base_folder).encode() in data]
    assert str(base_folder) in (tmp_path / "out" / "checkpoint-4" / "adapter_config.json").read_text()
