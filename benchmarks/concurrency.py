"""Processes that save adapters into one folder and read them at the same time: nobody may find a mixture.

python benchmarks/concurrency.py --rounds 1000

A round is one save and one reading, by the same process, while the others do so too. Each adapter's class name tells
its vectors, and savers differ in the number of vectors, so that two files of different saves are told at once. Without
locks, as on some network file systems, a reading may be refused; a mixture may not be read there either.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter

import torch
from common import report

from coop_hf import CoOpConfig, atomic
from coop_hf.files.adapter_files import WEIGHTS_KEY, read_adapter, write_adapter


def save(folder: str, number: int, n_ctx: int) -> None:
    config = CoOpConfig(n_ctx=n_ctx, class_names=[f"class {number}"])
    write_adapter(folder, config, {WEIGHTS_KEY: torch.full((n_ctx, 8), float(number))})


def look(folder: str) -> str:
    """How a reading ended."""
    try:
        config, tensors = read_adapter(folder)
    except (ValueError, OSError) as error:
        return "refused" if type(error) in (ValueError, OSError, FileNotFoundError) else f"unclear: {error!r}"
    except Exception as error:
        return f"unclear: {error!r}"
    (value,) = tensors[WEIGHTS_KEY].unique().tolist() if len(tensors[WEIGHTS_KEY].unique()) == 1 else (-1,)
    return "whole" if config.class_names == [f"class {int(value)}"] else "mixture"


def at_once(folder: str, rounds: int, processes: int, with_locks: bool) -> dict:
    """`rounds` rounds, shared among processes; how the readings ended, and what is left in the folder."""
    save(folder, 0, 2)
    children = []
    for index in range(processes):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            if not with_locks:
                atomic.fcntl = None
            outcomes: Counter = Counter()
            for number in range(index, rounds, processes):
                save(folder, 1 + number, 2 + index % 2)
                outcomes[look(folder)] += 1
            os.write(writing, json.dumps(outcomes).encode())
            os._exit(0)
        os.close(writing)
        children.append((pid, reading))
    total: Counter = Counter()
    for pid, reading in children:
        with os.fdopen(reading) as file:
            total.update(json.loads(file.read() or '{"unclear: process died": 1}'))
        os.waitpid(pid, 0)
    at_rest = look(folder)
    return {"readings": dict(total), "at_rest": at_rest, "files_left": sorted(os.listdir(folder))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {"rounds": args.rounds, "processes": args.processes}
    for name, with_locks in (("with_locks", True), ("without_locks", False)):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            results[name] = at_once(folder, args.rounds, args.processes, with_locks)
            results[name]["seconds"] = round(time.perf_counter() - start, 1)
    report("concurrency", results)


if __name__ == "__main__":
    main()
