"""Where data sets come from: class folders, Parquet files, saved sets, the Hub, and the split files of the CoOp
benchmark.
"""

import atexit
import functools
import hashlib
import io
import json
import operator
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from ..checks import some
from .transforms import content_key, decode_image


__all__ = ["as_dataset", "load_images", "read_coop_split", "read_few_shot_indices"]

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


def apart(names: Iterable[str]) -> list[str]:
    """Names that a `ClassLabel` takes: one that is there already gets underscores behind, which prompts leave out."""
    taken = set(names := list(names))
    seen: set[str] = set()
    result = []
    for name in names:
        other = name
        while other in seen or (other != name and other in taken):
            other += "_"
        seen.add(other)
        result.append(other)
    return result


# Files of the CoOp benchmark


def _read_json(path: str | os.PathLike, what: str) -> Any:
    path = Path(path).expanduser()
    if path.suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"'{path}' is a pickle, which runs code when it is read, so it is not opened: pass {what} as .json. "
            "docs/datasets.md has a few lines that convert one which you trust."
        )
    if not path.is_file():
        raise FileNotFoundError(f"There is no {what} at '{path}'.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not a {what}: it is not JSON ({error}).") from error


def read_coop_split(
    path: str | os.PathLike, image_root: str | os.PathLike, part: str | None = None, check_files: bool = True
) -> datasets.DatasetDict | datasets.Dataset:
    """
    The train, validation and test sets of a `split_zhou_*.json` file of the CoOp benchmark.

    The file holds `{"train" | "val" | "test": [[path, label, class name], ...]}`, with paths relative to `image_root`.
    Images are not opened.

    Args:
        path (`str` or `os.PathLike`):
            The split file.
        image_root (`str` or `os.PathLike`):
            Folder that the paths in the file start from, such as `caltech-101/101_ObjectCategories`.
        part (`str`, *optional*):
            Return only `"train"`, `"validation"` (or `"val"`) or `"test"`.
        check_files (`bool`, *optional*, defaults to `True`):
            Whether to check that each image exists. Turn it off on slow network disks.

    Returns:
        `datasets.DatasetDict` or, with `part`, `datasets.Dataset`: columns `image` (`datasets.Image`) and `label`
        (`ClassLabel`, names in the order of the labels), rows in the order of the file. Where several labels have one
        name, which `ClassLabel` refuses, the later ones end in underscores, "missile_", which prompts leave out.

    Raises:
        FileNotFoundError: if the file, the folder or images are missing.
        ValueError: if the file has another format, or labels and class names contradict each other.
    """
    what = "CoOp split file"
    content = _read_json(path, what)
    form = f"'{path}' is not a {what}, which holds {{'train', 'val', 'test': [[path, label, class name], ...]}}"
    if not isinstance(content, dict) or not content or set(content) - {"train", "val", "test"}:
        found = f"the keys {some(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{form}: it holds {found}.")
    root = Path(image_root).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder '{root}': pass as `image_root` the folder that paths in the split file start from."
        )

    name_of: dict[int, str] = {}
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
    gaps = sorted(set(range(len(name_of))) - set(name_of))
    if gaps or not name_of:
        raise ValueError(
            f"'{path}': labels must be 0, 1, ... without gaps; {len(name_of)} labels occur, and {some(gaps)} are "
            "missing among them: correct the file."
        )

    wanted = None if part is None else SPLIT_NAMES.get(part)
    parts = {SPLIT_NAMES[key]: entries for key, entries in content.items()}
    if part is not None and wanted not in parts:
        raise ValueError(f"`part` is '{part}', but '{path}' has {some(parts)}.")
    if wanted is not None:
        parts = {wanted: parts[wanted]}

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=apart([name_of[label] for label in range(len(name_of))])),
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
            f"{len(missing)} of {total} images of '{path}' are not under '{root}', such as '{missing[0]}': check "
            "`image_root`, or unpack the data set again. (`check_files=False` skips this check.)"
        )
    return result if wanted is None else result[wanted]


def read_few_shot_indices(path: str | os.PathLike, dataset: dict[str, datasets.Dataset]) -> datasets.DatasetDict:
    """
    The few-shot training and validation sets that a `shot_{K}-seed_{S}.json` file draws from a split file's sets.

    These files fix which images the public CoOp code draws (K a class for training, at most 4 for validation):
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
    form = f"'{path}' is not a {what}, which holds {{'train', 'val': {{'indices': [...], 'data': [...]}}}}"
    if not isinstance(content, dict) or "train" not in content or set(content) - {"train", "val", "test"}:
        raise ValueError(f"{form}: it holds {some(content) if isinstance(content, dict) else type(content)}.")
    if not isinstance(dataset, dict):
        raise TypeError(
            f"`dataset` must be the DatasetDict that `read_coop_split` returns, got {type(dataset).__name__}."
        )
    result = datasets.DatasetDict()
    for key, entry in content.items():
        name = SPLIT_NAMES[key]
        try:
            indices, data = entry["indices"], entry["data"]
            expected = [
                (item["classname"].rstrip("_"), item["label"], re.split(r"[/\\]", item["impath"])[-1]) for item in data
            ]
            well_formed = all(type(index) is int for index in indices) and len(indices) == len(data)
        except (TypeError, KeyError, AttributeError):
            well_formed = False
        if not well_formed:
            raise ValueError(f"{form}, one index for each entry of 'data': the part '{key}' does not.")
        if name not in dataset:
            raise ValueError(f"'{path}' has indices for '{name}', but the data set has only {some(dataset)}.")
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
            found = (names[label].rstrip("_"), label, os.path.basename(image["path"] or ""))
            if found != wanted:
                raise ValueError(
                    f"'{path}' expects {wanted} (class name, label, file) at index {index} of '{name}', where the "
                    f"data set has {found}: it belongs to another split file."
                )
        result[name] = part
    return result


# Loading


def _visible(folder: Path, keep: Callable[[Path], bool]) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__")) and keep(p))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()


def _split_folders(folder: Path, subfolders: list[Path]) -> dict[str, Path]:
    """`{split: subfolder}` where all subfolders are named as splits, else one split, the folder itself."""
    if not subfolders or any(path.name.lower() not in SPLIT_NAMES for path in subfolders):
        return {"train": folder}
    splits: dict[str, Path] = {}
    for path in subfolders:
        split = SPLIT_NAMES[path.name.lower()]
        if split in splits:
            raise ValueError(f"'{splits[split]}' and '{path}' would both be the split '{split}': merge them.")
        splits[split] = path
    return splits


def _class_folders(root: Path, leaf_folders: bool) -> list[Path]:
    if leaf_folders:
        below = [path for path in sorted(root.rglob("*")) if path.is_dir() and _visible(path, _is_image)]
        return [p for p in below if not any(part.startswith((".", "__")) for part in p.relative_to(root).parts)]
    folders = _visible(root, Path.is_dir)
    for class_folder in folders:
        nested = [p for p in class_folder.rglob("*") if _is_image(p) and p.parent != class_folder]
        if nested:
            raise ValueError(
                f"'{nested[0]}' lies deeper than its class folder '{class_folder}'. Expected <folder>/<class>/<image> "
                "or <folder>/<train|validation|test>/<class>/<image>: name the folder above these, move the "
                "images, or pass `leaf_folders=True` if each folder that holds images is a class."
            )
    return folders


def _leaf_names(paths: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The last part of each path, and where several paths end in it as many of the parts before as tell them apart."""
    names = {}
    for path in paths:
        size = 1
        while size < len(path) and sum(other[-size:] == path[-size:] for other in paths) > 1:
            size += 1
        names[path] = " ".join(path[-size:])
    return names


def _load_class_folders(folder: Path, leaf_folders: bool = False) -> datasets.DatasetDict:
    """
    Images in class folders, labelled by folder.

    Not left to the "imagefolder" builder: it guesses splits from words in file and folder names (a class called
    "train", or files called `cat_test_1.png`), and then silently leaves out the other images and the labels.
    """
    splits = _split_folders(folder, _visible(folder, Path.is_dir))
    for root in {folder, *splits.values()}:
        loose = _visible(root, _is_image)
        if loose:
            raise ValueError(
                f"'{loose[0]}' lies in no class folder ({len(loose)} such images in '{root}'): put the images of "
                "each class into a folder with its name."
            )
    folders = {split: _class_folders(root, leaf_folders) for split, root in splits.items()}
    name_of = _leaf_names({folder.relative_to(splits[key]).parts for key, own in folders.items() for folder in own})
    found = {
        split: [
            (str(p), name_of[own.relative_to(root).parts]) for own in folders[split] for p in _visible(own, _is_image)
        ]
        for split, root in splits.items()
    }
    names = sorted(set(name_of.values()))
    empty = sorted(set(names) - {name for rows in found.values() for _, name in rows})
    if empty or not names:
        raise ValueError(
            f"No images ({', '.join(IMAGE_EXTENSIONS)}) in "
            + (f"the class folders {some(empty)} of '{folder}': fill or remove them." if empty else f"'{folder}'.")
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


def _parquet_splits(files: list[Path], root: Path) -> dict[str, list[str]]:
    """`{split: [file]}`, by the first word of a file's name or by its folder's; all "train" where none is a split."""
    splits: dict[Any, list[str]] = {}
    for file in files:
        word = re.split(r"[-._]", file.name.lower())[0]
        folder = file.parent.name.lower() if file.parent != root else ""
        splits.setdefault(SPLIT_NAMES.get(word) or SPLIT_NAMES.get(folder), []).append(str(file))
    if None in splits and len(splits) > 1:
        raise ValueError(
            f"'{splits[None][0]}' belongs to no split, while others are of {some(key for key in splits if key)}: "
            "rename it to train-*.parquet, validation-*.parquet or test-*.parquet."
        )
    return {"train": splits[None]} if None in splits else splits


def load_images(
    name_or_path: str | os.PathLike, split: str | None = None, leaf_folders: bool = False, **kwargs: Any
) -> datasets.DatasetDict | datasets.Dataset:
    """
    Labelled images from what is on disk or, only if nothing is, from the Hub.

    Args:
        name_or_path (`str` or `os.PathLike`):
            One of, in this order:

            - a folder written by `save_to_disk`;
            - a `.parquet` file, or a folder of them, named by split (`train-*.parquet`, `test/*.parquet`);
            - a folder with a `metadata.csv` or `.jsonl`, as the "imagefolder" builder reads it;
            - a folder of class folders, or of `train`, `validation`, `test` folders that hold class folders;
            - the id of a data set on the Hub.
        split (`str`, *optional*):
            Return only this split, or a part of it in the words of `datasets`: `"train[:10]"`, `"train[80%:]"`,
            `"train+test"`.
        leaf_folders (`bool`, *optional*, defaults to `False`):
            Class folders may lie at any depth: each folder that holds images is a class, named by its own name, and by
            the folders above it too where several have that name ("church indoor", "church outdoor").
        kwargs (*optional*):
            Passed to `datasets.load_dataset` for a data set on the Hub (`name`, `revision`, `token`, ...).

    Returns:
        `datasets.DatasetDict` or, with `split` or where only one unnamed set was saved, `datasets.Dataset`.

    Raises:
        FileNotFoundError: if there is no such file or folder, nor such a data set on the Hub.
        ValueError: if the folder cannot be read as labelled images, or has no such split.
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
                f"'{name}' is neither a file nor a folder (there is no '{path}'), nor could it be loaded from "
                f"the Hub: {error}"
            ) from error
    if kwargs:
        raise TypeError(f"{some(kwargs)} are for data sets on the Hub, but '{path}' is on this disk: leave them out.")

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
            loaded = _load_class_folders(path, leaf_folders)

    if split is None:
        return loaded
    if not isinstance(loaded, dict):
        raise ValueError(f"'{path}' holds one set without splits, so there is no split '{split}': leave `split` out.")
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(loaded[name]) for name in loaded})
    except ValueError as error:
        raise ValueError(
            f"'{path}' has no split '{split}'; it has {some(loaded)}. A part of one is written 'train[:10]', "
            "'train[80%:]' or 'train+test'."
        ) from error
    rows = [range(len(loaded[part.splitname]))[part.from_ : part.to] for part in parts]
    taken = [loaded[part.splitname].select(own) for part, own in zip(parts, rows)]
    return datasets.concatenate_datasets(taken) if len(taken) > 1 else taken[0]


def as_dataset(data: Any, image_column: str = "image", label_column: str = "label") -> datasets.Dataset:
    """
    A `datasets.Dataset` of any labelled images: what is one already comes back as it is.

    Anything else is read once, into a file that goes when the process ends, so that it need not fit into memory.
    Encoded images and paths are kept as they are, pixels without loss.

    Args:
        data (`Iterable`):
            Dicts such as `{"image", "label"}`, or pairs of image and label, as torchvision's data sets give them; also
            a streamed `datasets.IterableDataset`, or a generator.
        image_column, label_column (`str`, *optional*, default to `"image"` and `"label"`):
            Keys of dicts, and columns of the result.

    Returns:
        `datasets.Dataset`: images as `datasets.Image`; labels as they are, with names where `data` has them, in
        `features` or in `classes`.

    Raises:
        TypeError: if it is something else; says what its first item is.
        ValueError: if it is empty.
    """
    if isinstance(data, (datasets.Dataset, dict)):
        return data  # several splits are refused where columns are looked up, which says which there are
    known = getattr(data, "features", None) or {}
    feature, names = known.get(label_column), getattr(data, "classes", None)
    if isinstance(known.get(image_column), datasets.Image):
        data = data.cast_column(image_column, datasets.Image(mode=known[image_column].mode, decode=False))
    digest, writer = hashlib.blake2b(digest_size=16), None
    path = os.path.join(_folder_of_this_process(), f"{uuid.uuid4().hex}.arrow")
    try:
        has_length = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        for item in (data[index] for index in range(len(data))) if has_length else data:
            pair = (item[image_column], item[label_column]) if isinstance(item, dict) else tuple(item)
            if len(pair) != 2:
                raise TypeError(f"an item of {len(pair)} parts")
            label = pair[1] if isinstance(pair[1], str) else operator.index(pair[1])
            if writer is None:
                if feature is None:
                    is_name = isinstance(label, str)
                    feature = datasets.Value("string" if is_name else "int64")
                    feature = datasets.ClassLabel(names=apart(names)) if names and not is_name else feature
                image_feature = datasets.Image(mode=getattr(known.get(image_column), "mode", None))
                features = datasets.Features({image_column: image_feature, label_column: feature})
                writer = ArrowWriter(features=features, path=path)
            image = _kept(pair[0])
            digest.update(content_key(image) + repr(label).encode())
            writer.write(features.encode_example({image_column: image, label_column: label}))
    except (TypeError, KeyError) as error:
        raise TypeError(
            f"Expected a datasets.Dataset, or an iterable of {{'{image_column}', '{label_column}'}} or of pairs, "
            f"image and label (a whole number or a name), got {type(data).__name__} ({type(error).__name__}: {error})."
        ) from error
    if writer is None:
        raise ValueError("There are no images: the iterable is empty, or was read to its end before.")
    writer.finalize()
    writer.close()
    dataset = datasets.Dataset.from_file(path)
    dataset._fingerprint = digest.hexdigest()  # of what it holds, instead of where: the same in the next run
    return dataset


@functools.cache
def _folder_of_this_process() -> str:
    folder = tempfile.mkdtemp(prefix="coop_hf-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _kept(image: Any) -> dict:
    """An image as bytes or a path. `datasets` would write an image that came from a JPEG as one, which loses."""
    if isinstance(image, dict):
        return {"bytes": image.get("bytes"), "path": image.get("path")}
    if isinstance(image, (bytes, bytearray, memoryview)):
        return {"bytes": bytes(image), "path": None}
    path = image if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", None)
    if path:
        return {"bytes": None, "path": os.path.abspath(path) if os.path.exists(path) else os.fspath(path)}
    image = decode_image(image)
    file = io.BytesIO()
    is_png = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    image.save(file, **({"format": "PNG", "compress_level": 1} if is_png else {"format": "TIFF"}))
    return {"bytes": file.getvalue(), "path": None}
