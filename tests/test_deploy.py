import copy
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_base
from safetensors.torch import load_file, save_file
from transformers import pipeline

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.deploy.export import as_image_classifier, export_onnx
from coop_hf.pipeline import CoOpImageClassificationPipeline


NAMES = ["cat", "dog", "sea_lion", "photo of a yak"]


def picture(seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 31, 3), dtype=np.uint8))


def pixels(batch, seed=0):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(base, processor):
    torch.manual_seed(1)
    model = CoOpModel(base, CoOpConfig(n_ctx=4), NAMES, processor)
    model.context.data.mul_(15)
    return model


# ---------------------------------------------------------------------- the plain module


@pytest.mark.parametrize("class_specific", [False, True])
def test_classifier_gives_the_logits_of_the_model(base, processor, class_specific):
    torch.manual_seed(0)
    model = CoOpModel(base, CoOpConfig(n_ctx=4, class_specific=class_specific), NAMES, processor)
    classifier = as_image_classifier(model)
    with torch.no_grad():
        assert torch.allclose(classifier(pixels(5)), model(pixel_values=pixels(5)).logits, atol=1e-6)
        with model.disable_adapter():
            zero_shot = as_image_classifier(model)
            assert torch.allclose(zero_shot(pixels(5)), model(pixel_values=pixels(5)).logits, atol=1e-6)
    assert not torch.allclose(zero_shot(pixels(5)), classifier(pixels(5)), atol=1e-3)
    assert classifier.class_names == NAMES
    assert not any("text" in name for name, _ in classifier.named_modules())
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_classifier_is_independent_of_the_model(model):
    classifier = as_image_classifier(model)
    before = copy.deepcopy(model.base_model.state_dict())
    expected = classifier(pixels(2))
    classifier.to(torch.bfloat16)
    assert all(torch.equal(value, before[key]) for key, value in model.base_model.state_dict().items())
    assert model.base_model.dtype == torch.float32
    assert torch.allclose(classifier(pixels(2)), expected, atol=0.3)
    assert classifier(pixels(2)).dtype == torch.float32


def test_classifier_needs_class_names(base, processor):
    with pytest.raises(ValueError, match="has no class names yet"):
        as_image_classifier(CoOpModel(base, CoOpConfig(n_ctx=2), processor=processor))


def test_weights_go_through_safetensors(model, tmp_path):
    classifier = as_image_classifier(model)
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    other = as_image_classifier(model)
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(pixels(3)), classifier(pixels(3)))


def test_torch_export_with_any_batch_size(model, tmp_path):
    classifier = as_image_classifier(model)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(classifier, (pixels(2),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2, 7):
        with torch.no_grad():
            expected = model(pixel_values=pixels(batch)).logits
        assert torch.allclose(module(pixels(batch)), expected, atol=1e-5)


def test_onnx_with_any_batch_size(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_onnx(as_image_classifier(model), tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"], "one file"
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["pixel_values"]
    for batch in (1, 2, 7):
        (found,) = session.run(["logits"], {"pixel_values": pixels(batch).numpy()})
        with torch.no_grad():
            scores = model(pixel_values=pixels(batch)).logits.softmax(dim=-1)
        assert torch.allclose(torch.from_numpy(found).softmax(dim=-1), scores, atol=1e-5)


def test_onnx_says_what_it_needs(model, base, tokenizer, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model.set_class_names(["猫", *NAMES[1:]])
    for made, name in ((model, "whole.onnx"), (CoOpModel(base, None, NAMES, tokenizer), "tokenizer_alone.onnx")):
        export_onnx(made.as_image_classifier(), tmp_path / name)
        session = onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["class_names"]) == made.class_names and metadata["scores"] == "softmax"
        if made is model:
            again = type(model.image_processor)(**json.loads(metadata["preprocessing"]))
            expected = model.image_processor(picture(), return_tensors="pt")["pixel_values"]
            assert torch.equal(again(picture(), return_tensors="pt")["pixel_values"], expected)
        else:
            assert "preprocessing" not in metadata


def test_onnx_refuses_before_the_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: pytest.fail("work began"))
    classifier = as_image_classifier(model)
    for given, path, error, message in [
        (model, "a.onnx", TypeError, r"got CoOpModel: call `.as_image_classifier\(\)`"),
        (torch.nn.Linear(1, 1), "a.onnx", TypeError, "got Linear: make one with"),
        (classifier, "lost/a.onnx", FileNotFoundError, "no folder '.*lost' to write 'a.onnx' into"),
        (classifier, "", IsADirectoryError, "is a folder: name a file"),
    ]:
        with pytest.raises(error, match=message):
            export_onnx(given, tmp_path / path)


def test_onnx_without_the_extra(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install coop_hf\[onnx\]"):
        export_onnx(as_image_classifier(model), tmp_path / "model.onnx")


# ---------------------------------------------------------------------- the pipeline


def test_pipeline_gives_what_predict_gives(model, tmp_path):
    classifier = pipeline("coop-image-classification", model=model, device="cpu")
    assert isinstance(classifier, CoOpImageClassificationPipeline)
    images = [picture(seed) for seed in range(5)]
    images[0].save(tmp_path / "image.png")
    expected = model.predict(images, top_k=None)

    def same(found, expected):
        assert [[a["label"] for a in answers] for answers in found] == [[a["label"] for a in e] for e in expected]
        assert np.allclose(
            [[a["score"] for a in answers] for answers in found],
            [[a["score"] for a in e] for e in expected],
            atol=1e-6,
        )

    same(classifier(images), expected)
    same(classifier(images, batch_size=3), expected)
    same([classifier(images[0])], expected[:1])
    same([classifier(str(tmp_path / "image.png"))], expected[:1])
    same([classifier(images[0], top_k=2)], [expected[0][:2]])
    same(list(classifier(image for image in images)), expected)
    assert "classes=4" in repr(classifier)


def test_pipeline_follows_the_model(model):
    classifier = pipeline("coop-image-classification", model=model, device="cpu", top_k=1)
    model.set_class_names(["cat", "dog"])
    assert classifier(picture()) == model.predict(picture(), top_k=1)
    classifier.model.add_adapter("other", CoOpConfig(n_ctx=2), ["sea", "photo"])
    model.set_adapter("other")
    assert classifier(picture())[0]["label"] in ("sea", "photo")


def test_pipeline_refuses_what_it_does_not_know(model):
    with pytest.raises(ValueError, match="unknown argument 'topk'"):
        pipeline("coop-image-classification", model=model, device="cpu")(picture(), topk=3)
    with pytest.raises(ValueError, match="`top_k` must be a positive whole number, got 0"):
        pipeline("coop-image-classification", model=model, device="cpu")(picture(), top_k=0)
    with pytest.raises(ValueError, match="runs on a CoOpModel, got CLIPModel"):
        pipeline("coop-image-classification", model=model.base_model, device="cpu")


def test_pipeline_saves_adapters_and_loads_them_by_name(processor, base_folder, tmp_path):
    """By name, transformers finds the base through the adapter's configuration, which it does where PEFT is there."""
    torch.manual_seed(0)
    model = CoOpModel.from_pretrained(base_folder, CoOpConfig(n_ctx=3), NAMES)
    classifier = pipeline("coop-image-classification", model=model, device="cpu")
    classifier.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = pipeline("coop-image-classification", model=CoOpModel.from_pretrained(tmp_path / "adapter"), device="cpu")
    assert loaded(picture()) == classifier(picture())
    pytest.importorskip("peft")
    by_name = pipeline("coop-image-classification", model=str(tmp_path / "adapter"), device="cpu")
    assert by_name(picture()) == classifier(picture())


def test_a_half_precision_model(tokenizer, processor):
    model = CoOpModel(make_base(tokenizer).to(torch.bfloat16), CoOpConfig(n_ctx=2), NAMES, processor)
    answer = pipeline("coop-image-classification", model=model, device="cpu")(picture())
    assert sum(a["score"] for a in answer) == pytest.approx(1, abs=1e-5)


def test_registered_on_import():
    program = "import coop_hf, json; from transformers.pipelines import PIPELINE_REGISTRY as r; "
    program += "print(json.dumps('coop-image-classification' in r.get_supported_tasks()))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert json.loads(run.stdout) is True
