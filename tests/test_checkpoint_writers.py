"""The written files compute, under OpenAI's names and without a line of transformers, what the references compute."""

import checkpoint_writers as writers
import pytest
import reference_methods as ref
import torch
from reference import relative_error
from torch.nn import functional as F


NAMES = ["cat", "Sea_lion", "dog house"]
HEADS = 4


def draw(*shape, seed=0, scale=0.5):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def deep_base(tokenizer):
    return ref.make_deep_base(tokenizer)


@pytest.fixture(scope="module")
def pixels():
    return draw(2, 3, 16, 16, seed=1, scale=1.0)


def load(path):
    return torch.load(path, weights_only=False)


def affine(state, name, hidden):
    return F.linear(hidden, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, hidden):
    return F.layer_norm(hidden, hidden.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def block(state, name, hidden, causal):
    batch, length, width = hidden.shape
    packed = norm(state, f"{name}.ln_1", hidden)
    packed = F.linear(packed, state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"])
    heads = [part.view(batch, length, HEADS, -1).transpose(1, 2) for part in packed.chunk(3, dim=-1)]
    mixed = F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).reshape(batch, length, width)
    hidden = hidden + affine(state, f"{name}.attn.out_proj", mixed)
    inner = affine(state, f"{name}.mlp.c_fc", norm(state, f"{name}.ln_2", hidden))
    return hidden + affine(state, f"{name}.mlp.c_proj", inner * torch.sigmoid(1.702 * inner))


def text_from(state, rows, deep):
    """`rows`: ids, of which only EOS, the largest, is used; the vectors are the file's own."""
    learner = {key.removeprefix("prompt_learner."): v for key, v in state.items() if key.startswith("prompt_learner.")}
    context = learner["ctx"].expand(len(rows), -1, -1)
    hidden = torch.cat([learner["token_prefix"], context, learner["token_suffix"]], dim=1)
    hidden = hidden + state["text_encoder.positional_embedding"]
    for number in range(3):
        if number in deep:
            n = len(deep[number])
            hidden = torch.cat([hidden[:, :1], deep[number].expand(len(rows), -1, -1), hidden[:, 1 + n :]], dim=1)
        hidden = block(state, f"text_encoder.transformer.resblocks.{number}", hidden, causal=True)
    hidden = norm(state, "text_encoder.ln_final", hidden)
    return hidden[torch.arange(len(rows)), rows.argmax(-1)] @ state["text_encoder.text_projection"]


def image_from(state, pixels, prompts, prefix="image_encoder"):
    patches = F.conv2d(pixels, state[f"{prefix}.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    hidden = torch.cat([state[f"{prefix}.class_embedding"].expand(len(pixels), 1, -1), patches], dim=1)
    hidden = hidden + state[f"{prefix}.positional_embedding"]
    if 0 in prompts:
        hidden = torch.cat([hidden, prompts[0].expand(len(pixels), -1, -1)], dim=1)
    hidden = norm(state, f"{prefix}.ln_pre", hidden)
    for number in range(3):
        if number in prompts and number > 0:
            hidden = hidden[:, : -len(prompts[number])]
            hidden = torch.cat([hidden, prompts[number].expand(len(pixels), -1, -1)], dim=1)
        hidden = block(state, f"{prefix}.transformer.resblocks.{number}", hidden, causal=False)
    return norm(state, f"{prefix}.ln_post", hidden[:, 0]) @ state[f"{prefix}.proj"]


def close(value, expected, tolerance=2e-6):
    return relative_error(value, expected.detach()) < tolerance


def shallow_and_deep(state, prefix):
    """The prompts in a tower, by layer."""
    found = {0: state[f"{prefix}.VPT"]} if f"{prefix}.VPT" in state else {}
    for key, value in state.items():
        if key.startswith(f"{prefix}.") and key.endswith(".VPT_shallow"):
            found[int(key.split(".")[3])] = value
    return found


def two_towers(n=2, depth=2):
    return [draw(n, 32, seed=i) for i in range(depth)], [draw(n, 48, seed=10 + i) for i in range(depth)]


@pytest.mark.parametrize("method", ["ivlp", "promptsrc"])
def test_ivlp_and_promptsrc(deep_base, tokenizer, pixels, tmp_path, method):
    text_prompts, vision_prompts = two_towers()
    write = {"ivlp": writers.write_ivlp, "promptsrc": writers.write_promptsrc}[method]
    path, _ = write(tmp_path, deep_base, tokenizer, NAMES, text_prompts, vision_prompts, precision="fp32")
    assert path == tmp_path / "VLPromptLearner" / ("model.pth.tar-5" if method == "ivlp" else "model.pth.tar-20")
    state = load(path)["state_dict"]
    expected = ref.ivlp_features(deep_base, tokenizer, NAMES, pixels, text_prompts, vision_prompts, "of a {}.")
    rows = ref.prompt_rows(deep_base, tokenizer, NAMES, 2, "of a {}.")
    assert close(text_from(state, rows, shallow_and_deep(state, "text_encoder")), expected[0])
    assert close(image_from(state, pixels, shallow_and_deep(state, "image_encoder")), expected[1])
    frozen = "prompt_learner.ZS_image_encoder"
    assert any(key.startswith(frozen) for key in state) == (method == "promptsrc")
    if method == "promptsrc":
        assert close(image_from(state, pixels, {}, frozen), ref.vision_pass(deep_base, pixels))
        assert not shallow_and_deep(state, frozen)


def test_no_vision_prompts(deep_base, tokenizer, tmp_path):
    path, state = writers.write_ivlp(tmp_path, deep_base, tokenizer, NAMES, two_towers()[0], [])
    assert not shallow_and_deep(load(path)["state_dict"], "image_encoder")
    assert shallow_and_deep(state, "text_encoder").keys() == {1}


@pytest.mark.parametrize("depth", [1, 3])
def test_vpt(deep_base, pixels, tmp_path, depth):
    prompts = two_towers(n=3, depth=depth)[1]
    path, _ = writers.write_vpt(tmp_path, deep_base, prompts)
    assert path == tmp_path / "prompt_learner" / "model.pth.tar-5"
    state = load(path)["state_dict"]
    assert not any(key.startswith("prompt_learner.") for key in state)
    found = shallow_and_deep(state, "image_encoder")
    assert sorted(found) == list(range(depth))
    assert close(image_from(state, pixels, found), ref.vision_pass(deep_base, pixels, dict(enumerate(prompts))))


@pytest.mark.parametrize("depth", [1, 3])
def test_maple(deep_base, tokenizer, pixels, tmp_path, depth):
    prompts = two_towers(depth=depth)[0]
    couplings = [
        (draw(48, 32, seed=20 + i).half().float(), draw(48, seed=30 + i).half().float()) for i in range(depth)
    ]
    path, _ = writers.write_maple(tmp_path, deep_base, tokenizer, NAMES, prompts, couplings, precision="fp32")
    assert path == tmp_path / "MultiModalPromptLearner" / "model.pth.tar-5"
    state = {key: value.float() for key, value in load(path)["state_dict"].items()}
    deep = {i: state[f"prompt_learner.compound_prompts_text.{i - 1}"] for i in range(1, depth)}
    vision = {0: affine(state, "prompt_learner.proj", state["prompt_learner.ctx"])}
    for i, prompt in deep.items():
        vision[i] = affine(state, f"prompt_learner.compound_prompt_projections.{i - 1}", prompt)
    assert f"prompt_learner.compound_prompts_text.{depth - 1}" not in state
    expected = ref.maple_features(deep_base, tokenizer, NAMES, pixels, prompts, couplings)
    rows = ref.prompt_rows(deep_base, tokenizer, NAMES, 2, "of a {}.")
    assert close(text_from(state, rows, deep), expected[0])
    assert close(image_from(state, pixels, vision), expected[1])


def dtypes(state):
    return {key: value.dtype for key, value in state.items()}


def test_dtypes_of_an_fp16_run(deep_base, tokenizer, tmp_path):
    text_prompts, vision_prompts = two_towers()
    couplings = [(draw(48, 32), draw(48))] * 2
    _, maple = writers.write_maple(tmp_path, deep_base, tokenizer, NAMES, text_prompts, couplings)
    half = {key for key, dtype in dtypes(maple).items() if dtype == torch.float16}
    assert {"prompt_learner.ctx", "prompt_learner.token_prefix", "prompt_learner.proj.weight"} < half
    assert {"image_encoder.conv1.weight", "image_encoder.proj", "text_encoder.text_projection"} < half
    assert "text_encoder.transformer.resblocks.0.attn.in_proj_bias" in half
    full = set(maple) - half
    assert {"logit_scale", "text_encoder.positional_embedding", "image_encoder.class_embedding"} < full
    assert {"prompt_learner.compound_prompts_text.0", "prompt_learner.compound_prompt_projections.0.bias"} < full
    assert "image_encoder.ln_pre.weight" in full and "text_encoder.transformer.resblocks.2.ln_2.bias" in full
    _, ivlp = writers.write_ivlp(tmp_path, deep_base, tokenizer, NAMES, text_prompts, vision_prompts)
    assert ivlp["prompt_learner.ctx"].dtype == torch.float16 and ivlp["image_encoder.VPT"].dtype == torch.float32
    assert set(dtypes(writers.write_vpt(tmp_path, deep_base, vision_prompts)[1]).values()) == {torch.float32}


def test_the_average_of_promptsrc_rounds_what_did_not_learn(deep_base, tokenizer, tmp_path):
    text_prompts, vision_prompts = two_towers()
    arguments = (deep_base, tokenizer, NAMES, text_prompts, vision_prompts)
    _, plain = writers.write_ivlp(tmp_path / "a", *arguments)
    _, averaged = writers.write_promptsrc(tmp_path / "b", *arguments)
    suffix = "prompt_learner.token_suffix"
    assert not torch.equal(averaged[suffix], plain[suffix])
    assert torch.allclose(averaged[suffix].float(), plain[suffix].float(), rtol=5e-3, atol=1e-4)
    assert torch.equal(averaged["prompt_learner.ctx"], plain["prompt_learner.ctx"])
    assert torch.equal(averaged["image_encoder.VPT"], plain["image_encoder.VPT"])


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_prompt_learners_alone(deep_base, tokenizer, tmp_path, precision):
    context, embedding = draw(4, 32), deep_base.text_model.embeddings.token_embedding.weight
    small = [draw(2, 32), draw(2), draw(32, 2), draw(32)]
    wide = [draw(8, 32), draw(8), draw(128, 8), draw(128)]
    meta_net = {f"meta_net.linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    common = {"ctx", "token_prefix", "token_suffix"}
    arguments, options = (deep_base, tokenizer, NAMES), {"precision": precision}
    cases = {
        "cocoop": (writers.write_cocoop(tmp_path / "1", *arguments, context, small, **options), common | meta_net),
        "kgcoop": (
            writers.write_kgcoop(tmp_path / "2", *arguments, context, **options),
            common | {"bias_vectors", "meta_net.linear1.weight", "meta_net.linear1.bias"},
        ),
        "prograd": (writers.write_prograd(tmp_path / "3", *arguments, context, **options), common),
        "tcp": (writers.write_tcp(tmp_path / "4", *arguments, context, wide, **options), common | meta_net),
    }
    for name, ((path, state), keys) in cases.items():
        checkpoint = load(path)
        assert path.parent.name == "prompt_learner" and (path.parent / "checkpoint").read_text() == path.name + "\n"
        assert checkpoint.keys() == {"state_dict", "epoch", "optimizer", "scheduler", "val_result"}, name
        assert set(checkpoint["state_dict"]) == keys and path.name == f"model.pth.tar-{checkpoint['epoch']}"
        assert {v.dtype for v in state.values()} == {writers.DTYPES[precision]}
        assert torch.equal(checkpoint["state_dict"]["ctx"], context.to(writers.DTYPES[precision]))
        ids = tokenizer("cat.")["input_ids"][1:]
        assert torch.equal(state["token_suffix"][0, : len(ids)], embedding[ids].to(writers.DTYPES[precision]))
        assert state["token_prefix"].shape == (3, 1, 32) and state["token_suffix"].shape == (3, 35, 32)
        ids_of_all = checkpoint["optimizer"]["param_groups"][0]["params"]
        assert len(ids_of_all) == len(keys) - 2
        moved = 1 if name in ("kgcoop", "prograd") else len(ids_of_all)
        assert len(checkpoint["optimizer"]["state"]) == moved


def test_words_in_the_last_places(deep_base, tokenizer, tmp_path):
    path, state = writers.write_prograd(tmp_path, deep_base, tokenizer, NAMES, draw(6, 32), words="a photo of a")
    assert state["token_suffix"].shape == (3, 33, 32)
    rest = writers.write_tcp(
        tmp_path,
        deep_base,
        tokenizer,
        NAMES,
        draw(4, 32),
        [draw(8, 32), draw(8), draw(128, 8), draw(128)],
        "{} of sea",
    )[1]
    ids = tokenizer("cat of sea")["input_ids"][1:]
    embedding = deep_base.text_model.embeddings.token_embedding.weight
    assert torch.equal(rest["token_suffix"][0, : len(ids)], embedding[ids].half())
