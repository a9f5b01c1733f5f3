"""Each adapter against the slow, independent implementations of `reference_methods`, and in every place it is used."""

import copy
import inspect
import json

import pytest
import reference_methods as ref
import torch
from conftest import make_image_processor, picture
from family_kit import FAMILIES, image_inputs, make_family, text_inputs
from reference import reference_features, relative_error, sentence, slots
from transformers import CLIPProcessor

from coop_hf import CoOpConfig, CoOpModel, LabelledImages, embed_images
from coop_hf.adapters.cocoop import CoCoOp, CoCoOpConfig
from coop_hf.adapters.deep import DeepTextConfig, IVLPConfig, MaPLeConfig, VPTConfig
from coop_hf.adapters.tcp import TCPConfig
from coop_hf.core import plain, shared_prefix


NAMES = ["cat", "Sea_lion", "kite (bird)", "photo of a sea dog at sea", "dog"]
LABELS = torch.tensor([1, 4, 3])
WORDS = {"ctx_init": None}

CASES = {
    "cocoop": CoCoOpConfig(),
    "cocoop-one": CoCoOpConfig(n_ctx=1, **WORDS),
    "cocoop-middle": CoCoOpConfig(n_ctx=3, class_token_position="middle", **WORDS),
    "cocoop-front": CoCoOpConfig(n_ctx=2, class_token_position="front", **WORDS),
    "cocoop-specific": CoCoOpConfig(n_ctx=2, class_specific=True, **WORDS),
    "cocoop-specific-middle": CoCoOpConfig(n_ctx=5, class_specific=True, class_token_position="middle", **WORDS),
    "deep_text": DeepTextConfig(),
    "deep_text-first": DeepTextConfig(n_ctx=3, depth=1, **WORDS),
    "deep_text-two": DeepTextConfig(n_ctx=1, depth=2, **WORDS),
    "deep_text-words": DeepTextConfig(n_ctx=2, depth=3, fixed_words="of a", **WORDS),
    "deep_text-middle": DeepTextConfig(n_ctx=5, depth=3, class_token_position="middle", **WORDS),
    "deep_text-front": DeepTextConfig(n_ctx=2, depth=2, class_token_position="front", **WORDS),
    "deep_text-specific": DeepTextConfig(n_ctx=3, depth=3, class_specific=True, **WORDS),
    "deep_text-specific-front": DeepTextConfig(
        n_ctx=3, depth=2, class_specific=True, class_token_position="front", **WORDS
    ),
    "vpt-shallow": VPTConfig(n_vision=5, depth=1),
    "vpt-two": VPTConfig(n_vision=1, depth=2, template="art of the {}!"),
    "vpt": VPTConfig(),
    "ivlp": IVLPConfig(),
    "ivlp-lengths": IVLPConfig(n_ctx=4, n_vision=3, depth=2, fixed_words=None, **WORDS),
    "ivlp-depths": IVLPConfig(depth=3, vision_depth=1),
    "ivlp-specific": IVLPConfig(class_specific=True),
    "ivlp-middle": IVLPConfig(n_ctx=3, class_token_position="middle", fixed_words=None, **WORDS),
    "maple": MaPLeConfig(),
    "maple-first": MaPLeConfig(depth=1),
    "maple-four": MaPLeConfig(n_ctx=4, depth=2, fixed_words=None, **WORDS),
    "tcp": TCPConfig(),
    "tcp-one": TCPConfig(n_ctx=1, layer=1),
    "tcp-middle": TCPConfig(n_ctx=3, layer=1, class_token_position="middle", template="art of the {}!"),
    "tcp-words": TCPConfig(fixed_words="of a", ending=", a photo of sea", layer=1),
    "tcp-front": TCPConfig(n_ctx=2, class_token_position="front"),
}
METHODS = ("cocoop", "deep_text", "vpt", "ivlp", "maple", "tcp")
READS_IMAGE, VISUAL = ("cocoop",), ("vpt", "ivlp", "maple")


@pytest.fixture(scope="module")
def deep_base(tokenizer):
    """Shared by all tests here, and at the end what it was at the start."""
    base = ref.make_deep_base(tokenizer)
    before, config = {k: v.clone() for k, v in base.state_dict().items()}, base.config.to_dict()
    yield base
    assert base.state_dict().keys() == before.keys() and base.config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.fixture(scope="module")
def processor(tokenizer):
    return CLIPProcessor(image_processor=make_image_processor(16), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def randomise(model, seed=0):
    """Values so large that each of them matters; the meta-network's most of all, as random images are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.adapter.named_parameters():
            scale = 2.0 if name.startswith("meta_net") else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def make(base, processor, config, names=NAMES, **options):
    return randomise(CoOpModel(base, copy.deepcopy(config), names, processor, **options))


def learned_copies(model):
    return {k: v.detach().clone().requires_grad_() for k, v in model.adapter.named_parameters()}


def text_features(base, tokenizer, names, config, prompts):
    """Class embeddings with prompts by layer in the context's places, wherever the class name stands."""
    n_ctx, position = config.n_ctx, config.class_token_position
    words, ending = getattr(config, "fixed_words", None), getattr(config, "ending", ".")
    if position == "end":
        template = f"{words} {{}}{ending}" if words else f"{{}}{ending}"
        rows = ref.prompt_rows(base, tokenizer, names, n_ctx, template)
        return ref.text_pass(base, rows, prompts)
    rows = ref.padded_rows(base, tokenizer, [sentence(name, n_ctx, position) for name in names])
    places = torch.tensor([slots(row, n_ctx, position, tokenizer.eos_token_id) for row in rows.tolist()])
    return ref.text_pass(base, rows, prompts, places)


def couplings(tensors):
    count = sum(name.endswith("weight") for name in tensors if name.startswith("couplings"))
    return [(tensors[f"couplings.{k}.weight"], tensors[f"couplings.{k}.bias"]) for k in range(count)]


def meta_net(tensors):
    return [tensors[f"meta_net.linear{k}.{what}"] for k in (1, 2) for what in ("weight", "bias")]


def reference(base, tokenizer, names, config, pixels, tensors):
    """(text, image) of any adapter, not normalised, from its learned tensors."""
    method = config.method
    if method == "cocoop":
        position = config.class_token_position
        return ref.cocoop_features(base, tokenizer, names, pixels, tensors["context"], meta_net(tensors), position)
    if method == "vpt":
        return ref.vpt_features(base, tokenizer, names, pixels, list(tensors["visual"]), config.template)
    deep = [tensors["context"], *tensors.get("deep_text", [])]
    if method == "tcp":
        class_embeds = ref.normalised(ref.template_features(base, tokenizer, names, config.template)).detach()
        deep = {0: deep[0], config.layer: ref.tcp_tokens(class_embeds, meta_net(tensors), config.n_ctx)}
        return text_features(base, tokenizer, names, config, deep), ref.vision_pass(base, pixels)
    if method == "maple":
        template = f"{config.fixed_words} {{}}." if config.fixed_words else "{}."
        return ref.maple_features(base, tokenizer, names, pixels, deep, couplings(tensors), template)
    text = text_features(base, tokenizer, names, config, dict(enumerate(deep)))
    return text, ref.vision_pass(base, pixels, dict(enumerate(tensors.get("visual", []))))


def check_against_reference(model, names, pixels, labels=LABELS, logits_tolerance=1e-5, tolerance=1e-4):
    base, tensors = model.base_model, learned_copies(model)
    text, image = reference(base, model.tokenizer, names, model.config, pixels, tensors)
    expected = ref.cosine_logits(base, text, image)
    own = model(pixel_values=pixels, labels=labels)
    assert relative_error(own.logits.detach(), expected.detach()) < logits_tolerance
    model.zero_grad()
    own.loss.backward()
    loss = torch.nn.functional.cross_entropy(expected, labels)
    learned = model.learned_parameters()  # not the deeper prompts of depth 1, which have no rows
    gradients = torch.autograd.grad(loss, [tensors[name] for name in learned])
    for (name, parameter), gradient in zip(learned.items(), gradients):
        assert gradient.abs().max() > 0, name
        assert relative_error(parameter.grad, gradient) < tolerance, name
    assert all(p.grad is None for p in base.parameters())


# ---------------------------------------------------------------------- exact


@pytest.mark.parametrize("text_pass", ["shared", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(deep_base, processor, pixels, case, text_pass):
    model = make(deep_base, processor, CASES[case], text_pass=text_pass)
    check_against_reference(model, NAMES, pixels)


@pytest.mark.parametrize("text_pass", ["shared", "plain"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("vpt")])
def test_classes_in_chunks(deep_base, processor, pixels, case, text_pass):
    model = make(deep_base, processor, CASES[case], text_pass=text_pass, text_chunk_size=2)
    check_against_reference(model, NAMES, pixels)


@pytest.mark.parametrize("chunk_size, piece", [(None, 50), (2, 50), (None, 12)])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("cocoop")])
def test_images_in_groups_are_computed_again(deep_base, processor, monkeypatch, case, chunk_size, piece):
    monkeypatch.setattr(shared_prefix, "TOKENS_KEPT", 50)
    monkeypatch.setattr(shared_prefix, "TOKENS_AGAIN", piece)
    monkeypatch.setattr(plain, "TOKENS_AT_ONCE", 50)
    many = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(7) % len(NAMES)
    runs, whole = [], shared_prefix.SharedPrefixPass._features

    def counted(self, *args, **kwargs):
        runs.append(len(args[0][0]))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(shared_prefix.SharedPrefixPass, "_features", counted)
    model = make(deep_base, processor, CASES[case], text_chunk_size=chunk_size)
    check_against_reference(model, NAMES, many, labels)
    forward = runs[: len(runs) // 2]
    assert len(forward) > 1 and len(runs) == 2 * len(forward), "each group again in the backward pass"
    per_chunk = sum(forward) // 7
    assert sum(forward) == 7 * per_chunk and max(forward) < 7
    assert piece == 50 or (per_chunk > 1 and max(forward) == 1), "one image at a time, in chunks of classes"
    check_against_reference(make(deep_base, processor, CASES[case], text_pass="plain"), NAMES, many, labels)


def test_one_image_or_one_class(deep_base, processor, pixels):
    for method in METHODS:
        check_against_reference(make(deep_base, processor, CASES[method]), NAMES, pixels[:1], LABELS[:1])
        model = make(deep_base, processor, CASES[method], ["sea lion"])
        tensors = learned_copies(model)
        text, image = reference(deep_base, model.tokenizer, ["sea lion"], model.config, pixels, tensors)
        expected = ref.cosine_logits(deep_base, text, image)
        assert relative_error(model(pixel_values=pixels).logits.detach(), expected.detach()) < 1e-5


def test_each_image_has_its_own_class_embeddings(deep_base, processor, pixels):
    """Pairing matters: the shift of one image is not that of another."""
    model = make(deep_base, processor, CASES["cocoop"])
    with torch.no_grad():
        output = model(pixel_values=pixels)
        assert output.text_embeds.shape == (3, len(NAMES), 32)
        assert (output.text_embeds[0] - output.text_embeds[1]).abs().max() > 1e-2
        for i in range(3):
            assert torch.allclose(model(pixel_values=pixels[i : i + 1]).logits, output.logits[i : i + 1], atol=1e-5)
        image_embeds = model.get_image_features(pixels)
        assert torch.allclose(model(image_embeds=image_embeds).logits, output.logits, atol=1e-6)
    with pytest.raises(ValueError, match="'cocoop' depend on the image"):
        model.get_text_features()


@pytest.mark.parametrize("method", METHODS)
def test_starts(deep_base, processor, method):
    """Words, N(0, 0.02²), and MaPLe's deeper couplings from one draw."""
    adapter = CoOpModel(deep_base, CASES[method], NAMES, processor).adapter
    if method in ("cocoop", "deep_text", "maple", "ivlp"):
        words = ref.word_vectors(deep_base, processor.tokenizer, "a photo of a", adapter.config.n_ctx)
        assert torch.equal(adapter.context.detach(), words)
    for vectors in [getattr(adapter, name, None) for name in ("deep_text", "visual")]:
        if vectors is not None:
            assert vectors.shape[0] == (3 if vectors is getattr(adapter, "visual", None) else 2)
            assert 0.01 < vectors.std() < 0.03
    if method == "maple":
        weights = [couple.weight for couple in adapter.couplings]
        assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
        assert weights[1] is not weights[2]


def test_official_sizes(deep_base, processor):
    adapters = {m: CoOpModel(deep_base, CASES[m], NAMES, processor).adapter for m in METHODS}
    assert adapters["cocoop"].meta_net.linear1.weight.shape == (32 // 16, 32)
    assert adapters["cocoop"].meta_net.linear2.weight.shape == (32, 32 // 16)
    assert adapters["tcp"].meta_net.linear1.weight.shape == (32 // 4, 32)
    assert adapters["tcp"].meta_net.linear2.weight.shape == (4 * 32, 32 // 4)
    assert adapters["maple"].couplings[0].weight.shape == (48, 32)
    assert (adapters["vpt"].config.n_vision, adapters["ivlp"].config.n_vision) == (8, 2)
    assert [adapters[m].config.depth for m in ("vpt", "ivlp", "maple", "deep_text")] == [3] * 4, "all layers there are"


def test_cocoop_is_an_adapter_of_under_40_lines():
    assert len(inspect.getsource(CoCoOp).splitlines()) < 40


# ---------------------------------------------------------------------- in use


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_beside_others(deep_base, processor, pixels, tmp_path, method):
    model = make(deep_base, processor, CASES[method])
    model.add_adapter("other", CoOpConfig(n_ctx=2), ["photo", "dog"])
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".safetensors", ".json", ".md"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["method"] == method
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        loaded = CoOpModel.from_pretrained(tmp_path, base_model=deep_base, processor=processor)
        assert torch.equal(loaded(pixel_values=pixels).logits, expected)
        assert loaded.config.class_names == NAMES and loaded.learned_parameters() == {}
        host = make(deep_base, processor, CoOpConfig(n_ctx=3), ["dog", "sea"])
        before = host(pixel_values=pixels).logits
        host.load_adapter(tmp_path, "learned")
        assert torch.equal(host(pixel_values=pixels).logits, before)
        host.set_adapter("learned")
        assert torch.equal(host(pixel_values=pixels).logits, expected)
        host.set_adapter("default")
        assert torch.equal(host(pixel_values=pixels).logits, before)
    again = CoOpModel.from_pretrained(tmp_path, base_model=deep_base, processor=processor, is_trainable=True)
    assert again.learned_parameters().keys() == model.learned_parameters().keys()
    again.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_shallow_adapter_is_saved_too(deep_base, processor, pixels, tmp_path):
    """Depth 1 leaves a tensor of no rows."""
    for case in ("maple-first", "deep_text-first", "vpt-shallow", "ivlp-depths"):
        model = make(deep_base, processor, CASES[case])
        model.save_pretrained(tmp_path / case)
        loaded = CoOpModel.from_pretrained(tmp_path / case, base_model=deep_base, processor=processor)
        with torch.no_grad():
            assert torch.equal(loaded(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


@pytest.mark.parametrize("method", METHODS)
def test_new_classes_at_once(deep_base, processor, pixels, method):
    model = make(deep_base, processor, CASES[method])
    with torch.no_grad():
        model(pixel_values=pixels)
    new = ["photo", "dog at sea", "cat cat cat", "yak"]
    model.set_class_names(new)
    check_against_reference(model, new, pixels, torch.tensor([0, 3, 2]))


def test_class_specific_prompts_stay_with_their_classes(deep_base, processor, pixels):
    for case in ("cocoop-specific", "deep_text-specific", "ivlp-specific"):
        model = make(deep_base, processor, CASES[case])
        with torch.no_grad():
            before = model(pixel_values=pixels).logits
            model.set_class_names(NAMES[::-1])
            assert torch.allclose(model(pixel_values=pixels).logits, before.flip(-1), atol=1e-5)
        with pytest.raises(ValueError, match="no vectors for 'yak'"):
            model.set_class_names([*NAMES[:-1], "yak"])
    for config, message in ((MaPLeConfig, "MaPLe's visual prompts"), (TCPConfig, "TCP's context is unified")):
        with pytest.raises(ValueError, match=message):
            config(class_specific=True)


@pytest.mark.parametrize("method", METHODS)
def test_disabled_is_zero_shot(deep_base, processor, pixels, method):
    model = make(deep_base, processor, CASES[method])
    text = ref.template_features(deep_base, processor.tokenizer, NAMES)
    expected = ref.cosine_logits(deep_base, text, ref.vision_pass(deep_base, pixels))
    with torch.no_grad():
        learned = model(pixel_values=pixels).logits
        with model.disable_adapter():
            assert relative_error(model(pixel_values=pixels).logits, expected) < 1e-5
        assert torch.equal(model(pixel_values=pixels).logits, learned)
    assert relative_error(learned, expected) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_bases(deep_base, processor, pixels, method, dtype):
    base = copy.deepcopy(deep_base).to(dtype)
    models = [make(base, processor, CASES[method], text_pass=text_pass) for text_pass in ("shared", "plain")]
    with torch.no_grad():
        exact = make(deep_base, processor, CASES[method])(pixel_values=pixels).logits
    for model in models:
        assert {p.dtype for p in model.adapter.parameters()} == {torch.float32}
        output = model(pixel_values=pixels, labels=LABELS)
        output.loss.backward()
        assert output.logits.dtype == torch.float32
        assert relative_error(output.logits.detach(), exact) < (0.01 if dtype == torch.float16 else 0.08)
        for name, parameter in model.adapter.named_parameters():
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    moved = make(deep_base, processor, CASES[method]).adapter.half()
    assert {p.dtype for p in moved.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_copies_are_independent(deep_base, processor, pixels, method):
    model = make(deep_base, processor, CASES[method])
    with torch.no_grad():
        before = model(pixel_values=pixels).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(pixel_values=pixels).logits, before)
        randomise(twin, seed=5)
        assert not torch.allclose(twin(pixel_values=pixels).logits, before, atol=1e-2)
        assert torch.equal(model(pixel_values=pixels).logits, before)
        state = model.adapter.learned_state()
        assert all(type(value) is torch.Tensor and not value.requires_grad for value in state.values())
        twin.adapter.load_learned_state(state)
        assert torch.equal(twin(pixel_values=pixels).logits, before)


@pytest.mark.parametrize("method", METHODS)
def test_what_learns(deep_base, processor, pixels, method):
    """All of the adapter and nothing else; one step lowers the loss."""
    model = make(deep_base, processor, CASES[method])
    learned = model.learned_parameters()
    assert learned.keys() == dict(model.adapter.named_parameters()).keys()
    optimizer = torch.optim.SGD(learned.values(), lr=1e-3)
    before = model(pixel_values=pixels, labels=LABELS).loss
    before.backward()
    optimizer.step()
    assert model(pixel_values=pixels, labels=LABELS).loss < before


@pytest.mark.parametrize("method", METHODS)
def test_predict(deep_base, processor, method):
    model = make(deep_base, processor, CASES[method])
    images = [picture(i) for i in range(3)]
    inputs = processor.image_processor(images=images, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    best = logits.softmax(-1).max(-1)
    for result, value, index in zip(model.predict(images, top_k=1, batch_size=2), best.values, best.indices):
        assert result[0]["label"] == NAMES[index] and abs(result[0]["score"] - value.item()) < 1e-5


# ---------------------------------------------------------------------- exported, or refused


@pytest.mark.parametrize("method", [method for method in METHODS if method not in READS_IMAGE])
def test_exported(deep_base, processor, pixels, method):
    model = make(deep_base, processor, CASES[method])
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        classifier = model.as_image_classifier()
        assert torch.allclose(classifier(pixels), expected, atol=1e-5)
        program = torch.export.export(classifier, (pixels,))
        assert torch.allclose(program.module()(pixels), expected, atol=1e-5)
        randomise(model, seed=5)
        assert torch.allclose(classifier(pixels), expected, atol=1e-5), "its parts are copies"


def test_what_reads_the_image_is_not_exported(deep_base, processor, pixels):
    model = make(deep_base, processor, CASES["cocoop"])
    with pytest.raises(ValueError, match="'cocoop' computes class embeddings for each image"):
        model.as_image_classifier()
    with model.disable_adapter(), torch.no_grad():
        assert torch.allclose(model.as_image_classifier()(pixels), model(pixel_values=pixels).logits, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_stock_model_cannot_hold_it(deep_base, processor, method):
    with pytest.raises(ValueError, match=rf"the method '{method}' is more than words in a prompt"):
        make(deep_base, processor, CASES[method]).merge_and_unload()


@pytest.mark.parametrize("method", METHODS)
def test_cached_image_embeddings(deep_base, processor, splits, tmp_path, method):
    """Of a tower that prompts enter there are none to keep."""
    model = make(deep_base, processor, CASES[method], ["cat", "dog", "sea", "photo", "of", "cat sea"])
    images = LabelledImages(splits["validation"], processor, class_names=model.class_names)
    if method in VISUAL:
        with pytest.raises(ValueError, match=rf"'{method}' change the image tower.*disable_adapter"):
            embed_images(model, images, cache_dir=tmp_path, progress=False)
        assert not list(tmp_path.rglob("*.safetensors"))
        with model.disable_adapter():
            embeds = embed_images(model, images, cache_dir=tmp_path, progress=False)
    else:
        embeds = embed_images(model, images, cache_dir=tmp_path, progress=False)
    pixels = torch.stack([images.view(item, None) for item in range(len(images))])
    assert torch.allclose(embeds[0], ref.vision_pass(deep_base, pixels), atol=1e-5)


@pytest.mark.parametrize("case", VISUAL)
def test_an_image_tower_without_layers(case):
    base, processor = make_family("align")
    with pytest.raises(ValueError, match=f"image tower is not a transformer.*'{case}'"):
        CoOpModel(base, CASES[case], NAMES, processor)


def test_more_layers_than_there_are(deep_base, processor):
    for config in (DeepTextConfig(depth=4), VPTConfig(depth=4), IVLPConfig(vision_depth=4), MaPLeConfig(depth=4)):
        with pytest.raises(ValueError, match="depth`=4, and the (text|image) tower has 3 layers"):
            CoOpModel(deep_base, config, NAMES, processor)
    with pytest.raises(ValueError, match="`layer`=3 is not a layer of this text tower, which has 3"):
        CoOpModel(deep_base, TCPConfig(layer=3), NAMES, processor)


# ---------------------------------------------------------------------- other towers

FAMILY_NAMES = ["cat", "sea lion", "big red dog"]
FAMILY_CASES = {
    "cocoop": CoCoOpConfig(n_ctx=2, ctx_init=None),
    "deep_text": DeepTextConfig(n_ctx=2, depth=2, ctx_init=None),
    "vpt": VPTConfig(n_vision=3, depth=2),
    "ivlp": IVLPConfig(ctx_init=None, fixed_words=None),
    "maple": MaPLeConfig(ctx_init=None, fixed_words=None),
    "tcp": TCPConfig(n_ctx=2, layer=1),
}


def family_text(base, processor, texts, prompts=None):
    """Class embeddings by the family's own forward, with `prompts` by layer in the first two places behind SOS."""
    inputs = text_inputs(base, processor, texts)
    first = len(processor.tokenizer("")["input_ids"]) - 1  # SigLIP's have no SOS
    text = getattr(base.text_model, "roberta", base.text_model)
    embedding = getattr(text.embeddings, "token_embedding", None) or text.embeddings.word_embeddings
    layers = getattr(text.encoder, "layers", None) or text.encoder.layer

    def put(hidden, vectors):
        vectors = vectors.expand(len(texts), -1, -1)
        return torch.cat([hidden[:, :first], vectors, hidden[:, first + 2 :]], dim=1)

    handles = []
    for layer, vectors in (prompts or {}).items():
        if layer == 0:
            handles.append(embedding.register_forward_hook(lambda m, i, hidden, v=vectors: put(hidden, v)))
        else:
            handles.append(ref.before_layer(layers[layer], lambda hidden, v=vectors: put(hidden, v)))
    with ref.hooks(*handles):
        return base.get_text_features(**inputs).pooler_output


def family_reference(base, processor, config, pixels, tensors):
    """`reference` by the family's own forward."""
    template = [config.template.format(name) for name in FAMILY_NAMES]
    placeholders = [f"x x {name}." for name in FAMILY_NAMES]
    if config.method == "vpt":
        visual = dict(enumerate(tensors["visual"]))
        return family_text(base, processor, template), ref.vision_pass(base, pixels, visual)
    prompts = dict(enumerate([tensors["context"], *tensors.get("deep_text", [])]))
    visual = dict(enumerate(tensors.get("visual", [])))
    if config.method == "maple":
        visual = {k: prompts[k] @ weight.t() + bias for k, (weight, bias) in enumerate(couplings(tensors))}
    image = ref.vision_pass(base, pixels, visual)
    if config.method == "tcp":
        embeds = ref.normalised(family_text(base, processor, template)).detach()
        prompts[config.layer] = ref.tcp_tokens(embeds, meta_net(tensors), 2)
    if config.method == "cocoop":
        shifts = ref.cocoop_shift(ref.normalised(image), meta_net(tensors))
        text = [family_text(base, processor, placeholders, {0: prompts[0] + shift}) for shift in shifts]
        return torch.stack(text), image
    return family_text(base, processor, placeholders, prompts), image


def scores(base, text, image):
    cosines = (ref.normalised(image).unsqueeze(-2) * ref.normalised(text)).sum(-1)
    scale = 1 / base.temperature if hasattr(base, "temperature") else base.logit_scale.exp()
    return scale * cosines + getattr(base, "logit_bias", 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("clip", "siglip2_naflex")])
def test_other_families(family, method):
    if family == "align" and method in VISUAL:
        pytest.skip("its image tower has no layers to prompt, see test_an_image_tower_without_layers")
    base, processor = make_family(family)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    size = 32 if family == "align" else 16
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    model = make(base, processor, FAMILY_CASES[method], FAMILY_NAMES)
    tensors = learned_copies(model)
    expected = scores(base, *family_reference(base, processor, model.config, pixels, tensors))
    labels = torch.tensor([0, 2, 1])
    own = model(pixel_values=pixels, labels=labels)
    assert relative_error(own.logits.detach(), expected.detach()) < 1e-5
    own.loss.backward()
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(expected, labels), list(tensors.values()))
    for (name, parameter), gradient in zip(model.adapter.named_parameters(), gradients):
        assert gradient.abs().max() > 0 and relative_error(parameter.grad, gradient) < 1e-4, name
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_visual_prompts_among_patches_of_any_number():
    """NaFlex pads the patches of an image, and nothing looks at the padding; everything looks at the prompts."""
    base, processor = make_family("siglip2_naflex")
    model = make(base, processor, VPTConfig(n_vision=3, depth=2), FAMILY_NAMES)
    inputs = image_inputs(processor, [picture(0, (40, 20)), picture(1, (30, 30))])
    mask, shapes = inputs["pixel_attention_mask"], inputs["spatial_shapes"]
    assert not mask.all()
    with torch.no_grad():
        found = model.get_image_features(**inputs)
        noise = torch.where(mask[..., None].bool(), inputs["pixel_values"], 7.0)
        assert torch.allclose(model.get_image_features(**{**inputs, "pixel_values": noise}), found, atol=1e-5)
        tower = base.vision_model
        for i, expected in enumerate(found):  # each image alone, without padding and so without a mask
            patches = int(mask[i].sum())
            hidden = tower.embeddings(inputs["pixel_values"][i : i + 1], shapes[i : i + 1])[:, :patches]
            hidden = torch.cat([hidden, model.adapter.visual[:1]], dim=1)
            for index, layer in enumerate(tower.encoder.layers):
                if index:
                    hidden = torch.cat([hidden[:, :patches], model.adapter.visual[index : index + 1]], dim=1)
                hidden = layer(hidden, None)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            assert relative_error(tower.head(tower.post_layernorm(hidden))[0], expected) < 1e-5


def test_a_context_longer_than_the_tower_is_refused_before_it_is_made(deep_base, processor):
    """A configuration may come from a stranger: TCP's network grows with its `n_ctx`."""
    for config in (CoOpConfig, DeepTextConfig, TCPConfig):
        with pytest.raises(ValueError, match="`n_ctx`=4096 .* 40 positions"):
            CoOpModel(deep_base, config(n_ctx=4096, ctx_init=None), processor=processor)


def test_coop_itself_against_its_reference(deep_base, processor, pixels):
    """The ground that the others stand on, in a tower of three layers with another width for images."""
    model = make(deep_base, processor, CoOpConfig(n_ctx=4))
    context = model.context.detach()
    text = reference_features(deep_base, processor.tokenizer, NAMES, context, "end")
    expected = ref.cosine_logits(deep_base, text, ref.vision_pass(deep_base, pixels))
    assert relative_error(model(pixel_values=pixels).logits.detach(), expected) < 1e-5


@pytest.mark.parametrize("config", [DeepTextConfig, IVLPConfig, MaPLeConfig])
def test_words_of_more_tokens_than_prompts_are_cut(config, tokenizer):
    """The defaults name two words; to a tokenizer that cuts them finer, the first tokens are taken."""
    base = ref.make_deep_base(tokenizer)
    model = CoOpModel(base, config(n_ctx=2, ctx_init="hat of", fixed_words=None), NAMES, tokenizer)
    ids = tokenizer("hat of", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2 and model.config.n_ctx == 2
    words = base.text_model.embeddings.token_embedding.weight[ids[:2]]
    torch.testing.assert_close(model.context.detach(), words, rtol=0, atol=0)
    with pytest.raises(ValueError, match="more than n_ctx=2"):
        CoOpModel(base, CoOpConfig(n_ctx=2, ctx_init="hat of"), NAMES, tokenizer)
