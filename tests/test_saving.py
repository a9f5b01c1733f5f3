import json
import math
import os
import re
import resource
import shutil
import signal
import stat
import struct
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from coop_hf import CoOpConfig, CoOpModel, __version__
from coop_hf.atomic import write_atomically
from coop_hf.files.adapter_files import WEIGHTS_KEY, bind_adapter, check_adapter, read_adapter, write_adapter


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DATA = Path(__file__).parent / "data"
NAMES = ["cat", "dog (cat)", "sea_lion!", "猫"]


@pytest.fixture
def image_embeds():
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def adapter(tmp_path):
    """A sound adapter's folder, to be damaged."""
    folder = tmp_path / "adapter"
    write_adapter(folder, CoOpConfig(n_ctx=4, class_names=NAMES), {WEIGHTS_KEY: torch.randn(4, 32)})
    return folder


def make_model(base, processor, names=NAMES, **kwargs):
    torch.manual_seed(0)
    return CoOpModel(base, CoOpConfig(**kwargs), names, processor)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_round_trip(base_folder, image_embeds, tmp_path, position, class_specific):
    config = CoOpConfig(n_ctx=5, class_token_position=position, class_specific=class_specific, ctx_init="a photo of")
    model = CoOpModel.from_pretrained(base_folder, config, NAMES)
    with torch.no_grad():
        model.context.add_(torch.randn_like(model.context))
    model.save_pretrained(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == ["README.md", CONFIG, WEIGHTS]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = CoOpModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.context, model.context) and loaded.config == model.config
    assert loaded.config.base_model_name_or_path == str(base_folder)
    assert torch.equal(loaded(image_embeds=image_embeds).logits, model(image_embeds=image_embeds).logits)
    assert loaded.processor.image_processor is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saved_from_any_dtype(tokenizer, tmp_path, dtype):
    """The context is fp32 and stays so, bit for bit, whatever the base is; and loads on any other."""
    model = make_model(make_base(tokenizer).to(dtype), tokenizer, n_ctx=3)
    model.to(dtype)
    with torch.no_grad():
        model.context.copy_(torch.randn(3, 32))
    model.save_pretrained(tmp_path)
    context = read_adapter(tmp_path)[1][WEIGHTS_KEY]
    assert context.dtype == torch.float32 and torch.equal(context, model.context)
    for other in (torch.float32, torch.float16):
        base = make_base(tokenizer).to(other)
        loaded = CoOpModel.from_pretrained(tmp_path, base_model=base, processor=tokenizer)
        assert torch.equal(loaded.context, model.context) and loaded.base_model.dtype == other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_context_stored_in_half_precision_loads(adapter, dtype):
    values = torch.randn(4, 32).to(dtype)
    save_file({WEIGHTS_KEY: values}, adapter / WEIGHTS)
    context = read_adapter(adapter)[1][WEIGHTS_KEY]
    assert context.dtype == torch.float32 and torch.equal(context, values.float())


def test_exact_files(base_folder, tmp_path):
    model = CoOpModel.from_pretrained(base_folder, CoOpConfig(n_ctx=4), NAMES)
    model.save_pretrained(tmp_path)
    expected = {
        "base_model_name_or_path": str(base_folder),
        "class_names": NAMES,
        "class_specific": False,
        "class_token_position": "end",
        "coop_hf_version": __version__,
        "ctx_init": None,
        "format_version": 1,
        "n_ctx": 4,
        "peft_type": "COOP_HF (no adapter of PEFT: load it with coop_hf.CoOpModel.from_pretrained)",
        "revision": None,
        "template": "a photo of a {}.",
    }
    text = (tmp_path / CONFIG).read_text(encoding="utf-8")
    assert text == json.dumps(expected, indent=2, ensure_ascii=False) + "\n", "sorted keys, two spaces"
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert list(file.keys()) == ["prompt_embeddings"] and set(file.metadata()) == {
            "format",
            "config_sha256",
            "base_sha256",
        }
        assert file.get_slice("prompt_embeddings").get_dtype() == "F32"
        assert torch.equal(file.get_tensor("prompt_embeddings"), model.context)


def test_size_and_independence_of_the_class_list(tmp_path):
    """16 vectors of 512 numbers of 4 bytes and a header, whatever the classes."""
    for count in (1, 1000):
        config = CoOpConfig(class_names=[f"class {i}" for i in range(count)])
        write_adapter(tmp_path / str(count), config, {WEIGHTS_KEY: torch.zeros(16, 512)})
        size = os.path.getsize(tmp_path / str(count) / WEIGHTS)
        assert 16 * 512 * 4 < size < 16 * 512 * 4 + 400
    assert len((tmp_path / "1" / WEIGHTS).read_bytes()) == len((tmp_path / "1000" / WEIGHTS).read_bytes())


def test_a_context_without_classes(base_folder, tmp_path, image_embeds):
    CoOpModel.from_pretrained(base_folder, CoOpConfig(n_ctx=2)).save_pretrained(tmp_path)
    loaded = CoOpModel.from_pretrained(tmp_path)
    assert loaded.class_names is None
    loaded = CoOpModel.from_pretrained(tmp_path, class_names=["sea", "dog"])
    assert loaded(image_embeds=image_embeds).logits.shape == (5, 2)


def test_other_classes_on_loading(base_folder, tmp_path):
    CoOpModel.from_pretrained(base_folder, CoOpConfig(n_ctx=2), NAMES).save_pretrained(tmp_path / "unified")
    assert CoOpModel.from_pretrained(tmp_path / "unified", class_names=["sea"]).class_names == ["sea"]
    specific = CoOpModel.from_pretrained(base_folder, CoOpConfig(n_ctx=2, class_specific=True), NAMES)
    specific.save_pretrained(tmp_path / "specific")
    with pytest.raises(ValueError, match="lacks 'cat'"):
        CoOpModel.from_pretrained(tmp_path / "specific", class_names=NAMES[1:])
    loaded = CoOpModel.from_pretrained(tmp_path / "specific", class_names=NAMES[::-1])
    assert torch.equal(loaded.context, specific.context.flip(0))


def test_whether_a_loaded_context_learns(base_folder, tmp_path, image_embeds):
    fresh = CoOpModel.from_pretrained(base_folder, CoOpConfig(n_ctx=2), NAMES)
    assert fresh.context.requires_grad
    fresh.save_pretrained(tmp_path)
    frozen = CoOpModel.from_pretrained(tmp_path)
    assert not frozen.context.requires_grad and frozen.get_nb_trainable_parameters()[0] == 0
    assert not frozen(image_embeds=image_embeds).logits.requires_grad
    learning = CoOpModel.from_pretrained(tmp_path, is_trainable=True)
    assert learning.context.requires_grad and learning.get_nb_trainable_parameters()[0] == 64
    assert not any(p.requires_grad for p in learning.base_model.parameters())


# ---------------------------------------------------------------- several adapters


def test_several_adapters(base, base_folder, tokenizer, tmp_path):
    model = make_model(base, tokenizer, n_ctx=3)
    model.add_adapter("flowers 2", CoOpConfig(n_ctx=2, class_specific=True), ["sea", "dog"])
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, WEIGHTS, "flowers 2"]
    assert sorted(os.listdir(tmp_path / "flowers 2")) == [CONFIG, WEIGHTS]
    options = {"base_model": base, "processor": tokenizer}
    for loaded in (
        CoOpModel.from_pretrained(tmp_path, subfolder="flowers 2", **options),
        CoOpModel.from_pretrained(tmp_path / "flowers 2", adapter_name="x", **options),
    ):
        assert torch.equal(loaded.context, model.adapters["flowers 2"].context)
        assert loaded.class_names == ["sea", "dog"]

    both = CoOpModel.from_pretrained(tmp_path, **options)
    both.load_adapter(tmp_path, "second", subfolder="flowers 2")
    both.load_adapter(tmp_path / "flowers 2", "third", is_trainable=True, class_names=["dog", "sea"])
    assert both.active_adapter == "default", "loading does not activate"
    assert not any(a.context.requires_grad for a in both.adapters.values())
    both.set_adapter("second")
    assert not both.context.requires_grad and both.class_names == ["sea", "dog"]
    both.set_adapter("third")
    assert both.context.requires_grad
    assert torch.equal(both.context, model.adapters["flowers 2"].context.flip(0))
    with pytest.raises(ValueError, match="'third' already"):
        both.load_adapter(tmp_path, "third")
    for bad in (["cow", "sea"], ["cat", "cat"]):
        with pytest.raises(ValueError):
            both.load_adapter(tmp_path / "flowers 2", "fourth", class_names=bad)
    with pytest.raises(FileNotFoundError):
        both.load_adapter(tmp_path / "nowhere", "fourth")
    assert list(both.adapters) == ["default", "second", "third"], "what failed leaves nothing behind"


def test_chosen_adapters(base, tokenizer, tmp_path):
    model = make_model(base, tokenizer, n_ctx=3)
    model.add_adapter("other", CoOpConfig(n_ctx=2), ["sea"])
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert sorted(os.listdir(tmp_path)) == ["README.md", "other"]
    with pytest.raises(FileNotFoundError, match="It holds the adapters 'other': pass `subfolder=`"):
        CoOpModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no adapter named 'nobody'"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["other", "nobody"])
    assert not (tmp_path / "new").exists(), "checked before anything is written"


# ---------------------------------------------------------------- where the base is


def test_base_named_by_a_relative_path(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(base_folder.parent)
    model = CoOpModel.from_pretrained("./tiny-clip", CoOpConfig(n_ctx=2), ["cat"])
    assert model.config.base_model_name_or_path == "./tiny-clip", "as the user wrote it"
    model.save_pretrained(tmp_path)
    assert torch.equal(CoOpModel.from_pretrained(tmp_path).context, model.context)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"'./tiny-clip' of the adapter .* could not be loaded.* pass `base_model=`"):
        CoOpModel.from_pretrained(tmp_path)
    moved = CoOpModel.from_pretrained(tmp_path, base_model=base_folder)
    assert torch.equal(moved.context, model.context)


def test_a_moved_base(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "old")
    CoOpModel.from_pretrained(tmp_path / "old", CoOpConfig(n_ctx=2), ["cat"]).save_pretrained(tmp_path / "adapter")
    os.rename(tmp_path / "old", tmp_path / "new")
    with pytest.raises(OSError, match=f"{re.escape(str(tmp_path / 'old'))}.*could not be loaded.*`base_model=`"):
        CoOpModel.from_pretrained(tmp_path / "adapter")
    found = CoOpModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "new")
    found.save_pretrained(tmp_path / "again")
    again = CoOpModel.from_pretrained(tmp_path / "again")  # saved anew, it names the base that it really has
    assert again.config.base_model_name_or_path == str(tmp_path / "new")


def test_a_base_that_has_been_loaded(base_folder, base, tokenizer, tmp_path):
    CoOpModel.from_pretrained(base_folder, CoOpConfig(n_ctx=2), ["cat"]).save_pretrained(tmp_path)
    assert CoOpModel.from_pretrained(tmp_path, base_model=base, processor=tokenizer).base_model is base
    with pytest.raises(ValueError, match="pass its `processor` too"):
        CoOpModel.from_pretrained(tmp_path, base_model=base)
    loaded = CLIPModel.from_pretrained(base_folder)
    model = CoOpModel(loaded, CoOpConfig(n_ctx=2), ["cat"], tokenizer)
    assert model.config.base_model_name_or_path == str(base_folder), "read off the base"


def test_an_adapter_that_names_no_base(adapter, base, tokenizer):
    with pytest.raises(ValueError, match="does not name its base model: pass `base_model=`"):
        CoOpModel.from_pretrained(adapter)
    assert CoOpModel.from_pretrained(adapter, base_model=base, processor=tokenizer).class_names == NAMES


def test_contradicting_arguments(base_folder, adapter):
    with pytest.raises(ValueError, match="is an adapter and has its own configuration"):
        CoOpModel.from_pretrained(adapter, CoOpConfig())
    with pytest.raises(ValueError, match="is not an adapter, so `base_model` has no place"):
        CoOpModel.from_pretrained(base_folder, base_model=base_folder)
    with pytest.raises(FileNotFoundError, match="folder 'x', holds neither an adapter"):
        CoOpModel.from_pretrained(base_folder, subfolder="x")


def test_no_model_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither an adapter .* nor a base model"):
        CoOpModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        CoOpModel.from_pretrained(tmp_path / "missing")
    with pytest.raises(OSError, match="not in the cache"):
        CoOpModel.from_pretrained("owner/missing", local_files_only=True, cache_dir=tmp_path)


def test_a_base_with_a_tokenizer_alone(base, tokenizer, tmp_path):
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = CoOpModel.from_pretrained(tmp_path, CoOpConfig(n_ctx=2), ["dog (cat)"])
    assert model.get_text_features().shape == (1, 24)
    with pytest.raises(ValueError, match="tokenizer alone"):
        _ = model.image_processor


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map_and_dtype(base_folder, image_embeds, tmp_path, device_map):
    fresh = CoOpModel.from_pretrained(base_folder, CoOpConfig(n_ctx=2), NAMES, device_map=device_map)
    assert fresh.base_model.dtype == torch.float32 and fresh.context.device.type == fresh.device.type
    expected = fresh(image_embeds=image_embeds).logits
    fresh.save_pretrained(tmp_path)
    loaded = CoOpModel.from_pretrained(tmp_path, device_map=device_map, attn_implementation="eager")
    assert loaded.base_model.config._attn_implementation == "eager"
    torch.testing.assert_close(loaded(image_embeds=image_embeds).logits, expected.detach(), rtol=0, atol=1e-5)
    half = CoOpModel.from_pretrained(tmp_path, device_map=device_map, dtype=torch.bfloat16)
    assert half.base_model.dtype == torch.bfloat16 and half.context.dtype == torch.float32
    assert (half(image_embeds=image_embeds).logits - expected).abs().max() < 0.3


@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.parametrize("offloaded", ["text_model", "vision_model", ""])
def test_a_base_offloaded_to_disk(base_folder, image_embeds, tmp_path, offloaded):
    """accelerate reads the weights of each module when it runs; until then they are on the meta device."""
    parts = ("text_model", "vision_model", "text_projection", "visual_projection", "logit_scale")
    device_map = {part: "disk" if part == offloaded else "cpu" for part in parts} if offloaded else {"": "disk"}
    config = CoOpConfig(n_ctx=3, ctx_init="a photo of")
    expected = CoOpModel.from_pretrained(base_folder, config, NAMES)
    options = {"device_map": device_map, "offload_folder": tmp_path}
    if not hasattr(CLIPModel.from_pretrained(base_folder, **options), "hf_device_map"):
        # Older versions of transformers put nothing on a model that goes to one place alone: it does not run at all.
        with pytest.raises(ValueError, match="are on no device: transformers .* Keep a part elsewhere"):
            CoOpModel.from_pretrained(base_folder, config, NAMES, **options)
        return
    model = CoOpModel.from_pretrained(base_folder, config, NAMES, **options)
    assert torch.equal(model.context, expected.context)
    inputs = {"image_embeds": image_embeds, "labels": torch.tensor([0, 1, 2, 3, 0])}
    loss, expected_loss = model(**inputs).loss, expected(**inputs).loss
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, model.context)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected_loss, expected.context)[0], rtol=1e-4, atol=1e-6)
    pixels = torch.ones(2, 3, 16, 16)
    torch.testing.assert_close(model.get_image_features(pixels), expected.get_image_features(pixels))


# ---------------------------------------------------------------- damaged files


def edit_config(folder, **values):
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**config, **values}), encoding="utf-8")


def edit(folder, **values):
    edit_config(folder, **values)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)  # as a stranger's program writes it: bound to nothing


def with_header(header, data=b"", size=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def entry(dtype="F32", shape=(4, 32), length=512):
    return {WEIGHTS_KEY: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, length]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (b"\x01\x00", "cut off"),
        (with_header(b"", size=2**63), "announces a header of 9,223,372,036,854,775,808"),
        (with_header(b"{}", size=10**7), "announces a header of 10,000,000"),
        (with_header(b" " * 70_000 + b"{}"), "announces a header of 70,002"),
        (with_header(b"not json"), "not a usable adapter"),
        (with_header(b"[" * 60_000), "not a usable adapter"),
        (with_header(b'{"a":' * 10_000), "not a usable adapter"),
        (with_header({}), "it holds \\[\\], expected the one tensor 'prompt_embeddings'"),
        (with_header(entry(), b"\x00" * 511), "not a usable adapter"),
        (with_header(entry(), b"\x00" * 513), "not a usable adapter"),
        (with_header(entry(shape=(4, 31)), b"\x00" * 512), "not a usable adapter"),
        (with_header(entry(shape=(2**40, 2**40)), b"\x00" * 512), "not a usable adapter"),
        (with_header(entry(shape=(4, 0), length=0)), "shape \\(4, 0\\)"),
        (with_header(entry("F99"), b"\x00" * 512), "not a usable adapter"),
        (b"PK\x03\x04" + b"\x00" * 200, "not a usable adapter"),
        (b"\x80\x02}q\x00." + b"\x00" * 200, "not a usable adapter"),
    ],
)
def test_damaged_weights(adapter, base, tokenizer, content, message):
    (adapter / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        CoOpModel.from_pretrained(adapter, base_model=base, processor=tokenizer)
    assert str(adapter / WEIGHTS) in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("length", [0, 4, 7, 8, 9, 40, 90, 200, -1])
def test_truncated_weights(adapter, length):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[:length])
    with pytest.raises(ValueError, match="not a usable adapter"):
        read_adapter(adapter)


@pytest.mark.filterwarnings("ignore:.*names another base model")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_weights_with_any_damage(tmp_path_factory, data):
    """Flipped bytes give a clear error or a context of the right kind, never another exception."""
    folder = tmp_path_factory.mktemp("damaged")
    write_adapter(folder, CoOpConfig(n_ctx=2), {WEIGHTS_KEY: torch.zeros(2, 3)})
    content = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    (folder / WEIGHTS).write_bytes(bytes(content[:length]))
    try:
        context = read_adapter(folder)[1][WEIGHTS_KEY]
    except ValueError as error:
        assert "not a usable adapter" in str(error) or "not of one save" in str(error)
    else:
        assert context.shape[0] == 2 and context.dtype == torch.float32 and torch.isfinite(context).all()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"context": torch.zeros(4, 32)}, r"it holds \['context'\], expected the one tensor 'prompt_embeddings'"),
        ({WEIGHTS_KEY: torch.zeros(4, 32), "token_prefix": torch.zeros(1)}, "expected the one tensor"),
        ({f"key{i}": torch.zeros(1) for i in range(100)}, "expected the one tensor"),
        ({WEIGHTS_KEY: torch.zeros(3, 32)}, r"shape \(3, 32\), and its configuration asks for \(4, dim\)"),
        ({WEIGHTS_KEY: torch.zeros(128)}, r"shape \(128,\)"),
        ({WEIGHTS_KEY: torch.zeros(4, 4, 32)}, r"shape \(4, 4, 32\)"),
        ({WEIGHTS_KEY: torch.tensor(1.0)}, r"shape \(\)"),
        ({WEIGHTS_KEY: torch.zeros(4, 32, dtype=torch.float64)}, "dtype F64, expected F32, F16 or BF16"),
        ({WEIGHTS_KEY: torch.zeros(4, 32, dtype=torch.int64)}, "dtype I64"),
        ({WEIGHTS_KEY: torch.zeros(4, 32, dtype=torch.bool)}, "dtype BOOL"),
        ({WEIGHTS_KEY: torch.full((4, 32), torch.nan)}, "holds NaN or infinite values"),
        ({WEIGHTS_KEY: torch.tensor([[1.0] * 31 + [torch.inf]] * 4)}, "holds NaN or infinite values"),
        ({WEIGHTS_KEY: torch.tensor([[1.0] * 31 + [-torch.inf]] * 4).half()}, "holds NaN or infinite values"),
    ],
)
def test_wrong_weights(adapter, base, tokenizer, tensors, message):
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ValueError, match=message) as error:
        CoOpModel.from_pretrained(adapter, base_model=base, processor=tokenizer)
    assert str(adapter / WEIGHTS) in str(error.value)
    model = make_model(base, tokenizer)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(adapter, "second")
    assert list(model.adapters) == ["default"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_ctx": 4096}, r"shape \(4, 32\), and its configuration asks for \(4096, dim\)"),
        ({"n_ctx": 10**12}, "`n_ctx` must be a whole number"),
        ({"n_ctx": None, "ctx_init": "a photo"}, "does not say `n_ctx`"),
        ({"n_ctx": "4"}, "`n_ctx` must be"),
        ({"class_specific": True}, r"asks for \(4, 4, dim\)"),
        ({"class_specific": True, "class_names": None}, "class-specific but names no classes"),
        ({"class_names": ["x\x1b]0;y"]}, "control characters"),
        ({"class_names": ["cat " * 60]}, r"40 positions: .*\(by "),
        ({"format_version": 7}, "format version 7.*upgrade coop_hf"),
        ({"class_token_position": "start"}, "got 'start'"),
    ],
)
def test_wrong_configurations(adapter, base, tokenizer, values, message):
    edit(adapter, **values)
    with pytest.raises(ValueError, match=message):
        CoOpModel.from_pretrained(adapter, base_model=base, processor=tokenizer)


def test_unknown_keys_warn(adapter, base, tokenizer):
    edit(adapter, new_option=3)
    with pytest.warns(UserWarning, match="ignored: new_option"):
        CoOpModel.from_pretrained(adapter, base_model=base, processor=tokenizer)


def test_an_adapter_of_another_width(adapter, tokenizer):
    base = make_base(tokenizer, width=64)
    with pytest.raises(ValueError, match="have 32 dimensions, and the base's token embeddings have 64"):
        CoOpModel.from_pretrained(adapter, base_model=base, processor=tokenizer)


def test_a_missing_file(adapter, base, tokenizer):
    os.remove(adapter / WEIGHTS)
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS} in"):
        CoOpModel.from_pretrained(adapter, base_model=base, processor=tokenizer)


# ---------------------------------------------------------------- two files, one adapter


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    """safetensors' own order of the metadata is of chance: of 12 files, all equal."""
    config = CoOpConfig(n_ctx=4, class_names=NAMES)
    files = set()
    for i in range(12):
        write_adapter(tmp_path / str(i), config, {WEIGHTS_KEY: torch.ones(4, 32)})
        files.add((tmp_path / str(i) / WEIGHTS).read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("first", [CONFIG, WEIGHTS])
def test_files_of_two_saves_are_not_mixed(tmp_path, first):
    """The same shapes, other classes: what a kill between two renames would leave."""
    write_adapter(tmp_path / "a", CoOpConfig(n_ctx=4, class_names=["cat", "dog"]), {WEIGHTS_KEY: torch.ones(4, 32)})
    write_adapter(tmp_path / "b", CoOpConfig(n_ctx=4, class_names=["dog", "cat"]), {WEIGHTS_KEY: torch.zeros(4, 32)})
    shutil.copy(tmp_path / "a" / first, tmp_path / "b" / first)
    with pytest.raises(ValueError, match="are not of one save: .*bind_adapter"):
        read_adapter(tmp_path / "b")
    with pytest.raises(ValueError, match="are not of one save"):
        check_adapter(tmp_path / "b")
    bind_adapter(tmp_path / "b")
    config, tensors = read_adapter(tmp_path / "b")
    assert config.class_names == (["cat", "dog"] if first == CONFIG else ["dog", "cat"])
    assert tensors[WEIGHTS_KEY].unique().tolist() == [0.0 if first == CONFIG else 1.0]


def test_the_base_may_be_renamed_by_hand(tmp_path):
    write_adapter(tmp_path, CoOpConfig(n_ctx=4, base_model_name_or_path="/my/clip"), {WEIGHTS_KEY: torch.ones(4, 32)})
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text.replace("/my/clip", "ada/clip").replace("\n", "\r\n"))
    with pytest.warns(UserWarning, match="names another base model than when it was saved .'ada/clip' now."):
        assert read_adapter(tmp_path)[0].base_model_name_or_path == "ada/clip"
    bind_adapter(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_adapter(tmp_path)


def test_a_full_disk_at_the_second_file_changes_neither(tmp_path, monkeypatch):
    write_adapter(tmp_path, CoOpConfig(n_ctx=4, class_names=["cat"]), {WEIGHTS_KEY: torch.zeros(4, 32)})
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    synced = []

    def full(handle):
        synced.append(handle)
        if len(synced) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(tmp_path, CoOpConfig(n_ctx=4, class_names=["dog"]), {WEIGHTS_KEY: torch.ones(4, 32)})
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own")
@pytest.mark.parametrize("n_ctx", [2, 3])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_at_any_rename_leaves_a_whole_adapter(tmp_path, monkeypatch, renames, n_ctx):
    old, new = CoOpConfig(n_ctx=2, class_names=["old"]), CoOpConfig(n_ctx=n_ctx, class_names=["new"])
    write_adapter(tmp_path, old, {WEIGHTS_KEY: torch.zeros(2, 4)})
    child = os.fork()
    if child == 0:
        replace, done = os.replace, []

        def dies(*paths):
            if len(done) == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(replace(*paths))

        monkeypatch.setattr("os.replace", dies)
        try:
            write_adapter(tmp_path, new, {WEIGHTS_KEY: torch.ones(n_ctx, 4)})
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    config, tensors = read_adapter(tmp_path)
    assert config == check_adapter(tmp_path) == (new if renames else old)
    assert tensors[WEIGHTS_KEY].unique().tolist() == [float(renames > 0)]
    write_adapter(tmp_path, old, {WEIGHTS_KEY: torch.zeros(2, 4)})
    assert read_adapter(tmp_path)[0] == old, "the next save counts, whatever the kill left"


def test_an_adapter_that_changes_while_it_is_loaded(tmp_path):
    first, second = CoOpConfig(n_ctx=2, class_names=["a", "b"]), CoOpConfig(n_ctx=2, class_names=["b", "a"])
    write_adapter(tmp_path, first, {WEIGHTS_KEY: torch.zeros(2, 4)})
    checked = check_adapter(tmp_path)
    assert read_adapter(tmp_path, config=checked)[0] == first
    write_adapter(tmp_path, second, {WEIGHTS_KEY: torch.ones(2, 4)})
    with pytest.raises(ValueError, match="another adapter was saved to .* load it again"):
        read_adapter(tmp_path, config=checked)


def test_temporary_files_of_a_kill_are_swept(tmp_path):
    config, tensors = CoOpConfig(n_ctx=4), {WEIGHTS_KEY: torch.ones(4, 32)}
    old, new = tmp_path / f".{WEIGHTS}.abcd_123", tmp_path / f".{CONFIG}.efgh4567"
    mine = tmp_path / f".{WEIGHTS}.backup"
    for path in (old, new, mine):
        path.write_text("half")
    os.utime(old, (1, 1))
    os.utime(mine, (1, 1))
    write_adapter(tmp_path, config, tensors)
    assert sorted(os.listdir(tmp_path)) == sorted([new.name, mine.name, CONFIG, WEIGHTS])


def test_savers_and_readers_at_once_never_mix(tmp_path):
    """Two threads save adapters whose class name tells their vectors; whoever reads finds them together."""
    from threading import Event, Thread

    done, problems = Event(), []

    def save(number):
        for i in range(40):
            value = 100 * number + i
            config = CoOpConfig(n_ctx=2, class_names=[f"class {value}"])
            write_adapter(tmp_path, config, {WEIGHTS_KEY: torch.full((2, 4), float(value))})

    def read():
        while not done.is_set():
            try:
                config, tensors = read_adapter(tmp_path)
                if config.class_names != [f"class {int(tensors[WEIGHTS_KEY][0, 0])}"]:
                    problems.append(f"{config.class_names} with {tensors[WEIGHTS_KEY][0, 0]}")
            except Exception as error:
                problems.append(error)

    write_adapter(tmp_path, CoOpConfig(n_ctx=2, class_names=["class 7"]), {WEIGHTS_KEY: torch.full((2, 4), 7.0)})
    savers, readers = [Thread(target=save, args=(k,)) for k in (1, 2)], [Thread(target=read) for _ in range(2)]
    for thread in savers + readers:
        thread.start()
    for thread in savers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not problems, problems[:3]
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


# ---------------------------------------------------------------- any method: several tensors


@pytest.fixture
def wave(monkeypatch):
    from dataclasses import dataclass

    from coop_hf.config import CONFIGS, PromptConfig

    monkeypatch.setattr("coop_hf.config.CONFIGS", dict(CONFIGS))

    @dataclass
    class WaveConfig(PromptConfig, method="wave"):
        height: int = 3

    return WaveConfig


def test_several_tensors(wave, tmp_path):
    tensors = {"deep.0": torch.randn(4, 32), "coupling.bias": torch.randn(8), "scale": torch.tensor(2.0)}
    write_adapter(tmp_path, wave(class_names=["cat"]), tensors)
    shapes = {"deep.0": (4, None), "coupling.bias": (8,), "scale": ()}
    for expected in (None, shapes):
        config, found = read_adapter(tmp_path, expected)
        assert config == wave(class_names=["cat"]) == check_adapter(tmp_path, expected)
        assert set(found) == set(tensors) and all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"deep.0": (4, 31), "bias": (8,)}, r"'deep.0' has the shape \(4, 32\), and the model expects \(4, 31\)"),
        ({"deep.0": (None, 4, 32), "bias": (8,)}, r"expects \(dim, 4, 32\)"),
        ({"deep.0": (4, 32)}, r"holds \['bias', 'deep.0'\], expected the one tensor 'deep.0'"),
        ({"deep.0": (4, 32), "bias": (8,), "x": ()}, "expected the tensors 'bias', 'deep.0', 'x'"),
    ],
)
def test_other_shapes_than_the_model_expects(wave, tmp_path, expected, message):
    write_adapter(tmp_path, wave(), {"deep.0": torch.randn(4, 32), "bias": torch.randn(8)})
    for function in (read_adapter, check_adapter):
        with pytest.raises(ValueError, match=message):
            function(tmp_path, expected)


def test_what_is_not_finite_is_named(wave, tmp_path):
    with pytest.raises(ValueError, match="'b' holds NaN or infinite values and is not saved"):
        write_adapter(tmp_path / "new", wave(), {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])})
    assert not (tmp_path / "new").exists()


def test_a_header_is_checked_without_reading_values(adapter):
    save_file({WEIGHTS_KEY: torch.full((4, 32), torch.nan)}, adapter / WEIGHTS)
    assert check_adapter(adapter).n_ctx == 4
    save_file({WEIGHTS_KEY: torch.zeros(5, 32)}, adapter / WEIGHTS)
    with pytest.raises(ValueError, match=r"shape \(5, 32\), and its configuration asks for \(4, dim\)"):
        check_adapter(adapter)


# ---------------------------------------------------------------- what claims to be large


def sparse(path, key, shape, item=4):
    length = item * math.prod(shape)
    header = json.dumps({key: {"dtype": "F32", "shape": shape, "data_offsets": [0, length]}}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + length)


@pytest.mark.parametrize(
    ("n_ctx", "dim", "message"),
    [
        (4, 100_000_000, r"shape \(4, 100000000\), and its configuration asks for \(4, dim\)"),
        (4096, 16_384, "says that it has 268,435,5.. bytes, and .* are on the disk"),
    ],
)
def test_a_file_that_is_not_really_there(adapter, n_ctx, dim, message):
    (adapter / WEIGHTS).unlink()
    edit_config(adapter, n_ctx=n_ctx)
    sparse(adapter / WEIGHTS, WEIGHTS_KEY, [n_ctx, dim])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(ValueError, match=message):
        read_adapter(adapter)
    assert time.monotonic() - started < 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 50, "megabytes"


def test_more_values_than_any_adapter_has(wave, tmp_path):
    wave().save_pretrained(tmp_path)
    sparse(tmp_path / WEIGHTS, "deep", [2**10, 2**19])
    with pytest.raises(ValueError, match="claims 536,870,912 values; an adapter has at most 268,435,456"):
        read_adapter(tmp_path)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_diverged_context_is_not_saved(base, tokenizer, tmp_path, value):
    model = make_model(base, tokenizer, n_ctx=3)
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with torch.no_grad():
        model.context[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite values and is not saved"):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_writing_is_atomic(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        with write_atomically(path) as temporary:
            Path(temporary).write_bytes(b"half of the ne")
            raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with write_atomically(path) as temporary:
        assert os.path.dirname(temporary) == str(tmp_path), "on the same file system"
        Path(temporary).write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]
    assert stat.S_IMODE(os.stat(path).st_mode) & 0o444 == 0o444, "readable, unlike a temporary file"


def test_an_interrupted_save_keeps_the_old_files(base, tokenizer, tmp_path, monkeypatch):
    model = make_model(base, tokenizer, n_ctx=3)
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def fail(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("coop_hf.atomic.save_file", fail)
    with torch.no_grad():
        model.context.add_(1)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_saving_over_a_loaded_adapter(base, tokenizer, tmp_path):
    """The loaded context is no view of the file."""
    model = make_model(base, tokenizer, n_ctx=3)
    model.save_pretrained(tmp_path)
    options = {"base_model": base, "processor": tokenizer, "is_trainable": True}
    loaded, other = (CoOpModel.from_pretrained(tmp_path, **options) for _ in range(2))
    with torch.no_grad():
        loaded.context.add_(1)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(other.context, model.context)
    assert torch.equal(CoOpModel.from_pretrained(tmp_path, **options).context, model.context + 1)


def test_a_file_where_the_folder_should_be(base, tokenizer, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a folder"):
        make_model(base, tokenizer).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_context_of_any_dtype_is_stored_as_fp32(tmp_path, dtype):
    context = torch.randn(4, 32).to(dtype)
    write_adapter(tmp_path, CoOpConfig(n_ctx=4), {WEIGHTS_KEY: context})
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert torch.equal(file.get_tensor(WEIGHTS_KEY), context.float())
    assert os.path.getsize(tmp_path / WEIGHTS) < 4 * 32 * 4 + 400


def test_a_context_that_is_no_contiguous_memory(tmp_path):
    context = torch.randn(32, 4, requires_grad=True).T
    write_adapter(tmp_path, CoOpConfig(n_ctx=4), {WEIGHTS_KEY: context})
    assert torch.equal(read_adapter(tmp_path)[1][WEIGHTS_KEY], context)


# ---------------------------------------------------------------- one adapter of every format version, for ever


@pytest.mark.parametrize("version", [1])
def test_adapters_of_every_format_version_load(base, tokenizer, image_embeds, version):
    """Written once when the format was new, and never written again. If this fails, users' adapters don't load."""
    folder = DATA / f"adapter_v{version}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config, tensors = read_adapter(folder)
        context = tensors[WEIGHTS_KEY]
        model = CoOpModel.from_pretrained(folder, base_model=base, processor=tokenizer)
    assert config == CoOpConfig(
        n_ctx=4,
        class_token_position="middle",
        class_names=["cat", "dog (cat)", "sea_lion", "café"],
        template="a photo of the {}.",
        base_model_name_or_path="openai/clip-vit-base-patch32",
        revision="main",
        format_version=version,
        coop_hf_version="0.1.0",
    )
    assert torch.equal(context, (torch.arange(128).reshape(4, 32) - 64) / 256)
    assert torch.equal(model.context, context)
    assert model(image_embeds=image_embeds).logits.shape == (5, 4)


def test_a_class_specific_adapter_of_format_version_1(base, tokenizer):
    folder = DATA / "adapter_v1" / "own"
    config, tensors = read_adapter(folder)
    context = tensors[WEIGHTS_KEY]
    assert config.class_specific and config.class_names == ["cat", "dog (cat)"] and config.ctx_init == "a photo"
    assert torch.equal(context, (torch.arange(128).reshape(2, 2, 32) - 64) / 256)
    model = CoOpModel.from_pretrained(folder.parent, subfolder="own", base_model=base, processor=tokenizer)
    assert torch.equal(model.context, context)
