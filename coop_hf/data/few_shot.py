"""Labels of a `datasets.Dataset`, and few-shot sampling."""

import json
import operator
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import hf_hub_download

from ..checks import check_class_names, clean_class_name, some


__all__ = [
    "check_labels",
    "class_counts",
    "coop_few_shot_rows",
    "labels_of",
    "read_class_names",
    "resolve_labels",
    "sample_few_shot",
]

DRAWS = ("nested", "coop")


def _check_column(dataset: datasets.Dataset, column: str, argument: str) -> None:
    if isinstance(dataset, dict):
        raise TypeError(
            f"Expected one split of a data set, got a {type(dataset).__name__} with the splits "
            f"{some(dataset)}: pass one of them, such as dataset['{next(iter(dataset), 'train')}']."
        )
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"Expected a datasets.Dataset, got {type(dataset).__name__}: make one with `datasets.Dataset.from_dict`, "
            "`datasets.Dataset.from_list` or `coop_hf.load_images`."
        )
    if column not in dataset.column_names:
        raise ValueError(
            f"The data set has no column '{column}'; it has {some(dataset.column_names, 20)}. "
            f"Pass the right one as `{argument}=`."
        )


def _read_labels(dataset: datasets.Dataset, label_column: str) -> tuple[list, object]:
    """The label column as a list, and its feature. Reads no other column, so no image is decoded."""
    _check_column(dataset, label_column, "label_column")
    # No formatting: a transform that the user set on the data set may decode images or rename columns.
    values = dataset.select_columns([label_column]).with_format(None)[:][label_column]
    feature = dataset.features[label_column]
    kind = getattr(feature, "dtype", None)
    if not isinstance(feature, datasets.ClassLabel):
        if not isinstance(feature, datasets.Value) or not re.fullmatch(r"u?int\d+|(large_)?string", str(kind)):
            several = " Several labels for one image are not supported." if hasattr(feature, "feature") else ""
            raise ValueError(
                f"Labels must be a ClassLabel, integers or strings, but the column '{label_column}' holds {feature}. "
                f"Pass another column as `label_column=`, or cast this one with `dataset.cast_column`.{several}"
            )
    is_string = "string" in str(kind)
    missing = [row for row, value in enumerate(values) if value is None or (not is_string and value == -1)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(values)} rows have no label (None or -1) in the column '{label_column}', such as "
            f"row {missing[0]}. Drop them, with `dataset.filter` or `dataset.select`, or label them."
        )
    return values, feature


def check_labels(labels: np.ndarray, num_classes: int | None = None, where: str = "Item {row}") -> None:
    """
    Refuses labels that are no indices into the class list.

    Args:
        labels (`np.ndarray`):
            Class indices, `(num_items,)`.
        num_classes (`int`, *optional*):
            Number of classes; without it only negative labels are found.
        where (`str`, *optional*, defaults to `"Item {row}"`):
            What the error calls the first such item.

    Raises:
        ValueError: if a label is negative or not below `num_classes`; names the first.
    """
    outside = np.flatnonzero((labels < 0) | (labels >= (np.inf if num_classes is None else num_classes)))
    if len(outside):
        row = int(outside[0])
        top = "" if num_classes is None else f" to {num_classes - 1}"
        given = "" if num_classes is None else f"there are {num_classes} classes, so "
        raise ValueError(
            f"{where.format(row=row)} has the label {labels[row]}, but {given}labels go from 0{top} "
            f"({len(outside)} of {len(labels)} are outside). Correct the labels, leave these images out, or name all "
            "classes as `class_names=`."
        )


def labels_of(dataset: Any) -> np.ndarray:
    """The class index of each item of a data set that gives `labels`, `(num_items,)`."""
    return np.asarray(
        dataset.labels if hasattr(dataset, "labels") else [dataset[i]["labels"] for i in range(len(dataset))]
    )


def class_counts(dataset: Any, class_names: Sequence[str], strict: bool = True) -> np.ndarray:
    """Images of each class, `(num_classes,)`.

    Raises:
        ValueError: with `strict`, a class without any.
    """
    labels = labels_of(dataset)
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
    if strict and (counts == 0).any():
        empty = [class_names[int(c)] for c in np.flatnonzero(counts == 0)]
        raise ValueError(
            f"{len(empty)} of {len(counts)} classes have no image in the training set: {some(empty, 10)}. Add images, "
            "or leave these classes out of the class names while training."
        )
    return counts


def resolve_labels(
    dataset: datasets.Dataset, label_column: str = "label", class_names: Sequence[str] | None = None
) -> tuple[list[str], np.ndarray]:
    """
    Class names and class indices of a data set, whatever its label column holds.

    Only the label column is read. Underscores in names are kept; the prompt turns them into spaces.

    Args:
        dataset (`datasets.Dataset`):
            One split of a data set.
        label_column (`str`, *optional*, defaults to `"label"`):
            Column with a `ClassLabel`, integers or strings.
        class_names (`list[str]`, *optional*):
            Names of the classes in the order of their indices. If all names of a `ClassLabel` are among them, labels
            follow the names; otherwise they replace its names, one for each. They are required for integers, and give
            the order and the valid values for strings, which are otherwise sorted. A name may stand there twice, as
            in CLIP's list for ImageNet: then labels must be integers, or a `ClassLabel` with a name for each class.
            (`ClassLabel` itself refuses repeated names; "missile" and "missile_" are two to it and one prompt.)

    Returns:
        `tuple(list[str], np.ndarray)`: the class names, and the class index of each row, `(num_rows,)` int64.

    Raises:
        ValueError: if the column is missing or of another type, a row has no label, a label is outside the class list,
            or `class_names` is missing for integers, of the wrong length, or has empty names or a label's name twice.
    """
    values, feature = _read_labels(dataset, label_column)
    given = None if class_names is None else check_class_names(class_names)
    if isinstance(feature, datasets.ClassLabel):
        names = given or check_class_names(feature.names)
        index_of = {clean_class_name(name): index for index, name in enumerate(names)}
        is_known = len(index_of) == len(names) and all(clean_class_name(name) in index_of for name in feature.names)
        if given is not None and is_known:
            # The same names, or some of them, perhaps in another order, as in a test folder: by name.
            order = [index_of[clean_class_name(name)] for name in feature.names]
            values = [order[value] if 0 <= value < len(order) else value for value in values]
        elif given is not None and len(given) != feature.num_classes:
            twice = ", some of them twice" if len(index_of) < len(names) else ""
            raise ValueError(
                f"`class_names` has {len(given)} names{twice}, but the column '{label_column}' has "
                f"{feature.num_classes} classes ({some(feature.names)}), which are not among them: pass one name for "
                "each class, in this order."
            )
    elif "string" in str(getattr(feature, "dtype", "")):
        names = given or check_class_names(sorted(set(values)))
        index_of = {name: index for index, name in enumerate(names)}
        counts = Counter(names)
        repeated = sorted(name for name in set(values) if counts[name] > 1)
        if repeated:
            classes = [index for index, name in enumerate(names) if name == repeated[0]]
            raise ValueError(
                f"The label {repeated[0]!r} in the column '{label_column}' is the name of the classes "
                f"{some(classes)}: it does not say which one is meant. Use class indices as labels (integers)."
            )
        for row, value in enumerate(values):
            if value not in index_of:
                raise ValueError(
                    f"Row {row} has the label {value!r} in the column '{label_column}', which is not among the "
                    f"{len(names)} class names ({some(names)}): add it to `class_names=` or drop the row."
                )
        values = [index_of[value] for value in values]
    elif given is None:
        raise ValueError(
            f"The column '{label_column}' holds integers without names ({some(sorted(set(values)))}), and "
            "a prompt needs names: pass `class_names=[...]`, in the order of the integers from 0."
        )
    else:
        names = given
    labels = np.asarray(values, dtype=np.int64).reshape(-1)
    check_labels(labels, len(names), f"Row {{row}} of the column '{label_column}'")
    return names, labels


def read_class_names(path: str | os.PathLike) -> list[str]:
    """
    The class names in a file: one in each line, where empty lines do not count, or a JSON list.

    Args:
        path (`str` or `os.PathLike`):
            The file; one beside a data set on the Hub is `hf://datasets/OWNER/NAME/FILE`.

    Returns:
        `list[str]`.
    """
    if str(path).startswith("hf://datasets/"):
        parts = str(path).removeprefix("hf://datasets/").split("/", 2)
        if len(parts) < 3:
            raise ValueError(f"a file of names on the Hub is hf://datasets/OWNER/NAME/FILE, got {str(path)!r}.")
        path = hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset")
    text = Path(path).read_text(encoding="utf-8")
    if not str(path).endswith(".json"):
        return [line.strip() for line in text.split("\n") if line.strip()]
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); expected a list of names.") from None


def coop_few_shot_rows(num_shots: int, seed: int, *labels: Sequence[int]) -> list[list[int]]:
    """
    The few-shot draw of the public CoOp code, which it makes where it finds no index file.

    It seeds Python's generator once, with `random.seed(seed)`. Then, part by part (training, validation) and class by
    class in the order in which classes first occur, it takes `random.sample` of the rows of a class; all rows of one
    that has fewer. Draws for different numbers of shots are not nested. The generator of the program is left as it is.

    Args:
        num_shots (`int`):
            Rows per class of the first part; of the others at most 4.
        seed (`int`):
            Seed of the draw.
        labels (`Sequence[int]`):
            For each part the labels of its rows, in the order of the split file, `(num_rows,)`.

    Returns:
        `list[list[int]]`: for each part the row numbers, class by class.

    Example:

    ```python
    >>> split = read_coop_split("split_zhou_Caltech101.json", "caltech-101/101_ObjectCategories")
    >>> train, val = coop_few_shot_rows(16, 1, split["train"]["label"], split["validation"]["label"])
    ```
    """
    generator = random.Random(seed)
    drawn = []
    for part, part_labels in enumerate(labels):
        number = min(num_shots, 4) if part else num_shots
        by_label: dict[int, list[int]] = {}
        for row, label in enumerate(part_labels):
            by_label.setdefault(label, []).append(row)
        drawn.append(
            [r for own in by_label.values() for r in (generator.sample(own, number) if len(own) >= number else own)]
        )
    return drawn


def sample_few_shot(
    dataset: datasets.Dataset,
    num_shots: int,
    label_column: str = "label",
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    allow_fewer: bool = False,
    draw: str = "nested",
) -> datasets.Dataset:
    """
    A few-shot training set: exactly `num_shots` rows of each class, drawn without replacement.

    The draw is a function of the labels, `num_shots` and `seed` alone, the same on every machine. It is nested: with
    the same seed, the rows for K shots are among those for any larger number of shots, so that a curve over shots
    (section 3.1 of the [CoOp paper](https://arxiv.org/abs/2109.01134)) shows the gain of added images. Images are
    not decoded.

    Args:
        dataset (`datasets.Dataset`):
            One split of a data set.
        num_shots (`int`):
            Rows per class, at least 1.
        label_column (`str`, *optional*, defaults to `"label"`):
            Column with a `ClassLabel`, integers or strings.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw, from 0 to 2³² - 1.
        class_names (`list[str]`, *optional*):
            Names of the classes, as in [`resolve_labels`]. Integers may go without: the integers present are then the
            classes.
        allow_fewer (`bool`, *optional*, defaults to `False`):
            Take all rows of a class that has fewer than `num_shots`, or none, instead of raising.
        draw (`str`, *optional*, defaults to `"nested"`):
            `"nested"`, as above, or `"coop"`: the rows that the public CoOp code draws from the training part of a
            split file, see [`coop_few_shot_rows`]. These are not nested.

    Returns:
        `datasets.Dataset`: the drawn rows, class by class, with all columns.

    Raises:
        ValueError: if `num_shots` or `seed` is out of range, the column is missing, or a class has too few rows.

    Example:

    ```python
    >>> train = sample_few_shot(dataset["train"], num_shots=16, seed=1)
    ```
    """
    try:
        num_shots, seed = operator.index(num_shots), operator.index(seed)
    except TypeError:
        raise TypeError(f"`num_shots` and `seed` must be integers, got {num_shots!r} and {seed!r}.") from None
    if num_shots < 1:
        raise ValueError(f"`num_shots` must be at least 1, got {num_shots}. For no shots, use the model zero-shot.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be from 0 to 2**32 - 1, got {seed}.")
    if draw not in DRAWS:
        raise ValueError(f"`draw` must be {' or '.join(map(repr, DRAWS))}, got {draw!r}.")

    values, feature = _read_labels(dataset, label_column)
    if class_names is None and isinstance(feature, datasets.Value) and "int" in feature.dtype:
        found = sorted(set(values))
        names = [str(value) for value in found]
        labels = np.searchsorted(np.asarray(found), np.asarray(values)) if found else np.zeros(0, np.int64)
    else:
        names, labels = resolve_labels(dataset, label_column, class_names)

    counts = np.bincount(labels, minlength=len(names))
    if not allow_fewer:
        empty = [name for name, count in zip(names, counts) if count == 0]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(names)} classes have no image: {some(empty)}. Add images, take these "
                "classes out, or pass `allow_fewer=True`."
            )
        few = [f"{name} ({count})" for name, count in zip(names, counts) if count < num_shots]
        if few:
            raise ValueError(
                f"{len(few)} of {len(names)} classes have fewer than {num_shots} images: {some(few)}. Ask for at "
                f"most {counts.min()} shots, add images, or pass `allow_fewer=True` to take what there is."
            )
    if draw == "coop":
        return dataset.select(coop_few_shot_rows(num_shots, seed, labels.tolist())[0])
    # One random key for each row; a class gives its rows with the smallest keys, which makes the draw nested.
    # RandomState and not Generator: numpy promises that its stream never changes.
    keys = np.random.RandomState(seed).random_sample(len(labels))
    order = np.argsort(keys, kind="stable")
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rows = np.concatenate([by_class[s : s + min(num_shots, n)] for s, n in zip(starts, counts)] or [by_class])
    return dataset.select(rows.tolist())
