"""The experiments of prompt learning, each a function: few-shot curves, ablations, domain generalisation, base-to-new
generalisation, transfer to other data sets, label noise.

Every experiment is a list of cells, one for each method, number of shots and seed. Pictures are embedded once; a cell
draws its few-shot set, fits a method, and scores the test pictures. Results go into one JSON file that is written
whole after every cell, together with all that is needed to repeat them: settings, rows drawn, seeds, versions,
hardware and times. A second run computes only the cells that are missing.
"""

import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import datasets
import numpy as np
import torch
import transformers
from transformers import PrinterCallback, set_seed

from .baselines import (
    HAND_TEMPLATES,
    IMAGENET_7_TEMPLATES,
    autoprompt,
    class_embeddings,
    cupl_class_embeddings,
    fit_linear_probe,
    fit_pet,
    read_prompts,
    zero_shot_logits,
)
from .config import CoOpConfig, clean_class_name
from .data import LabelledImages, load_images, read_coop_split, sample_few_shot
from .embedded import emoji_model_path, load_emoji
from .feature_cache import EmbeddedImages, embed_images
from .modeling import CoOpModel
from .saving import write_atomically
from .trainer import CoOpTrainer
from .training_args import CoOpTrainingArguments
from .version import __version__


__all__ = [
    "ABLATIONS",
    "EMOJI_TEMPLATES",
    "METHODS",
    "FewShot",
    "Method",
    "Options",
    "ProtocolArguments",
    "Task",
    "ablation_methods",
    "base_to_new",
    "choose_template",
    "coop_method",
    "corrupt_labels",
    "cross_dataset_transfer",
    "domain_generalization",
    "draw_few_shot",
    "environment",
    "few_shot_curve",
    "label_noise",
    "load_splits",
    "make_task",
    "map_classes",
    "prepare",
    "read_class_names",
    "results_table",
    "run_cells",
    "scores_by_method",
    "select_classes",
]

# Candidates for the embedded default; `choose_template` takes the best on validation.
EMOJI_TEMPLATES = (
    "{}.",
    "a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "an emoji of a {}.",
    "an icon of a {}.",
    "a drawing of a {}.",
    "a photo of a {}.",
)


# ---------------------------------------------------------------------- pictures


@dataclass
class Task:
    """A data set whose pictures are embedded.

    Args:
        name (`str`): its name in tables.
        class_names (`list[str]`): its classes.
        parts (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): for `"train"` (the pool that shots are drawn from),
            `"validation"` and `"test"`: image embeddings `(num_pictures, projection_dim)` and labels
            `(num_pictures,)`.
        fingerprint (`str`): hash of the pictures, the labels and their order.
        pictures (`datasets.Dataset`, *optional*): the rows of `"train"`, for training on augmented views.
        columns (`tuple[str, str]`, *optional*, defaults to `("image", "label")`): columns of pictures and labels.
        rows (`np.ndarray`, *optional*): `(num_train,)`, the row of each training picture in the whole data set, where
            classes were selected.
    """

    name: str
    class_names: list[str]
    parts: dict[str, tuple[torch.Tensor, torch.Tensor]]
    fingerprint: str
    pictures: datasets.Dataset | None = None
    columns: tuple[str, str] = ("image", "label")
    rows: np.ndarray | None = None


@dataclass
class FewShot:
    """What a method may see: a few labelled pictures, a few for validation, and the rest of the pool without labels.

    `pictures` are the rows of `image_embeds` in the data set, `rows` their numbers there.
    """

    class_names: list[str]
    image_embeds: torch.Tensor
    labels: torch.Tensor
    val_embeds: torch.Tensor
    val_labels: torch.Tensor
    unlabelled_embeds: torch.Tensor
    shots: int
    seed: int
    rows: list[int] = field(default_factory=list)
    pictures: datasets.Dataset | None = None
    columns: tuple[str, str] = ("image", "label")


def make_task(
    model: CoOpModel,
    splits: dict,
    name: str,
    image_column: str = "image",
    label_column: str = "label",
    class_names: list[str] | None = None,
    progress: bool = True,
) -> Task:
    """Embeds a data set, or takes its embeddings from the cache.

    Args:
        model (`CoOpModel`): whose image tower.
        splits (`dict[str, datasets.Dataset]`): `"test"`, and to learn from it `"train"`. Without `"validation"`, a
            fifth of each class of the training pictures (seed 0) is held out as validation.
        name (`str`): name of the data set.
        image_column, label_column (`str`, *optional*): its columns.
        class_names (`list[str]`, *optional*): see `coop_hf.data.resolve_labels`.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        [`Task`].
    """
    if "test" not in splits:
        raise ValueError(f"{name} has no part to test on: expected a split 'test', got {', '.join(splits)}.")
    parts, digest, pictures, names = {}, hashlib.blake2b(digest_size=8), None, class_names
    for part in ("train", "validation", "test"):
        if part not in splits:
            continue
        images = LabelledImages(splits[part], model.image_processor, image_column, label_column, names)
        names = images.class_names
        embeds = embed_images(model, images, progress=progress)[0]
        parts[part] = (embeds, torch.as_tensor(images.labels))
        for index, label in enumerate(images.labels):
            digest.update(images.content_key(index) + f"{part} {label}".encode())
        if part == "train":
            pictures = splits[part]
    rows = None
    if "train" in parts and "validation" not in parts:
        held_out = _a_fifth(parts["train"][1].numpy())
        kept = np.setdiff1d(np.arange(len(held_out)), np.flatnonzero(held_out))
        embeds, labels = parts["train"]
        parts["validation"] = (embeds[held_out], labels[held_out])
        parts["train"], pictures, rows = (embeds[kept], labels[kept]), pictures.select(kept), kept
    return Task(name, names, parts, digest.hexdigest(), pictures, (image_column, label_column), rows)


def _a_fifth(labels: np.ndarray) -> np.ndarray:
    """A mask of a fifth of each class, at least one picture of those that have two."""
    mask, random = np.zeros(len(labels), dtype=bool), np.random.RandomState(0)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        mask[random.permutation(own)[: max(len(own) // 5, int(len(own) > 1))]] = True
    return mask


def select_classes(task: Task, classes: list[int], name: str | None = None) -> Task:
    """The pictures of some classes, which are numbered anew in the order given.

    Args:
        task (`Task`): the data set.
        classes (`list[int]`): class indices.
        name (`str`, *optional*, defaults to the task's): its name in tables.

    Returns:
        [`Task`].
    """
    number = torch.full((len(task.class_names),), -1)
    number[list(classes)] = torch.arange(len(classes))
    parts = {
        part: (embeds[number[labels] >= 0], number[labels][number[labels] >= 0])
        for part, (embeds, labels) in task.parts.items()
    }
    pictures, rows = task.pictures, task.rows
    if "train" in task.parts:
        kept = np.flatnonzero((number[task.parts["train"][1]] >= 0).numpy())
        pictures = None if pictures is None else pictures.select(kept)
        rows = kept if rows is None else rows[kept]
    names = [task.class_names[c] for c in classes]
    return replace(task, name=name or task.name, class_names=names, parts=parts, pictures=pictures, rows=rows)


def corrupt_labels(labels: torch.Tensor, share: float, num_classes: int, seed: int) -> torch.Tensor:
    """Labels of which a share is wrong: replaced by another class, all other classes being equally likely.

    Args:
        labels (`torch.Tensor`): `(num_pictures,)`, class indices.
        share (`float`): from 0 to 1; rounded to whole pictures.
        num_classes (`int`): number of classes.
        seed (`int`): of the draw. With the same seed, a smaller share is part of a larger one.

    Returns:
        `torch.Tensor` `(num_pictures,)`.
    """
    if not 0 <= share <= 1 or num_classes < 2:
        raise ValueError(f"`share` goes from 0 to 1 and needs two classes, got {share!r} and {num_classes} classes.")
    random = np.random.RandomState(seed)
    order, steps = random.permutation(len(labels)), random.randint(1, num_classes, len(labels))
    wrong = order[: round(share * len(labels))]
    noisy = labels.clone()
    noisy[wrong] = (noisy[wrong] + torch.as_tensor(steps[wrong])) % num_classes
    return noisy


def _draw(labels: torch.Tensor, num_classes: int, shots: int, seed: int, allow_fewer: bool = False) -> list[int]:
    """Row numbers that `sample_few_shot` draws; it depends on the labels alone."""
    table = datasets.Dataset.from_dict({"label": labels.tolist(), "row": list(range(len(labels)))})
    names = [str(index) for index in range(num_classes)]
    return sample_few_shot(table, shots, seed=seed, class_names=names, allow_fewer=allow_fewer)["row"][:]


def draw_few_shot(task: Task, shots: int, seed: int, noise: float = 0.0, with_pictures: bool = False) -> FewShot:
    """Draws `shots` training pictures of each class and, as the paper, min(shots, 4) for validation.

    Args:
        task (`Task`): the data set.
        shots (`int`): pictures of a class.
        seed (`int`): of the draw, and of the methods. Draws are nested, see `sample_few_shot`.
        noise (`float`, *optional*, defaults to 0.0): share of wrong labels, in training and in validation.
        with_pictures (`bool`, *optional*, defaults to `False`): also give the pictures, for augmented views.

    Returns:
        [`FewShot`].
    """
    embeds, labels = task.parts["train"]
    val_embeds, val_labels = task.parts["validation"]
    number = len(task.class_names)
    drawn = _draw(labels, number, shots, seed)
    val = _draw(val_labels, number, min(shots, 4), seed, allow_fewer=True)
    rest = np.setdiff1d(np.arange(len(labels)), drawn)
    own, pictures = corrupt_labels(labels[drawn], noise, number, seed), None
    if with_pictures:
        pictures = task.pictures.select(drawn)
        column = task.columns[1]
        pictures = pictures.remove_columns(column).add_column(column, own.tolist())
    return FewShot(
        class_names=task.class_names,
        image_embeds=embeds[drawn],
        labels=own,
        val_embeds=val_embeds[val],
        val_labels=corrupt_labels(val_labels[val], noise, number, seed),
        unlabelled_embeds=embeds[rest],
        shots=shots,
        seed=seed,
        rows=np.asarray(drawn if task.rows is None else task.rows[drawn]).tolist(),
        pictures=pictures,
        columns=task.columns,
    )


# ---------------------------------------------------------------------- methods

# Scores pictures `(num_pictures, projection_dim)` against any list of class names.
Predictor = Callable[[torch.Tensor, list[str]], torch.Tensor]


@dataclass(frozen=True)
class Options:
    """What all methods of a run have in common.

    Args:
        template (`str`): the hand-written prompt.
        ensemble (`tuple[str, ...]`): templates of the prompt ensemble.
        cupl (`dict[str, list[str]]`, *optional*): CuPL's sentences.
        recipe (`str`, *optional*, defaults to `"fast"`): of `CoOpTrainingArguments`.
    """

    template: str
    ensemble: tuple[str, ...]
    cupl: dict | None = None
    recipe: str = "fast"


@dataclass(frozen=True)
class Method:
    """A method of a protocol.

    Args:
        title (`str`): its name in tables.
        fit (`Callable[[CoOpModel, FewShot, Options], Predictor]`): learns, and returns what scores pictures. The model
            gives base and processor, and must not be changed.
        learns (`bool`, *optional*, defaults to `True`): `False`: does not look at the few-shot set, and is run once.
        any_classes (`bool`, *optional*, defaults to `True`): whether it scores other classes than it has learned.
    """

    title: str
    fit: Callable
    learns: bool = True
    any_classes: bool = True


def _from_texts(model, embed) -> Predictor:
    """Scores with class embeddings that depend on the class names alone."""
    return lambda image_embeds, names: zero_shot_logits(model, embed(names), image_embeds=image_embeds)


def _fit_template(model, shots, options):
    return _from_texts(model, lambda names: class_embeddings(model, None, names, options.template))


def _fit_ensemble(model, shots, options):
    return _from_texts(model, lambda names: class_embeddings(model, None, names, list(options.ensemble)))


def _fit_cupl(model, shots, options):
    if options.cupl is None:
        raise ValueError("CuPL needs a file of sentences: pass `cupl=read_prompts(path)`, or --cupl_file.")
    return _from_texts(
        model, lambda names: cupl_class_embeddings(model, None, names, options.cupl, too_long="truncate")
    )


def _fit_probe(model, shots, options):
    probe = fit_linear_probe(
        shots.image_embeds, shots.labels, shots.val_embeds, shots.val_labels, class_names=shots.class_names
    )

    def predict(image_embeds, names):
        if list(names) != list(shots.class_names):
            raise ValueError("a linear probe scores the classes that it was fitted on, and no others.")
        return probe.logits(image_embeds)

    return predict


def _fit_autoprompt(model, shots, options):
    prompt = autoprompt(
        model, shots.image_embeds, shots.labels, shots.class_names, num_tokens=4, num_steps=16, seed=shots.seed
    )
    return _from_texts(model, lambda names: class_embeddings(model, None, names, prompt.template))


def _make_student(model, shots, options, **config) -> CoOpModel:
    set_seed(shots.seed)
    config = CoOpConfig(template=options.template, **config)
    return CoOpModel(model.get_base_model(), config, shots.class_names, model.processor)


def _train_coop(model, shots, options, **config) -> CoOpModel:
    student = _make_student(model, shots, options, **config)
    train, columns = EmbeddedImages(shots.image_embeds, shots.labels), {}
    if options.recipe != "fast":  # augmented views need the pictures
        train = shots.pictures
        columns = {"image_column": shots.columns[0], "label_column": shots.columns[1]}
    with tempfile.TemporaryDirectory() as folder:
        args = CoOpTrainingArguments(
            folder,
            recipe=options.recipe,
            seed=shots.seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **columns,
        )
        trainer = CoOpTrainer(student, args, train_dataset=train)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return student


def _predict_with(student: CoOpModel) -> Predictor:
    @torch.no_grad()
    def predict(image_embeds, names):
        if list(names) != student.class_names:
            student.set_class_names(list(names))
        return student(image_embeds=image_embeds).logits

    return predict


def _fit_coop(model, shots, options, **config):
    return _predict_with(_train_coop(model, shots, options, **config))


def coop_method(title: str, **config) -> Method:
    """CoOp with a configuration.

    Args:
        title (`str`): its name in tables.
        config: fields of `CoOpConfig`: `n_ctx`, `class_token_position`, `class_specific`, `ctx_init`.
    """
    return Method(title, functools.partial(_fit_coop, **config), any_classes=not config.get("class_specific", False))


def _fit_pet(model, shots, options):
    """Teachers: the prompt ensemble, CuPL if there is a file, and a context learned on the labelled pictures.

    The temperature was chosen on the validation part of the emoji.
    """
    learned = _train_coop(model, shots, options, n_ctx=16)
    if len(shots.unlabelled_embeds) == 0:
        return _predict_with(learned)
    teachers = [list(options.ensemble)]
    if options.cupl is not None:
        teachers.append(cupl_class_embeddings(model, None, shots.class_names, options.cupl, too_long="truncate"))
    with torch.no_grad():
        teachers.append(learned.get_text_features())
    student = _make_student(model, shots, options, n_ctx=16)
    fit_pet(student, teachers, shots.image_embeds, shots.labels, shots.unlabelled_embeds, temperature=1.0)
    return _predict_with(student)


METHODS = {
    "zero_shot": Method("zero-shot CLIP", _fit_template, learns=False),
    "ensemble": Method("prompt ensemble", _fit_ensemble, learns=False),
    "cupl": Method("CuPL", _fit_cupl, learns=False),
    "linear_probe": Method("linear probe", _fit_probe, any_classes=False),
    "autoprompt": Method("AutoPrompt M=4", _fit_autoprompt),
    "pet": Method("PET, student M=16", _fit_pet),
    "coop": coop_method("CoOp M=16", n_ctx=16),
    "coop_m4": coop_method("CoOp M=4", n_ctx=4),
    "coop_csc": coop_method("CoOp M=4, class-specific", n_ctx=4, class_specific=True),
}

# One change at a time; `words` stands for the hand-written template up to the class name.
ABLATIONS = {
    "m4": {"n_ctx": 4},
    "m8": {"n_ctx": 8},
    "m16": {"n_ctx": 16},
    "words": {"ctx_init": "words"},
    "m16_middle": {"n_ctx": 16, "class_token_position": "middle"},
    "m16_front": {"n_ctx": 16, "class_token_position": "front"},
    "m16_csc": {"n_ctx": 16, "class_specific": True},
    "m16_csc_middle": {"n_ctx": 16, "class_specific": True, "class_token_position": "middle"},
}
_ABLATION_TITLES = {
    "m4": "M=4, random, end",
    "m8": "M=8, random, end",
    "m16": "M=16, random, end",
    "words": "from words, end",
    "m16_middle": "M=16, random, middle",
    "m16_front": "M=16, random, front",
    "m16_csc": "M=16, random, end, class-specific",
    "m16_csc_middle": "M=16, random, middle, class-specific",
}


def ablation_methods(template: str, names=None) -> dict[str, Method]:
    """The methods of the ablations.

    Args:
        template (`str`): the hand-written prompt; its words before `{}` are what the context starts from in `"words"`.
        names (`list[str]`, *optional*, defaults to all of `ABLATIONS`): which ones.
    """
    methods = {}
    for name in names or ABLATIONS:
        config, title = dict(_known(ABLATIONS, name, "ablation")), _ABLATION_TITLES[name]
        if "ctx_init" in config:
            words = template.split("{}")[0].strip()
            if not words:
                continue
            config["ctx_init"], title = words, f'from "{words}", end'
        methods[name] = coop_method(title, **config)
    return methods


def _known(table: dict, name: str, what: str):
    if name not in table:
        raise ValueError(f"there is no {what} {name!r}; choose from {', '.join(table)}.")
    return table[name]


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
    options = asdict(options)
    if options["cupl"] is not None:
        text = json.dumps(options["cupl"], sort_keys=True)
        options["cupl"] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return {
        "protocol": protocol,
        "coop_hf": __version__,
        "base_model": os.path.basename(os.path.normpath(base.config._name_or_path or "unnamed")),
        "base_fingerprint": _base_fingerprint(model),
        "data": {task.name: task.fingerprint for task in tasks},
        "class_names": {task.name: list(task.class_names) for task in tasks},
        "options": {**options, "ensemble": list(options["ensemble"])},
    }


def run_cells(path, settings: dict, cells: list[dict], compute, overwrite: bool = False, report=print) -> dict:
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
    results = {"settings": settings, "environment": None, "draws": {}, "cells": []}
    if os.path.exists(path) and not overwrite:
        try:
            with open(path, encoding="utf-8") as file:
                results = json.load(file)
            different = [key for key in settings if results["settings"].get(key) != settings[key]]
            done = {_key(cell): cell for cell in results["cells"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no results file ({error}): move it, or pass overwrite=True.") from None
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


def _cells(methods: dict[str, Method], shots: list[int], seeds: list[int], **more) -> list[dict]:
    """One cell for each method, number of shots and seed; a method that does not learn has one, at 0 shots."""
    cells = []
    for name, method in methods.items():
        pairs = [(k, seed) for k in shots for seed in seeds] if method.learns else [(0, 0)]
        cells += [{"method": name, "shots": k, "seed": seed, **more} for k, seed in pairs]
    return cells


def _fit(model, task: Task, methods, options, cell: dict) -> tuple[Predictor, list[int] | None]:
    method = methods[cell["method"]]
    if not method.learns:
        return method.fit(model, None, options), None
    shots = draw_few_shot(task, cell["shots"], cell["seed"], cell.get("noise", 0.0), options.recipe != "fast")
    return method.fit(model, shots, options), shots.rows


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(dim=-1).cpu() == labels).float().mean().item()


def _test(predict: Predictor, task: Task, part: str = "test") -> float:
    embeds, labels = task.parts[part]
    return _accuracy(predict(embeds, task.class_names), labels)


def choose_template(model: CoOpModel, task: Task, templates) -> tuple[str, dict[str, float]]:
    """The template with the best zero-shot accuracy on validation; the first of equals.

    Returns:
        the template, and `{template: validation accuracy}`.
    """
    scores = {
        template: _test(_fit_template(model, None, Options(template, (template,))), task, "validation")
        for template in templates
    }
    return max(scores, key=scores.get), scores


# ---------------------------------------------------------------------- protocols


def few_shot_curve(
    model: CoOpModel,
    task: Task,
    path,
    options: Options,
    methods: dict[str, Method] = METHODS,
    shots=(1, 2, 4, 8, 16),
    seeds=(1, 2, 3),
    overwrite: bool = False,
    report=print,
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

    def compute(cell):
        predict, rows = _fit(model, task, methods, options, cell)
        return {"scores": {"accuracy": _test(predict, task)}, "rows": rows}

    settings = _settings("few_shot_curve", model, [task], options)
    return run_cells(path, settings, _cells(methods, shots, seeds), compute, overwrite, report)


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
        logits (`torch.Tensor`): `(num_pictures, len(source))`.
        source, target (`list[str]`): the two class lists.
        class_map (`dict[str, str]`, *optional*): `{source class: target class}`. Several source classes may stand for
            one target class, which gets their largest logit; a source class that is not named belongs to the target
            class of its own name, or to none.

    Returns:
        `torch.Tensor` `(num_pictures, len(target))`.

    Raises:
        ValueError: unknown classes in the map, or a target class that no source class stands for.
    """
    index = {clean_class_name(name): i for i, name in enumerate(target)}
    own = {clean_class_name(name): clean_class_name(name) for name in source}
    given = {clean_class_name(a): clean_class_name(b) for a, b in (class_map or {}).items()}
    unknown = [a for a in given if a not in own] + [b for b in given.values() if b not in index]
    if unknown:
        raise ValueError(f"the class map names classes that neither list has: {', '.join(map(repr, unknown[:10]))}.")
    result = logits.new_full((len(logits), len(target)), -torch.inf)
    for column, name in enumerate(own):
        place = index.get(given.get(name, name))
        if place is not None:
            result[:, place] = torch.maximum(result[:, place], logits[:, column])
    missing = [name for name, i in index.items() if torch.isinf(result[:, i]).all()]
    if missing:
        raise ValueError(
            f"no class of the source stands for {', '.join(map(repr, missing[:10]))}: name one in the class map."
        )
    return result


def domain_generalization(
    model: CoOpModel,
    source: Task,
    targets: list[Task],
    path,
    options: Options,
    methods: dict[str, Method] = METHODS,
    shots: int = 16,
    seeds=(1, 2, 3),
    class_maps: dict[str, dict[str, str]] | None = None,
    overwrite: bool = False,
    report=print,
) -> dict:
    """Learns on one data set and tests on others with the same kind of classes (section 4.2 of the paper).

    Every method scores the source's classes; where a target has other ones, they are mapped.

    Args:
        model (`CoOpModel`): gives base and processor; it is not changed.
        source (`Task`): the data set that is learned on; its test part is the first column.
        targets (`list[Task]`): the other data sets; only their test parts are looked at.
        path, options, methods, seeds, overwrite, report: see [`few_shot_curve`].
        shots (`int`, *optional*, defaults to 16): pictures of a class.
        class_maps (`dict[str, dict[str, str]]`, *optional*): for targets by name, see [`map_classes`].

    Returns:
        `dict`, see [`run_cells`]; scores by name of data set.
    """
    methods, class_maps = _usable(methods, options), class_maps or {}

    def compute(cell):
        predict, rows = _fit(model, source, methods, options, cell)
        scores = {source.name: _test(predict, source)}
        for target in targets:
            embeds, labels = target.parts["test"]
            logits = predict(embeds, source.class_names)
            logits = map_classes(logits, source.class_names, target.class_names, class_maps.get(target.name))
            scores[target.name] = _accuracy(logits, labels)
        return {"scores": scores, "rows": rows}

    settings = _settings("domain_generalization", model, [source, *targets], options)
    settings["class_maps"] = class_maps
    return run_cells(path, settings, _cells(methods, [shots], seeds), compute, overwrite, report)


def cross_dataset_transfer(
    model: CoOpModel,
    source: Task,
    targets: list[Task],
    path,
    options: Options,
    methods: dict[str, Method] = METHODS,
    shots: int = 16,
    seeds=(1, 2, 3),
    overwrite: bool = False,
    report=print,
) -> dict:
    """Learns on one data set and tests on others with their own classes.

    Methods that are bound to their classes (linear probe, class-specific contexts) are left out.

    Args and returns: as [`domain_generalization`], without maps.
    """
    methods = _usable(methods, options, any_classes=True)

    def compute(cell):
        predict, rows = _fit(model, source, methods, options, cell)
        return {"scores": {task.name: _test(predict, task) for task in (source, *targets)}, "rows": rows}

    settings = _settings("cross_dataset_transfer", model, [source, *targets], options)
    return run_cells(path, settings, _cells(methods, [shots], seeds), compute, overwrite, report)


def base_to_new(
    model: CoOpModel,
    task: Task,
    path,
    options: Options,
    methods: dict[str, Method] = METHODS,
    shots: int = 16,
    seeds=(1, 2, 3),
    overwrite: bool = False,
    report=print,
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

    def compute(cell):
        predict, rows = _fit(model, base, methods, options, cell)
        first, second = _test(predict, base), _test(predict, new)
        mean = 2 * first * second / (first + second) if first + second else 0.0
        return {"scores": {"base": first, "new": second, "H": mean}, "rows": rows}

    settings = _settings("base_to_new", model, [base, new], options)
    return run_cells(path, settings, _cells(methods, [shots], seeds), compute, overwrite, report)


def label_noise(
    model: CoOpModel,
    task: Task,
    path,
    options: Options,
    methods: dict[str, Method] = METHODS,
    noise=(0.0, 0.125, 0.25, 0.5),
    shots: int = 16,
    seeds=(1, 2, 3),
    overwrite: bool = False,
    report=print,
) -> dict:
    """Test accuracy against the share of wrong labels among the few-shot pictures.

    Args:
        model, task, path, options, methods, seeds, overwrite, report: see [`few_shot_curve`].
        noise (`list[float]`, *optional*): shares of wrong labels, in training and in validation alike; the labels that
            are tested on are right.
        shots (`int`, *optional*, defaults to 16): pictures of a class.

    Returns:
        `dict`, see [`run_cells`]; the score is `"accuracy"`.
    """
    methods = _usable(methods, options)
    learning = {name: method for name, method in methods.items() if method.learns}
    cells = _cells({name: m for name, m in methods.items() if not m.learns}, [shots], seeds)
    cells += [cell for share in noise for cell in _cells(learning, [shots], seeds, noise=share)]

    def compute(cell):
        predict, rows = _fit(model, task, methods, options, cell)
        return {"scores": {"accuracy": _test(predict, task)}, "rows": rows}

    settings = _settings("label_noise", model, [task], options)
    return run_cells(path, settings, cells, compute, overwrite, report)


# ---------------------------------------------------------------------- tables


def scores_by_method(results: dict, methods: dict[str, Method], column: str) -> dict[str, dict]:
    """Scores of the seeds, by title of the method and by column.

    Args:
        results (`dict`): as a protocol returns it.
        methods (`dict[str, Method]`): gives titles and order.
        column (`str`): `"shots"` or another key of the cells, or `"scores"`: one column for each score.

    Returns:
        `dict[str, dict[key, list[float]]]`.
    """
    table = {method.title: {} for method in methods.values()}
    for entry in results["cells"]:
        by_column = table[methods[entry["cell"]["method"]].title]
        for name, value in entry["scores"].items():
            key = name if column == "scores" else entry["cell"].get(column)
            by_column.setdefault(key, []).append(value)
    return {title: by_column for title, by_column in table.items() if by_column}


def results_table(scores: dict[str, dict], columns: list, corner: str = "", headers: list[str] | None = None) -> str:
    """Means in percent ± the standard deviation over seeds (of a sample), as a table that is Markdown too.

    Args:
        scores (`dict[str, dict[key, list[float]]]`): as [`scores_by_method`] gives them. A method that does not
            learn has one score, in every column if it stands under 0 or `None`.
        columns (`list`): keys, in order.
        corner (`str`, *optional*): heading of the first column.
        headers (`list[str]`, *optional*, defaults to the keys): headings of the others.

    Returns:
        `str`.
    """
    rows = [[corner, *(headers or map(str, columns))]]
    for title, by_column in scores.items():
        everywhere = by_column.get(0, by_column.get(None)) if len(by_column) == 1 else None
        rows.append([title, *(_mean_and_spread(by_column.get(key, everywhere)) for key in columns)])
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _mean_and_spread(values) -> str:
    if not values:
        return ""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


# ---------------------------------------------------------------------- commands


@dataclass
class ProtocolArguments:
    """What the commands under `examples/` have in common."""

    base_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a CLIP model. Default: the embedded emoji CLIP."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id or folder, see docs/datasets.md. Default: the embedded emoji."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    coop_split: str | None = field(default=None, metadata={"help": "A split_zhou_*.json of the CoOp benchmark."})
    image_root: str | None = field(default=None, metadata={"help": "Folder of the pictures of --coop_split."})
    class_names_file: str | None = field(
        default=None, metadata={"help": "Text file with a class name in each line, in the order of the labels."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the pictures."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    style: str = field(default="fluent-flat", metadata={"help": "Style of the embedded emoji to learn on."})
    template: str | None = field(
        default=None,
        metadata={"help": "Hand-written prompt. Default: CoOp's for the data set; emoji: the best on validation."},
    )
    cupl_file: str | None = field(default=None, metadata={"help": "JSON file of CuPL's sentences."})
    methods: list[str] | None = field(default=None, metadata={"help": f"Any of {', '.join(METHODS)}. Default: all."})
    shots: list[int] = field(default_factory=lambda: [16], metadata={"help": "Pictures of a class."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds."})
    recipe: str = field(default="fast", metadata={"help": "'fast' or 'paper', see CoOpTrainingArguments."})
    output_dir: str = field(default="results", metadata={"help": "Folder of the results."})
    overwrite: bool = field(default=False, metadata={"help": "Start afresh instead of going on."})


def load_splits(args: ProtocolArguments) -> dict:
    """The splits of the data set that the arguments name: "train", "validation", "test", as far as it has them."""
    if args.coop_split is not None:
        return read_coop_split(args.coop_split, args.image_root)
    if args.dataset is None:
        return load_emoji(args.style)
    splits = load_images(args.dataset, **({"name": args.dataset_config} if args.dataset_config else {}))
    if isinstance(splits, datasets.Dataset):
        return {"test": splits}
    splits = {("validation" if name in ("val", "valid") else name): split for name, split in splits.items()}
    if "test" not in splits and "validation" in splits:  # Food101, ImageNet: what is published is the test part
        splits["test"] = splits.pop("validation")
    return splits


def read_class_names(path) -> list[str]:
    """The class names in a text file, one in each line; empty lines don't count."""
    with open(path, encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def prepare(args: ProtocolArguments) -> tuple[CoOpModel, Task, Options, dict[str, Method]]:
    """Loads and embeds what a command needs.

    Returns:
        the model, on a GPU if there is one; the data set; options; the methods.
    """
    methods = {name: _known(METHODS, name, "method") for name in args.methods or METHODS}
    model = CoOpModel.from_pretrained(args.base_model or emoji_model_path())
    if torch.cuda.is_available():
        model.to("cuda")
    names = None if args.class_names_file is None else read_class_names(args.class_names_file)
    name = args.style if args.dataset is None and args.coop_split is None else _short_name(args)
    splits = load_splits(args)
    if "train" not in splits or "test" not in splits:
        raise ValueError(f"{name} has {', '.join(splits)}; a protocol needs train, and test or validation.")
    task = make_task(model, splits, name, args.image_column, args.label_column, names)
    if args.dataset is None and args.coop_split is None:
        template, ensemble = args.template, EMOJI_TEMPLATES
        if template is None:
            template, scores = choose_template(model, task, EMOJI_TEMPLATES)
            shown = ", ".join(f'"{text}" {100 * score:.1f}' for text, score in scores.items())
            print(f"Hand-written template, chosen on validation (zero-shot accuracy in %): {shown}")
    else:
        template = args.template or HAND_TEMPLATES.get(name, "a photo of a {}.")
        ensemble = dict.fromkeys((*IMAGENET_7_TEMPLATES, template))  # as in CoOp's comparison
    cupl = None if args.cupl_file is None else read_prompts(args.cupl_file, task.class_names)
    print(f'Template: "{template}". Pictures: {", ".join(f"{k} {len(v[1])}" for k, v in task.parts.items())}.')
    return model, task, Options(template, tuple(ensemble), cupl, args.recipe), methods


def _short_name(args: ProtocolArguments) -> str:
    if args.coop_split is not None:
        return os.path.splitext(os.path.basename(args.coop_split))[0].removeprefix("split_zhou_")
    return os.path.basename(os.path.normpath(args.dataset))
