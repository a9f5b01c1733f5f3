"""The experiments of prompt learning, each a function: few-shot curves, ablations, domain generalisation, base-to-new
generalisation, transfer to other data sets, label noise.

An experiment is a list of cells, one for each method, number of shots and seed; see [`run_cells`].
"""

import os
from collections.abc import Callable, Sequence

import torch

from ..baselines.cupl import class_key
from ..checks import clean_class_name
from ..modeling import CoOpModel
from .cells import environment, make_cells, run_cells, settings_of
from .methods import METHODS, Method, Options, Predictor
from .scoring import Exam, accuracies, answer_here, draw_for, harmonic_mean, make_exam, score
from .tasks import Task, select_classes


__all__ = [
    "base_to_new",
    "choose_template",
    "cross_dataset_transfer",
    "domain_generalization",
    "environment",
    "few_shot_curve",
    "halves",
    "harmonic_mean",
    "label_noise",
    "map_classes",
    "mapped_exam",
    "run_cells",
    "usable",
]


def _run(
    protocol: str, model: CoOpModel, tasks: list[Task], path: str | os.PathLike, options: Options,
    methods: dict[str, Method], cells: list[dict], exams: list[Exam], overwrite: bool, report: Callable, **more: dict,
) -> dict:  # fmt: skip
    """Fits the method of each cell on the first data set, and scores it on all exams."""

    def compute(cell: dict) -> dict:
        method = methods[cell["method"]]
        shots = draw_for(method, tasks[0], options, cell)
        with answer_here(method, model, shots, options) as (_, ask):
            scores = accuracies(score(ask, exams)[0])
        return {"scores": scores} if shots is None else {"scores": scores, "rows": shots.rows}

    settings = {**settings_of(protocol, model, tasks, options), **more}
    return run_cells(path, settings, cells, compute, overwrite, report)


def _test(predict: Predictor, task: Task, part: str = "test") -> float:
    """Accuracy of what a method gave, on a part of a data set."""
    method = Method("", lambda *_: predict)
    with answer_here(method, None, None, None) as (_, ask):  # type: ignore[arg-type]
        return score(ask, [make_exam(task, "test", part)])[0]["test"]["accuracy"]


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
    methods = usable(methods, options)
    cells, exams = make_cells(methods, shots, seeds), [make_exam(task, "accuracy")]
    return _run("few_shot_curve", model, [task], path, options, methods, cells, exams, overwrite, report)


def usable(methods: dict[str, Method], options: Options, any_classes: bool = False) -> dict[str, Method]:
    """Methods that have what they need: sentences, and to score other classes than they have learned."""
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
    methods, class_maps = usable(methods, options), class_maps or {}
    exams = [make_exam(source), *(mapped_exam(source, target, class_maps.get(target.name)) for target in targets)]
    tasks, cells = [source, *targets], make_cells(methods, [shots], seeds)
    more = {"class_maps": class_maps}
    return _run("domain_generalization", model, tasks, path, options, methods, cells, exams, overwrite, report, **more)


def mapped_exam(source: Task, target: Task, class_map: dict[str, str] | None = None) -> Exam:
    """The test images of another data set, scored over the source's classes, which are mapped to its own."""
    names = (list(source.class_names), list(target.class_names))
    return make_exam(target, class_names=names[0], mapped=lambda logits: map_classes(logits, *names, class_map))


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
    methods = usable(methods, options, any_classes=True)
    described = set(map(class_key, options.cupl or {}))
    if any(class_key(name) not in described for task in targets for name in task.class_names):
        methods.pop("cupl", None)
    tasks, cells = [source, *targets], make_cells(methods, [shots], seeds)
    exams = [make_exam(task) for task in tasks]
    return _run("cross_dataset_transfer", model, tasks, path, options, methods, cells, exams, overwrite, report)


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
    methods = usable(methods, options, any_classes=True)
    base, new = halves(task)
    cells, exams = make_cells(methods, [shots], seeds), [make_exam(base, "base"), make_exam(new, "new")]
    return _run("base_to_new", model, [base, new], path, options, methods, cells, exams, overwrite, report)


def halves(task: Task) -> tuple[Task, Task]:
    """The first half of the classes, of an odd number the larger, and the second."""
    number = len(task.class_names)
    half = (number + 1) // 2
    return (
        select_classes(task, list(range(half)), f"{task.name}, base classes"),
        select_classes(task, list(range(half, number)), f"{task.name}, new classes"),
    )


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
    methods = usable(methods, options)
    learning = {name: method for name, method in methods.items() if method.learns}
    cells = make_cells({name: m for name, m in methods.items() if not m.learns}, [shots], seeds)
    cells += [cell for share in noise for cell in make_cells(learning, [shots], seeds, noise=share)]
    exams = [make_exam(task, "accuracy")]
    return _run("label_noise", model, [task], path, options, methods, cells, exams, overwrite, report)
