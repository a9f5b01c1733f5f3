import json
import os
import pickle
import resource
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import make_base
from torch.optim.lr_scheduler import CosineAnnealingLR

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.files.adapter_files import read_adapter, write_adapter
from coop_hf.files.coop_checkpoint import (
    checkpoint_to_adapter,
    find_coop_checkpoint,
    from_coop_checkpoint,
    main,
    read_coop_checkpoint,
)


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
    config = CoOpConfig(n_ctx=4, class_token_position=position, class_specific=class_specific)
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
        (lambda: {"state_dict": {"ctx": torch.zeros(4, 8), "meta_net.linear1.bias": torch.zeros(1)}}, "is CoCoOp"),
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
    assert config == CoOpConfig(4, "front", True, class_names=NAMES)
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


def test_command_line_as_a_module(tokenizer, base, base_folder, tmp_path):
    write_checkpoint(tmp_path / "model-best.pth.tar", tokenizer, base, class_specific=True, dtype=torch.float16)
    command = [sys.executable, "-m", "coop_hf.files.coop_checkpoint", str(tmp_path), str(tmp_path / "a")]
    run = subprocess.run([*command, "--base_model", str(base_folder)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "class-specific context, 4 vectors of 32, 4 classes" in run.stdout
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["class_names"][0] == "cat"
