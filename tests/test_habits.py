"""What people try who come from PEFT and transformers: names, orders of arguments, loaders of theirs on our files."""

import json
import warnings

import pytest
import torch
from conftest import make_base
from torch import nn
from transformers import AutoModel, AutoModelForZeroShotImageClassification, CLIPModel

from coop_hf import CoCoOpConfig, CoOpConfig, CoOpModel, PromptConfig, TaskResConfig, VPTConfig
from coop_hf.config import PEFT_TYPE
from coop_hf.core.families import FAMILIES
from coop_hf.files.adapter_files import read_adapter


NAMES = ["cat", "dog", "sea_lion"]


@pytest.fixture
def model(base, processor):
    torch.manual_seed(0)
    return CoOpModel(base, CoOpConfig(n_ctx=3), NAMES, processor)


# ---------------------------------------------------------------- names and orders of theirs


def test_add_adapter_in_the_order_of_transformers(model):
    model.add_adapter(CoOpConfig(n_ctx=2), "theirs")
    model.add_adapter("ours", CoOpConfig(n_ctx=2))
    assert list(model.adapters) == ["default", "theirs", "ours"] and model.active_adapter == "default"
    assert model.adapters["theirs"].context.shape == model.adapters["ours"].context.shape == (2, 32)
    with pytest.raises(ValueError, match="there is an adapter named 'default' already"):
        model.add_adapter(CoOpConfig())  # transformers' default name
    with pytest.raises(TypeError, match="`config` must be a CoOpConfig"):
        model.add_adapter("one", "two")
    with pytest.raises(ValueError, match="must be made of letters"):
        model.add_adapter(CoOpConfig(), CoOpConfig())


def test_names_that_models_have(model, base):
    learned = model.context.numel()
    assert model.num_parameters() == base.num_parameters() + learned
    assert model.num_parameters(only_trainable=True) == learned == model.get_nb_trainable_parameters()[0]
    assert model.num_parameters(exclude_embeddings=True) == base.num_parameters(exclude_embeddings=True) + learned
    assert model.dtype == base.dtype == torch.float32 and model.unload() is base
    half = CoOpModel(make_base(model.tokenizer).bfloat16(), processor=model.processor)
    assert half.dtype == torch.bfloat16 and half.context.dtype == torch.float32
    model.add_adapter("other", CoOpConfig(n_ctx=2))
    assert {name: config.n_ctx for name, config in model.peft_config.items()} == {"default": 3, "other": 2}


def test_from_pretrained_with_fields_of_the_configuration(base_folder, tmp_path):
    model = CoOpModel.from_pretrained(base_folder, n_ctx=2, class_specific=True, class_names=NAMES, device="cpu")
    assert model.context.shape == (3, 2, 32) and model.device.type == "cpu"
    assert model.config == CoOpConfig(
        n_ctx=2, class_specific=True, class_names=NAMES, base_model_name_or_path=str(base_folder)
    )
    assert CoOpModel.from_pretrained(base_folder, device="meta").device.type == "meta"
    with pytest.raises(TypeError, match=r"n_ctx=4 belongs into `config`: write config=VPTConfig\(n_ctx=4, ...\)"):
        CoOpModel.from_pretrained(base_folder, VPTConfig(), n_ctx=4)
    model.save_pretrained(tmp_path)
    assert CoOpModel.from_pretrained(tmp_path, device="meta").device.type == "meta"
    with pytest.raises(ValueError, match="is an adapter and has its own configuration"):
        CoOpModel.from_pretrained(tmp_path, n_ctx=4)
    with pytest.raises(TypeError, match="the base is loaded already, so dtype has no use"):
        CoOpModel.from_pretrained(
            tmp_path, base_model=model.base_model, processor=model.processor, dtype=torch.float16
        )


def test_the_mean_of_adapters(model):
    for seed, name in enumerate(["one", "two"]):
        model.add_adapter(name, CoOpConfig(n_ctx=3), class_names=[f"class {seed}"])
        model.adapters[name].context.data.add_(seed)
    first, one, two = (model.adapters[name].context.detach() for name in ("default", "one", "two"))
    model.add_weighted_adapter(["default", "one"])
    torch.testing.assert_close(model.adapters["mean"].context, (first + one) / 2)
    model.add_weighted_adapter(["one", "two"], [1, 3], "weighted", combination_type="linear")
    mean = model.adapters["weighted"]
    torch.testing.assert_close(mean.context, one / 4 + 3 * two / 4)
    assert mean.config.class_names == ["class 0"] and model.active_adapter == "default"
    model.set_adapter("weighted")
    assert model.get_text_features().shape == (1, 24) and model.context.requires_grad, "it may learn on"


def test_a_mean_of_what_learned_more_than_vectors(base, processor):
    model = CoOpModel(base, CoCoOpConfig(n_ctx=2, ctx_init=None), NAMES, processor)
    model.add_adapter("other", CoCoOpConfig(n_ctx=2, ctx_init=None))
    for parameter in model.adapters["other"].parameters():
        parameter.data.add_(1)
    model.add_weighted_adapter(["default", "other"], [0.25, 0.75], "both")
    first, second, both = (model.adapters[name].learned_state() for name in ("default", "other", "both"))
    assert len(both) > 2
    for key, value in both.items():
        torch.testing.assert_close(value, 0.25 * first[key] + 0.75 * second[key])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["default"],), "at least two names"),
        (("default",), "at least two names"),
        ((["default", "lost"],), "no adapter named 'lost'"),
        ((["default", "short"],), "have no mean: their n_ctx is 3 and 2"),
        ((["default", "cocoop"],), "have no mean: their method is 'coop' and 'cocoop'"),
        ((["specific", "others"],), "have no mean: their class_names is"),
        ((["head", "head"],), "'head' is a head"),
        ((["default", "default"], [1]), "`weights` must be 2 numbers"),
        ((["default", "default"], [0, 0]), "not all 0"),
        ((["default", "default"], [1, -1]), "from 0 on"),
        ((["default", "default"], [1, float("nan")]), "`weights` must be"),
        ((["default", "default"], None, "default"), "named 'default' already"),
        ((["default", "default"], None, "x", "svd"), "must be 'linear'"),
    ],
)
def test_what_has_no_mean(model, arguments, message):
    model.add_adapter("short", CoOpConfig(n_ctx=2))
    model.add_adapter("cocoop", CoCoOpConfig(n_ctx=3, ctx_init=None))
    model.add_adapter("specific", CoOpConfig(n_ctx=3, class_specific=True), NAMES)
    model.add_adapter("others", CoOpConfig(n_ctx=3, class_specific=True), ["yak", "gnu", "emu"])
    model.add_adapter("head", TaskResConfig(), NAMES)
    names = list(model.adapters)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.adapters) == names


def test_other_classes_for_a_head(model):
    model.add_adapter("head", TaskResConfig(), NAMES)
    with pytest.raises(
        ValueError, match="a head of the method 'taskres' holds weights .* for 'yak'.* Fit a head anew"
    ):
        model.set_class_names(["cat", "dog", "yak"], "head")
    model.set_class_names(["dog", "cat", "sea_lion"], "head")
    model.add_adapter("specific", CoOpConfig(n_ctx=2, class_specific=True), NAMES)
    with pytest.raises(ValueError, match="a class-specific context holds vectors .* Learn a unified context"):
        model.set_class_names(["cat", "dog", "yak"], "specific")


# ---------------------------------------------------------------- PEFT on our files, and we on PEFT's


def test_loaders_of_peft_say_whose_adapter_it_is(model, base_folder, tmp_path):
    """PEFT looks `peft_type` up among its own, and its error shows the value: that value says what to do."""
    peft = pytest.importorskip("peft")
    model.config.base_model_name_or_path = str(base_folder)
    model.save_pretrained(tmp_path)
    base = CLIPModel.from_pretrained(base_folder)
    for load in (
        lambda: AutoModel.from_pretrained(tmp_path),
        lambda: CLIPModel.from_pretrained(tmp_path),
        lambda: AutoModelForZeroShotImageClassification.from_pretrained(tmp_path),
        lambda: peft.PeftConfig.from_pretrained(str(tmp_path)),
        lambda: peft.PeftModel.from_pretrained(base, str(tmp_path)),
        lambda: base.load_adapter(str(tmp_path)),
    ):
        with pytest.raises(KeyError, match="no adapter of PEFT: load it with coop_hf.CoOpModel.from_pretrained"):
            load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CoOpModel.from_pretrained(tmp_path).class_names == NAMES


def test_the_line_for_peft_is_no_part_of_a_configuration(model, tmp_path):
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == PEFT_TYPE
    assert not hasattr(PromptConfig.from_dict(values), "peft_type")
    del values["peft_type"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PromptConfig.from_dict(values) == read_adapter(tmp_path)[0], "as files of before it came"


def test_an_adapter_of_peft_is_refused(model, base_folder, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(CLIPModel.from_pretrained(base_folder), peft.LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    for load in (lambda: CoOpModel.from_pretrained(tmp_path), lambda: model.load_adapter(tmp_path, "lora")):
        with pytest.raises(ValueError, match="an adapter of PEFT, of the type 'LORA', and none of coop_hf: load it"):
            load()
    assert list(model.adapters) == ["default"]


# ---------------------------------------------------------------- bases that this transformers does not know


def test_a_base_that_is_newer_than_transformers(base_folder, tmp_path, monkeypatch):
    def write(**values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    written = "Its config.json was written by transformers 9.1"
    with pytest.raises(ValueError, match=f"model_type 'future'.* does not know it either. {written}"):
        CoOpModel.from_pretrained(write(model_type="future", transformers_version="9.1"))
    with pytest.raises(ValueError, match="model_type 'bert'") as error:
        CoOpModel.from_pretrained(write(model_type="bert", transformers_version="9.1"))
    assert "does not know it" not in str(error.value)
    folder = write(model_type="clip", transformers_version="9.1")
    monkeypatch.setattr(FAMILIES["clip"], "model_class", "Clip7Model")
    with pytest.raises(ValueError, match=f"is a Clip7Model, and transformers .* upgrade transformers. {written}"):
        CoOpModel.from_pretrained(folder)


def test_nothing_of_a_base_learns(model):
    assert not any(p.requires_grad for p in model.unload().parameters())
    assert isinstance(model.context, nn.Parameter)
