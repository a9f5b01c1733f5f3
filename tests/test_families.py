"""Every family of base models, held to what transformers' own classes compute and to the independent reference.

`family_kit` makes the models and asks them; `reference_families` is CoOp written out with a family's own tokenizer and
text model.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import picture
from family_kit import (
    CAUSAL,
    FAMILIES,
    PROJECTION,
    SIGMOID,
    family_images,
    family_logits,
    family_texts,
    fresh_family,
    image_inputs,
    make_family,
    make_gemma_tokenizer,
    save_family,
    text_inputs,
)
from hub_server import HubServer
from reference import relative_error
from reference_families import clean, reference_features, reference_logits
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BertTokenizer,
    ClapConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Siglip2Tokenizer,
    pipeline,
)

from coop_hf import (
    CoOpConfig,
    CoOpModel,
    CoOpTrainer,
    CoOpTrainingArguments,
    EmbeddedImages,
    LabelledImages,
    embed_images,
)
from coop_hf.baselines.cupl import cupl_class_embeddings
from coop_hf.baselines.linear_probe import fit_linear_probe
from coop_hf.baselines.zero_shot import class_embeddings, zero_shot_logits


NAMES = ["cat", "sea_lion", "a small dog", "Big-red T1 (lion)"]
BIDIRECTIONAL = [name for name in FAMILIES if name not in CAUSAL]
POSITIONS = ["end", "middle", "front"]
COLOURS = {"red": (220, 30, 30), "sea": (20, 60, 200), "small dog": (120, 90, 40)}

every_family = pytest.mark.parametrize("family", FAMILIES)


def photos():
    """Two images of different aspect ratios."""
    return [picture(0), picture(1, (60, 20))]


def make_coop(family, names=NAMES, base=None, seed=0, **config):
    own, processor = make_family(family)
    torch.manual_seed(seed)
    model_options = {key: config.pop(key) for key in ("text_pass", "text_chunk_size") if key in config}
    return CoOpModel(base or own, CoOpConfig(**{"n_ctx": 4, **config}), names, processor, **model_options)


def set_context(model, seed=1, scale=0.3):
    """Learned vectors as large as token embeddings."""
    generator = torch.Generator().manual_seed(seed)
    model.context.data.copy_(scale * torch.randn(model.context.shape, generator=generator))
    return model.context.detach().clone()


def sentences(names=NAMES, template="a photo of a {}."):
    return [template.format(clean(name)) for name in names]


def gradient(features, parameter, seed=2):
    """Gradient of a random linear function of the features."""
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad((features * weights).sum(), parameter)[0]


def coloured(count=12, seed=0):
    """Images of three classes, each of a colour of its own, of different sizes."""
    random = np.random.default_rng(seed)
    images, labels = [], []
    for index in range(count):
        colour = list(COLOURS.values())[index % 3]
        size = (20 + 4 * (index % 2), 24)
        noise = random.integers(-25, 25, (*size, 3))
        images.append(PIL.Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)))
        labels.append(index % 3)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """`folders(family)`: the folder of a family's base and processor, written once."""
    written = {}

    def folder(family):
        if family not in written:
            written[family] = save_family(family, tmp_path_factory.mktemp("bases") / f"tiny-{family}")
        return written[family]

    return folder


# ---------------------------------------------------------------------- the kit and the reference themselves


@every_family
def test_the_kit_is_read_back_by_transformers(folders, family):
    base, processor = make_family(family)
    loaded, info = AutoModel.from_pretrained(folders(family), output_loading_info=True)
    assert type(loaded) is type(base) and not info["missing_keys"] and not info["unexpected_keys"]
    expected = family_logits(base, processor, photos(), sentences())
    assert (family_logits(loaded, processor, photos(), sentences()) - expected).abs().max() < 1e-5


@every_family
def test_every_part_of_the_kit_matters(family):
    """A test on weights that hide a mistake proves nothing: texts, places and images must change the scores."""
    base, processor = make_family(family)
    texts = ["a photo of a cat.", "photo a of a cat.", "a photo of a cat", "a photo of a dog."]
    logits = family_logits(base, processor, photos(), texts)
    same = family == "siglip"  # which drops the full stop
    assert torch.equal(logits[:, 0], logits[:, 2]) == same
    assert ((logits[:, 0] - logits[:, [1, 3]].T).abs() > 1e-3).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    if family in SIGMOID:  # unpadded is another number
        inputs = processor.tokenizer(texts[:1], return_tensors="pt")
        unpadded = base.get_text_features(**inputs).pooler_output
        assert relative_error(unpadded, family_texts(base, processor, texts[:1])) > 0.01


@every_family
def test_the_reference_reads_words_as_the_family_does(family):
    base, processor = make_family(family)
    ids = processor.tokenizer("a photo of a", add_special_tokens=False)["input_ids"]
    (embedding,) = (
        m for n, m in base.text_model.named_modules() if n.endswith((".token_embedding", ".word_embeddings"))
    )
    features = reference_features(base, processor, NAMES, embedding.weight[ids].detach(), "end")
    assert relative_error(features, family_texts(base, processor, sentences())) < 1e-6


# ---------------------------------------------------------------------- the proof


@every_family
def test_nothing_learned_is_the_familys_own_forward(family):
    base, processor = make_family(family)
    model = make_coop(family, n_ctx=None, ctx_init="a photo of a")
    assert model.config.n_ctx == 4 and model.get_base_model() is base
    expected = family_logits(base, processor, photos(), sentences())
    with torch.no_grad():
        output = model(**image_inputs(processor, photos()))
        features = family_images(base, processor, photos())
        from_embeddings = model(image_embeds=features).logits
    assert (output.logits - expected).abs().max() < 1e-5
    assert (from_embeddings - expected).abs().max() < 1e-5
    assert relative_error(model.get_text_features(), family_texts(base, processor, sentences())) < 1e-5
    assert relative_error(output.text_embeds, F.normalize(family_texts(base, processor, sentences()), dim=-1)) < 1e-5
    assert relative_error(output.image_embeds, F.normalize(features, dim=-1)) < 1e-5


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SIGMOID) - {"align"}))
def test_the_last_image_layer_runs_for_the_class_token_alone(family):
    base, processor = fresh_family(family)
    model, tower, seen = make_coop(family, base=base), base.vision_model, []
    last, inputs = tower.encoder.layers[-1], image_inputs(processor, photos())
    last.mlp.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    with torch.no_grad():
        short = model.get_image_features(**inputs)
        stock = model.get_base_model().get_image_features(**inputs).pooler_output
        assert relative_error(short, stock) < 1e-6
        tokens = seen[1][1]
        assert seen == [(len(stock), 1, seen[0][2]), (len(stock), tokens, seen[0][2])] and tokens > 1
        # Who watches the tower, its encoder or the layer sees it called whole.
        for module in (tower, tower.encoder, last):
            calls = []
            hook = module.register_forward_hook(lambda *given, calls=calls: calls.append(1))
            assert torch.equal(model.get_image_features(**inputs), stock)
            hook.remove()
            assert calls == [1] and seen.pop()[1] == tokens


@every_family
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True])
def test_features_and_gradients_equal_the_reference(family, position, class_specific):
    base, processor = make_family(family)
    model = make_coop(family, class_token_position=position, class_specific=class_specific)
    context = set_context(model).requires_grad_()
    expected = reference_features(base, processor, NAMES, context, position)
    features = model.get_text_features()
    assert relative_error(features, expected) < 1e-5
    assert relative_error(gradient(features, model.context), gradient(expected, context)) < 1e-4
    images = family_images(base, processor, photos())
    labels = torch.tensor([2, 1])
    logits = reference_logits(base, reference_features(base, processor, NAMES, context, position), images)
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, labels), context)
    output = model(image_embeds=images, labels=labels)
    assert relative_error(output.logits, logits) < 1e-5
    assert relative_error(torch.autograd.grad(output.loss, model.context)[0], grad) < 1e-4


@every_family
@pytest.mark.parametrize(("n_ctx", "position"), [(1, "end"), (1, "middle"), (3, "middle"), (2, "front")])
def test_other_lengths(family, n_ctx, position):
    base, processor = make_family(family)
    model = make_coop(family, n_ctx=n_ctx, class_token_position=position)
    context = set_context(model)
    expected = reference_features(base, processor, NAMES, context, position)
    assert relative_error(model.get_text_features(), expected) < 1e-5


def test_chinese_names():
    base, processor = make_family("chinese_clip")
    names = ["猫", "海狮", "一张照片"]
    model = make_coop("chinese_clip", names, n_ctx=2)
    context = set_context(model)
    assert relative_error(model.get_text_features(), reference_features(base, processor, names, context, "end")) < 1e-5
    assert model.predict(photos()[0], top_k=1)[0]["label"] in names


@pytest.mark.parametrize("options", [{"padding_side": "left"}, {"model_input_names": ["input_ids", "attention_mask"]}])
def test_the_tokenizers_padding_side_and_mask_are_followed(options):
    """The class's own defaults for Gemma are padding to the left and a mask; published configurations say neither."""
    base, _ = make_family("siglip2_naflex")
    _, processor = fresh_family("siglip2_naflex")
    processor.tokenizer = make_gemma_tokenizer(Siglip2Tokenizer, **options)
    model = CoOpModel(base, CoOpConfig(n_ctx=4), NAMES, processor)
    context = set_context(model)
    for position in POSITIONS:
        model.add_adapter(position, CoOpConfig(n_ctx=4, class_token_position=position), NAMES, context=context)
        model.set_adapter(position)
        expected = reference_features(base, processor, NAMES, context, position)
        assert relative_error(model.get_text_features(), expected) < 1e-5
    with model.disable_adapter():
        assert relative_error(model.get_text_features(), family_texts(base, processor, sentences())) < 1e-5


def test_a_causal_tower_without_a_token_in_front():
    """T5's tokenizer, which some MetaCLIP 2 have, puts nothing before a text: the first vector stands at place 0."""
    base, processor = make_family("metaclip2_t5")
    assert len(processor.tokenizer("")["input_ids"]) == 1
    for position in POSITIONS:
        for class_specific in (False, True):
            model = make_coop("metaclip2_t5", class_token_position=position, class_specific=class_specific)
            context = set_context(model).requires_grad_()
            expected = reference_features(base, processor, NAMES, context, position)
            features = model.get_text_features()
            assert relative_error(features, expected) < 1e-5
            assert relative_error(gradient(features, model.context), gradient(expected, context)) < 1e-4
    with model.disable_adapter():
        assert relative_error(model.get_text_features(), family_texts(base, processor, sentences())) < 1e-5


@every_family
def test_the_template_is_the_familys_own_zero_shot(family):
    base, processor = make_family(family)
    template = "the {} is big."
    model = make_coop(family, template=template)
    set_context(model)
    expected = family_texts(base, processor, sentences(template=template))
    before = model(image_embeds=family_images(base, processor, photos())).logits
    with model.disable_adapter(), torch.no_grad():
        logits = model(**image_inputs(processor, photos())).logits
        assert relative_error(model.get_text_features(), expected) < 1e-5
    expected_logits = family_logits(base, processor, photos(), sentences(template=template))
    assert (logits - expected_logits).abs().max() < 1e-5
    assert (logits - before).abs().max() > 1e-3
    assert relative_error(model.template_embeds(), F.normalize(expected, dim=-1)) < 1e-5


# ---------------------------------------------------------------------- text passes


@every_family
def test_passes_agree(family):
    base, processor = make_family(family)
    for class_specific in (False, True):
        models = {
            name: make_coop(family, class_specific=class_specific, **options)
            for name, options in {
                "auto": {},
                "plain": {"text_pass": "plain"},
                "chunks": {"text_chunk_size": 3},
                "plain chunks": {"text_pass": "plain", "text_chunk_size": 1},
            }.items()
        }
        found = {}
        for name, model in models.items():
            set_context(model)
            features = model.get_text_features()
            found[name] = (features, gradient(features, model.context))
        for features, grad in found.values():
            assert relative_error(features, found["plain"][0]) < 1e-5
            assert relative_error(grad, found["plain"][1]) < 1e-5
    assert models["auto"].text_pass == ("shared" if family in CAUSAL else "plain")


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_the_shared_pass_is_refused_where_it_is_wrong(family):
    with pytest.raises(ValueError, match="shared"):
        make_coop(family, text_pass="shared")


def test_chunks_are_computed_again_instead_of_kept():
    """What a chunked step keeps for the way back does not grow with the text tower's activations."""

    def kept_bytes(**options):
        sizes = []
        model = make_coop("siglip", [f"cat {n}" for n in range(24)], **options)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            features = model.get_text_features()
        gradient(features, model.context)
        return sum(sizes)

    assert kept_bytes(text_chunk_size=4) < 0.2 * kept_bytes()


# ---------------------------------------------------------------------- prediction, pipeline, export


@every_family
def test_predict_gives_what_the_familys_pipeline_gives(family):
    base, processor = make_family(family)
    model = make_coop(family, n_ctx=None, ctx_init="a photo of a")
    own = pipeline(
        "zero-shot-image-classification",
        model=base,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    labels = {clean(name): name for name in NAMES}
    options = {"candidate_labels": list(labels), "hypothesis_template": "a photo of a {}."}
    expected = [own(photo, **options) for photo in photos()]
    results = model.predict(photos(), top_k=None)
    for found, answer in zip(results, expected, strict=True):
        assert [entry["label"] for entry in found] == [labels[entry["label"]] for entry in answer]
        assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in answer], abs=1e-5)
        total = sum(entry["score"] for entry in found)
        assert (abs(total - 1) < 1e-5) == (family not in SIGMOID)
    assert [entry["label"] for entry in model.predict(photos()[1], top_k=2)] == [e["label"] for e in results[1][:2]]
    logits = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    probabilities = logits.sigmoid() if family in SIGMOID else logits.softmax(dim=-1)
    assert torch.allclose(model.logits_to_probabilities(logits), probabilities)


@every_family
def test_the_pipeline_of_adapters(family):
    model = make_coop(family)
    set_context(model)
    classify = pipeline("coop-image-classification", model=model)
    expected = model.predict(photos(), top_k=3)
    for found in (classify(photos(), top_k=3), classify(photos(), top_k=3, batch_size=2)):
        for own, answer in zip(found, expected, strict=True):
            assert [entry["label"] for entry in own] == [entry["label"] for entry in answer]
            assert [entry["score"] for entry in own] == pytest.approx([e["score"] for e in answer], abs=1e-5)


@every_family
def test_export_with_fixed_classes(family):
    base, processor = make_family(family)
    model = make_coop(family)
    set_context(model)
    classifier = model.as_image_classifier()
    inputs = image_inputs(processor, photos())
    with torch.no_grad():
        assert torch.allclose(classifier(**inputs), model(**inputs).logits, atol=1e-5)
        with model.disable_adapter():
            zero_shot = model.as_image_classifier()
        expected = family_logits(base, processor, photos(), sentences())
        assert torch.allclose(zero_shot(**inputs), expected, atol=1e-5)
    assert classifier.class_names == NAMES
    assert not any("text" in name for name, _ in classifier.named_modules())
    assert not {id(p) for p in classifier.parameters()} & {id(p) for p in base.parameters()}


@pytest.mark.parametrize("family", ["siglip", "altclip", "align"])
def test_the_exported_classifier_is_a_graph(family):
    _, processor = make_family(family)
    classifier = make_coop(family).as_image_classifier()
    pixels = image_inputs(processor, photos())["pixel_values"]
    program = torch.export.export(classifier, (pixels,))
    assert torch.allclose(program.module()(pixels), classifier(pixels), atol=1e-5)


@every_family
def test_a_merged_stock_model_is_exact_or_refused(family, tmp_path):
    base, processor = make_family(family)
    model = make_coop(family)
    set_context(model)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    try:
        merged, merged_processor = model.merge_and_unload()
    except (ValueError, NotImplementedError) as error:
        assert family != "clip" and "merge" in str(error)
    else:
        merged.save_pretrained(tmp_path)
        loaded = type(base).from_pretrained(tmp_path)
        prompt = loaded.config.coop_hf
        texts = [prompt["hypothesis_template"].format(label) for label in prompt["candidate_labels"]]
        with torch.no_grad():
            expected = model(**image_inputs(processor, photos())).logits
        assert torch.allclose(family_logits(loaded, merged_processor, photos(), texts), expected, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


# ---------------------------------------------------------------------- files and the Hub


@every_family
def test_from_pretrained_save_and_load(folders, family, tmp_path):
    base, processor = make_family(family)
    folder = folders(family)
    config = CoOpConfig(n_ctx=3, class_token_position="middle", class_specific=True)
    model = CoOpModel.from_pretrained(folder, config, class_names=NAMES)
    assert type(model.get_base_model()) is type(base)
    assert type(model.processor) is type(processor)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in model.get_base_model().state_dict().items())
    context = set_context(model)
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["format_version"] == 1 and "method" not in written
    assert written["base_model_name_or_path"] == str(folder)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert list(tensors) == ["prompt_embeddings"] and torch.equal(tensors["prompt_embeddings"], context)

    loaded = CoOpModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is type(base) and not loaded.context.requires_grad
    inputs = image_inputs(processor, photos())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    on_loaded_base = CoOpModel.from_pretrained(tmp_path / "adapter", base_model=base, processor=processor)
    with torch.no_grad():
        assert torch.allclose(on_loaded_base(**inputs).logits, model(**inputs).logits, atol=1e-6)


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback that this process talks to."""
    with HubServer() as server:
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # Made once, with the endpoint of its time; older versions of transformers have none.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        yield server


@every_family
def test_push_and_pull(folders, hub, family, tmp_path):
    token = hub.add_user("ada")
    name = f"ada/family-{family}"  # one for each: transformers remembers the commit of a name
    hub.add_folder(name, folders(family))
    options = {"cache_dir": tmp_path / "cache", "token": token}
    model = CoOpModel.from_pretrained(name, CoOpConfig(n_ctx=2), class_names=NAMES, **options)
    context = set_context(model)
    model.push_to_hub("ada/prompts", token=token)
    assert "adapter_model.safetensors" in hub.files("ada/prompts")
    pulled = CoOpModel.from_pretrained("ada/prompts", **options)
    assert torch.equal(pulled.context, context) and pulled.config.base_model_name_or_path == name
    inputs = image_inputs(make_family(family)[1], photos())
    with torch.no_grad():
        assert torch.equal(pulled(**inputs).logits, model(**inputs).logits)


# ---------------------------------------------------------------------- what is not accepted


def folder_of(config_or_model, tmp_path, tokenizer=None):
    config_or_model.save_pretrained(tmp_path)
    if tokenizer is not None:
        tokenizer.save_pretrained(tmp_path)
    return tmp_path


def unsupported(kind):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    if kind == "bert":
        return BertModel(BertConfig(vocab_size=20, **small))
    if kind == "vision tower":
        return CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **small))
    return ClapConfig()  # without weights: it must be refused before they are looked for


@pytest.mark.parametrize("kind", ["bert", "vision tower", "clap"])
def test_other_bases_are_refused_at_once_with_the_list(kind, tmp_path):
    model = unsupported(kind)
    folder = folder_of(model, tmp_path, make_family("align")[1].tokenizer if kind == "bert" else None)
    own = model.model_type if kind == "clap" else model.config.model_type
    with pytest.raises((TypeError, ValueError)) as caught:
        CoOpModel.from_pretrained(folder, class_names=NAMES)
    words = [own, "CLIPModel", "MetaClip2Model", "SiglipModel", "Siglip2Model"]
    words += ["ChineseCLIPModel", "AltCLIPModel", "AlignModel"]
    assert all(word in str(caught.value) for word in words), str(caught.value)
    if kind != "clap":
        with pytest.raises(TypeError) as caught:
            CoOpModel(model, CoOpConfig(n_ctx=2), NAMES, make_family("align")[1])
        assert type(model).__name__ in str(caught.value) and "SiglipModel" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("clip", "text_projection.weight"),
        ("siglip", "text_model.head.bias"),
        ("siglip2_naflex", "logit_bias"),
        ("altclip", "text_model.pre_LN.weight"),
        ("chinese_clip", "vision_model.post_layernorm.weight"),
        ("align", "temperature"),
    ],
)
def test_missing_weights_are_an_error_that_names_them(family, lost, tmp_path):
    folder = save_family(family, tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert lost in weights, sorted(weights)
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, OSError), match=lost.replace(".", r"\.")):
        CoOpModel.from_pretrained(folder, class_names=NAMES)


def test_weights_of_another_family_under_a_clip_configuration(folders, tmp_path):
    """A folder that calls itself CLIP and holds something else must not answer with random scores."""
    (tmp_path / "model.safetensors").write_bytes((folders("chinese_clip") / "model.safetensors").read_bytes())
    for path in folders("clip").iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises((ValueError, OSError, RuntimeError), match="text_model"):
        CoOpModel.from_pretrained(tmp_path, class_names=NAMES)


def test_a_tokenizer_that_does_not_fit_the_base():
    """MetaCLIP 2 pools at the `eos_token_id` of its configuration: a tokenizer that never writes it would be pooled
    at the first place, silently."""
    base, processor = fresh_family("metaclip2")
    model = CoOpModel(base, CoOpConfig(n_ctx=2), NAMES, processor)
    set_context(model)
    expected = reference_features(base, processor, NAMES, model.context.detach(), "end")
    assert relative_error(model.get_text_features(), expected) < 1e-5
    wrong = BertTokenizer(vocab=make_family("align")[1].tokenizer.get_vocab())
    with pytest.raises(ValueError, match=r"(?i)eos"):
        CoOpModel(base, CoOpConfig(n_ctx=2), NAMES, wrong)


def test_names_that_siglip_cannot_tell_apart():
    with pytest.raises(ValueError, match="no token"):
        make_coop("siglip", ["cat", "!!!"])
    with pytest.warns(UserWarning, match=r"same prompt: 'Cat' \(0\), 'cat\.' \(1\)"):
        make_coop("siglip", ["Cat", "cat."])


@pytest.mark.parametrize(
    ("family", "room"), [("siglip", 64), ("altclip", 40), ("chinese_clip", 40), ("metaclip2", 40)]
)
def test_all_positions_can_be_used_and_no_more(family, room):
    """Of AltCLIP's positions, those up to the padding's are never used."""
    base, processor = make_family(family)
    special = len(processor.tokenizer("")["input_ids"])
    stop = 0 if family == "siglip" else 1
    names = ["cat", "dog"]
    n_ctx = room - special - stop - 1
    model = make_coop(family, names, n_ctx=n_ctx)
    context = set_context(model)
    expected = reference_features(base, processor, names, context, "end")
    assert relative_error(model.get_text_features(), expected) < 1e-5
    with pytest.raises(ValueError, match=f"{room} positions"):
        make_coop(family, names, n_ctx=n_ctx + 1)


# ---------------------------------------------------------------------- PEFT


def test_a_base_wrapped_by_peft():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    base, processor = fresh_family("clip")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(base, lora).eval()
    model = CoOpModel(wrapped, CoOpConfig(ctx_init="a photo of a"), NAMES, processor)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["adapters.default.context"]
    inputs = {**text_inputs(base, processor, sentences()), **image_inputs(processor, photos())}
    with torch.no_grad():
        expected = wrapped(**inputs).logits_per_image
        assert torch.allclose(model(**image_inputs(processor, photos())).logits, expected, atol=1e-5)
        with wrapped.disable_adapter():
            assert not torch.allclose(wrapped(**inputs).logits_per_image, expected, atol=1e-3)
    features = model.get_text_features()
    context = model.context.detach().clone().requires_grad_()
    expected = reference_features(wrapped.get_base_model(), processor, NAMES, context, "end")
    assert relative_error(gradient(features, model.context), gradient(expected, context)) < 1e-4


# ---------------------------------------------------------------------- precision


@every_family
def test_a_bf16_base(family):
    """The context stays in fp32; the towers give what the family's own give in bf16."""
    base, processor = fresh_family(family)
    base.to(torch.bfloat16)
    model = CoOpModel(base, CoOpConfig(ctx_init="a photo of a"), NAMES, processor)
    own = family_texts(base, processor, sentences())
    features = model.get_text_features()
    assert own.dtype == torch.bfloat16 and relative_error(features, own) < 0.03
    labels = torch.tensor([0, 2])
    images = {k: v for k, v in image_inputs(processor, photos()).items()}
    output = model(**images, labels=labels)
    output.loss.backward()
    assert output.logits.dtype == torch.float32 and output.logits.isfinite().all()
    assert model.context.dtype == model.context.grad.dtype == torch.float32
    assert model.context.grad.any(dim=-1).all()
    # Against fp32 scores of the same rounded weights.
    exact, _ = fresh_family(family)
    exact.load_state_dict({k: v.float() for k, v in base.state_dict().items()})
    expected = family_logits(exact, processor, photos(), sentences())
    assert relative_error(output.logits, expected) < 0.1


# ---------------------------------------------------------------------- training


def arguments(folder, **given):
    defaults = {"save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    defaults |= {"feature_cache_dir": str(folder / "cache"), "max_steps": 12}
    return CoOpTrainingArguments(str(folder), **{**defaults, **given})


def loss_before_and_after(model, folder, train, **given):
    trainer = CoOpTrainer(model=model, args=arguments(folder, **given), train_dataset=train, eval_dataset=train)
    losses = [trainer.evaluate()["eval_loss"]]
    trainer.train()
    return [*losses, trainer.evaluate()["eval_loss"]]


@every_family
def test_training_on_embeddings_lowers_the_loss(family, tmp_path):
    base, processor = make_family(family)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = make_coop(family, list(COLOURS))
    images = LabelledImages(coloured(), processor.image_processor)
    embeds = embed_images(model, images, cache_dir=str(tmp_path / "cache"), progress=False)
    assert relative_error(embeds, family_images(base, processor, coloured()["image"])) < 1e-5
    train = EmbeddedImages(embeds, coloured()["label"])
    first, last = loss_before_and_after(model, tmp_path, train)
    assert last < 0.98 * first
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert not any(parameter.grad is not None for parameter in base.parameters())


@every_family
def test_training_on_images_lowers_the_loss(family, tmp_path):
    model = make_coop(family, list(COLOURS), class_token_position="front", class_specific=True)
    first, last = loss_before_and_after(
        model, tmp_path, coloured(), cache_features=False, augment=False, per_device_train_batch_size=12
    )
    assert last < 0.98 * first


@pytest.mark.parametrize("family", FAMILIES)
def test_training_on_augmented_views(family, tmp_path):
    """One step on random crops, whatever the family's image processor gives."""
    model = make_coop(family, list(COLOURS))
    before = model.context.detach().clone()
    trainer = CoOpTrainer(
        model=model,
        args=arguments(tmp_path, cache_features=False, augment=True, max_steps=1, per_device_train_batch_size=4),
        train_dataset=coloured(),
    )
    trainer.train()
    assert not torch.equal(model.context, before) and model.context.isfinite().all()


@pytest.mark.parametrize("family", SIGMOID)
def test_the_familys_own_sigmoid_loss(family, tmp_path):
    """-mean over the batch of the sum over the classes of log sigmoid(z s), z = 1 for the label and -1 elsewhere."""
    base, processor = make_family(family)
    model = make_coop(family, list(COLOURS))
    train = coloured()
    first, last = loss_before_and_after(model, tmp_path, train, objective="sigmoid")
    fresh = make_coop(family, list(COLOURS))
    with torch.no_grad():
        logits = fresh(**image_inputs(processor, train["image"])).logits
    signs = 2 * F.one_hot(torch.tensor(train["label"]), len(COLOURS)) - 1
    assert first == pytest.approx(-F.logsigmoid(signs * logits).sum(dim=-1).mean().item(), rel=1e-4)
    assert last < 0.98 * first


# ---------------------------------------------------------------------- baselines


@every_family
def test_ensembles_cupl_and_zero_shot(family):
    base, processor = make_family(family)
    model = make_coop(family)
    templates = ["a photo of a {}.", "the {} is big."]

    def mean(texts):
        return F.normalize(family_texts(base, processor, texts), dim=-1).mean(dim=0)

    expected = F.normalize(torch.stack([mean([t.format(clean(n)) for t in templates]) for n in NAMES]), dim=-1)
    for source, tokenizer in ((model, None), (base, processor)):
        ensemble = class_embeddings(source, tokenizer, NAMES, templates)
        assert relative_error(ensemble, expected) < 1e-5
        single = class_embeddings(source, tokenizer, NAMES, templates[:1])
        with torch.no_grad():
            logits = zero_shot_logits(source, single, **image_inputs(processor, photos()))
        assert (logits - family_logits(base, processor, photos(), sentences())).abs().max() < 1e-5
        features = family_images(base, processor, photos())
        assert (zero_shot_logits(source, single, image_embeds=features) - logits).abs().max() < 1e-5
    assert relative_error(model.template_embeds(templates), expected) < 1e-5

    prompts = {
        name: [f"the {clean(name)} is big.", f"a {clean(name)} of the sea"][: 1 + i % 2]
        for i, name in enumerate(NAMES)
    }
    expected = F.normalize(torch.stack([mean(prompts[name]) for name in NAMES]), dim=-1)
    assert relative_error(cupl_class_embeddings(model, None, NAMES, prompts), expected) < 1e-5


@every_family
def test_linear_probe(family):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    _, processor = make_family(family)
    model = make_coop(family, list(COLOURS))
    train, validation = coloured(18), coloured(9, seed=1)
    features = []
    for part in (train, validation):
        with torch.no_grad():
            features.append(model.get_image_features(**image_inputs(processor, part["image"])))
        assert features[-1].shape == (len(part), PROJECTION)
    probe = fit_linear_probe(features[0], train["label"], features[1], validation["label"], list(COLOURS), num_steps=2)
    assert probe.val_accuracy >= 0.8
    assert probe.logits(features[1]).shape == (9, 3)


SIGLIP_BASE = """
import json, resource, time
import torch
from family_kit import make_siglip_tokenizer
from transformers import SiglipConfig, SiglipModel
from coop_hf import CoOpConfig, CoOpModel

config = SiglipConfig(text_config={}, vision_config={"num_hidden_layers": 1})  # the defaults are SigLIP-base's
text = config.text_config
assert (text.hidden_size, text.num_hidden_layers, text.max_position_embeddings) == (768, 12, 64)
names = [f"small {i} dog" for i in range(CLASSES)]
model = CoOpModel(SiglipModel(config), CoOpConfig(n_ctx=16), names, make_siglip_tokenizer())
start = time.perf_counter()
image_embeds = torch.nn.functional.normalize(torch.randn(32, 768), dim=-1)
model(image_embeds=image_embeds, labels=torch.arange(32) % CLASSES).loss.backward()
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "gradient": model.context.grad.norm().item(),
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize("classes", [128, 1000])
def test_many_classes_of_siglip_base_take_no_more_memory_than_few(classes):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    script = SIGLIP_BASE.replace("CLASSES", str(classes))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    step = json.loads(done.stdout)
    print(classes, "classes:", step)
    assert step["peak_bytes"] < 8 * 2**30 and 0 < step["gradient"] < float("inf")
