"""Embedded images as a task, and a few-shot draw from it."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Subset

from ..data.feature_cache import embed_images
from ..data.few_shot import sample_few_shot
from ..data.labelled_images import LabelledImages
from ..modeling import CoOpModel


__all__ = ["FewShot", "Task", "corrupt_labels", "draw_few_shot", "make_task", "select_classes", "with_draws"]


# ---------------------------------------------------------------------- images


@dataclass
class Task:
    """A data set whose images are embedded.

    Args:
        name (`str`): its name in tables.
        class_names (`list[str]`): its classes.
        parts (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): for `"train"` (the pool that shots are drawn from),
            `"validation"` and `"test"`: image embeddings `(num_images, projection_dim)` and labels
            `(num_images,)`.
        fingerprint (`str`): hash of the images, the labels and their order.
        images (`datasets.Dataset`, *optional*): the rows of `"train"`, for training on augmented views.
        columns (`tuple[str, str]`, *optional*, defaults to `("image", "label")`): columns of images and labels.
        rows (`np.ndarray`, *optional*): `(num_train,)`, the row of each training image in the whole data set, where
            classes were selected.
        draws (`dict[tuple[int, int], tuple[list[int], list[int] or None]]`, *optional*): by number of shots and seed,
            the rows of `"train"` and of `"validation"` that a draw from elsewhere takes, see [`with_draws`].
        views (`dict[str, torch.utils.data.Dataset]`, *optional*): of each part, the images of the embeddings as plain
            views, for methods that change the image tower; their labels are not looked at.
    """

    name: str
    class_names: list[str]
    parts: dict[str, tuple[torch.Tensor, torch.Tensor]]
    fingerprint: str
    images: datasets.Dataset | None = None
    columns: tuple[str, str] = ("image", "label")
    rows: np.ndarray | None = None
    draws: dict = field(default_factory=dict)
    views: dict[str, torch.utils.data.Dataset] = field(default_factory=dict)


@dataclass
class FewShot:
    """What a method may see: a few labelled images, a few for validation, and the rest of the pool without labels.

    `images` are the rows of `image_embeds` in the data set, `rows` their numbers there.
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
    images: datasets.Dataset | None = None
    columns: tuple[str, str] = ("image", "label")


def make_task(
    model: CoOpModel,
    splits: dict,
    name: str,
    image_column: str = "image",
    label_column: str = "label",
    class_names: list[str] | None = None,
    progress: bool = True,
    original: bool = False,
) -> Task:
    """Embeds a data set, or takes its embeddings from the cache.

    Args:
        model (`CoOpModel`): whose image tower.
        splits (`dict[str, datasets.Dataset]`): `"test"`, and to learn from it `"train"`. Without `"validation"`, a
            fifth of each class of the training images (seed 0) is held out as validation.
        name (`str`): name of the data set.
        image_column, label_column (`str`, *optional*): its columns.
        class_names (`list[str]`, *optional*): see `coop_hf.data.resolve_labels`.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.
        original (`bool`, *optional*, defaults to `False`): images are cropped as by the public code, see
            `coop_hf.data.transforms.eval_transform`; the commands do so with the paper's recipe.

    Returns:
        [`Task`].
    """
    if "test" not in splits:
        raise ValueError(f"{name} has no part to test on: expected a split 'test', got {', '.join(splits)}.")
    parts, digest = {}, hashlib.blake2b(digest_size=8)
    views: dict[str, torch.utils.data.Dataset] = {}
    images: Any = None
    names: Any = class_names
    for part in ("train", "validation", "test"):
        if part not in splits:
            continue
        labelled = LabelledImages(
            splits[part], model.image_processor, image_column, label_column, names, original=original
        )
        names = labelled.class_names
        embeds = embed_images(model, labelled, progress=progress)[0]
        parts[part], views[part] = (embeds, torch.as_tensor(labelled.labels)), labelled
        for key, label in zip(labelled.content_keys(), labelled.labels):
            digest.update(key + f"{part} {label}".encode())
        if part == "train":
            images = splits[part]
    rows = None
    if "train" in parts and "validation" not in parts:
        held_out = a_fifth(parts["train"][1].numpy())
        kept = np.flatnonzero(~held_out)
        embeds, labels = parts["train"]
        parts["validation"] = (embeds[held_out], labels[held_out])
        parts["train"], images, rows = (embeds[kept], labels[kept]), images.select(kept), kept
        places = {"train": kept, "validation": np.flatnonzero(held_out)}
        views |= {part: Subset(views["train"], own.tolist()) for part, own in places.items()}
    columns = (image_column, label_column)
    return Task(name, names, parts, digest.hexdigest(), images, columns, rows, views=views)


def a_fifth(labels: np.ndarray) -> np.ndarray:
    """A mask `(len(labels),)` of a fifth of each class, at least one image of those that have two; seed 0."""
    mask, random = np.zeros(len(labels), dtype=bool), np.random.RandomState(0)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        mask[random.permutation(own)[: max(len(own) // 5, int(len(own) > 1))]] = True
    return mask


def select_classes(task: Task, classes: list[int], name: str | None = None) -> Task:
    """The images of some classes, which are numbered anew in the order given.

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
    images, rows, draws = task.images, task.rows, {}
    places = {part: np.flatnonzero((number[labels] >= 0).numpy()) for part, (_, labels) in task.parts.items()}
    views = {part: Subset(own, places[part].tolist()) for part, own in task.views.items()}
    if "train" in task.parts:
        kept = places["train"]
        images = None if images is None else images.select(kept)
        rows = kept if rows is None else rows[kept]
        new = {part: {old: place for place, old in enumerate(own.tolist())} for part, own in places.items()}
        for key, drawn in task.draws.items():  # of all classes, as in the public code, and then those that are kept
            draws[key] = tuple(
                own and [new[part][row] for row in own if row in new[part]]
                for part, own in zip(("train", "validation"), drawn, strict=True)
            )
    names = [task.class_names[c] for c in classes]
    own: dict[str, Any] = {"parts": parts, "images": images, "rows": rows, "draws": draws, "views": views}
    return replace(task, name=name or task.name, class_names=names, **own)


def with_draws(task: Task, draws: dict[tuple[int, int], tuple[list[int], list[int] | None]]) -> Task:
    """A task with few-shot draws that come from elsewhere: from index files, or from the public code's way.

    Args:
        task (`Task`): the data set.
        draws (`dict`): `{(shots, seed): (rows of "train", rows of "validation" or None)}`.

    Returns:
        [`Task`], with a fingerprint of its own.
    """
    digest = hashlib.blake2b(repr(sorted(draws.items())).encode(), digest_size=4).hexdigest()
    return replace(task, draws=draws, fingerprint=f"{task.fingerprint}-{digest}")


def corrupt_labels(labels: torch.Tensor, share: float, num_classes: int, seed: int) -> torch.Tensor:
    """Labels of which a share is wrong: replaced by another class, all other classes being equally likely.

    Args:
        labels (`torch.Tensor`): `(num_images,)`, class indices.
        share (`float`): from 0 to 1; rounded to whole images.
        num_classes (`int`): number of classes.
        seed (`int`): of the draw. With the same seed, a smaller share is part of a larger one.

    Returns:
        `torch.Tensor` `(num_images,)`.
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


def draw_few_shot(task: Task, shots: int, seed: int, noise: float = 0.0, with_images: bool = False) -> FewShot:
    """Draws `shots` training images of each class and, as the paper, min(shots, 4) for validation.

    Args:
        task (`Task`): the data set.
        shots (`int`): images of a class.
        seed (`int`): of the draw, and of the methods. Draws are nested, see `sample_few_shot`, unless
            the task has its own.
        noise (`float`, *optional*, defaults to 0.0): share of wrong labels, in training and in validation.
        with_images (`bool`, *optional*, defaults to `False`): also give the images, for augmented views.

    Returns:
        [`FewShot`].
    """
    embeds, labels = task.parts["train"]
    val_embeds, val_labels = task.parts["validation"]
    number = len(task.class_names)
    drawn, val = task.draws.get((shots, seed), (None, None))
    drawn = _draw(labels, number, shots, seed) if drawn is None else drawn
    val = _draw(val_labels, number, min(shots, 4), seed, allow_fewer=True) if val is None else val
    rest = np.setdiff1d(np.arange(len(labels)), drawn)
    own = corrupt_labels(labels[drawn], noise, number, seed)
    images: Any = None
    if with_images:
        assert task.images is not None
        images = task.images.select(drawn)
        column = task.columns[1]
        images = images.remove_columns(column).add_column(column, own.tolist())
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
        images=images,
        columns=task.columns,
    )
