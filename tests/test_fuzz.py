"""Adapter files from strangers: mutated at random, each ends in a clear error or a safe reading.

2,000 files stay in the suite. `COOP_HF_FUZZ=10000 pytest tests/test_fuzz.py` reads more, `COOP_HF_FUZZ_SEED=1` others.
"""

import copy
import json
import os
import random
import resource
import struct
import time
import warnings

import pytest
import torch
from safetensors.torch import save

from coop_hf import CoOpConfig
from coop_hf.config import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from coop_hf.files.adapter_files import WEIGHTS_KEY, _binding, read_adapter


COUNT = int(os.environ.get("COOP_HF_FUZZ", 2000))
SEED = int(os.environ.get("COOP_HF_FUZZ_SEED", 20260101))
SECONDS_EACH = 2.0
MEGABYTES = 300  # what all of it together may add to the process at its largest
CLASSES = ["cat", "dog", "sea_lion"]
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    4,
    16,
    2**31,
    2**63,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    " ",
    "end",
    "front",
    "../../etc/passwd",
    "/etc/passwd",
    "\x00",
    "\ud800",
    "a\nb",
    "{}",
    "{}{}",
    "<script>alert(1)</script>",
    "x" * 20_000,
    [],
    {},
    [[]],
    ["cat"],
    ["cat", "cat"],
    ["cat", "dog", "yak"],
    ["cat", None],
    [1, 2, 3],
    ["a" * 5000] * 3,
    {"a": {"b": {}}},
    list(range(1000)),
]


def good_files(rng):
    class_specific = rng.random() < 0.5
    config = CoOpConfig(n_ctx=4, class_specific=class_specific, class_names=list(CLASSES), revision="main")
    shape = (3, 4, 8) if class_specific else (4, 8)
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    text = config.to_json()
    metadata = {"format": "pt"}
    if rng.random() < 0.3:  # as coop_hf writes them; the others are bound to no configuration
        metadata |= _binding(json.loads(text))
    weights = save({WEIGHTS_KEY: torch.full(shape, 0.5, dtype=dtype)}, metadata=metadata)
    return text.encode(), weights


def mutate_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        kind, place = rng.randrange(6), rng.randrange(len(data) + 1)
        if kind == 0 and data:
            data[place % len(data)] = rng.randrange(256)
        elif kind == 1 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + rng.randrange(1, 20)]
        elif kind == 4:
            data[place:place] = rng.randbytes(rng.randrange(1, 20))
        else:
            data[place:place] = data[: rng.randrange(1, 200)]
    return bytes(data)


def mutate_config(rng, data):
    if rng.random() < 0.35:
        return mutate_bytes(rng, data)
    values = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        kind = rng.randrange(7)
        key = rng.choice(sorted(values)) if values else "n_ctx"
        if kind <= 2:
            values[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3:
            values.pop(key, None)
        elif kind == 4:
            values[rng.choice(["__class__", "auto_map", "peft_type", "x" * 500, "", "\x1b[0m", "self"])] = rng.choice(
                VALUES
            )
        elif kind == 5 and isinstance(values.get("class_names"), list) and values["class_names"]:
            names = values["class_names"]
            names[rng.randrange(len(names))] = copy.deepcopy(rng.choice(VALUES))
        else:
            nested = rng.choice(["[", '{"a":', '{"n_ctx":'])
            depth = rng.choice([3, 50, 900, 5000, 100_000])
            return (nested * depth + rng.choice(["", "1", "]" * depth, "}" * depth])).encode()
    whole = rng.choice([values, values, values, [values], rng.choice(VALUES)])
    text = json.dumps(whole)
    if rng.random() < 0.1:
        text = text.replace("}", ', "n_ctx": 4, "n_ctx": 99999999999}', 1)  # a key twice
    return rng.choice(["", "", "", "\ufeff", " \n"]).encode() + text.encode(rng.choice(["utf-8", "utf-8", "utf-16"]))


def mutate_weights(rng, data):
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    entry = header[WEIGHTS_KEY]
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.randrange(9)
        if kind == 0:
            entry["shape"] = rng.choice(
                [[], [0], [-1, 8], [2**40, 2**40], [10**30], [4, 8, 1], [8, 4], ["a"], None, 4]
            )
        elif kind == 1:
            entry["dtype"] = rng.choice(["F64", "I8", "BOOL", "F8_E4M3", "C64", "F32", "x", "", None, 3])
        elif kind == 2:
            entry["data_offsets"] = rng.choice([[0, 10**18], [-8, 8], [8, 0], [0], [0, 1, 2], None, [0, 2**64], "a"])
        elif kind == 3:
            header[rng.choice(["ctx", "../x", "", "\x00", "a" * 1000])] = copy.deepcopy(entry)
        elif kind == 4:
            header[rng.choice(["base_layer", "__metadata__"])] = header.pop(WEIGHTS_KEY, entry)
        elif kind == 5:
            header["__metadata__"] = rng.choice([{"format": "tf"}, {"a": 1}, {}, "x", {"x": "y" * 100_000}, None])
        elif kind == 6:
            body = body[: rng.randrange(len(body) + 1)] + rng.randbytes(rng.choice([0, 1, 8]))
        elif kind == 7:
            special = rng.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff\xff\xff\xff"])
            place = 4 * rng.randrange(max(1, len(body) // 4))
            body = body[:place] + special + body[place + 4 :]
        else:
            entry["extra"] = rng.choice(VALUES[:13])
    text = json.dumps(header).encode()
    announced = rng.choice([len(text)] * 8 + [0, 1, len(text) - 1, len(text) + 1, 2**32, 2**63, 2**64 - 1])
    return struct.pack("<Q", announced) + text + body


def test_mutated_files(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    rng = random.Random(SEED)
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read, refused = 0, {}
    for number in range(COUNT):
        config, weights = good_files(rng)
        which = rng.randrange(3)
        if which != 1:
            config = mutate_config(rng, config)
        if which != 0:
            weights = mutate_weights(rng, weights)
        (folder / ADAPTER_CONFIG_NAME).write_bytes(config)
        (folder / ADAPTER_WEIGHTS_NAME).write_bytes(weights)
        before = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found, tensors = read_adapter(folder)
        except (ValueError, OSError) as error:
            assert type(error) in (ValueError, OSError), f"file {number}: {type(error).__name__}: {error}"
            assert 20 < len(str(error)) < 2_000, f"file {number}: {str(error)[:500]}"
            reason = str(error).split(": ")[-1][:20]
            refused[reason] = refused.get(reason, 0) + 1
        except Exception as error:
            pytest.fail(f"file {number} ({config[:300]!r}, {weights[:300]!r}): {type(error).__name__}: {error}")
        else:
            read += 1
            (context,) = tensors.values()
            expected = (found.n_ctx,) if not found.class_specific else (len(found.class_names), found.n_ctx)
            assert context.shape[:-1] == expected and context.dtype == torch.float32
            assert torch.isfinite(context).all() and context.numel() <= len(weights)
            CoOpConfig.from_dict(json.loads(found.to_json()))  # what was read can be written and read again
        assert time.monotonic() - before < SECONDS_EACH, f"file {number} took {time.monotonic() - before:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started) / 1024
    assert grown < MEGABYTES, f"memory grew by {grown:.0f} MB"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "outside"]
    assert sorted(path.name for path in folder.iterdir()) == [ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME]
    assert outside.read_text() == "untouched"
    # Both ways out are well travelled, and for many reasons, or the mutations are too tame or too wild.
    assert read > COUNT / 50 and len(refused) > 20
