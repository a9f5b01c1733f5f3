"""What a cell of an experiment is made of: embedded pictures, a few-shot draw from them, and a method.

A method learns from the draw, and gives what scores pictures.
"""

import functools
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import torch
from transformers import PrinterCallback, set_seed

from .baselines import (
    autoprompt,
    class_embeddings,
    cupl_class_embeddings,
    fit_linear_probe,
    fit_pet,
    zero_shot_logits,
)
from .config import CoOpConfig
from .data import LabelledImages, sample_few_shot
from .feature_cache import EmbeddedImages, embed_images
from .modeling import CoOpModel
from .prompts import encode_words
from .trainer import CoOpTrainer
from .training_args import CoOpTrainingArguments


__all__ = [
    "ABLATIONS",
    "EMOJI_TEMPLATES",
    "METHODS",
    "FewShot",
    "Method",
    "Options",
    "Predictor",
    "Task",
    "ablation_methods",
    "coop_method",
    "corrupt_labels",
    "draw_few_shot",
    "make_task",
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
    """Starts from the words of the hand-written prompt; without any, or with rare ones, from four random words."""
    words = options.template.split("{}")[0].split()
    is_usual = words and all(len(ids) == 1 for ids in encode_words(model.tokenizer, words))
    prompt = autoprompt(
        model,
        shots.image_embeds,
        shots.labels,
        shots.class_names,
        init=" ".join(words) if is_usual else None,
        objective="accuracy",
        num_steps=32,
        seed=shots.seed,
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
    "autoprompt": Method("AutoPrompt from the template", _fit_autoprompt),
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
        config, title = dict(look_up(ABLATIONS, name, "ablation")), _ABLATION_TITLES[name]
        if "ctx_init" in config:
            words = template.split("{}")[0].strip()
            if not words:
                continue
            config["ctx_init"], title = words, f'from "{words}", end'
        methods[name] = coop_method(title, **config)
    return methods


def look_up(table: dict, name: str, what: str):
    if name not in table:
        raise ValueError(f"there is no {what} {name!r}; choose from {', '.join(table)}.")
    return table[name]
