"""A unified context as PEFT's own adapter: stock transformers and PEFT give the scores of the model it came from."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import make_base, picture
from transformers import AutoModel, AutoProcessor, CLIPModel, pipeline

from coop_hf import CoOpConfig, CoOpModel, VPTConfig
from coop_hf.deploy.peft_export import export_peft, name_free_entries


peft = pytest.importorskip("peft")

NAMES = ["cat", "dog (cat)", "sea_lion", "Cat A"]


def make_model(base, processor, names=NAMES, **config):
    torch.manual_seed(0)
    model = CoOpModel(base, CoOpConfig(**{"n_ctx": 5, **config}), names, processor)
    model.context.data.mul_(20)
    return model


def stock_logits(clip, processor, prompt, image):
    texts = [prompt["hypothesis_template"].format(label) for label in prompt["candidate_labels"]]
    with torch.no_grad():
        inputs = processor(text=texts, images=image, padding=True, return_tensors="pt")
        return clip(**inputs).logits_per_image


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("eos_token_id", [2, None])
def test_stock_peft_gives_the_same_logits(tokenizer, processor, tmp_path, position, eos_token_id):
    base = make_base(tokenizer, eos_token_id=eos_token_id or tokenizer.eos_token_id)
    base.save_pretrained(tmp_path / "base")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    vocabulary = dict(tokenizer.get_vocab())
    model = make_model(base, processor, class_token_position=position, base_model_name_or_path=str(tmp_path / "base"))
    prompt = export_peft(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "prompt.json").read_text()) == prompt
    assert prompt["class_names"] == NAMES and prompt["candidate_labels"][2] == "sea lion"
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert tokenizer.get_vocab() == vocabulary

    image = picture(0)
    expected = model(**processor(images=image, return_tensors="pt")).logits
    theirs = AutoProcessor.from_pretrained(tmp_path / "out")
    clip = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(tmp_path / "base"), tmp_path / "out").eval()
    assert clip.peft_config["default"].peft_type == "TRAINABLE_TOKENS"
    torch.testing.assert_close(stock_logits(clip, theirs, prompt, image), expected, rtol=0, atol=1e-5)
    by_name = AutoModel.from_pretrained(tmp_path / "out").eval()  # transformers finds base and adapter by itself
    torch.testing.assert_close(stock_logits(by_name, theirs, prompt, image), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1 and (expected - stock_logits(base, theirs, prompt, image)).abs().max() > 0.1
    # Every other text reads as before, capital letters too.
    for text in ("A CAT and a Dog", "Übergröße ÀÁÿ", "猫 (cat)!"):
        assert theirs.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    model.set_class_names(["yak", "sea"])  # other classes than those of the export
    labels = {"hypothesis_template": prompt["hypothesis_template"], "candidate_labels": ["yak", "sea"]}
    expected = model(**processor(images=image, return_tensors="pt")).logits
    torch.testing.assert_close(stock_logits(clip, theirs, labels, image), expected, rtol=0, atol=1e-5)


def test_without_us(base_folder, tmp_path):
    """The code of the card runs in a process that cannot import coop_hf."""
    model = CoOpModel.from_pretrained(base_folder, n_ctx=3, class_names=NAMES)
    image = picture(1)
    image.save(tmp_path / "image.png")
    prompt = export_peft(model, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and str(base_folder) not in card
    code = card.split("```python\n")[1].split("```")[0].replace("clip(**inputs)", "print(clip(**inputs)")
    code = code.replace(".logits_per_image", ".logits_per_image.tolist())")
    code = code.replace("path/to/this/folder", str(tmp_path / "out")).replace(
        "path/to/the/base/model", str(base_folder)
    )
    path = str(tmp_path / "image.png")
    start = f"import sys\nsys.modules['coop_hf'] = None\nimport PIL.Image\nimage = PIL.Image.open({path!r})\n"
    code = start + code
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (row,) = json.loads(run.stdout.splitlines()[-1])
    expected = model(**model.processor(images=image, return_tensors="pt")).logits
    assert row == pytest.approx([expected[0, 0].item()], abs=1e-4)
    folder = str(tmp_path / "out")  # for the processor, too: else the pipeline takes the base's
    parts = {"model": folder, "tokenizer": folder, "image_processor": folder}
    classify = pipeline("zero-shot-image-classification", **parts)
    answers = classify(image, prompt["candidate_labels"], hypothesis_template=prompt["hypothesis_template"])
    scores = dict(zip(NAMES, expected.softmax(-1)[0].tolist()))
    assert {a["label"]: a["score"] for a in answers} == pytest.approx(
        {n.replace("_", " "): s for n, s in scores.items()}, abs=1e-4
    )


def test_no_classes_and_a_real_vocabulary(real_base, real_tokenizer, image_processor, tmp_path):
    from transformers import CLIPProcessor

    processor = CLIPProcessor(image_processor=image_processor, tokenizer=real_tokenizer)
    model = make_model(real_base, processor, None, n_ctx=16)
    prompt = export_peft(model, tmp_path)
    assert prompt["candidate_labels"] is None and prompt["hypothesis_template"].startswith("<coop_1> <coop_2>")
    model.set_class_names(["Sea lion", "C++"])
    clip = peft.PeftModel.from_pretrained(make_base(real_tokenizer, positions=77, seed=3), tmp_path).eval()
    prompt["candidate_labels"] = ["Sea lion", "C++"]
    expected = model(**processor(images=picture(0), return_tensors="pt")).logits
    found = stock_logits(clip, AutoProcessor.from_pretrained(tmp_path), prompt, picture(0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_is_not_exported(base, processor, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    merged = {"class_token_position": "middle", "merge_full_stop": True}
    for model, folder, error, message in [
        (make_model(base, processor, class_specific=True), "out", ValueError, "a class-specific context is more than"),
        (CoOpModel(base, VPTConfig(), NAMES, processor), "out", ValueError, "an adapter of the method 'vpt' is more"),
        (make_model(base, processor), "there", FileExistsError, "there already and not empty"),
        (
            make_model(base, processor, **merged),
            "out",
            ValueError,
            r"the prompt of the class 'dog \(cat\)' is another",
        ),
    ]:
        with pytest.raises(error, match=message):
            export_peft(model, tmp_path / folder)
    processor.save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match="79 vectors, and the tokenizer 78 entries that no text reaches"):
        name_free_entries(tmp_path / "tokens" / "tokenizer.json", [f"<coop_{k}>" for k in range(79)])
    assert not (tmp_path / "out").exists() and [p.name for p in (tmp_path / "there").iterdir()] == ["file"]
