"""Cells of an experiment, one for each method, number of shots and seed, in one file that a second run completes.

The file is replaced as a whole after every cell, so that an interrupted run loses the cells it was at and no other.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Any

import datasets
import numpy as np
import torch
import transformers

from ..atomic import write_text
from ..modeling import CoOpModel
from ..version import __version__
from .methods import Method, Options
from .tasks import Task


__all__ = ["CellError", "base_fingerprint", "environment", "make_cells", "run_cells", "settings_of"]


class CellError(RuntimeError):
    """A cell failed; the others go on."""


def environment() -> dict:
    """Versions and hardware, as plain values."""
    cuda = torch.cuda.is_available()
    return {
        "coop_hf": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def base_fingerprint(model: CoOpModel) -> str:
    """Hash of the base model's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.get_base_model().state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings_of(protocol: str, model: CoOpModel, tasks: Sequence[Task], options: Options) -> dict:
    """What a result depends on, beside the cell."""
    base = model.get_base_model()
    values = asdict(options)
    if values["cupl"] is not None:
        text = json.dumps(values["cupl"], sort_keys=True)
        values["cupl"] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return {
        "protocol": protocol,
        "coop_hf": __version__,
        "base_model": os.path.basename(os.path.normpath(base.config._name_or_path or "unnamed")),
        "base_fingerprint": base_fingerprint(model),
        "data": {task.name: task.fingerprint for task in tasks},
        "class_names": {task.name: list(task.class_names) for task in tasks},
        "options": {**values, "ensemble": list(values["ensemble"])},
    }


def make_cells(methods: dict[str, Method], shots: Sequence[int], seeds: Sequence[int], **more: Any) -> list[dict]:
    """One cell for each method, number of shots and seed; a method that does not learn has one, at 0 shots."""
    cells = []
    for name, method in methods.items():
        pairs = [(k, seed) for k in shots for seed in seeds] if method.learns else [(0, 0)]
        cells += [{"method": name, "shots": k, "seed": seed, **more} for k, seed in pairs]
    return cells


def run_cells(
    path: str | os.PathLike,
    settings: dict,
    cells: list[dict],
    compute: Callable[[dict], dict],
    overwrite: bool = False,
    report: Callable[[str], None] = print,
    processes: int = 1,
) -> dict:
    """Computes the cells that a results file does not hold yet.

    Args:
        path (`str` or `os.PathLike`): JSON file; its folder is made if missing. After each cell it is replaced as a
            whole, so an interrupted run loses one cell (with `processes`, as many).
        settings (`dict`): what all results depend on, plain values. A file with other settings is not touched.
        cells (`list[dict]`): what each result depends on beside that, plain values.
        compute (`Callable[[dict], dict]`): takes a cell, returns what is to be kept; `"scores"` is a dict of
            fractions, `"rows"` goes to the file's `"draws"`, once for all methods.
        overwrite (`bool`, *optional*, defaults to `False`): start afresh.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): gets a line for each cell.
        processes (`int`, *optional*, defaults to 1): cells at a time. `compute` is then called by as many threads, and
            gains by it what it does in processes of its own.

    Returns:
        `dict`: the file: `settings`, `environment` (of the last run that computed something), `draws` and `cells` in
        the order given, each with its time in seconds and the date; and, not in the file, `failed` if there are
        any: cells for which `compute` raised [`CellError`], with its message.

    Raises:
        ValueError: the file was made with other settings; names them.
    """
    path = os.fspath(path)
    settings = json.loads(json.dumps(settings))
    results: dict[str, Any] = {"settings": settings, "environment": None, "draws": {}, "cells": []}
    if os.path.exists(path) and not overwrite:
        try:
            with open(path, encoding="utf-8") as file:
                results = json.load(file)
            different = [key for key in settings if results["settings"].get(key) != settings[key]]
            done = {_key(cell): cell for cell in results["cells"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a results file ({error}): move it, or pass overwrite=True.") from None
        if different:
            raise ValueError(
                f"{path} holds results with other settings ({', '.join(different)} differ): choose another "
                "`output_dir`, or pass overwrite=True (--overwrite) to lose them."
            )
    else:
        done = {}
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    place = {_key(cell): number for number, cell in enumerate(cells, 1)}
    failed: list[dict] = []

    def line(cell: dict, text: str) -> None:
        name = ", ".join(str(value) if key == "method" else f"{key} {value}" for key, value in cell.items())
        report(f"[{place[_key(cell)]}/{len(cells)}] {name}: {text}")

    def timed(cell: dict) -> dict:
        start = time.perf_counter()
        return {**compute(cell), "seconds": round(time.perf_counter() - start, 2)}

    def keep(cell: dict, found: dict) -> None:
        rows = found.pop("rows", None)
        if rows is not None:
            results["draws"][", ".join(f"{key} {cell[key]}" for key in ("shots", "seed"))] = rows
            results["draws"] = dict(sorted(results["draws"].items(), key=lambda item: _numbers(item[0])))
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        results["cells"].append({"cell": cell, **found, "date": date})
        results["cells"].sort(key=lambda entry: place.get(_key(entry), len(place) + 1))
        results["environment"] = environment()
        write_text(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        scores = ", ".join(f"{key} {100 * value:.1f} %" for key, value in found["scores"].items())
        line(cell, f"{scores} ({found['seconds']:.1f} s)")

    def finish(cell: dict, result: Callable[[], dict]) -> None:
        try:
            found = result()
        except CellError as error:
            failed.append({"cell": cell, "error": str(error)})
            line(cell, f"failed: {error}")
        else:
            keep(cell, found)

    missing = []
    for cell in cells:
        if _key(cell) in done:
            line(cell, "kept from an earlier run")
        else:
            missing.append(cell)
    if processes == 1:
        for cell in missing:
            finish(cell, lambda cell=cell: timed(cell))  # type: ignore[misc]
    else:
        with ThreadPoolExecutor(processes) as pool:
            running: dict[Future, dict] = {pool.submit(timed, cell): cell for cell in missing}
            try:
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        finish(running.pop(future), future.result)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    failed.sort(key=lambda entry: place[_key(entry)])
    wanted = [entry for entry in results["cells"] if _key(entry) in place]
    return {**results, "cells": wanted, **({"failed": failed} if failed else {})}


def _key(entry: dict) -> str:
    return json.dumps(entry.get("cell", entry), sort_keys=True)


def _numbers(name: str) -> list[int]:
    """The numbers of `"shots 4, seed 1"`."""
    return [int(part.split()[-1]) for part in name.split(", ")]
