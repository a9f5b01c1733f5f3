"""Files of strangers: adapters of every method and checkpoints of the original code, mutated at random and loaded.

python benchmarks/fuzz.py --adapters 10000 --checkpoints 2000

Each file is loaded onto a base model that is there already. It may end in a model, in a ValueError or in an OSError,
within 5 seconds and 1 GiB of memory beyond what the process had before (its peak, as Linux counts it); what else
happens is listed in the report, also a process that dies or hangs. Nothing in a file may run; some ask for it.
"""

import argparse
import copy
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from common import report

from coop_hf import CoOpModel, emoji_model_path
from coop_hf.config import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CONFIGS, PromptConfig
from coop_hf.files.adapter_files import write_adapter


SECONDS_EACH = 5.0
MEBIBYTES_EACH = 1024
COSTS = {"seconds": 60.0, "cpu_seconds": 60.0, "mebibytes": 0}  # of a process that died
CLASSES = ["cat", "dog", "sea_lion"]
VALUES: list[Any] = [
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
    4096,
    2_000_000,
    [f"class {i}" for i in range(20_000)],
]
KEYS = ["__class__", "auto_map", "peft_type", "x" * 500, "", "\x1b[0m", "self"]


# ---------------------------------------------------------------------- mutations of adapters


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, bits flipped, pieces cut off, taken out, put in and doubled."""
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


def mutate_config(rng: random.Random, data: bytes) -> bytes:
    """Bytes, or values, keys, names, nesting and encoding of the JSON."""
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
            values[rng.choice([*KEYS, "method", "class_specific", "num_keys"])] = rng.choice(
                [*VALUES, *sorted(CONFIGS)]
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


def mutate_weights(rng: random.Random, data: bytes) -> bytes:
    """Bytes, or shapes, dtypes, offsets, keys, metadata, values and the header's length of the safetensors."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
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
            header[rng.choice(["base_layer", "__metadata__"])] = header.pop(name, entry)
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


def grow(rng: random.Random, weights: bytes) -> tuple[bytes, int]:
    """A first tensor that claims gigabytes, and the length of the sparse file that seems to hold them."""
    size = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8 : 8 + size])
    name = min((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    shape, number = list(header[name]["shape"]), {"F32": 4, "F16": 2, "BF16": 2}[header[name]["dtype"]]
    shape[rng.randrange(len(shape))] = rng.choice([10**4, 10**5, 10**6])
    length = number * int(np.prod([float(n) for n in shape]))
    if length > 3 * 2**30:
        return weights, len(weights)
    moved = length - header[name]["data_offsets"][1]
    for key, entry in header.items():
        if key != "__metadata__":
            entry["data_offsets"] = [offset + moved for offset in entry["data_offsets"]]
    header[name] |= {"shape": shape, "data_offsets": [0, length]}
    text = json.dumps(header).encode()
    end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + end


FILES = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)


def good_adapters(model: CoOpModel, folder: str) -> list[tuple[bytes, bytes]]:
    """Both files of an adapter of every method, two of them class-specific too."""
    files = []
    for method, specific in [*((method, False) for method in sorted(CONFIGS)), ("coop", True), ("deep_text", True)]:
        kind, given = CONFIGS[method], {"class_names": list(CLASSES), **({"class_specific": True} if specific else {})}
        if hasattr(kind, "n_ctx"):
            given |= {"n_ctx": 4, "ctx_init": None}
        if hasattr(kind, "num_keys"):
            given["num_keys"] = 3
        if hasattr(kind, "stores_class_embeds"):
            given["stores_class_embeds"] = True
        made = CoOpModel(model.base_model, kind(**given), CLASSES, model.processor)
        write_adapter(folder, made.config, made.adapter.learned_state())
        files.append(tuple(open(os.path.join(folder, n), "rb").read() for n in FILES))
    return files


def greedy_config(rng: random.Random, data: bytes) -> bytes:
    """A configuration whose every value may be right, and which asks for as much as it can."""
    values = json.loads(data)
    counts = {"n_ctx": [64, 1000, 4096], "n_vision": [64, 1000, 4096], "num_keys": [10**5, 2 * 10**6]}
    for key, choices in counts.items():
        if key in values and rng.random() < 0.7:
            values[key] = rng.choice(choices)
    if rng.random() < 0.5:
        values["class_names"] = [f"class {i}" for i in range(rng.choice([1000, 20_000, 20_000, 200_000]))]
    if "class_specific" in values:
        values["class_specific"] = rng.random() < 0.7
    return json.dumps(values).encode()


def unbind(weights: bytes) -> bytes:
    """Without the hash of the configuration, as other programs write them: then the configuration is not refused."""
    size = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8 : 8 + size])
    header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + weights[8 + size :]


def write_mutated_adapter(rng: random.Random, good: list[tuple[bytes, bytes]], folder: str) -> str:
    """Writes one; returns what it was made from."""
    config, weights = rng.choice(good)
    made_from = json.loads(config).get("method", "coop")
    if rng.random() < 0.7:
        weights = unbind(weights)
    which, length = rng.randrange(20), None
    if which == 0:  # of another method
        weights = rng.choice(good)[1]
    elif which == 1:
        weights, length = grow(rng, weights)
    elif which == 2:
        config = greedy_config(rng, config)
    elif which < 8:
        config = mutate_config(rng, config)
    elif which < 14:
        weights = mutate_weights(rng, weights)
    else:
        config, weights = mutate_config(rng, config), mutate_weights(rng, weights)
    for name, data in zip(FILES, (config, weights)):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
    if length is not None:
        os.truncate(os.path.join(folder, ADAPTER_WEIGHTS_NAME), length)
    return made_from


# ---------------------------------------------------------------------- mutations of checkpoints


class Code:
    """Pickles into a call of `function(*arguments)`."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def make_checkpoint(rng: random.Random, model: CoOpModel) -> dict:
    """What the original's trainer saves, with whole objects in the scheduler's state."""
    tokenizer, embedding = model.tokenizer, model.family.token_embedding.weight.detach()
    n_ctx, dtype = rng.choice([1, 4, 16]), rng.choice([torch.float16, torch.float32])
    shape = (len(CLASSES), n_ctx) if rng.random() < 0.5 else (n_ctx,)
    context = torch.full((*shape, embedding.shape[1]), 0.5).to(dtype)
    rows = torch.zeros(len(CLASSES), 77, dtype=torch.long)
    for row, name in zip(rows, CLASSES):
        ids = tokenizer("X " * n_ctx + name.replace("_", " ") + ".")["input_ids"]
        row[: len(ids)] = torch.tensor(ids)
    embedded = embedding[rows].to(dtype)
    optimizer = torch.optim.SGD([torch.nn.Parameter(context)], lr=0.002, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    state = OrderedDict(ctx=context, token_prefix=embedded[:, :1], token_suffix=embedded[:, 1 + n_ctx :])
    return {
        "state_dict": state,
        "epoch": 50,
        "optimizer": optimizer.state_dict(),
        "scheduler": {**scheduler.state_dict(), "successor": scheduler, "warmup_epoch": 1},
        "val_result": np.float64(63.5),
    }


def odd_value(rng: random.Random, marker: str) -> Any:
    """A value that no checkpoint of the original holds there."""
    deep: list = []
    for _ in range(rng.choice([10, 200])):
        deep = [deep]
    return rng.choice(
        [
            lambda: copy.deepcopy(rng.choice(VALUES[:-1])),
            lambda: torch.zeros(rng.choice([(), (0,), (4,), (4, 8), (3, 4, 8), (1, 1, 1, 1), (4, 0), (5000, 8)])),
            lambda: torch.zeros(4, 512, dtype=rng.choice([torch.int64, torch.bool, torch.complex64, torch.float64])),
            lambda: torch.full((4, 512), rng.choice([float("nan"), float("inf"), 1e30])),
            lambda: torch.zeros(1).expand(rng.choice([10, 10**6, 10**9]), 512),
            lambda: torch.zeros(4, 8).to_sparse(),
            lambda: torch.zeros(rng.choice([4, 10**9]), 512, device="meta"),
            lambda: torch.zeros(2**22).as_strided((2**22, 64), (1, 0)),
            lambda: np.zeros(3),
            lambda: Code(os.system, f"touch {marker}"),
            lambda: Code(open, marker, "w"),
            lambda: Code(eval, f"open({marker!r}, 'w')"),
            lambda: Code(bytearray, 3 * 10**9),
            lambda: Code(torch.zeros, 10**9),
            lambda: deep,
            lambda: "a" * rng.choice([10, 10**6, 2 * 10**7]),
        ]
    )()


def write_mutated_checkpoint(rng: random.Random, model: CoOpModel, path: str, marker: str) -> str:
    """Writes one; returns how it was mutated."""
    kind = rng.choice(["values", "values", "bytes", "bytes", "archive", "pickle", "sparse"])
    content: Any = make_checkpoint(rng, model)
    if kind == "values":
        for _ in range(rng.choice([1, 1, 2, 3])):
            place = rng.choice(
                [content, content["state_dict"]] if isinstance(content.get("state_dict"), dict) else [0]
            )
            if place == 0:
                break
            key = rng.choice([*place, "meta_net.linear1.weight", "module.ctx", 7])
            if rng.random() < 0.2:
                place.pop(key, None)
            else:
                place[key] = odd_value(rng, marker)
        if rng.random() < 0.05:
            content = odd_value(rng, marker)
    buffer = io.BytesIO()
    legacy = rng.random() < 0.3 and kind not in ("archive", "pickle")
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    data, length = buffer.getvalue(), None
    if kind == "bytes":
        data = mutate_bytes(rng, data)
    elif kind == "sparse":
        data, length = data[: rng.randrange(len(data))], rng.choice([10**6, 10**8, 3 * 10**9])
    elif kind in ("archive", "pickle"):
        data = rewrite_archive(rng, data, kind)
    with open(path, "wb") as file:
        file.write(data)
    if length is not None and length > len(data):
        os.truncate(path, length)
    return kind


def rewrite_archive(rng: random.Random, data: bytes, kind: str) -> bytes:
    """The archive again, its checksums right, with another pickle or with records that PyTorch does not write."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    out = io.BytesIO()
    squeezed = kind == "archive" and rng.random() < 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name twice
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if squeezed else zipfile.ZIP_STORED) as archive:
            for name, content in records:
                if kind == "pickle" and name.endswith(".pkl"):
                    content = mutate_bytes(rng, content) if rng.random() < 0.6 else odd_pickle(rng)
                if kind == "archive":
                    change = rng.randrange(12)
                    if change == 0:
                        continue
                    if change == 1:
                        name = rng.choice(["../../outside", "/tmp/outside", name.upper(), "x" * 1000])
                    if change == 2:
                        content = content[: rng.randrange(len(content) + 1)]
                    if change == 3:
                        content += b"\x00" * rng.choice([1, 10**6, 5 * 10**7])
                    if change == 4:
                        archive.writestr(name, rng.randbytes(50))
                archive.writestr(name, content)
    return out.getvalue()


def odd_pickle(rng: random.Random) -> bytes:
    """A few hand-made streams: doubling, depth, sizes that are not there, opcodes of newer protocols."""
    double = b"\x80\x02]q\x00K\x01a" + b"".join(b"]q%c(h%ch%ce" % (k, k - 1, k - 1) for k in range(1, 60)) + b"."
    return rng.choice(
        [
            double,
            b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
            b"\x80\x02" + b"(" * 1_000_000 + b".",
            b"\x80\x02X\xff\xff\xff\x7fabc.",
            b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"abc.",
            b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
            b"\x80\x02" + b"r\xff\xff\xff\x7f" * 3 + b".",
            pickle.dumps({"state_dict": {"ctx": list(range(1000))}}, protocol=2),
            b"\x80\x02c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
            b"\x80\x02ccollections\nOrderedDict\n)R}(X\x01\x00\x00\x00aK\x01ub.",
            b"I" + b"9" * 100_000 + b"\n.",
            b"\x80\x02" + b"2" * 1_000_000 + b".",
        ]
    )


# ---------------------------------------------------------------------- reading, measured


def memory(field: str) -> int:
    """Kibibytes that this process holds ("VmRSS"), or has held since `forget_peak` ("VmHWM")."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measured(function: Callable[[], Any]) -> dict:
    """How a call ends: `outcome`, `text`, `seconds`, and by how many `mebibytes` the process grew at its largest."""
    result = {"outcome": "loaded", "text": ""}
    forget_peak()
    before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function()
    except BaseException as error:
        clear = type(error) in (ValueError, OSError, FileNotFoundError)
        result = {"outcome": type(error).__name__, "text": str(error)[:500]}
        result["outcome"] = result["outcome"] if clear else f"unclear: {result['outcome']}"
    result |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return result | {"mebibytes": round((memory("VmHWM") - before) / 1024, 1)}


def in_processes(numbers: range, work: Callable[[int], dict], batch: int = 200) -> Iterator[dict]:
    """The results of `work` on each number, in forked processes; one that dies or hangs is a result, too."""
    done = numbers.start
    while done < numbers.stop:
        last = min(done + batch, numbers.stop)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            limit = 16 * 2**30  # for the machine's sake
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            for number in range(done, last):
                signal.alarm(60)
                os.write(writing, json.dumps(work(number)).encode() + b"\n")
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as lines:
            for line in lines:
                yield json.loads(line)
                done += 1
        status = os.waitpid(pid, 0)[1]
        if done < last:
            yield {"outcome": f"unclear: status {status}", "text": "", "made_from": "", **COSTS}
            done += 1


def check_model(model: CoOpModel) -> None:
    """What was loaded is finite, and can be written and read again."""
    for value in model.adapter.learned_state().values():
        if not torch.isfinite(value).all():
            raise AssertionError("a value that is not finite was loaded")
    PromptConfig.from_dict(json.loads(model.config.to_json()))


def fuzz(count: int, write: Callable[[random.Random], str], load: Callable[[], CoOpModel], seed: int) -> dict:
    """`count` files: how each ended, and what the worst of them cost."""

    def work(number: int) -> dict:
        made_from = write(random.Random(f"{seed}/{number}"))
        return {**measured(lambda: check_model(load())), "number": number, "made_from": made_from}

    outcomes, sources, reasons = Counter(), Counter(), set()
    problems, worst = [], {key: {key: -1.0} for key in COSTS}
    for result in in_processes(range(count), work):
        outcomes[result["outcome"]] += 1
        sources[result["made_from"]] += 1
        reasons.add(" ".join(result["text"].split(": ")[-1].split()[:4]))
        for key in COSTS:
            worst[key] = max(worst[key], result, key=lambda r: r[key])
        bad = result["outcome"].startswith("unclear") or result["seconds"] > SECONDS_EACH
        if bad or result["mebibytes"] > MEBIBYTES_EACH:
            problems.append(result)
            print(result, file=sys.stderr, flush=True)
    return {
        "files": count,
        "seed": seed,
        "made_from": dict(sorted(sources.items())),
        "outcomes": dict(sorted(outcomes.items())),
        "different_reasons": len(reasons),
        "worst": worst,
        "problems": problems[:20],
        "number_of_problems": len(problems),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--checkpoints", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=20260101)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = CoOpModel.from_pretrained(emoji_model_path(), class_names=CLASSES)
    base, processor = model.base_model, model.processor
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        adapter, path = os.path.join(folder, "adapter"), os.path.join(folder, "model.pth.tar-50")
        marker = os.path.join(folder, "ran")
        good = good_adapters(model, adapter)
        adapters = fuzz(
            args.adapters,
            lambda rng: write_mutated_adapter(rng, good, adapter),
            lambda: CoOpModel.from_pretrained(adapter, base_model=base, processor=processor),
            args.seed,
        )
        checkpoints = fuzz(
            args.checkpoints,
            lambda rng: write_mutated_checkpoint(rng, model, path, marker),
            lambda: CoOpModel.from_coop_checkpoint(path, base, processor=processor),
            args.seed,
        )
        left = sorted(os.listdir(folder))
        results = {
            "limits": {"seconds": SECONDS_EACH, "mebibytes": MEBIBYTES_EACH},
            "seconds": round(time.perf_counter() - start),
            "adapters": adapters,
            "checkpoints": checkpoints,
            "code_ran": os.path.exists(marker),
            "other_files_written": sorted(set(left) - {"adapter", "model.pth.tar-50"})
            + sorted(set(os.listdir(adapter)) - set(FILES)),
        }
    report("fuzz", results)


if __name__ == "__main__":
    main()
