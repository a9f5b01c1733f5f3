"""Pictures and labels: few-shot sampling, the CoOp benchmark's split files, transforms, the data set of a training.

The way of a picture: a row of a `datasets.Dataset` -> [`decode_image`] -> PIL -> [`eval_transform`] or
[`train_transform`] -> `(3, height, width)` -> [`collate`] -> `(batch, 3, height, width)`. [`LabelledImages`] goes it
in the worker processes of a `DataLoader`.
"""

import functools
import hashlib
import json
import logging
import math
import operator
import os
import re
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch


__all__ = [
    "LabelledImages",
    "collate",
    "decode_image",
    "eval_transform",
    "load_images",
    "read_coop_split",
    "read_few_shot_indices",
    "resolve_labels",
    "sample_few_shot",
    "to_rgb",
    "train_transform",
]

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


# Labels and few-shot sampling


def _some(items, limit=5):
    """`items` as text for an error message, cut after `limit`."""
    items = list(items)
    text = ", ".join(repr(item) for item in items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


def _check_dataset(dataset):
    if isinstance(dataset, dict):
        raise TypeError(
            f"Expected one split of a data set, got a {type(dataset).__name__} with the splits "
            f"{_some(dataset)}: pass one of them, such as dataset['{next(iter(dataset), 'train')}']."
        )
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"Expected a datasets.Dataset, got {type(dataset).__name__}: make one with `datasets.Dataset.from_dict`, "
            "`datasets.Dataset.from_list` or `coop_hf.data.load_images`."
        )


def _check_column(dataset, column, argument):
    _check_dataset(dataset)
    if column not in dataset.column_names:
        raise ValueError(
            f"The data set has no column '{column}'; it has {_some(dataset.column_names, 20)}. "
            f"Pass the right one as `{argument}=`."
        )


def _check_class_names(class_names):
    if isinstance(class_names, str):
        raise TypeError(f"`class_names` must be a list of names, got the single string {class_names!r}.")
    class_names = list(class_names)
    if not class_names:
        raise ValueError("`class_names` is empty: pass one name for each class.")
    for position, name in enumerate(class_names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"Class name {position} is {name!r}: every class needs a name that is not empty.")
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise ValueError(f"Each class name may stand once in `class_names`; repeated: {_some(repeated)}.")
    return class_names


def _plain(name):
    """A class name as the prompt shows it."""
    return " ".join(name.replace("_", " ").split())


def _read_labels(dataset, label_column):
    """The label column as a list, and its feature. Reads no other column, so no picture is decoded."""
    _check_column(dataset, label_column, "label_column")
    # No formatting: a transform that the user set on the data set may decode pictures or rename columns.
    values = dataset.select_columns([label_column]).with_format(None)[:][label_column]
    feature = dataset.features[label_column]
    kind = getattr(feature, "dtype", None)
    if not isinstance(feature, datasets.ClassLabel):
        if not isinstance(feature, datasets.Value) or not re.fullmatch(r"u?int\d+|(large_)?string", str(kind)):
            raise ValueError(
                f"Labels must be a ClassLabel, integers or strings, but the column '{label_column}' holds {feature}. "
                "Pass another column as `label_column=`, or cast this one with `dataset.cast_column`."
            )
    is_string = "string" in str(kind)
    missing = [row for row, value in enumerate(values) if value is None or (not is_string and value == -1)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(values)} rows have no label (None or -1) in the column '{label_column}', such as "
            f"row {missing[0]}. Drop them, with `dataset.filter` or `dataset.select`, or label them."
        )
    return values, feature


def resolve_labels(dataset, label_column="label", class_names=None):
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
            the order and the valid values for strings, which are otherwise sorted.

    Returns:
        `tuple(list[str], np.ndarray)`: the class names, and the class index of each row, `(num_rows,)` int64.

    Raises:
        ValueError: if the column is missing or of another type, a row has no label, a label is outside the class list,
            or `class_names` is missing for integers, of the wrong length, or has repeated or empty names.
    """
    values, feature = _read_labels(dataset, label_column)
    given = None if class_names is None else _check_class_names(class_names)
    if isinstance(feature, datasets.ClassLabel):
        names = given or _check_class_names(feature.names)
        index_of = {_plain(name): index for index, name in enumerate(names)}
        if given is not None and all(_plain(name) in index_of for name in feature.names):
            # The same names, or some of them, perhaps in another order, as in a test folder: by name.
            order = [index_of[_plain(name)] for name in feature.names]
            values = [order[value] if 0 <= value < len(order) else value for value in values]
        elif given is not None and len(given) != feature.num_classes:
            raise ValueError(
                f"`class_names` has {len(given)} names, but the column '{label_column}' has {feature.num_classes} "
                f"classes ({_some(feature.names)}), which are not among them: pass one name for each class, in this "
                "order."
            )
    elif "string" in str(feature.dtype):
        names = given or _check_class_names(sorted(set(values)))
        index_of = {name: index for index, name in enumerate(names)}
        for row, value in enumerate(values):
            if value not in index_of:
                raise ValueError(
                    f"Row {row} has the label {value!r} in the column '{label_column}', which is not among the "
                    f"{len(names)} class names ({_some(names)}): add it to `class_names=` or drop the row."
                )
        values = [index_of[value] for value in values]
    elif given is None:
        raise ValueError(
            f"The column '{label_column}' holds integers without names ({_some(sorted(set(values)))}), and "
            "a prompt needs names: pass `class_names=[...]`, in the order of the integers from 0."
        )
    else:
        names = given
    labels = np.asarray(values, dtype=np.int64).reshape(-1)
    outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"Row {row} has the label {labels[row]} in the column '{label_column}', but there are {len(names)} "
            f"classes, so labels go from 0 to {len(names) - 1} ({len(outside)} rows are outside). "
            "Correct the labels or pass all names as `class_names=`."
        )
    return names, labels


def sample_few_shot(dataset, num_shots, label_column="label", seed=0, class_names=None, allow_fewer=False):
    """
    A few-shot training set: exactly `num_shots` rows of each class, drawn without replacement.

    The draw is a function of the labels, `num_shots` and `seed` alone, the same on every machine. It is nested: with
    the same seed, the rows for K shots are among those for any larger number of shots, so that a curve over shots
    (section 3.1 of the [CoOp paper](https://arxiv.org/abs/2109.01134)) shows the gain of added pictures. Pictures are
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

    values, feature = _read_labels(dataset, label_column)
    if class_names is None and isinstance(feature, datasets.Value) and "int" in feature.dtype:
        found = sorted(set(values))
        names = [str(value) for value in found]
        labels = np.searchsorted(np.asarray(found), np.asarray(values)) if found else np.zeros(0, np.int64)
    else:
        names, labels = resolve_labels(dataset, label_column, class_names)

    # One random key for each row; a class gives its rows with the smallest keys, which makes the draw nested.
    # RandomState and not Generator: numpy promises that its stream never changes.
    keys = np.random.RandomState(seed).random_sample(len(labels))
    order = np.argsort(keys, kind="stable")
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels, minlength=len(names))
    if not allow_fewer:
        empty = [name for name, count in zip(names, counts) if count == 0]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(names)} classes have no picture: {_some(empty)}. Add pictures, take these "
                "classes out, or pass `allow_fewer=True`."
            )
        few = [f"{name} ({count})" for name, count in zip(names, counts) if count < num_shots]
        if few:
            raise ValueError(
                f"{len(few)} of {len(names)} classes have fewer than {num_shots} pictures: {_some(few)}. Ask for at "
                f"most {counts.min()} shots, add pictures, or pass `allow_fewer=True` to take what there is."
            )
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rows = np.concatenate([by_class[s : s + min(num_shots, n)] for s, n in zip(starts, counts)] or [by_class])
    return dataset.select(rows.tolist())


# Files of the CoOp benchmark


def _read_json(path, what):
    path = Path(path).expanduser()
    if path.suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"'{path}' is a pickle, which runs code when it is read, so it is not opened: pass {what} as a .json file."
        )
    if not path.is_file():
        raise FileNotFoundError(f"There is no {what} at '{path}'.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is no {what}: it is not JSON ({error}).") from error


def read_coop_split(path, image_root, part=None, check_files=True):
    """
    The train, validation and test sets of a `split_zhou_*.json` file of the CoOp benchmark.

    The file holds `{"train" | "val" | "test": [[path, label, class name], ...]}`, with paths relative to `image_root`.
    Pictures are not opened.

    Args:
        path (`str` or `os.PathLike`):
            The split file.
        image_root (`str` or `os.PathLike`):
            Folder that the paths in the file start from, such as `caltech-101/101_ObjectCategories`.
        part (`str`, *optional*):
            Return only `"train"`, `"validation"` (or `"val"`) or `"test"`.
        check_files (`bool`, *optional*, defaults to `True`):
            Whether to check that each picture exists. Turn it off on slow network disks.

    Returns:
        `datasets.DatasetDict` or, with `part`, `datasets.Dataset`: columns `image` (`datasets.Image`) and `label`
        (`ClassLabel`, names in the order of the labels), rows in the order of the file.

    Raises:
        FileNotFoundError: if the file, the folder or pictures are missing.
        ValueError: if the file has another format, or labels and class names contradict each other.
    """
    what = "CoOp split file"
    content = _read_json(path, what)
    form = f"'{path}' is no {what}, which holds {{'train', 'val', 'test': [[path, label, class name], ...]}}"
    if not isinstance(content, dict) or not content or set(content) - {"train", "val", "test"}:
        found = f"the keys {_some(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{form}: it holds {found}.")
    root = Path(image_root).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder '{root}': pass as `image_root` the folder that paths in the split file start from."
        )

    name_of, label_of = {}, {}
    for key, entries in content.items():
        for position, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            types = [type(item) for item in entry] if isinstance(entry, list) else None
            if types != [str, int, str]:
                raise ValueError(f"{form}: entry {position} of '{key}' is {str(entry)[:100]}.")
            _, label, name = entry
            if name_of.setdefault(label, name) != name:
                raise ValueError(
                    f"'{path}': label {label} stands for '{name_of[label]}', but in entry {position} of '{key}' for "
                    f"'{name}'. A label needs one class name: correct the file."
                )
            if label_of.setdefault(name, label) != label:
                raise ValueError(
                    f"'{path}': class name '{name}' has the label {label_of[name]}, but {label} in entry {position} "
                    f"of '{key}'. A class name needs one label: correct the file."
                )
    gaps = sorted(set(range(len(name_of))) - set(name_of))
    if gaps or not name_of:
        raise ValueError(
            f"'{path}': labels must be 0, 1, ... without gaps; {len(name_of)} labels occur, and {_some(gaps)} are "
            "missing among them: correct the file."
        )

    wanted = None if part is None else SPLIT_NAMES.get(part)
    parts = {SPLIT_NAMES[key]: entries for key, entries in content.items()}
    if part is not None and wanted not in parts:
        raise ValueError(f"`part` is '{part}', but '{path}' has {_some(parts)}.")
    if wanted is not None:
        parts = {wanted: parts[wanted]}

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[name_of[label] for label in range(len(name_of))]),
        }
    )
    result, missing = datasets.DatasetDict(), []
    for key, entries in parts.items():
        files = [os.path.join(root, file) for file, _, _ in entries]
        if check_files:
            missing += [file for file in files if not os.path.isfile(file)]
        labels = [label for _, label, _ in entries]
        result[key] = datasets.Dataset.from_dict({"image": files, "label": labels}, features=features)
    if missing:
        total = sum(len(entries) for entries in parts.values())
        raise FileNotFoundError(
            f"{len(missing)} of {total} pictures of '{path}' are not under '{root}', such as '{missing[0]}': check "
            "`image_root`, or unpack the data set again. (`check_files=False` skips this check.)"
        )
    return result if wanted is None else result[wanted]


def read_few_shot_indices(path, dataset):
    """
    The few-shot training and validation sets that a `shot_{K}-seed_{S}.json` file draws from a split file's sets.

    These files fix which pictures the public CoOp code draws (K a class for training, at most 4 for validation):
    `{"train" | "val": {"indices": [...], "data": [{"impath", "label", "classname"}, ...]}}`, where the indices point
    into the part of the split file, and the data repeat what stands there. Both are compared, so that a file for
    another split cannot pass.

    Args:
        path (`str` or `os.PathLike`):
            The index file.
        dataset (`datasets.DatasetDict`):
            What [`read_coop_split`] returned for the split file that the indices point into.

    Returns:
        `datasets.DatasetDict`: `train` and, where the file has it, `validation`; rows in the order of the file.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it has another format or belongs to another split.

    Example:

    ```python
    >>> split = read_coop_split("split_zhou_Caltech101.json", "caltech-101/101_ObjectCategories")
    >>> train = read_few_shot_indices("shot_16-seed_1.json", split)["train"]
    ```
    """
    what = "few-shot index file"
    content = _read_json(path, what)
    form = f"'{path}' is no {what}, which holds {{'train', 'val': {{'indices': [...], 'data': [...]}}}}"
    if not isinstance(content, dict) or "train" not in content or set(content) - {"train", "val", "test"}:
        raise ValueError(f"{form}: it holds {_some(content) if isinstance(content, dict) else type(content)}.")
    if not isinstance(dataset, dict):
        raise TypeError(
            f"`dataset` must be the DatasetDict that `read_coop_split` returns, got {type(dataset).__name__}."
        )
    result = datasets.DatasetDict()
    for key, entry in content.items():
        name = SPLIT_NAMES[key]
        try:
            indices, data = entry["indices"], entry["data"]
            expected = [(item["classname"], item["label"], re.split(r"[/\\]", item["impath"])[-1]) for item in data]
            well_formed = all(type(index) is int for index in indices) and len(indices) == len(data)
        except (TypeError, KeyError, AttributeError):
            well_formed = False
        if not well_formed:
            raise ValueError(f"{form}, one index for each entry of 'data': the part '{key}' does not.")
        if name not in dataset:
            raise ValueError(f"'{path}' has indices for '{name}', but the data set has only {_some(dataset)}.")
        size = len(dataset[name])
        outside = [index for index in indices if not 0 <= index < size]
        if outside:
            raise ValueError(
                f"'{path}' has index {outside[0]} for '{name}', which has {size} rows: it belongs to another split."
            )
        part = dataset[name].select(indices)
        names = part.features["label"].names
        rows = part.cast_column("image", datasets.Image(decode=False))[:]
        for index, label, image, wanted in zip(indices, rows["label"], rows["image"], expected):
            found = (names[label], label, os.path.basename(image["path"] or ""))
            if found != wanted:
                raise ValueError(
                    f"'{path}' expects {wanted} (class name, label, file) at index {index} of '{name}', where the "
                    f"data set has {found}: it belongs to another split file."
                )
        result[name] = part
    return result


# Loading


def _visible(folder, keep):
    return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__")) and keep(p))


def _is_picture(path):
    return path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()


def _split_folders(folder, subfolders):
    """`{split: subfolder}` where all subfolders are named as splits, else one split, the folder itself."""
    if not subfolders or any(path.name.lower() not in SPLIT_NAMES for path in subfolders):
        return {"train": folder}
    splits = {}
    for path in subfolders:
        split = SPLIT_NAMES[path.name.lower()]
        if split in splits:
            raise ValueError(f"'{splits[split]}' and '{path}' would both be the split '{split}': merge them.")
        splits[split] = path
    return splits


def _load_class_folders(folder):
    """
    Pictures in class folders, labelled by folder.

    Not left to the "imagefolder" builder: it guesses splits from words in file and folder names (a class called
    "train", or files called `cat_test_1.png`), and then silently leaves out the other pictures and the labels.
    """
    splits = _split_folders(folder, _visible(folder, Path.is_dir))
    for root in {folder, *splits.values()}:
        loose = _visible(root, _is_picture)
        if loose:
            raise ValueError(
                f"'{loose[0]}' lies in no class folder ({len(loose)} such pictures in '{root}'): put the pictures of "
                "each class into a folder with its name."
            )
    found, names = {}, set()
    for split, root in splits.items():
        found[split] = []
        for class_folder in _visible(root, Path.is_dir):
            nested = [p for p in class_folder.rglob("*") if _is_picture(p) and p.parent != class_folder]
            if nested:
                raise ValueError(
                    f"'{nested[0]}' lies deeper than its class folder '{class_folder}'. Expected "
                    "<folder>/<class>/<picture> or <folder>/<train|validation|test>/<class>/<picture>: pass the "
                    "folder directly above the class folders, or move the pictures."
                )
            names.add(class_folder.name)
            found[split] += [(str(p), class_folder.name) for p in _visible(class_folder, _is_picture)]
    names = sorted(names)
    empty = sorted(set(names) - {name for rows in found.values() for _, name in rows})
    if empty or not names:
        raise ValueError(
            f"No pictures ({', '.join(IMAGE_EXTENSIONS)}) in "
            + (f"the class folders {_some(empty)} of '{folder}': fill or remove them." if empty else f"'{folder}'.")
        )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [file for file, _ in rows], "label": [name for _, name in rows]}, features=features
            )
            for split, rows in found.items()
        }
    )


def _parquet_splits(files, root):
    """`{split: [file]}`, by the first word of a file's name or by its folder's; all "train" where none is a split."""
    splits = {}
    for file in files:
        word = re.split(r"[-._]", file.name.lower())[0]
        folder = file.parent.name.lower() if file.parent != root else ""
        splits.setdefault(SPLIT_NAMES.get(word) or SPLIT_NAMES.get(folder), []).append(str(file))
    if None in splits and len(splits) > 1:
        raise ValueError(
            f"'{splits[None][0]}' belongs to no split, while others are of {_some(key for key in splits if key)}: "
            "rename it to train-*.parquet, validation-*.parquet or test-*.parquet."
        )
    return {"train": splits[None]} if None in splits else splits


def load_images(name_or_path, split=None, **kwargs):
    """
    Labelled pictures from what is on disk or, only if nothing is, from the Hub.

    Args:
        name_or_path (`str` or `os.PathLike`):
            One of, in this order:

            - a folder written by `save_to_disk`;
            - a `.parquet` file, or a folder of them, named by split (`train-*.parquet`, `test/*.parquet`);
            - a folder with a `metadata.csv` or `.jsonl`, as the "imagefolder" builder reads it;
            - a folder of class folders, or of `train`, `validation`, `test` folders that hold class folders;
            - the id of a data set on the Hub.
        split (`str`, *optional*):
            Return only this split.
        kwargs (*optional*):
            Passed to `datasets.load_dataset` for a data set on the Hub (`name`, `revision`, `token`, ...).

    Returns:
        `datasets.DatasetDict` or, with `split` or where only one unnamed set was saved, `datasets.Dataset`.

    Raises:
        FileNotFoundError: if there is no such file or folder, nor such a data set on the Hub.
        ValueError: if the folder cannot be read as labelled pictures, or has no such split.
    """
    path = Path(name_or_path).expanduser().absolute()
    if not path.exists():
        name = str(name_or_path)
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or name.endswith(".parquet"):
            raise FileNotFoundError(f"There is no file or folder '{path}'.")
        try:
            return datasets.load_dataset(name, split=split, **kwargs)
        except OSError as error:
            raise FileNotFoundError(
                f"'{name}' is no file or folder (there is no '{path}'), nor could it be loaded from the Hub: {error}"
            ) from error
    if kwargs:
        raise TypeError(f"{_some(kwargs)} are for data sets on the Hub, but '{path}' is on this disk: leave them out.")

    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"'{path}' is a file, but no .parquet file: pass a .parquet file or a folder.")
        loaded = datasets.load_dataset("parquet", data_files=_parquet_splits([path], path.parent))
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(str(path))
    else:
        files = sorted(p for g in ("*.parquet", "*/*.parquet") for p in path.glob(g) if p.name not in METADATA_FILES)
        subfolders = _visible(path, Path.is_dir)
        if files:
            loaded = datasets.load_dataset("parquet", data_files=_parquet_splits(files, path))
        elif any((folder / name).is_file() for folder in (path, *subfolders) for name in METADATA_FILES):
            patterns = {
                key: "**" if folder == path else f"{folder.name}/**"
                for key, folder in _split_folders(path, subfolders).items()
            }
            loaded = datasets.load_dataset("imagefolder", data_dir=str(path), data_files=patterns)
        else:
            loaded = _load_class_folders(path)

    if split is None:
        return loaded
    if not isinstance(loaded, dict):
        raise ValueError(f"'{path}' holds one set without splits, so there is no split '{split}': leave `split` out.")
    if split not in loaded:
        raise ValueError(f"'{path}' has no split '{split}'; it has {_some(loaded)}.")
    return loaded[split]


# Pictures and transforms


def decode_image(value, mode=None):
    """
    A PIL picture from what an image column may hold.

    Files and bytes are decoded by `datasets.Image`, so that EXIF orientation is applied as it does.

    Args:
        value (`PIL.Image.Image`, `str`, `os.PathLike`, `bytes`, `dict`, `np.ndarray` or nested `list`):
            A picture, a path, an encoded file, `{"bytes", "path"}`, or pixels: integers from 0 to 255, of shape
            `(height, width)`, `(height, width, channels)` or `(channels, height, width)` with 1, 3 or 4 channels.
        mode (`str`, *optional*):
            PIL mode to convert to.

    Returns:
        `PIL.Image.Image`: the picture, loaded, in its own mode unless `mode` is given.

    Raises:
        Exception: whatever PIL raises for files that it cannot read.
        ValueError: for values of no such kind.
    """
    if value is None:
        raise ValueError("the picture is missing (None)")
    if isinstance(value, (str, os.PathLike)):
        value = {"path": os.fspath(value), "bytes": None}
    elif isinstance(value, (bytes, bytearray, memoryview)):
        value = {"path": None, "bytes": bytes(value)}
    if isinstance(value, dict):
        value = {"path": value.get("path"), "bytes": value.get("bytes")}
        return datasets.Image(mode=mode).decode_example(value)
    if not isinstance(value, PIL.Image.Image):
        pixels = np.asarray(value)
        if pixels.dtype.kind not in "iu" or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(f"pixels must be integers from 0 to 255, got {pixels.dtype} of shape {pixels.shape}")
        if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.ndim == 3 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[-1] not in (3, 4)):
            raise ValueError(f"pixels must be (height, width[, 1 | 3 | 4]), got the shape {pixels.shape}")
        value = PIL.Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))
    return value.convert(mode) if mode is not None and value.mode != mode else value


def to_rgb(image):
    """
    A picture of any mode in RGB, as `CLIPImageProcessor` converts it: transparent parts on white.

    One difference: 16-bit grey is scaled to 8 bits (divided by 256), where PIL and with it the processor cuts every
    value at 255, which leaves a white area of most such pictures.

    Args:
        image (`PIL.Image.Image`):
            A picture in any mode.

    Returns:
        `PIL.Image.Image`: the picture in mode RGB, the same object if it was.
    """
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _image_processor(processor):
    processor = getattr(processor, "image_processor", processor)
    if not callable(processor) or not hasattr(processor, "image_mean"):
        raise TypeError(
            f"Expected an image processor, such as CLIPImageProcessor or a CLIPProcessor that holds one, got "
            f"{type(processor).__name__}: load it with `AutoImageProcessor.from_pretrained`."
        )
    return processor


def _output_size(image_processor):
    """(height, width) that an image processor gives."""
    size = image_processor.size
    if getattr(image_processor, "do_center_crop", False) and getattr(image_processor, "crop_size", None):
        size = image_processor.crop_size
    if not isinstance(size, dict):  # SizeDict, a dataclass, in newer versions
        size = {key: getattr(size, key, None) for key in ("height", "width", "shortest_edge")}
    height, width = (size.get(key) or size.get("shortest_edge") for key in ("height", "width"))
    if not height or not width:
        raise ValueError(
            f"The image processor gives pictures of no fixed size (size={image_processor.size}), but a batch needs "
            "one: set its `crop_size` or `size` to a height and a width."
        )
    return int(height), int(width)


def _eval_pixels(image, image_processor):
    pixel_values = image_processor(images=to_rgb(image), return_tensors="pt")["pixel_values"]
    return pixel_values[0].to(torch.float32)


def eval_transform(image_processor):
    """
    The test transform: the model's own image processor.

    Args:
        image_processor (`BaseImageProcessor` or `ProcessorMixin`):
            The model's image processor, or a processor that holds it.

    Returns:
        `Callable[[PIL.Image.Image], torch.Tensor]`: gives `(3, height, width)` float32. It can be pickled.
    """
    return functools.partial(_eval_pixels, image_processor=_image_processor(image_processor))


def _crop_box(width, height, rng, scale, ratio):
    """Left, top, right, bottom of a random crop, as published for torchvision's `RandomResizedCrop`."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        # Only `random()`: numpy keeps its stream, while it may change how other distributions draw from it.
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
            return left, top, left + w, top + h
    # None fits, as in very long pictures: the largest centre crop within the aspect ratios.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _train_pixels(image, rng, size, flip, scale, ratio, factor, mean, std):
    image = to_rgb(image)
    box = _crop_box(*image.size, rng, scale, ratio)
    # Cut first, resize then: resizing with `box=` would let pixels from outside the crop into its border.
    image = image.crop(box).resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32)
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = (pixels * np.float32(factor) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def train_transform(image_processor, flip=True, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """
    The training transform of the [CoOp paper](https://arxiv.org/abs/2109.01134): a random crop of random size and
    aspect ratio, resized (bicubic) to the model's size, flipped left to right in half of the cases, then rescaled and
    normalised as the model's image processor does.

    The crop is torchvision's `RandomResizedCrop`: its area is `scale` times the picture's, its aspect ratio
    log-uniform in `ratio`; after ten draws that do not fit, the largest centre crop within `ratio`.

    Args:
        image_processor (`BaseImageProcessor` or `ProcessorMixin`):
            The model's image processor, or a processor that holds it: gives size, mean and standard deviation.
        flip (`bool`, *optional*, defaults to `True`):
            Whether to flip. Turn it off where left and right matter, as in letters and traffic signs.
        scale (`tuple(float, float)`, *optional*, defaults to `(0.08, 1.0)`):
            Smallest and largest share of the picture's area.
        ratio (`tuple(float, float)`, *optional*, defaults to `(3/4, 4/3)`):
            Smallest and largest width / height.

    Returns:
        `Callable[[PIL.Image.Image, np.random.Generator], torch.Tensor]`: gives `(3, height, width)` float32. It can be
        pickled.

    Raises:
        ValueError: if `scale` or `ratio` is not an increasing pair of positive numbers, or scale exceeds 1.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"`scale` must be two shares of the area, 0 < low <= high <= 1, got {scale}.")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"`ratio` must be two aspect ratios, 0 < low <= high, got {ratio}.")
    processor = _image_processor(image_processor)
    normalise = getattr(processor, "do_normalize", True)
    return functools.partial(
        _train_pixels,
        size=_output_size(processor),
        flip=flip,
        scale=tuple(scale),
        ratio=tuple(ratio),
        factor=processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0,
        mean=np.asarray(processor.image_mean if normalise else 0.0, dtype=np.float32),
        std=np.asarray(processor.image_std if normalise else 1.0, dtype=np.float32),
    )


# The data set of a training


class LabelledImages(torch.utils.data.Dataset):
    """
    Pictures and labels of a `datasets.Dataset` as tensors, decoded where they are asked for: in the workers of a
    `DataLoader`.

    The augmentation of a row is a function of `seed`, epoch and row alone. Number of workers, number of processes,
    order and resuming do not change it. Call [`~LabelledImages.set_epoch`] before each epoch is iterated; it reaches
    workers that are already running.

    Args:
        dataset (`datasets.Dataset`):
            One split of a data set.
        image_processor (`BaseImageProcessor` or `ProcessorMixin`):
            The model's image processor, or a processor that holds it.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column with a `datasets.Image`, paths, encoded files or pixels, see [`decode_image`].
        label_column (`str`, *optional*, defaults to `"label"`):
            Column with a `ClassLabel`, integers or strings.
        class_names (`list[str]`, *optional*):
            Names of the classes, see [`resolve_labels`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the augmentation, from 0 to 2³² - 1.
        augment (`bool`, *optional*, defaults to `False`):
            Whether items are augmented views (for training) or plain ones (for evaluation).
        transform (`Callable`, *optional*):
            Augmentation `(image, rng) -> (3, height, width)` float32, by default `train_transform(image_processor)`.
            It must draw from `rng`, a `np.random.Generator`, only.
        on_bad_image (`str`, *optional*, defaults to `"raise"`):
            `"raise"` when an unreadable picture is asked for, or `"skip"`: decode all pictures once now, leave the
            unreadable ones out, and say how many.

    Attributes:
        class_names (`list[str]`): names of the classes.
        labels (`np.ndarray`): class index of each item, `(num_items,)` int64.
        rows (`np.ndarray`): row of `dataset` that each item comes from, `(num_items,)` int64.
        skipped (`list[int]`): rows of `dataset` that were left out.

    Raises:
        ValueError: if a column is missing or of the wrong type, a label is wrong, or no picture is readable.

    Example:

    ```python
    >>> train = LabelledImages(dataset["train"], processor, seed=1, augment=True)
    >>> loader = torch.utils.data.DataLoader(train, batch_size=32, shuffle=True, collate_fn=collate, num_workers=2)
    >>> for epoch in range(50):
    ...     train.set_epoch(epoch)
    ...     for batch in loader:
    ...         ...
    ```
    """

    def __init__(
        self,
        dataset,
        image_processor,
        image_column="image",
        label_column="label",
        class_names=None,
        seed=0,
        augment=False,
        transform=None,
        on_bad_image="raise",
    ):
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"`on_bad_image` must be 'raise' or 'skip', got {on_bad_image!r}.")
        if not 0 <= operator.index(seed) < 2**32:
            raise ValueError(f"`seed` must be from 0 to 2**32 - 1, got {seed}.")
        _check_column(dataset, image_column, "image_column")
        if len(dataset) == 0:
            raise ValueError("The data set has no rows: check the split and any filter or selection before this.")
        self.class_names, self.labels = resolve_labels(dataset, label_column, class_names)
        self.image_column = image_column
        self.seed = operator.index(seed)
        self.augment = augment
        self._plain = eval_transform(image_processor)
        self._augmented = train_transform(image_processor) if transform is None else transform
        if getattr(self._augmented, "func", None) is _train_pixels:
            self._augmentation = f"train_transform {sorted(self._augmented.keywords.items())}"
        else:
            self._augmentation = uuid.uuid4().hex  # nobody knows what it does, so what it gives is not kept for others

        feature = dataset.features[image_column]
        dtype = getattr(feature, "dtype", None)
        is_image = isinstance(feature, datasets.Image)
        if isinstance(feature, datasets.ClassLabel) or (
            isinstance(feature, datasets.Value) and not re.fullmatch(r"(large_)?(string|binary)", str(dtype))
        ):
            images = [name for name, other in dataset.features.items() if isinstance(other, datasets.Image)]
            raise ValueError(
                f"The column '{image_column}' holds {feature}, which is no picture. Pass as `image_column=` a column "
                "of datasets.Image, paths, encoded files or pixels (columns with a datasets.Image: "
                f"{_some(images) or 'none'})."
            )
        self._mode = feature.mode if is_image else None
        images = dataset.select_columns([image_column]).with_format(None)
        self._images = images.cast_column(image_column, datasets.Image(decode=False)) if is_image else images

        # In shared memory, so that set_epoch reaches workers that are already running.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.rows = np.arange(len(dataset), dtype=np.int64)
        self.skipped = []
        if on_bad_image == "skip":
            self._drop_unreadable()

    def __setstate__(self, state):
        self.__dict__.update(state)
        # A copy (deepcopy, pickle) has an epoch of its own; a worker process gets the shared one and keeps it.
        if not self._epoch.is_shared():
            self._epoch.share_memory_()

    def _drop_unreadable(self):
        def problem(row):
            try:
                self._decode(row)
            except ValueError as error:
                return str(error)

        # PIL decodes without holding the interpreter lock.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            problems = list(pool.map(problem, range(len(self.rows))))
        bad = np.array([text is not None for text in problems])
        self.skipped = np.flatnonzero(bad).tolist()
        if not self.skipped:
            return
        first = problems[self.skipped[0]]
        if bad.all():
            raise ValueError(f"None of the {len(bad)} pictures can be read. The first: {first}")
        self.rows, self.labels = self.rows[~bad], self.labels[~bad]
        logger.warning(
            "Left out %d of %d pictures that cannot be read (rows %s). The first: %s",
            len(self.skipped),
            len(bad),
            _some(self.skipped),
            first,
        )

    def _decode(self, row):
        value = self._images[row][self.image_column]
        try:
            return decode_image(value, self._mode)
        # PIL's decoders raise many types for broken files (OSError, SyntaxError, struct.error, ...).
        except Exception as error:
            path = value.get("path") if isinstance(value, dict) else value
            where = f" ('{path}')" if isinstance(path, (str, os.PathLike)) else ""
            raise ValueError(
                f"The picture in row {row}{where}, column '{self.image_column}', cannot be read: "
                f"{type(error).__name__}: {error}. Replace it or drop the row, or pass on_bad_image='skip'."
            ) from error

    def __len__(self):
        return len(self.rows)

    @property
    def epoch(self):
        """`int`: the epoch whose augmented views the items are."""
        return int(self._epoch)

    def set_epoch(self, epoch):
        """
        Set the epoch, which chooses the augmented views. `accelerate`'s data loaders call this in single-process runs.

        Args:
            epoch (`int`):
                Epoch, from 0.
        """
        if int(epoch) < 0:
            raise ValueError(f"`epoch` must be at least 0, got {epoch}.")
        self._epoch.fill_(int(epoch))

    def view(self, index, epoch=None):
        """
        The pixels of an item as it is in a given epoch of augmented training.

        Args:
            index (`int`):
                Item.
            epoch (`int`, *optional*):
                Epoch, from 0. `None` is the plain view, that of evaluation.

        Returns:
            `torch.Tensor`: pixels, `(3, height, width)` float32.

        Raises:
            IndexError: if there is no such item.
            ValueError: if the picture cannot be read; names the row and the path.
        """
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no item {index}: the data set has {len(self)}.")
        # The row and not the index seeds: skipping a picture must not change the augmentation of others.
        row = int(self.rows[index])
        image = self._decode(row)
        if epoch is None:
            return self._plain(image)
        return self._augmented(image, np.random.default_rng([self.seed, operator.index(epoch), row]))

    def preprocessing_key(self):
        """`str`: names the plain transform, for a cache of what it gives."""
        return f"{self._plain.keywords['image_processor'].to_json_string()} {self._mode}"

    def view_key(self, index, epoch=None):
        """`str`: names a view of an item; see [`~LabelledImages.view`]."""
        if epoch is None:
            return "plain"
        return f"{self._augmentation} {self.seed} {operator.index(epoch)} {int(self.rows[index])}"

    def content_key(self, index):
        """`bytes`: hash of an item's encoded picture; of a file on disk, hash of its path, size and time of change."""
        value = self._images[int(self.rows[index])][self.image_column]
        if isinstance(value, (str, os.PathLike)):
            value = {"path": os.fspath(value), "bytes": None}
        if isinstance(value, dict) and value.get("bytes") is None and os.path.exists(value.get("path") or ""):
            status = os.stat(value["path"])
            content = f"{os.path.abspath(value['path'])} {status.st_size} {status.st_mtime_ns}".encode()
        elif isinstance(value, dict):
            content = value.get("bytes") or repr(value.get("path")).encode()
        elif isinstance(value, (bytes, bytearray, memoryview)):
            content = bytes(value)
        else:
            pixels = np.ascontiguousarray(value)
            content = f"{pixels.dtype} {pixels.shape}".encode() + pixels.tobytes()
        return hashlib.blake2b(content, digest_size=16).digest()

    def __getitem__(self, index):
        return {
            "pixel_values": self.view(index, self.epoch if self.augment else None),
            "labels": int(self.labels[index]),
        }


def collate(examples):
    """
    A batch from examples of [`LabelledImages`], or from examples that hold image embeddings instead of pixels.

    Args:
        examples (`list[dict]` or `dict[str, torch.Tensor]`):
            A batch already, which is returned as it is, or examples, each with `pixel_values`
            `(3, height, width)` or `image_embeds` `(projection_dim,)`, and `labels` `()`, which may be left out in
            prediction.

    Returns:
        `dict[str, torch.Tensor]`: `image_embeds` `(batch, projection_dim)` if present, else `pixel_values`
        `(batch, 3, height, width)`, both float32; `labels` `(batch,)` int64.

    Raises:
        ValueError: if examples hold neither, or pictures of different sizes.
    """
    if isinstance(examples, dict):
        return examples
    key = "image_embeds" if "image_embeds" in examples[0] else "pixel_values"
    if key not in examples[0]:
        raise ValueError(f"Examples need 'pixel_values' or 'image_embeds', got {_some(examples[0])}.")
    tensors = [torch.as_tensor(example[key], dtype=torch.float32) for example in examples]
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise ValueError(
            f"The '{key}' of a batch must have one shape, got {_some(shapes)}: use an image processor that crops or "
            "resizes to a fixed height and width."
        )
    batch = {key: torch.stack(tensors)}
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([int(example["labels"]) for example in examples], dtype=torch.int64)
    return batch
