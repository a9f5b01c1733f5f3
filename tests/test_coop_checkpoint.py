import json
import os
import pickle
import resource
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict

import checkpoint_writers as writers
import numpy as np
import pytest
import reference_methods as ref
import torch
from conftest import make_base
from reference import relative_error
from torch.optim.lr_scheduler import CosineAnnealingLR

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.coop_checkpoint import from_coop_checkpoint, main
from coop_hf.files.adapter_files import read_adapter, write_adapter
from coop_hf.files.coop_checkpoint import find_coop_checkpoint, read_coop_checkpoint
from coop_hf.files.coop_conversion import checkpoint_to_adapter


NAMES = ["cat", "Sea_lion", "dog house", "kite (bird)"]


def original_state(model, names, n_ctx, class_specific, dtype, seed=0):
    """What the original's `PromptLearner` holds, built as it does: prompts of 'X', then cut up."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.text_model.embeddings.token_embedding.weight.detach()
    shape = (len(names), n_ctx) if class_specific else (n_ctx,)
    context = 0.5 * torch.randn(*shape, embedding.shape[1], generator=generator)
    return context.to(dtype), embedding


def write_checkpoint(path, tokenizer, base, names=NAMES, n_ctx=4, class_specific=False, dtype=torch.float32, **extra):
    context, embedding = original_state(base, names, n_ctx, class_specific, dtype)
    length = base.config.text_config.max_position_embeddings
    rows = torch.zeros(len(names), length, dtype=torch.long)  # the original pads with token 0
    for row, name in zip(rows, names):
        ids = tokenizer("X " * n_ctx + name.replace("_", " ") + ".")["input_ids"]
        row[: len(ids)] = torch.tensor(ids)
    embedded = embedding[rows].to(dtype)
    parameter = torch.nn.Parameter(context)
    optimizer = torch.optim.SGD([parameter], lr=0.002, momentum=0.9)
    parameter.grad = torch.ones_like(context)
    optimizer.step()
    optimizer.zero_grad()
    scheduler = CosineAnnealingLR(optimizer, 50)
    # The original's warm-up scheduler keeps its successor, a whole object with the optimizer in it.
    scheduler_state = {**scheduler.state_dict(), "successor": scheduler, "warmup_epoch": 1, "cons_lr": 1e-5}
    state = OrderedDict(ctx=context, token_prefix=embedded[:, :1], token_suffix=embedded[:, 1 + n_ctx :])
    checkpoint = {
        "state_dict": state,
        "epoch": 50,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler_state,
        "val_result": np.float64(63.5),
        **extra,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return context


def logits(model, seed=0):
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(pixel_values=pixels).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("class_specific", [False, True], ids=["unified", "class-specific"])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_becomes_an_adapter(tokenizer, processor, base, tmp_path, position, class_specific, dtype):
    path = tmp_path / "prompt_learner" / "model.pth.tar-50"
    context = write_checkpoint(path, tokenizer, base, class_specific=class_specific, dtype=dtype)
    model = from_coop_checkpoint(path, base, NAMES, position, processor=processor)
    assert torch.equal(model.context.detach(), context.float()) and model.context.dtype == torch.float32
    assert model.context.requires_grad
    merged = position != "end"  # name and full stop as the original tells them apart
    config = CoOpConfig(4, position, class_specific, merge_full_stop=merged)
    expected = CoOpModel(base, config, NAMES, processor, context=context.float())
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "adapter")
    loaded = CoOpModel.from_pretrained(tmp_path / "adapter", base_model=base, processor=processor)
    assert torch.equal(logits(loaded), logits(expected)) and loaded.class_names == NAMES


def test_agrees_with_the_original_computation(tokenizer, processor, base, tmp_path):
    """The original: prefix, context and suffix side by side, 77 positions, pooled at the largest id."""
    context = write_checkpoint(tmp_path / "c", tokenizer, base, class_specific=True)
    state = torch.load(tmp_path / "c", weights_only=False)["state_dict"]
    embeddings = torch.cat([state["token_prefix"], context, state["token_suffix"]], dim=1)
    tower = base.text_model
    length = embeddings.shape[1]
    hidden = embeddings + tower.embeddings.position_embedding.weight[:length]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None].expand(len(NAMES), 1, -1, -1)
    with torch.no_grad():
        hidden = tower.final_layer_norm(tower.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state)
        eos = [len(tokenizer("X X X X " + name.replace("_", " ") + ".")["input_ids"]) - 1 for name in NAMES]
        expected = base.text_projection(hidden[torch.arange(len(NAMES)), eos])
        model = from_coop_checkpoint(tmp_path / "c", base, NAMES, processor=processor)
        assert torch.allclose(model.get_text_features(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_class_names_are_read_off_the_embeddings(tokenizer, processor, base, tmp_path, dtype):
    write_checkpoint(tmp_path / "c", tokenizer, base, class_specific=True, dtype=dtype)
    model = from_coop_checkpoint(tmp_path / "c", base, processor=processor)
    assert model.class_names == ["cat", "sea lion", "dog house", "kite ( bird )"]  # spaced as the tokenizer decodes
    given = from_coop_checkpoint(tmp_path / "c", base, NAMES, processor=processor)
    assert torch.equal(logits(model), logits(given))


def test_unified_context_takes_any_class_names(tokenizer, processor, base, tmp_path):
    context = write_checkpoint(tmp_path / "c", tokenizer, base)
    model = from_coop_checkpoint(tmp_path / "c", base, ["photo", "yak"], processor=processor)
    assert model.class_names == ["photo", "yak"] and torch.equal(model.context.detach(), context)


def test_wrong_class_names_of_a_class_specific_context(tokenizer, processor, base, tmp_path):
    write_checkpoint(tmp_path / "c", tokenizer, base, class_specific=True)
    with pytest.raises(ValueError, match="contexts for 4 classes, and `class_names` has 2"):
        from_coop_checkpoint(tmp_path / "c", base, ["cat", "dog"], processor=processor)
    swapped = [NAMES[0], NAMES[2], NAMES[1], NAMES[3]]
    with pytest.raises(
        ValueError, match="2 of 4 class names .* first 'dog house' .number 1.; it was learned as 'sea l"
    ):
        from_coop_checkpoint(tmp_path / "c", base, swapped, processor=processor)


def test_context_alone_as_the_pasted_workaround_leaves_it(tokenizer, processor, base, tmp_path):
    """The workaround of the original's tracker deletes prefix and suffix."""
    context, _ = original_state(base, NAMES, 4, True, torch.float32)
    torch.save({"state_dict": {"ctx": context}, "epoch": 3}, tmp_path / "c")
    assert read_coop_checkpoint(tmp_path / "c")["epoch"] == 3
    with pytest.raises(ValueError, match="class names cannot be read off it: pass `class_names"):
        from_coop_checkpoint(tmp_path / "c", base, processor=processor)
    model = from_coop_checkpoint(tmp_path / "c", base, NAMES, processor=processor)
    assert torch.equal(model.context.detach(), context)
    torch.save({"state_dict": {"ctx": context[0]}}, tmp_path / "c")
    assert from_coop_checkpoint(tmp_path / "c", base, processor=processor).class_names is None


def test_wrong_base(tokenizer, processor, base, tmp_path):
    write_checkpoint(tmp_path / "c", tokenizer, base)
    other = make_base(tokenizer, seed=9)
    with pytest.raises(ValueError, match="learned on another CLIP model: its embedding of SOS"):
        from_coop_checkpoint(tmp_path / "c", other, NAMES, processor=processor)
    assert from_coop_checkpoint(tmp_path / "c", other, NAMES, processor=processor, check_base=False)
    with pytest.raises(ValueError, match="32 dimensions, and the base's token embeddings have 48"):
        from_coop_checkpoint(tmp_path / "c", make_base(tokenizer, width=48), NAMES, processor=processor)


def test_random_state_is_left_alone(tokenizer, processor, base, tmp_path):
    write_checkpoint(tmp_path / "c", tokenizer, base)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    from_coop_checkpoint(tmp_path / "c", base, NAMES, processor=processor)
    assert torch.equal(torch.get_rng_state(), before)


def test_which_file_of_a_folder(tmp_path):
    folder = tmp_path / "prompt_learner"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        find_coop_checkpoint(tmp_path)
    for name in ("model.pth.tar-5", "model.pth.tar-50", "model.pth.tar-x", "checkpoint"):
        (folder / name).touch()
    for path in (tmp_path, folder):
        assert find_coop_checkpoint(path) == str(folder / "model.pth.tar-50")
        assert find_coop_checkpoint(path, epoch=5) == str(folder / "model.pth.tar-5")
    (folder / "model-best.pth.tar").touch()
    assert find_coop_checkpoint(tmp_path) == str(folder / "model-best.pth.tar")
    with pytest.raises(FileNotFoundError, match="no model.pth.tar-7; the epochs there: 5, 50"):
        find_coop_checkpoint(tmp_path, epoch=7)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        find_coop_checkpoint(tmp_path / "nothing")


# ---------------------------------------------------------------------- the prompt learners built on CoOp


def draw(*shape, seed=0, scale=0.5):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def deep_base(tokenizer):
    return ref.make_deep_base(tokenizer)


@pytest.fixture(scope="module")
def pixels():
    return draw(3, 3, 16, 16, seed=1, scale=1.0)


def prompts(n, depth, width, seed=0):
    return [draw(n, width, seed=seed + i) for i in range(depth)]


def meta_net(hidden, outputs):
    shapes = ((hidden, 32), (hidden,), (outputs, hidden), (outputs,))
    return [draw(*shape, seed=20 + i, scale=2.0) for i, shape in enumerate(shapes)]


def couplings(depth):
    return [(draw(48, 32, seed=30 + i, scale=0.2), draw(48, seed=40 + i)) for i in range(depth)]


# Method of the adapter, writer, what it is given, values of the configuration.
FILES = {
    "cocoop": ("cocoop", "write_cocoop", (draw(4, 32), meta_net(2, 32)), {}),
    "cocoop-words": ("cocoop", "write_cocoop", (draw(4, 32), meta_net(2, 32), "a photo of a"), {"n_ctx": 4}),
    "cocoop-one": ("cocoop", "write_cocoop", (draw(1, 32), meta_net(2, 32)), {"n_ctx": 1}),
    "kgcoop": ("coop", "write_kgcoop", (draw(4, 32),), {"class_specific": False}),
    "kgcoop-specific": ("coop", "write_kgcoop", (draw(4, 3, 32),), {"class_specific": True}),
    "prograd": ("coop", "write_prograd", (draw(6, 32), "a photo of a"), {"n_ctx": 6}),
    "prograd-specific": ("coop", "write_prograd", (draw(4, 2, 32),), {"class_specific": True}),
    "maple": ("maple", "write_maple", (prompts(2, 3, 32), couplings(3)), {"depth": 3, "fixed_words": "of a"}),
    "maple-first": ("maple", "write_maple", (prompts(2, 1, 32), couplings(1)), {"depth": 1}),
    "maple-three": ("maple", "write_maple", (prompts(3, 2, 32), couplings(2)), {"n_ctx": 3, "fixed_words": "a"}),
    "maple-no-words": ("maple", "write_maple", (prompts(2, 2, 32), couplings(2), ""), {"fixed_words": None}),
    "vpt-shallow": ("vpt", "write_vpt", (prompts(5, 1, 48),), {"depth": 1, "n_vision": 5}),
    "vpt": ("vpt", "write_vpt", (prompts(2, 3, 48),), {"depth": 3}),
    "ivlp": ("ivlp", "write_ivlp", (prompts(2, 2, 32), prompts(3, 3, 48, 9)), {"depth": 2, "vision_depth": 3}),
    "ivlp-text": ("deep_text", "write_ivlp", (prompts(4, 3, 32), []), {"depth": 3, "fixed_words": None}),
    "ivlp-first": ("ivlp", "write_ivlp", (prompts(1, 1, 32), prompts(1, 1, 48, 9)), {"fixed_words": "photo of a"}),
    "promptsrc": ("ivlp", "write_promptsrc", (prompts(4, 2, 32), prompts(4, 2, 48, 9)), {"fixed_words": None}),
    "promptsrc-two": ("ivlp", "write_promptsrc", (prompts(2, 2, 32), prompts(2, 2, 48, 9)), {"fixed_words": "of a"}),
    "tcp": ("tcp", "write_tcp", (draw(4, 32), meta_net(8, 128)), {"layer": 2, "fixed_words": None, "ending": "."}),
    "tcp-one": ("tcp", "write_tcp", (draw(1, 32), meta_net(8, 32)), {"n_ctx": 1}),
    **{
        f"tcp-{rest}": ("tcp", "write_tcp", (draw(4, 32), meta_net(8, 128), rest), config)
        for rest, config in (
            ("{}, a type of pet.", {"ending": ", a type of pet.", "fixed_words": None}),
            ("{}, a type of car", {"ending": ", a type of car"}),
            ("{} texture.", {"ending": " texture."}),
            ("person doing {}.", {"fixed_words": "person doing", "ending": "."}),
        )
    },
}
OTHER_NAMES = ["cat", "Sea_lion", "dog house", "photo of sea"]


def write(case, folder, base, tokenizer, names=OTHER_NAMES, **extra):
    method, writer, given, _ = FILES[case]
    words = () if writer == "write_vpt" else (tokenizer, names)
    return getattr(writers, writer)(folder, base, *words, *given, **extra)


def stored_features(case, base, tokenizer, names, pixels, state):
    """(text, image) by the reference, from the tensors as they are in the file."""
    method, writer, given, config = FILES[case]
    state = {key.removeprefix("prompt_learner."): value.float() for key, value in state.items()}
    blocks = [f"transformer.resblocks.{k}.VPT_shallow" for k in (1, 2)]
    text_deep = [state[f"text_encoder.{key}"] for key in blocks if f"text_encoder.{key}" in state]
    visual = [state[f"image_encoder.{key}"] for key in ("VPT", *blocks) if f"image_encoder.{key}" in state]
    net = [state.get(f"meta_net.linear{k}.{what}") for k in (1, 2) for what in ("weight", "bias")]
    if method == "vpt":
        return ref.vpt_features(base, tokenizer, names, pixels, visual)
    context = state["ctx"]
    if method == "cocoop":
        return ref.cocoop_features(base, tokenizer, names, pixels, context, net)
    if method == "coop":
        return ref.coop_features(base, tokenizer, names, pixels, context)
    if method == "tcp":
        rest = given[2] if len(given) > 2 else "{}."
        return ref.tcp_features(base, tokenizer, names, pixels, context, net, layer=2, template=rest)
    left = " ".join("a photo of a".split()[len(context) :]) if given[-1] != "" else ""
    template = f"{left} {{}}." if left else "{}."
    if method == "maple":
        deep = [context, *(state[f"compound_prompts_text.{k}"] for k in range(len(given[0]) - 1))]
        names_of = ["proj", *(f"compound_prompt_projections.{k}" for k in range(len(given[0]) - 1))]
        linear = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names_of]
        return ref.maple_features(base, tokenizer, names, pixels, deep, linear, template)
    return ref.ivlp_features(base, tokenizer, names, pixels, [context, *text_deep], visual, template)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("case", FILES)
def test_other_methods_become_adapters(deep_base, tokenizer, processor, pixels, tmp_path, case, precision):
    method, _, _, config = FILES[case]
    extra = {} if method == "vpt" else {"precision": precision}
    _, state = write(case, tmp_path / "out", deep_base, tokenizer, **extra)
    model = CoOpModel.from_coop_checkpoint(tmp_path / "out", deep_base, OTHER_NAMES, processor=processor)
    assert model.config.method == method
    assert {key: getattr(model.config, key) for key in config} == config
    assert all(p.requires_grad or 0 in p.shape for p in model.adapter.parameters())
    text, image = stored_features(case, deep_base, tokenizer, OTHER_NAMES, pixels, state)
    expected = ref.cosine_logits(deep_base, text, image)
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    assert relative_error(logits, expected.detach()) < 1e-5
    model.save_pretrained(tmp_path / "adapter")
    loaded = CoOpModel.from_pretrained(tmp_path / "adapter", base_model=deep_base, processor=processor)
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=pixels).logits, logits)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("case", [case for case in FILES if not case.startswith("vpt")])
def test_names_of_other_methods_are_read_off(deep_base, tokenizer, processor, tmp_path, case, precision):
    write(case, tmp_path, deep_base, tokenizer, precision=precision)
    model = CoOpModel.from_coop_checkpoint(tmp_path, deep_base, processor=processor)
    assert model.class_names == ["cat", "sea lion", "dog house", "photo of sea"]
    config = FILES[case][3]
    assert {key: getattr(model.config, key) for key in config} == config
    if not getattr(model.config, "class_specific", False):  # any others do
        other = CoOpModel.from_coop_checkpoint(tmp_path, deep_base, ["yak", "gnu"], processor=processor)
        assert other.class_names == ["yak", "gnu"]
        assert {key: getattr(other.config, key) for key in config} == config


def test_no_names_in_a_file_of_vpt(deep_base, tokenizer, processor, pixels, tmp_path):
    _, state = write("vpt", tmp_path, deep_base, tokenizer)
    assert CoOpModel.from_coop_checkpoint(tmp_path, deep_base, processor=processor).class_names is None
    options = {"template": "art of the {}!", "processor": processor}
    model = CoOpModel.from_coop_checkpoint(tmp_path, deep_base, OTHER_NAMES, **options)
    visual = [model.adapter.visual[k].detach() for k in range(3)]
    text, image = ref.vpt_features(deep_base, tokenizer, OTHER_NAMES, pixels, visual, "art of the {}!")
    with torch.no_grad():
        assert relative_error(model(pixel_values=pixels).logits, ref.cosine_logits(deep_base, text, image)) < 1e-5


@pytest.mark.parametrize("case", ["maple", "ivlp", "promptsrc-two", "cocoop", "tcp"])
def test_without_the_buffers(deep_base, tokenizer, processor, tmp_path, case):
    """Deleted, as the public code's own loaders do: the words are those of the public configurations."""
    path, _ = write(case, tmp_path, deep_base, tokenizer)
    checkpoint = torch.load(path, weights_only=False)
    for key in list(checkpoint["state_dict"]):
        if key.endswith(("token_prefix", "token_suffix")):
            del checkpoint["state_dict"][key]
    state = {f"module.{key}": value for key, value in checkpoint["state_dict"].items()}
    torch.save({**checkpoint, "state_dict": state}, path)
    model = CoOpModel.from_coop_checkpoint(tmp_path, deep_base, ["yak"], processor=processor)
    config = FILES[case][3]
    assert {key: getattr(model.config, key) for key in config} == config


def test_other_methods_of_another_base(deep_base, tokenizer, processor, tmp_path):
    other = ref.make_deep_base(tokenizer, seed=9)
    for case in ("cocoop", "maple", "tcp", "promptsrc"):
        write(case, tmp_path / case, deep_base, tokenizer)
        with pytest.raises(ValueError, match="learned on another CLIP model: its embedding of SOS"):
            CoOpModel.from_coop_checkpoint(tmp_path / case, other, OTHER_NAMES, processor=processor)
        options = {"processor": processor, "check_base": False}
        assert CoOpModel.from_coop_checkpoint(tmp_path / case, other, OTHER_NAMES, **options)
    write("vpt", tmp_path / "vpt", deep_base, tokenizer)
    with pytest.raises(ValueError, match="learned on another CLIP model: its text position embeddings"):
        CoOpModel.from_coop_checkpoint(tmp_path / "vpt", other, OTHER_NAMES, processor=processor)
    shallow = ref.make_deep_base(tokenizer, layers=2, vision_layers=2)
    with pytest.raises(ValueError, match="`depth`=3, and the image tower has 2 layers"):
        CoOpModel.from_coop_checkpoint(tmp_path / "vpt", shallow, OTHER_NAMES, processor=processor, check_base=False)
    narrow = ref.make_deep_base(tokenizer, vision_width=32)
    with pytest.raises(ValueError, match="visual has the shape .3, 2, 48., its configuration says .3, 2, 32."):
        CoOpModel.from_coop_checkpoint(tmp_path / "vpt", narrow, OTHER_NAMES, processor=processor, check_base=False)


def test_the_class_token_stands_at_the_end(deep_base, tokenizer, processor, tmp_path):
    write("maple", tmp_path, deep_base, tokenizer)
    with pytest.raises(ValueError, match="of the method 'maple', whose public code has the class name at the end"):
        CoOpModel.from_coop_checkpoint(tmp_path, deep_base, OTHER_NAMES, "middle", processor=processor)


def test_folders_of_other_methods(deep_base, tokenizer, tmp_path):
    for case, name in (("maple", "MultiModalPromptLearner"), ("ivlp", "VLPromptLearner"), ("vpt", "prompt_learner")):
        path, _ = write(case, tmp_path / case, deep_base, tokenizer)
        assert find_coop_checkpoint(tmp_path / case) == str(path) == str(tmp_path / case / name / "model.pth.tar-5")
        assert find_coop_checkpoint(tmp_path / case / name) == str(path)


WHOLE = {"image_encoder.proj": torch.zeros(48, 32), "text_encoder.ln_final.bias": torch.zeros(32)}
BLOCK = "image_encoder.transformer.resblocks"
META = {"meta_net.linear1.weight": torch.zeros(2, 32), "meta_net.linear1.bias": torch.zeros(2)}
META |= {"meta_net.linear2.weight": torch.zeros(32, 2), "meta_net.linear2.bias": torch.zeros(32)}
PROJ = {"prompt_learner.ctx": torch.zeros(2, 32), "prompt_learner.proj.weight": torch.zeros(48, 32)}
PROJ |= {"prompt_learner.proj.bias": torch.zeros(48)}


@pytest.mark.parametrize(
    "state, message",
    [
        (WHOLE, "whole model, whose prompts have the keys none"),
        ({**WHOLE, "prompt_learner.fc": torch.zeros(1), **PROJ}, "whose prompts have the keys 'prompt_learner.fc'"),
        ({**WHOLE, f"{BLOCK}.1.VPT_shallow": torch.zeros(2, 48)}, "gaps between the layers of '.*resblocks.1.VPT"),
        (
            {**WHOLE, "image_encoder.VPT": torch.zeros(2, 48), f"{BLOCK}.3.VPT_shallow": torch.zeros(2, 48)},
            "gaps between the layers",
        ),
        (
            {**WHOLE, "image_encoder.VPT": torch.zeros(2, 48), f"{BLOCK}.1.VPT_shallow": torch.zeros(3, 48)},
            "VPT_shallow' has the shape .3, 48., which no method has",
        ),
        ({**WHOLE, "image_encoder.VPT": torch.zeros(48)}, "VPT' has the shape .48,., which no method has"),
        ({**WHOLE, "image_encoder.VPT": torch.full((2, 48), float("inf"))}, "visual holds NaN or infinite values"),
        ({**WHOLE, "image_encoder.VPT": torch.zeros(1).expand(10**9, 48)}, "more than the file holds"),
        ({**WHOLE, "image_encoder.VPT": "x"}, "'image_encoder.VPT' is a str, expected a plain tensor"),
        ({**WHOLE, **PROJ, "image_encoder.VPT": torch.zeros(2, 48)}, "whose prompts have the keys"),
        ({**WHOLE, **PROJ, "prompt_learner.compound_prompts_text.0": torch.zeros(2, 32)}, "whose prompts have the"),
        ({"ctx": torch.zeros(4, 32), **META, "meta_net.linear3.bias": torch.zeros(1)}, "keys 'ctx', 'meta_net"),
        (
            {"ctx": torch.zeros(4, 32), **META, "meta_net.linear2.weight": torch.zeros(33, 2)},
            "gives 33 numbers; with 4 context vectors of 32 numbers CoCoOp's gives 32 and TCP's 128",
        ),
        ({"ctx": torch.zeros(3, 4, 32), **META}, r"'ctx' has the shape \(3, 4, 32\)"),
        (
            {"ctx": torch.zeros(4, 32), **META, "meta_net.linear1.bias": torch.full((2,), torch.nan)},
            "linear1.bias hol",
        ),
        ({"ctx": torch.zeros(4, 32), **META, "meta_net.linear1.bias": [0.0]}, "is a list, expected a plain tensor"),
    ],
)
def test_other_contents_of_other_methods(tmp_path, state, message):
    torch.save({"state_dict": state}, tmp_path / "c")
    with pytest.raises(ValueError, match=f"not a usable checkpoint.*{message}"):
        read_coop_checkpoint(tmp_path / "c")


def test_many_prompts_that_share_one_storage(tmp_path):
    """Small on the disk, and large once each is a tensor of its own."""
    vectors = torch.zeros(4096, 512)
    state = {f"{BLOCK}.{k}.VPT_shallow": vectors for k in range(1, 400)}
    torch.save({"state_dict": {**WHOLE, "image_encoder.VPT": vectors, **state}}, tmp_path / "c")
    refuses_at_once(tmp_path / "c", "claims more than 268,435,456 learned values")


@pytest.mark.parametrize("kind", ["system", "eval"])
@pytest.mark.parametrize("case", ["maple", "vpt", "cocoop", "promptsrc"])
def test_no_code_runs_from_files_of_other_methods(deep_base, tokenizer, tmp_path, case, kind):
    path, _ = write(case, tmp_path, deep_base, tokenizer, more=calls(tmp_path)[kind])
    with pytest.raises(ValueError, match="reading it would run .* The file was not loaded"):
        read_coop_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", ["maple", "tcp"])
def test_files_of_other_methods_changed_anywhere(deep_base, tokenizer, tmp_path, case):
    path, _ = write(case, tmp_path, deep_base, tokenizer)
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith(".pkl")]
        records = {name: archive.read(name) for name in archive.namelist()}
    random = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(records[pickled])
        for place in random.integers(0, len(changed), 3):
            changed[place] = random.integers(0, 256)
        with zipfile.ZipFile(tmp_path / "c", "w") as archive:
            for name, content in records.items():
                archive.writestr(name, bytes(changed) if name == pickled else content)
        try:
            tensors = read_coop_checkpoint(tmp_path / "c")["tensors"]
            assert all(torch.isfinite(value).all() for value in tensors.values())
        except ValueError as error:
            assert "not a usable checkpoint" in str(error)


def test_the_frozen_rest_is_not_read(deep_base, tokenizer, tmp_path):
    """Whatever it holds: it is the base's."""
    path, _ = write("maple", tmp_path, deep_base, tokenizer)
    checkpoint = torch.load(path, weights_only=False)
    for key, value in checkpoint["state_dict"].items():
        if key.startswith("image_encoder"):
            value.fill_(float("nan"))
    torch.save(checkpoint, path)
    assert read_coop_checkpoint(path)["method"] == "maple"


# ---------------------------------------------------------------------- anything else


class Code:
    """Pickles into a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def calls(folder):
    marker = str(folder / "ran")
    return {
        "system": Code(os.system, f"touch {marker}"),
        "eval": Code(eval, f"open({marker!r}, 'w')"),
        "open": Code(open, marker, "w"),
        "popen": Code(subprocess.Popen, ["touch", marker]),
        "torch.load": Code(torch.load, marker),
    }


@pytest.mark.parametrize("kind", ["system", "eval", "open", "popen", "torch.load"])
@pytest.mark.parametrize("place", ["alone", "epoch", "scheduler", "state_dict"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_code_never_runs(tmp_path, kind, place, legacy):
    code = calls(tmp_path)[kind]
    good = {"state_dict": {"ctx": torch.zeros(4, 8)}, "epoch": 1, "scheduler": {}}
    if place == "alone":
        good = code
    elif place == "epoch":
        good["epoch"] = code
    else:
        good[place]["x"] = code
    torch.save(good, tmp_path / "c", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="reading it would run .* The file was not loaded"):
        read_coop_checkpoint(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_stand_ins_run_nothing(tmp_path, monkeypatch):
    """Classes whose objects are passed over are never made, and keep no state."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = CosineAnnealingLR(optimizer, 5)
    torch.save({"state_dict": {"ctx": torch.zeros(4, 8)}, "scheduler": {"successor": scheduler}}, tmp_path / "c")
    monkeypatch.setattr(torch.optim.SGD, "__setstate__", lambda *_: pytest.fail("was made"))
    assert read_coop_checkpoint(tmp_path / "c")["context"].shape == (4, 8)


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda: torch.zeros(4, 8), "holds a Tensor, expected a dict with 'state_dict'"),
        (lambda: {"ctx": torch.zeros(4, 8)}, "no dict 'state_dict'; its keys are 'ctx'"),
        (lambda: {"state_dict": {}}, "keys none; expected 'ctx'"),
        (
            lambda: {"state_dict": {"ctx": torch.zeros(4, 8), "fc.weight": torch.zeros(1)}},
            "the keys 'ctx', 'fc.weight'",
        ),
        (
            lambda: {"state_dict": {"ctx": torch.zeros(4, 8), "meta_net.linear1.bias": torch.zeros(1)}},
            "keys 'ctx', 'meta",
        ),
        (lambda: {"state_dict": {"ctx": torch.zeros(8)}}, r"the shape \(8,\)"),
        (lambda: {"state_dict": {"ctx": torch.zeros(2, 4, 8, 1)}}, r"the shape \(2, 4, 8, 1\)"),
        (lambda: {"state_dict": {"ctx": torch.zeros(0, 8)}}, r"the shape \(0, 8\)"),
        (lambda: {"state_dict": {"ctx": torch.zeros(4, 8, dtype=torch.int64)}}, "dtype torch.int64"),
        (lambda: {"state_dict": {"ctx": [1.0, 2.0]}}, "'ctx' is a list, expected a plain tensor"),
        (lambda: {"state_dict": {"ctx": torch.full((4, 8), float("nan"))}}, "NaN or infinite"),
        (lambda: {"state_dict": {"ctx": torch.zeros(1).expand(10**9, 512)}}, "claims the shape .* more than the file"),
        (
            lambda: {"state_dict": {"ctx": torch.zeros(3, 4, 8), "token_prefix": torch.zeros(2, 1, 8)}},
            r"disagree on the number of classes: \[2, 3\]",
        ),
        (
            lambda: {"state_dict": {"ctx": torch.zeros(4, 8), "token_prefix": torch.zeros(2, 2, 8)}},
            "'token_prefix' has the shape",
        ),
        (
            lambda: {"state_dict": {"ctx": torch.zeros(4, 8), "token_suffix": torch.zeros(2, 9, 7)}},
            "'token_suffix' has the shape",
        ),
    ],
)
def test_other_contents(tmp_path, content, message):
    torch.save(content(), tmp_path / "c")
    with pytest.raises(ValueError, match=message):
        read_coop_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"hello", b"\x80\x02" + b"(" * 5000])
def test_other_files(tmp_path, content):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ValueError, match="not a usable checkpoint"):
        read_coop_checkpoint(tmp_path / "c")


def test_cut_off_anywhere(tokenizer, base, tmp_path):
    write_checkpoint(tmp_path / "whole", tokenizer, base, names=["cat"])
    whole = (tmp_path / "whole").read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 40)):
        (tmp_path / "c").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a usable checkpoint"):
            read_coop_checkpoint(tmp_path / "c")


def test_changed_anywhere(tokenizer, base, tmp_path):
    write_checkpoint(tmp_path / "whole", tokenizer, base, names=["cat"])
    whole = bytearray((tmp_path / "whole").read_bytes())
    random = np.random.default_rng(0)
    for _ in range(150):
        changed = bytearray(whole)
        for place in random.integers(0, len(whole), 4):
            changed[place] = random.integers(0, 256)
        (tmp_path / "c").write_bytes(changed)
        try:
            assert torch.isfinite(read_coop_checkpoint(tmp_path / "c")["context"]).all()
        except ValueError as error:
            assert "not a usable checkpoint" in str(error)


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "c", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"state_dict": {}}, protocol=2))
    with pytest.raises(ValueError, match="not a usable checkpoint"):
        read_coop_checkpoint(tmp_path / "c")


# ---------------------------------------------------------------------- what grows on being read


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refuses_at_once(path, message):
    before, started = peak(), time.monotonic()
    with pytest.raises(ValueError, match=message):
        read_coop_checkpoint(path)
    assert time.monotonic() - started < 2 and peak() - before < 100, "seconds and megabytes"


def test_a_deflated_pickle(tmp_path):
    with zipfile.ZipFile(tmp_path / "c", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("archive/data.pkl", "w", force_zip64=True) as record:
            record.write(b"\x80\x02X" + (200_000_000).to_bytes(4, "little"))
            for _ in range(200):
                record.write(b"a" * 1_000_000)
            record.write(b".")
        file.writestr("archive/version", "3")
    assert os.path.getsize(tmp_path / "c") < 2_000_000
    refuses_at_once(tmp_path / "c", "not a usable checkpoint.*its records are compressed")


def test_a_pickle_that_is_large(tmp_path):
    torch.save({"state_dict": {"ctx": torch.zeros(4, 8)}, "x": "a" * 20_000_000}, tmp_path / "c")
    refuses_at_once(tmp_path / "c", "its pickle has 20,000,... bytes, at most 2,097,152 are read")


def test_a_long_text_in_a_legacy_file(tmp_path):
    content = {"state_dict": "a" * 20_000_000}
    torch.save(content, tmp_path / "c", _use_new_zipfile_serialization=False)
    refuses_at_once(tmp_path / "c", "not a usable checkpoint.*it cannot be read")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_of_many_steps(tmp_path, legacy):
    """Each step is one byte, and costs a microsecond and a list."""
    if legacy:
        torch.save({"state_dict": {}}, tmp_path / "c", _use_new_zipfile_serialization=False)
        with open(tmp_path / "c", "rb+") as file:
            file.write(b"\x80\x02" + b"(" * 1_000_000 + b".")
    else:
        with zipfile.ZipFile(tmp_path / "c", "w") as file:
            file.writestr("archive/data.pkl", b"\x80\x02" + b"(" * 1_000_000 + b".")
            file.writestr("archive/version", "3")
    refuses_at_once(tmp_path / "c", "its pickle has more than 200,000 steps")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_memory_that_is_asked_for(tmp_path, legacy):
    """`bytearray(n)` is the one call of `weights_only` that allocates what it is told to."""
    content = {"state_dict": {"ctx": torch.zeros(4, 8)}, "x": Code(bytearray, 3_000_000_000)}
    torch.save(content, tmp_path / "c", _use_new_zipfile_serialization=not legacy)
    refuses_at_once(tmp_path / "c", "reading it would run builtins.bytearray")


@pytest.mark.parametrize("shape", [(4097, 8), (4, 16_385)])
def test_a_context_of_no_real_size(tmp_path, shape):
    torch.save({"state_dict": {"ctx": torch.zeros(shape)}}, tmp_path / "c")
    refuses_at_once(tmp_path / "c", "at most 4,096 vectors of 16,384 numbers")


def test_a_sparse_checkpoint(tmp_path):
    with open(tmp_path / "c", "wb") as file:
        file.write(b"PK\x03\x04" + b"a" * 4096)
        file.truncate(1_500_000_000)
    refuses_at_once(tmp_path / "c", "says that it has 1,500,000,000 bytes, and .* are on the disk")


@pytest.mark.parametrize("key", ["ctx", "token_prefix"])
def test_tensors_without_values(tmp_path, key):
    state = {"ctx": torch.zeros(4, 8), "token_prefix": torch.zeros(2, 1, 8)}
    torch.save({"state_dict": {**state, key: state[key].to("meta")}}, tmp_path / "c")
    with pytest.raises(ValueError, match=f"'{key}' is on the device 'meta' and holds no values"):
        read_coop_checkpoint(tmp_path / "c")


def test_read_as_an_adapter_is(tokenizer, base, tmp_path):
    context = write_checkpoint(tmp_path / "c", tokenizer, base, class_specific=True)
    embedding = base.text_model.embeddings.token_embedding.weight
    config, tensors = checkpoint_to_adapter(read_coop_checkpoint(tmp_path / "c"), embedding, tokenizer, NAMES, "front")
    assert config == CoOpConfig(4, "front", True, class_names=NAMES, merge_full_stop=True, original_crop=True)
    assert list(tensors) == ["prompt_embeddings"] and torch.equal(tensors["prompt_embeddings"], context)
    write_adapter(tmp_path / "a", config, tensors)
    assert read_adapter(tmp_path / "a")[0] == config


# ---------------------------------------------------------------------- the command line


def test_command_line(tokenizer, processor, base, base_folder, tmp_path, capsys):
    context = write_checkpoint(tmp_path / "out" / "prompt_learner" / "model.pth.tar-50", tokenizer, base)
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    (tmp_path / "names.json").write_text(json.dumps(NAMES[:2]))
    arguments = [str(tmp_path / "out"), str(tmp_path / "a"), "--base_model", str(base_folder)]
    assert main([*arguments, "--class_names", str(tmp_path / "names.txt"), "--class_token_position", "middle"]) == 0
    assert "unified context, 4 vectors of 32, 4 classes" in capsys.readouterr().out
    model = CoOpModel.from_pretrained(tmp_path / "a")
    assert torch.equal(model.context.detach(), context) and model.class_names == NAMES
    assert model.config.class_token_position == "middle"
    assert main([*arguments, "--class_names", str(tmp_path / "names.json")]) == 0
    assert CoOpModel.from_pretrained(tmp_path / "a").class_names == NAMES[:2]
    assert main([*arguments, "--epoch", "3"]) == 1
    assert "error: " in capsys.readouterr().err


def test_command_line_with_another_method(deep_base, tokenizer, processor, tmp_path, capsys):
    deep_base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    write("tcp", tmp_path / "out", deep_base, tokenizer)
    (tmp_path / "names.json").write_text(json.dumps(OTHER_NAMES))
    arguments = [str(tmp_path / "out"), str(tmp_path / "a"), "--base_model", str(tmp_path / "base")]
    arguments += ["--class_names", str(tmp_path / "names.json"), "--template", "art of the {}!"]
    assert main(arguments) == 0
    count = 4 * 32 + 8 * 32 + 8 + 128 * 8 + 128
    assert f"adapter of the method 'tcp', {count:,} values, 4 classes" in capsys.readouterr().out
    model = CoOpModel.from_pretrained(tmp_path / "a")
    assert model.class_names == OTHER_NAMES and model.config.template == "art of the {}!"
    direct = CoOpModel.from_coop_checkpoint(
        tmp_path / "out", deep_base, OTHER_NAMES, processor=processor, template="art of the {}!"
    )
    assert torch.allclose(logits(model), logits(direct), atol=1e-5)


def test_command_line_as_a_module(tokenizer, base, base_folder, tmp_path):
    write_checkpoint(tmp_path / "model-best.pth.tar", tokenizer, base, class_specific=True, dtype=torch.float16)
    command = [sys.executable, "-m", "coop_hf.coop_checkpoint", str(tmp_path), str(tmp_path / "a")]
    run = subprocess.run([*command, "--base_model", str(base_folder)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "class-specific context, 4 vectors of 32, 4 classes" in run.stdout
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["class_names"][0] == "cat"
