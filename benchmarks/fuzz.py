"""Files from strangers, mutated at random: each is read or refused with a clear error, within 5 s and 1 GiB.

python benchmarks/fuzz.py --adapters 10000 --checkpoints 2000

Files are mutated byte by byte and value by value; the mutations of adapters are those of `tests/test_fuzz.py`. They
are read in child processes, so that a crash is counted and not suffered. A number and a seed give the same file.
"""

import argparse
import contextlib
import io
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import report


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import test_fuzz  # noqa: E402

from coop_hf.config import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME  # noqa: E402
from coop_hf.files.adapter_files import read_adapter  # noqa: E402
from coop_hf.files.coop_checkpoint import read_coop_checkpoint  # noqa: E402


SECONDS, BYTES = 5, 1 << 30
IN_ONE_PROCESS = 250


def write_adapter(rng: random.Random, folder: str) -> None:
    config, weights = test_fuzz.good_files(rng)
    which = rng.randrange(3)
    if which != 1:
        config = test_fuzz.mutate_config(rng, config)
    if which != 0:
        weights = test_fuzz.mutate_weights(rng, weights)
    Path(folder, ADAPTER_CONFIG_NAME).write_bytes(config)
    Path(folder, ADAPTER_WEIGHTS_NAME).write_bytes(weights)


def odd_tensors(rng: random.Random) -> torch.Tensor:
    """Tensors that claim, share or lack values."""
    return rng.choice(
        [
            lambda: torch.zeros(1).expand(1 << 14, 1 << 14),
            lambda: torch.zeros(0, 32),
            lambda: torch.zeros(4, 32, device="meta"),
            lambda: torch.full((4, 32), float("nan")),
            lambda: torch.zeros(4, 32, dtype=torch.int64),
            lambda: torch.eye(4).to_sparse(),
            lambda: torch.zeros(2, 2, 2, 2),
            lambda: torch.tensor(1.0),
            lambda: torch.zeros(4, 32, dtype=torch.complex64),
            lambda: torch.zeros(4096, 32),
        ]
    )()


def write_checkpoint(rng: random.Random, folder: str) -> None:
    """What the public trainer saves, zipped or in the older format, with wrong values or wrong bytes."""
    classes, n_ctx, dim = 3, 4, 32
    shape = (classes, n_ctx, dim) if rng.random() < 0.5 else (n_ctx, dim)
    state = {
        "ctx": torch.full(shape, 0.5),
        "token_prefix": torch.zeros(classes, 1, dim),
        "token_suffix": torch.zeros(classes, 77 - 1 - n_ctx, dim),
    }
    checkpoint = {"state_dict": state, "epoch": 50, "optimizer": {"state": {}}, "val_result": 63.5}
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 2, 5])):
            state[rng.choice([*state, "meta_net.linear1.weight", "x" * 300, ""])] = rng.choice(
                [odd_tensors(rng), None, 3, "text", [1], {"a": 1}]
            )
    elif kind == 1:
        key = rng.choice([*checkpoint, "extra"])
        checkpoint[key] = rng.choice([None, 10**30, "x" * 100_000, [[]] * 1000, {}, odd_tensors(rng), float("nan")])
    buffer = io.BytesIO()
    torch.save(
        rng.choice([checkpoint] * 8 + [state, [checkpoint], None]),
        buffer,
        _use_new_zipfile_serialization=rng.random() < 0.7,
    )
    data = buffer.getvalue()
    if kind == 2:
        data = test_fuzz.mutate_bytes(rng, data)
    elif kind == 3 and data[:2] == b"PK":
        data = mutate_records(rng, data)
    Path(folder, "model.pth.tar-50").write_bytes(data)


def mutate_records(rng: random.Random, data: bytes) -> bytes:
    """The archive with a record deflated, changed, doubled, renamed or left out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that are there twice
        records = old.infolist()
        chosen = rng.randrange(len(records))
        for number, record in enumerate(records):
            content, name, compression = old.read(record), record.filename, zipfile.ZIP_STORED
            change = rng.randrange(6) if number == chosen else -1
            if change == 0:
                compression = zipfile.ZIP_DEFLATED
            elif change == 1:
                content = test_fuzz.mutate_bytes(rng, content)
            elif change == 2:
                content, compression = bytes(50 << 20), zipfile.ZIP_DEFLATED
            elif change == 3:
                name = rng.choice(["../../evil", "/evil", name.replace("data", "code"), "x" * 1000])
            elif change == 4:
                continue
            new.writestr(name, content, compression)
            if change == 5:
                new.writestr(name, content[: len(content) // 2], compression)
    return buffer.getvalue()


KINDS: dict[str, tuple[Callable, Callable]] = {
    "adapters": (write_adapter, read_adapter),
    "checkpoints": (write_checkpoint, read_coop_checkpoint),
}


def peak_bytes(reset: bool = False) -> int:
    """The most memory that this process has held, where the system allows since the last reset."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def read_one(kind: str, seed: int, number: int, folder: str) -> dict:
    """Writes and reads one mutated file."""
    write, read = KINDS[kind]
    write(random.Random(f"{kind} {seed} {number}"), folder)
    before, started = peak_bytes(reset=True), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
        outcome, problem = "read", None
    except (ValueError, OSError) as error:
        is_clear = type(error) in (ValueError, OSError) and 20 < len(str(error)) < 2000
        outcome, problem = "refused", None if is_clear else f"{type(error).__name__}: {str(error)[:300]}"
    except Exception as error:
        outcome, problem = "failed", f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = peak_bytes() - before
    if grown > BYTES:
        problem = f"{grown:,} bytes"
    return {
        "number": number,
        "outcome": "failed" if problem else outcome,
        "problem": problem,
        "seconds": time.monotonic() - started,
        "bytes": grown,
    }


def read_some(kind: str, seed: int, numbers: range, pipe: multiprocessing.connection.Connection) -> None:
    signal.signal(signal.SIGALRM, too_slow)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            pipe.send(read_one(kind, seed, number, folder))


def fuzz(kind: str, count: int, seed: int) -> dict:
    """Reads `count` mutated files of one kind; a child process that dies fails at the file that it was reading."""
    context, results, start = multiprocessing.get_context("fork"), [], 0
    while start < count:
        numbers = range(start, min(start + IN_ONE_PROCESS, count))
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=read_some, args=(kind, seed, numbers, sender))
        child.start()
        sender.close()
        done = 0
        with contextlib.suppress(EOFError):
            while done < len(numbers):
                results.append(receiver.recv())
                done += 1
        child.join()
        if done < len(numbers):
            problem = f"the process died with {child.exitcode}"
            results.append({"number": start + done, "outcome": "failed", "problem": problem, "seconds": 0, "bytes": 0})
            done += 1
        start += done
    failures = [{"number": r["number"], "problem": r["problem"]} for r in results if r["outcome"] == "failed"]
    return {
        "kind": kind,
        "files": len(results),
        "seed": seed,
        **{outcome: sum(r["outcome"] == outcome for r in results) for outcome in ("read", "refused", "failed")},
        "slowest_s": max(r["seconds"] for r in results),
        "most_bytes": max(r["bytes"] for r in results),
        "failures": failures[:20],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--checkpoints", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = {"adapters": args.adapters, "checkpoints": args.checkpoints}
    results = [fuzz(kind, count, args.seed) for kind, count in counts.items() if count]
    report("fuzz", results)
    sys.exit(any(result["failed"] for result in results))


if __name__ == "__main__":
    main()
