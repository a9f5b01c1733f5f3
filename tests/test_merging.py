import copy
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_base
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, pipeline

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.deploy.merging import merge_and_unload


NAMES = ["cat", "sea_lion", "Dog", "photo of  a yak", "kite (bird)", "x<y> & {z}"]


def make_processor(tokenizer):
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def picture(seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def make_model(tokenizer, base=None, names=NAMES, **config):
    torch.manual_seed(3)
    base = make_base(tokenizer) if base is None else base
    model = CoOpModel(base, CoOpConfig(**{"n_ctx": 5, **config}), names, make_processor(tokenizer))
    model.context.data.mul_(15)  # from 0.02 to the size of the base's own embeddings
    return model


def scores(model, image):
    by_name = {answer["label"]: answer["score"] for answer in model.predict(image, top_k=None)}
    return [by_name[name] for name in model.class_names]


def pipeline_scores(clip, processor, image, **changes):
    prompt = {**clip.config.coop_hf, **changes}
    classifier = pipeline(
        "zero-shot-image-classification",
        model=clip,
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        device="cpu",
    )
    answers = classifier(
        image, candidate_labels=prompt["candidate_labels"], hypothesis_template=prompt["hypothesis_template"]
    )
    by_label = {answer["label"]: answer["score"] for answer in answers}
    return [by_label[label] for label in prompt["candidate_labels"]]


@pytest.mark.parametrize("class_specific", [False, True], ids=["unified", "class-specific"])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("n_ctx", [1, 5])
def test_pipeline_gives_the_scores_of_predict(tokenizer, position, class_specific, n_ctx):
    model = make_model(tokenizer, n_ctx=n_ctx, class_token_position=position, class_specific=class_specific)
    expected = scores(model, picture())
    assert max(expected) - min(expected) > 0.01  # the classes differ, so agreement means something
    clip, processor = merge_and_unload(model)
    assert type(clip) is CLIPModel and type(processor) is CLIPProcessor
    assert pipeline_scores(clip, processor, picture()) == pytest.approx(expected, abs=1e-5)
    assert clip.config.coop_hf["class_names"] == NAMES


def test_plain_class_names_are_the_candidate_labels(tokenizer):
    model = make_model(tokenizer, names=["cat", "dog", "sea"])
    clip, processor = merge_and_unload(model)
    assert clip.config.coop_hf["candidate_labels"] == model.class_names
    template = clip.config.coop_hf["hypothesis_template"]
    assert template == "<coop_1> <coop_2> <coop_3> <coop_4> <coop_5> {}."
    # Other classes, unknown when the model was merged:
    model.set_class_names(["photo of dog", "sea cat"])
    found = pipeline_scores(clip, processor, picture(), candidate_labels=model.class_names)
    assert found == pytest.approx(scores(model, picture()), abs=1e-5)


@pytest.mark.parametrize("eos_token_id", ["legacy", "real"])
def test_pooling_finds_eos_behind_added_tokens(tokenizer, eos_token_id):
    base = make_base(tokenizer, eos_token_id=2 if eos_token_id == "legacy" else tokenizer.eos_token_id)
    model = make_model(tokenizer, base)
    clip, processor = merge_and_unload(model)
    assert clip.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert pipeline_scores(clip, processor, picture()) == pytest.approx(scores(model, picture()), abs=1e-5)
    # A text without learned tokens is read as before.
    inputs = processor(text=["a photo of a cat."], return_tensors="pt")
    with torch.no_grad():
        before = base.get_text_features(**inputs).pooler_output
        after = clip.get_text_features(**inputs).pooler_output
    assert torch.equal(before, after)


def test_base_and_processor_are_untouched(tokenizer):
    model = make_model(tokenizer)
    state = {key: value.clone() for key, value in model.base_model.state_dict().items()}
    config, vocabulary = model.base_model.config.to_dict(), len(model.tokenizer)
    clip, processor = merge_and_unload(model)
    with torch.no_grad():
        clip.text_model.embeddings.token_embedding.weight.zero_()
        clip.vision_model.embeddings.patch_embedding.weight.zero_()
    assert all(torch.equal(value, state[key]) for key, value in model.base_model.state_dict().items())
    assert model.base_model.config.to_dict() == config
    assert len(model.tokenizer) == vocabulary and len(processor.tokenizer) == vocabulary + 5


def test_rows_of_a_padded_embedding_are_used_and_kept(tokenizer):
    base = make_base(tokenizer)
    spare = torch.nn.Embedding(len(tokenizer) + 3, 32)  # fewer spare rows than the five that are needed
    spare.weight.data[: len(tokenizer)] = base.text_model.embeddings.token_embedding.weight
    base.text_model.embeddings.token_embedding = spare
    base.config.text_config.vocab_size = len(tokenizer) + 3
    clip, processor = merge_and_unload(make_model(tokenizer, base))
    weight = clip.text_model.embeddings.token_embedding.weight
    assert weight.shape[0] == clip.config.text_config.vocab_size == len(tokenizer) + 5
    model = make_model(tokenizer, base)
    assert torch.equal(weight[len(tokenizer) :], model.context)


def test_half_precision_base(tokenizer):
    model = make_model(tokenizer, make_base(tokenizer).to(torch.bfloat16))
    clip, processor = merge_and_unload(model)
    assert clip.dtype == torch.bfloat16
    ids = processor.tokenizer(
        [clip.config.coop_hf["hypothesis_template"].format(n) for n in clip.config.coop_hf["candidate_labels"]],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        features = clip.get_text_features(**ids).pooler_output
    model.text_pass = "plain"
    assert torch.equal(features, model.get_text_features().detach())


def test_merging_twice_takes_other_token_names(tokenizer):
    clip, processor = merge_and_unload(make_model(tokenizer))
    again = CoOpModel(clip, CoOpConfig(n_ctx=2), ["cat", "dog"], processor)
    second, second_processor = merge_and_unload(again)
    assert second.config.coop_hf["hypothesis_template"] == "<coop2_1> <coop2_2> {}."
    assert len(second_processor.tokenizer) == len(processor.tokenizer) + 2
    assert pipeline_scores(second, second_processor, picture()) == pytest.approx(scores(again, picture()), abs=1e-5)


def test_class_names_that_look_like_the_tokens(tokenizer):
    model = make_model(tokenizer, names=["<coop_1> thing", "<coop", "<COOP_1>", "cat"])
    clip, processor = merge_and_unload(model)  # underscores become spaces, so no name holds a token
    assert pipeline_scores(clip, processor, picture()) == pytest.approx(scores(model, picture()), abs=1e-5)


def test_without_class_names_or_image_processor(tokenizer):
    torch.manual_seed(0)
    model = CoOpModel(make_base(tokenizer), CoOpConfig(n_ctx=3), processor=tokenizer)
    clip, merged_tokenizer = merge_and_unload(model)
    assert type(merged_tokenizer) is type(tokenizer)
    assert clip.config.coop_hf["candidate_labels"] is None
    ids = merged_tokenizer("<coop_1><coop_2> Cat <coop_3>.", add_special_tokens=False)["input_ids"]
    cat, period = tokenizer("cat", add_special_tokens=False)["input_ids"], tokenizer(".")["input_ids"][1:2]
    assert ids == [len(tokenizer), len(tokenizer) + 1, *cat, len(tokenizer) + 2, *period]


def test_transformers_alone_saves_and_loads_it(tokenizer, tmp_path):
    model = make_model(tokenizer, class_token_position="middle")
    clip, processor = merge_and_unload(model)
    expected = pipeline_scores(clip, processor, picture())
    clip.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    picture().save(tmp_path / "image.png")
    program = """
import json, sys
from transformers import CLIPModel, CLIPProcessor, pipeline
folder = sys.argv[1]
clip, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
prompt = clip.config.coop_hf
classifier = pipeline("zero-shot-image-classification", model=folder, device="cpu")
answers = classifier(f"{folder}/image.png", candidate_labels=prompt["candidate_labels"],
                     hypothesis_template=prompt["hypothesis_template"])
assert not any(name.startswith("coop_hf") for name in sys.modules)
assert isinstance(processor, CLIPProcessor)
print(json.dumps({answer["label"]: answer["score"] for answer in answers}))
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert [found[label] for label in clip.config.coop_hf["candidate_labels"]] == pytest.approx(expected, abs=1e-5)


def test_a_copy_of_the_merged_model_is_as_good(tokenizer):
    clip, processor = merge_and_unload(make_model(tokenizer))
    expected = pipeline_scores(clip, processor, picture())
    assert pipeline_scores(copy.deepcopy(clip), copy.deepcopy(processor), picture()) == pytest.approx(expected)
