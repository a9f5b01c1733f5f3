"""A comparison of methods over data sets, numbers of shots and seeds, in which every method sees the same and no more.

Each cell runs in a process of its own (`processes`), which holds what the method may see (`scoring.allowed`); test
images are asked for once, when it has learned. One set of hyperparameters for a method, whatever the data set and the
number of shots; the last step counts.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ..demo.emoji import EMOJI_STYLES, emoji_model_path
from ..modeling import CoOpModel
from .cells import environment, make_cells, run_cells, settings_of
from .commands import ProtocolArguments, load_base_model, load_splits, make_options, prepare_task, protocol_splits
from .methods import Method, Options, look_up
from .processes import Place, answer_elsewhere, describe_methods
from .protocols import halves, mapped_exam, usable
from .scoring import Exam, accuracies, allowed, draw_for, make_exam, score
from .tasks import Task, make_task


__all__ = ["BenchmarkArguments", "Source", "benchmark", "compute_cell", "read_config", "read_sources"]

PROTOCOLS = ("few_shot", "base_to_new")

_KEPT = ("recipe", "validation", "shots", "seeds", "protocols", "reference")  # of the arguments, in the results

DEFAULT_METHODS = (
    "zero_shot ensemble linear_probe coop tip_adapter tip_adapter_f taskres zs_lp clap lp_plus_plus gda".split()
)


@dataclass
class BenchmarkArguments(ProtocolArguments):
    """What is compared: data sets × methods × shots × seeds."""

    config: str | None = field(default=None, metadata={"help": "YAML file of these arguments, and of data sets."})
    datasets: list[str] | None = field(
        default=None,
        metadata={"help": "Data sets: styles of the embedded emoji, folders, Hub ids, split_zhou_*.json files."},
    )
    methods: list[str] | None = field(
        default_factory=lambda: list(DEFAULT_METHODS),
        metadata={"help": "Names of methods; all; cached: those that learn from embeddings."},
    )
    methods_file: str | None = field(
        default=None, metadata={"help": "Python file that sets METHODS = {name: Method}, for methods of your own."}
    )
    protocols: list[str] = field(
        default_factory=lambda: ["few_shot"], metadata={"help": f"Any of {', '.join(PROTOCOLS)}."}
    )
    shots: list[int] = field(default_factory=lambda: [1, 4, 16], metadata={"help": "Images of a class."})
    validation: str = field(
        default="none",
        metadata={"help": "'none', or 'few': min(shots, 4) images of a class, for methods whose paper chooses there."},
    )
    reference: str = field(default="zero_shot", metadata={"help": "Method that the others are compared with."})
    processes: int | None = field(default=None, metadata={"help": "Cells at a time. Default: cores, with a GPU 1."})
    dry_run: bool = field(default=False, metadata={"help": "Say what would be run, and how long it takes, and stop."})
    output_dir: str = field(default="results/benchmark", metadata={"help": "Folder of the results."})


@dataclass
class Source:
    """A data set of the comparison.

    Args:
        args ([`BenchmarkArguments`]): how it is read.
        shifts (`list[Source]`, *optional*): data sets that the methods are tested on too, without learning there.
        facts (`dict`, *optional*): `classes`, `images`, `test_images`, `download_gb`, where they are known before the
            data are here.
    """

    args: BenchmarkArguments
    shifts: list["Source"] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in tables and files."""
        return self.args.data_name


_FACTS = ("classes", "images", "test_images", "download_gb")

_OF_A_SOURCE = {entry.name for entry in fields(ProtocolArguments)} - {
    "base_model", "methods", "shots", "seeds", "recipe", "output_dir", "overwrite",
}  # fmt: skip


def read_config(path: str) -> dict[str, Any]:
    """The arguments in a YAML file, and its list `data`.

    Raises:
        ValueError: not a mapping, or names that are no arguments; says which.
    """
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    known = {entry.name for entry in fields(BenchmarkArguments)} - {"config"}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold arguments, `shots: [1, 4]`, and `data`, got a {type(values).__name__}.")
    unknown = sorted(set(values) - known - {"data"})
    if unknown:
        raise ValueError(f"{path} holds {', '.join(map(repr, unknown))}: expected any of data, {', '.join(known)}.")
    return values


def _source(args: BenchmarkArguments, entry: dict[str, Any], path: str) -> Source:
    wrong = sorted(set(entry) - _OF_A_SOURCE - {"shifts", *_FACTS}) if isinstance(entry, dict) else entry
    if wrong or not isinstance(entry, dict):
        raise ValueError(f"{path}: a data set is a mapping of {', '.join(sorted(_OF_A_SOURCE))}; got {wrong!r}.")
    given = {key: value for key, value in entry.items() if key in _OF_A_SOURCE}
    for key in ("coop_split", "image_root", "few_shot_indices", "class_names_file", "cupl_file", "dataset"):
        if isinstance(given.get(key), str):
            given[key] = os.path.expandvars(given[key])
    if isinstance(given.get("class_names"), list):
        given["class_names"] = ",".join(given["class_names"])
    own = replace(args, **given)
    facts = {key: entry[key] for key in _FACTS if key in entry}
    return Source(own, [_source(args, shift, path) for shift in entry.get("shifts", [])], facts)


def read_sources(args: BenchmarkArguments, data: list[dict] | None = None) -> list[Source]:
    """The data sets of a comparison: those of a YAML file, or of `--datasets`, or the one of the other arguments.

    Args:
        args ([`BenchmarkArguments`]): the arguments.
        data (`list[dict]`, *optional*): the list `data` of a YAML file; each entry holds data arguments and,
            optionally, `shifts`, a list of such entries, and what is known before a download.

    Raises:
        ValueError: entries that are none, or two data sets of one name.
    """
    sources = []
    if data and args.datasets is None:
        sources = [_source(args, entry, str(args.config)) for entry in data]
    elif args.datasets:
        for name in args.datasets:
            kind = "style" if name in EMOJI_STYLES else "coop_split" if name.endswith(".json") else "dataset"
            own: dict[str, Any] = {"dataset": None, kind: name}
            sources.append(Source(replace(args, **own)))
    else:
        sources = [Source(args)]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two data sets are called {', '.join(twice)}: give them a `data_title` each.")
    return sources


def check_arguments(args: BenchmarkArguments) -> dict[str, Method]:
    """The methods, of which those of a file are known by their description alone.

    Raises:
        ValueError: an unknown method, protocol or validation, or a reference that is not compared.
    """
    known = describe_methods(args.methods_file)
    groups = {"all": list(known), "cached": [name for name, method in known.items() if not method.sees_images]}
    asked = args.methods or ["all"]
    chosen = list(dict.fromkeys(name for given in asked for name in groups.get(given, [given])))
    methods = {name: look_up(known, name, "method") for name in chosen}
    unknown = [name for name in args.protocols if name not in PROTOCOLS]
    if unknown or not args.protocols:
        raise ValueError(f"--protocols must be of {', '.join(PROTOCOLS)}, got {', '.join(unknown) or 'none'}.")
    if args.validation not in ("none", "few"):
        raise ValueError(f"--validation must be none or few, got {args.validation!r}.")
    if args.reference not in methods:
        raise ValueError(f"--reference {args.reference!r} is not among the methods: {', '.join(methods)}.")
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {args.processes}.")
    for what, values in (("--shots", args.shots), ("--seeds", args.seeds)):
        if not values or min(values) < (what == "--shots"):
            raise ValueError(f"{what} must be whole numbers from {int(what == '--shots')}, got {values}.")
    return methods


def num_processes(args: BenchmarkArguments) -> int:
    """Cells at a time."""
    return args.processes or (1 if torch.cuda.is_available() else os.cpu_count() or 1)


# ---------------------------------------------------------------------- a cell


def compute_cell(
    place: Place, name: str, method: Method, task: Task, exams: list[Exam], options: Options, cell: dict
) -> dict[str, Any]:
    """Lets a method learn in a process of its own, and scores it.

    Args:
        place ([`Place`]): base model and threads.
        name (`str`), method (`Method`): the method.
        task (`Task`): what is learned on.
        exams (`list[Exam]`): what is tested on.
        options (`Options`): the same for all methods.
        cell (`dict`): `shots` and `seed`.

    Returns:
        `dict`: `scores` (accuracies), `details` of each exam (see `scoring.measure`), `allowed`, `learned_values`,
        `cost`, and the `rows` drawn.
    """
    shots, options, seen = allowed(method, draw_for(method, task, options, cell), options)
    with answer_elsewhere(place, name, shots, options) as (facts, ask):
        details, image_seconds = score(ask, exams)
    cost = {
        "fit_seconds": round(facts["fit_seconds"], 3),
        "image_ms": round(1000 * image_seconds, 4),
        "with_image_tower": facts["sees_images"],
        "cpu_seconds": round(facts["cpu_seconds"], 2),
        "peak_memory_bytes": facts["peak_memory_bytes"],
        "peak_gpu_memory_bytes": facts["peak_gpu_memory_bytes"],
    }
    found = {"scores": accuracies(details), "details": details, "allowed": seen}
    found |= {"learned_values": facts["learned_values"], "cost": cost}
    return found if shots is None else {**found, "rows": shots.rows}


# ---------------------------------------------------------------------- the comparison


def _hash_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _origin(args: BenchmarkArguments) -> dict[str, Any]:
    """Where a data set and its draws come from, with hashes of the published files."""
    found: dict[str, Any] = {"source": args.dataset or args.coop_split or f"embedded emoji, {args.style}"}
    found["draw"] = "coop_hf, nested" if args.draw == "nested" else "CoOp's code, random.seed(seed)"
    if args.coop_split is not None:
        found["split_sha256"] = _hash_of(args.coop_split)
    if args.few_shot_indices is not None:
        found["draw"] = "index files"
        files = [args.few_shot_indices]
        if os.path.isdir(args.few_shot_indices):
            pairs = [(shots, seed) for shots in args.shots for seed in args.seeds]
            files = [os.path.join(args.few_shot_indices, f"shot_{k}-seed_{seed}.json") for k, seed in pairs]
        found["indices_sha256"] = {os.path.basename(file): _hash_of(file) for file in files}
    return found


def _shifted(source: Source, task: Task, model: CoOpModel) -> list[Exam]:
    exams = []
    for shift in source.shifts:
        splits = load_splits(shift.args)
        test = {"test": splits.get("test", next(iter(splits.values())))}
        columns = (shift.args.image_column, shift.args.label_column)
        original, names = shift.args.recipe == "paper", shift.args.read_class_names()
        exams.append(mapped_exam(task, make_task(model, test, shift.name, *columns, names, original=original)))
    return exams


def _run_source(
    source: Source, model: CoOpModel, methods: dict[str, Method], place: Place, report: Callable[[str], None]
) -> list[dict]:
    """All cells of a data set; one results file for each protocol."""
    args = source.args
    splits = protocol_splits(args, report)
    task = prepare_task(args, model, splits)
    options = replace(make_options(args, task), validation=args.validation)
    sizes = ", ".join(f"{part} {len(labels)}" for part, (_, labels) in task.parts.items())
    report(f'\n{task.name}: {len(task.class_names)} classes; images: {sizes}; template "{options.template}"')
    found = []
    for protocol in args.protocols:
        learned = task
        if protocol == "few_shot":
            exams, shots = [make_exam(task, "accuracy"), *_shifted(source, task, model)], args.shots
            own = usable(methods, options)
        else:
            learned, new = halves(task)
            exams, shots = [make_exam(learned, "base"), make_exam(new, "new")], [max(args.shots)]
            own = usable(methods, options, any_classes=True)
        settings = settings_of(protocol, model, [task], options)
        settings["data"] = {task.name: task.fingerprint.split("-")[0], **_origin(replace(args, shots=[], seeds=[]))}

        def compute(
            cell: dict, learned: Task = learned, exams: list[Exam] = exams, own: dict[str, Method] = own
        ) -> dict:
            return compute_cell(place, cell["method"], own[cell["method"]], learned, exams, options, cell)

        path = os.path.join(args.output_dir, "cells", f"{task.name.replace(os.sep, '_')}-{protocol}.json")
        results = run_cells(
            path, settings, make_cells(own, shots, args.seeds), compute, args.overwrite, report, num_processes(args)
        )
        about = {
            "class_names": list(task.class_names),
            "images": {part: len(labels) for part, (_, labels) in task.parts.items()},
            "tests": {exam.name: len(exam.labels) for exam in exams},
            "fingerprint": task.fingerprint.split("-")[0],
            "template": options.template,
            **_origin(args),
        }
        found.append({"protocol": protocol, "data": task.name, "about": about, **results})
    return found


def benchmark(
    args: BenchmarkArguments,
    data: list[dict] | None = None,
    report: Callable[[str], None] = print,
    command: str | None = None,
) -> dict[str, Any]:
    """Compares methods over data sets, numbers of shots and seeds. A second run goes on where the first one stopped.

    Args:
        args ([`BenchmarkArguments`]): what is compared; the cells go to files in `output_dir/cells`.
        data (`list[dict]`, *optional*): see [`read_sources`].
        report (`Callable[[str], None]`, *optional*, defaults to `print`): gets a line for each cell.
        command (`str`, *optional*): what was typed, to be repeated.

    Returns:
        `dict`: plain values, all that a report needs: `command`, `config` (the YAML file's text), `settings`,
        `methods`, `data`, `cells` (each with `protocol`, `data`, `method`, `shots`, `seed`), `draws`, `environment`
        and `failed`.
    """
    methods, sources = check_arguments(args), read_sources(args, data)
    processes = num_processes(args)
    threads = max(1, (os.cpu_count() or 1) // processes)
    base = args.base_model or emoji_model_path()
    place = Place(base, args.methods_file, threads)
    report(_conditions(args, methods, processes, threads))
    model = load_base_model(base)
    found = [entry for source in sources for entry in _run_source(source, model, methods, place, report)]
    cells: list[dict] = []
    failed: list[dict] = []
    data_of, draws = {}, {}
    for entry in found:
        where, name = {key: entry[key] for key in ("protocol", "data")}, f"{entry['data']}, {entry['protocol']}"
        cells += [{**cell, "cell": {**where, **cell["cell"]}} for cell in entry["cells"]]
        failed += [{**where, **failure} for failure in entry.get("failed", [])]
        data_of[name], draws[name] = entry["about"], entry["draws"]
    first = found[0]["settings"]
    return {
        "command": command,
        "config": None if args.config is None else Path(args.config).read_text(encoding="utf-8"),
        "settings": {
            **{key: first[key] for key in ("coop_hf", "base_model", "base_fingerprint")},
            **{key: getattr(args, key) for key in _KEPT},
            "threads": threads,
        },
        "methods": {name: describe(name, method) for name, method in methods.items()},
        "data": data_of,
        "cells": cells,
        "draws": draws,
        "environment": {**environment(), "processes": processes},
        "failed": failed,
    }


GROUPS = ("nothing learned", "learned from the shots", "with knowledge from outside")

OUTSIDE = {"sentences", "unlabelled", "test views"}


def describe(name: str, method: Method) -> dict[str, Any]:
    """Title, group and knowledge of a method, as plain values."""
    group = GROUPS[2] if OUTSIDE & set(method.knowledge) else GROUPS[int(method.learns)]
    values = {entry.name: getattr(method, entry.name) for entry in fields(method) if entry.name != "fit"}
    return {**values, "name": name, "group": group, "knowledge": list(method.knowledge)}


def _conditions(args: BenchmarkArguments, methods: dict[str, Method], processes: int, threads: int) -> str:
    """What holds for all cells, to be printed before the first."""
    choosing = [method.title for method in methods.values() if method.chooses]
    validation = "none, for all methods"
    if args.validation == "few":
        validation = f"min(shots, 4) images of each class, for {', '.join(choosing) or 'none of these methods'}"
    return (
        f"{len(methods)} methods; shots {', '.join(map(str, args.shots))}; seeds {', '.join(map(str, args.seeds))}; "
        f"recipe {args.recipe}, one for all data sets and shots, the last step counts.\nValidation: {validation}.\n"
        f"Test labels stay in this process; each cell learns in one of its own ({processes} at a time, "
        f"{threads} thread{'s' if threads > 1 else ''} each)."
    )
