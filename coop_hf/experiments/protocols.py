"""The experiments of prompt learning, each a function: few-shot curves, ablations, domain generalisation, base-to-new
generalisation, transfer to other data sets, label noise.

An experiment is a list of cells, one for each method, number of shots and seed; results go into one JSON file, written
whole after every cell, so that a second run computes only the cells that are missing.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import datasets
import numpy as np
import torch
import transformers

from ..atomic import write_atomically
from ..baselines.cupl import class_key
from ..checks import clean_class_name
from ..modeling import CoOpModel
from ..version import __version__
from .methods import METHODS, Method, Options, Predictor
from .tasks import Task, draw_few_shot, select_classes


__all__ = [
    "base_to_new",
    "choose_template",
    "cross_dataset_transfer",
    "domain_generalization",
    "environment",
    "few_shot_curve",
    "label_noise",
    "map_classes",
    "run_cells",
]


# ---------------------------------------------------------------------- files and cells


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


def _base_fingerprint(model: CoOpModel) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.get_base_model().state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _settings(protocol: str, model: CoOpModel, tasks: list[Task], options: Options) -> dict:
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
        "base_fingerprint": _base_fingerprint(model),
        "data": {task.name: task.fingerprint for task in tasks},
        "class_names": {task.name: list(task.class_names) for task in tasks},
        "options": {**values, "ensemble": list(values["ensemble"])},
    }


def run_cells(
    path: str | os.PathLike,
    settings: dict,
    cells: list[dict],
    compute: Callable[[dict], dict],
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> dict:
    """Computes the cells that a results file does not hold yet.

    Args:
        path (`str` or `os.PathLike`): JSON file; its folder is made if missing. After each cell it is replaced as a
            whole, so an interrupted run loses one cell.
        settings (`dict`): what all results depend on, plain values. A file with other settings is not touched.
        cells (`list[dict]`): what each result depends on beside that, plain values.
        compute (`Callable[[dict], dict]`): takes a cell, returns what is to be kept; `"scores"` is a dict of
            fractions, `"rows"` goes to the file's `"draws"`, once for all methods.
        overwrite (`bool`, *optional*, defaults to `False`): start afresh.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): gets a line for each cell.

    Returns:
        `dict`: the file: `settings`, `environment` (of the last run that computed something), `draws` and `cells`,
        each with its time in seconds and the date.

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
    for number, cell in enumerate(cells, 1):
        name = ", ".join(str(value) if key == "method" else f"{key} {value}" for key, value in cell.items())
        if _key(cell) in done:
            report(f"[{number}/{len(cells)}] {name}: kept from an earlier run")
            continue
        start = time.perf_counter()
        found = compute(cell)
        rows = found.pop("rows", None)
        if rows is not None:
            results["draws"][", ".join(f"{key} {cell[key]}" for key in ("shots", "seed"))] = rows
        seconds = round(time.perf_counter() - start, 2)
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        results["cells"].append({"cell": cell, **found, "seconds": seconds, "date": date})
        results["environment"] = environment()
        with write_atomically(path) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(results, file, indent=1, ensure_ascii=False)
                file.write("\n")
        scores = ", ".join(f"{key} {100 * value:.1f} %" for key, value in found["scores"].items())
        report(f"[{number}/{len(cells)}] {name}: {scores} ({seconds:.1f} s)")
    wanted = {_key({"cell": cell}) for cell in cells}
    return {**results, "cells": [cell for cell in results["cells"] if _key(cell) in wanted]}


def _key(entry: dict) -> str:
    return json.dumps(entry.get("cell", entry), sort_keys=True)


def _cells(methods: dict[str, Method], shots: Sequence[int], seeds: Sequence[int], **more: float) -> list[dict]:
    """One cell for each method, number of shots and seed; a method that does not learn has one, at 0 shots."""
    cells = []
    for name, method in methods.items():
        pairs = [(k, seed) for k in shots for seed in seeds] if method.learns else [(0, 0)]
        cells += [{"method": name, "shots": k, "seed": seed, **more} for k, seed in pairs]
    return cells


def _run(
    protocol: str, model: CoOpModel, tasks: list[Task], path: str | os.PathLike, options: Options,
    methods: dict[str, Method], cells: list[dict], score: Callable[[Predictor], dict[str, float]], overwrite: bool,
    report: Callable, **more: dict,
) -> dict:  # fmt: skip
    """Fits the method of each cell on the first data set; `score(predict)` gives what it reaches."""

    def compute(cell: dict) -> dict:
        method = methods[cell["method"]]
        if not method.learns:
            return {"scores": score(method.fit(model, None, options))}
        noise = cell.get("noise", 0.0)
        with_images = options.recipe != "fast" or method.sees_images
        shots = draw_few_shot(tasks[0], cell["shots"], cell["seed"], noise, with_images)
        return {"scores": score(method.fit(model, shots, options)), "rows": shots.rows}

    settings = {**_settings(protocol, model, tasks, options), **more}
    return run_cells(path, settings, cells, compute, overwrite, report)


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(dim=-1).cpu() == labels).float().mean().item()


def _logits(predict: Predictor, task: Task, class_names: list[str], part: str = "test") -> torch.Tensor:
    """Scores of a part's images; of the images themselves where a method changes the image tower."""
    images = task.views[part] if getattr(predict, "sees_images", False) else task.parts[part][0]
    return predict(images, class_names)


def _test(predict: Predictor, task: Task, part: str = "test") -> float:
    return _accuracy(_logits(predict, task, task.class_names, part), task.parts[part][1])


def choose_template(model: CoOpModel, task: Task, templates: Sequence[str]) -> tuple[str, dict[str, float]]:
    """The template with the best zero-shot accuracy on validation; the first of equals.

    Returns:
        the template, and `{template: validation accuracy}`.
    """
    scores = {
        template: _test(METHODS["zero_shot"].fit(model, None, Options(template, (template,))), task, "validation")
        for template in templates
    }
    return max(scores, key=scores.__getitem__), scores


# ---------------------------------------------------------------------- protocols


def few_shot_curve(
    model: CoOpModel,
    task: Task,
    path: str | os.PathLike,
    options: Options,
    methods: dict[str, Method] = METHODS,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> dict:
    """Test accuracy over the number of shots (section 4.1 of https://arxiv.org/abs/2109.01134), also for ablations.

    Args:
        model (`CoOpModel`): gives base and processor; it is not changed.
        task (`Task`): the data set.
        path (`str` or `os.PathLike`): results file, see [`run_cells`].
        options (`Options`): templates, CuPL's sentences, recipe.
        methods (`dict[str, Method]`, *optional*, defaults to `METHODS`): CuPL is left out where `options` have no
            sentences.
        shots, seeds (`list[int]`, *optional*): every pair is a cell.
        overwrite, report: see [`run_cells`].

    Returns:
        `dict`, see [`run_cells`]; the score is `"accuracy"`.
    """
    methods = _usable(methods, options)

    def score(predict: Predictor) -> dict[str, float]:
        return {"accuracy": _test(predict, task)}

    cells = _cells(methods, shots, seeds)
    return _run("few_shot_curve", model, [task], path, options, methods, cells, score, overwrite, report)


def _usable(methods: dict[str, Method], options: Options, any_classes: bool = False) -> dict[str, Method]:
    return {
        name: method
        for name, method in methods.items()
        if (name != "cupl" or options.cupl is not None) and (method.any_classes or not any_classes)
    }


def map_classes(
    logits: torch.Tensor, source: list[str], target: list[str], class_map: dict[str, str] | None = None
) -> torch.Tensor:
    """Logits over one class list as logits over another.

    Args:
        logits (`torch.Tensor`): `(num_images, len(source))`.
        source, target (`list[str]`): the two class lists.
        class_map (`dict[str, str]`, *optional*): `{source class: target class}`. Several source classes may stand for
            one target class, which gets their largest logit; a source class that is not named belongs to the target
            class of its own name, or to none.

    Returns:
        `torch.Tensor` `(num_images, len(target))`.

    Raises:
        ValueError: unknown classes in the map, or a target class that no source class stands for.
    """
    source, target = list(map(clean_class_name, source)), list(map(clean_class_name, target))
    if source == target and not class_map:
        return logits  # by index: a list may have a name twice, as ImageNet's has
    places: dict[str, list[int]] = {}
    for place, name in enumerate(target):
        places.setdefault(name, []).append(place)
    given = {clean_class_name(a): clean_class_name(b) for a, b in (class_map or {}).items()}
    unknown = [a for a in given if a not in source] + [b for b in given.values() if b not in places]
    if unknown:
        raise ValueError(f"the class map names classes that neither list has: {', '.join(map(repr, unknown[:10]))}.")
    result = logits.new_full((len(logits), len(target)), -torch.inf)
    for column, name in enumerate(source):
        for place in places.get(given.get(name, name), []):
            result[:, place] = torch.maximum(result[:, place], logits[:, column])
    missing = [name for name, own in places.items() if torch.isinf(result[:, own]).all()]
    if missing:
        raise ValueError(
            f"no class of the source stands for {', '.join(map(repr, missing[:10]))}: name one in the class map."
        )
    return result


def domain_generalization(
    model: CoOpModel,
    source: Task,
    targets: list[Task],
    path: str | os.PathLike,
    options: Options,
    methods: dict[str, Method] = METHODS,
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
    class_maps: dict[str, dict[str, str]] | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> dict:
    """Learns on one data set and tests on others with the same kind of classes (section 4.2 of the paper).

    Every method scores the source's classes; where a target has other ones, they are mapped.

    Args:
        model (`CoOpModel`): gives base and processor; it is not changed.
        source (`Task`): the data set that is learned on; its test part is the first column.
        targets (`list[Task]`): the other data sets; only their test parts are looked at.
        path, options, methods, seeds, overwrite, report: see [`few_shot_curve`].
        shots (`int`, *optional*, defaults to 16): images of a class.
        class_maps (`dict[str, dict[str, str]]`, *optional*): for targets by name, see [`map_classes`].

    Returns:
        `dict`, see [`run_cells`]; scores by name of data set.
    """
    methods, class_maps = _usable(methods, options), class_maps or {}

    def logits(predict: Predictor, target: Task) -> torch.Tensor:
        found = _logits(predict, target, source.class_names)
        return map_classes(found, source.class_names, target.class_names, class_maps.get(target.name))

    tasks, cells = [source, *targets], _cells(methods, [shots], seeds)

    def score(predict: Predictor) -> dict[str, float]:
        mapped = {target.name: _accuracy(logits(predict, target), target.parts["test"][1]) for target in targets}
        return {source.name: _test(predict, source), **mapped}

    more = {"class_maps": class_maps}
    return _run("domain_generalization", model, tasks, path, options, methods, cells, score, overwrite, report, **more)


def cross_dataset_transfer(
    model: CoOpModel,
    source: Task,
    targets: list[Task],
    path: str | os.PathLike,
    options: Options,
    methods: dict[str, Method] = METHODS,
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> dict:
    """Learns on one data set and tests on others with their own classes.

    Methods that are bound to their classes (linear probe, class-specific contexts) are left out, and so is CuPL where
    a target has classes without sentences.

    Args and returns: as [`domain_generalization`], without maps.
    """
    methods = _usable(methods, options, any_classes=True)
    described = set(map(class_key, options.cupl or {}))
    if any(class_key(name) not in described for task in targets for name in task.class_names):
        methods.pop("cupl", None)

    tasks, cells = [source, *targets], _cells(methods, [shots], seeds)

    def score(predict: Predictor) -> dict[str, float]:
        return {task.name: _test(predict, task) for task in tasks}

    return _run("cross_dataset_transfer", model, tasks, path, options, methods, cells, score, overwrite, report)


def base_to_new(
    model: CoOpModel,
    task: Task,
    path: str | os.PathLike,
    options: Options,
    methods: dict[str, Method] = METHODS,
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> dict:
    """Learns on the first half of the classes and tests on both halves, each among its own classes alone.

    The protocol of CoCoOp (https://arxiv.org/abs/2203.05557, section 4.1); of an odd number the larger half is
    learned.

    Args:
        model, path, options, methods, shots, seeds, overwrite, report: see [`domain_generalization`]. Methods that are
            bound to their classes are left out.
        task (`Task`): the data set.

    Returns:
        `dict`, see [`run_cells`]; scores `"base"`, `"new"` and `"H"`, the harmonic mean of the two in each cell.
    """
    methods = _usable(methods, options, any_classes=True)
    number = len(task.class_names)
    half = (number + 1) // 2
    base = select_classes(task, list(range(half)), f"{task.name}, base classes")
    new = select_classes(task, list(range(half, number)), f"{task.name}, new classes")

    def score(predict: Predictor) -> dict[str, float]:
        first, second = _test(predict, base), _test(predict, new)
        mean = 2 * first * second / (first + second) if first + second else 0.0
        return {"base": first, "new": second, "H": mean}

    cells = _cells(methods, [shots], seeds)
    return _run("base_to_new", model, [base, new], path, options, methods, cells, score, overwrite, report)


def label_noise(
    model: CoOpModel,
    task: Task,
    path: str | os.PathLike,
    options: Options,
    methods: dict[str, Method] = METHODS,
    noise: Sequence[float] = (0.0, 0.125, 0.25, 0.5),
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> dict:
    """Test accuracy against the share of wrong labels among the few-shot images.

    Args:
        model, task, path, options, methods, seeds, overwrite, report: see [`few_shot_curve`].
        noise (`list[float]`, *optional*): shares of wrong labels, in training and in validation alike; the labels that
            are tested on are right.
        shots (`int`, *optional*, defaults to 16): images of a class.

    Returns:
        `dict`, see [`run_cells`]; the score is `"accuracy"`.
    """
    methods = _usable(methods, options)
    learning = {name: method for name, method in methods.items() if method.learns}
    cells = _cells({name: m for name, m in methods.items() if not m.learns}, [shots], seeds)
    cells += [cell for share in noise for cell in _cells(learning, [shots], seeds, noise=share)]

    def score(predict: Predictor) -> dict[str, float]:
        return {"accuracy": _test(predict, task)}

    return _run("label_noise", model, [task], path, options, methods, cells, score, overwrite, report)
