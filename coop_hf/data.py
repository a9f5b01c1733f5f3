"""Labels of a `datasets.Dataset`, few-shot sampling, and the data set of a training.

[`LabelledImages`] gives pixels and class indices, decoded in the workers of a `DataLoader`; [`collate`] batches them.
"""

import hashlib
import logging
import operator
import os
import re
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import torch

from .config import clean_class_name, some
from .transforms import decode_image, eval_transform, train_pixels, train_transform


__all__ = ["LabelledImages", "collate", "resolve_labels", "sample_few_shot"]

logger = logging.getLogger(__name__)


# Labels and few-shot sampling


def _check_dataset(dataset):
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


def _check_column(dataset, column, argument):
    _check_dataset(dataset)
    if column not in dataset.column_names:
        raise ValueError(
            f"The data set has no column '{column}'; it has {some(dataset.column_names, 20)}. "
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
        raise ValueError(f"Each class name may stand once in `class_names`; repeated: {some(repeated)}.")
    return class_names


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
        index_of = {clean_class_name(name): index for index, name in enumerate(names)}
        if given is not None and all(clean_class_name(name) in index_of for name in feature.names):
            # The same names, or some of them, perhaps in another order, as in a test folder: by name.
            order = [index_of[clean_class_name(name)] for name in feature.names]
            values = [order[value] if 0 <= value < len(order) else value for value in values]
        elif given is not None and len(given) != feature.num_classes:
            raise ValueError(
                f"`class_names` has {len(given)} names, but the column '{label_column}' has {feature.num_classes} "
                f"classes ({some(feature.names)}), which are not among them: pass one name for each class, in this "
                "order."
            )
    elif "string" in str(feature.dtype):
        names = given or _check_class_names(sorted(set(values)))
        index_of = {name: index for index, name in enumerate(names)}
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
                f"{len(empty)} of {len(names)} classes have no picture: {some(empty)}. Add pictures, take these "
                "classes out, or pass `allow_fewer=True`."
            )
        few = [f"{name} ({count})" for name, count in zip(names, counts) if count < num_shots]
        if few:
            raise ValueError(
                f"{len(few)} of {len(names)} classes have fewer than {num_shots} pictures: {some(few)}. Ask for at "
                f"most {counts.min()} shots, add pictures, or pass `allow_fewer=True` to take what there is."
            )
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rows = np.concatenate([by_class[s : s + min(num_shots, n)] for s, n in zip(starts, counts)] or [by_class])
    return dataset.select(rows.tolist())


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
            Column with a `datasets.Image`, paths, encoded files or pixels, see
            `coop_hf.transforms.decode_image`.
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
        if getattr(self._augmented, "func", None) is train_pixels:
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
                f"{some(images) or 'none'})."
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
            some(self.skipped),
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
        raise ValueError(f"Examples need 'pixel_values' or 'image_embeds', got {some(examples[0])}.")
    tensors = [torch.as_tensor(example[key], dtype=torch.float32) for example in examples]
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise ValueError(
            f"The '{key}' of a batch must have one shape, got {some(shapes)}: use an image processor that crops or "
            "resizes to a fixed height and width."
        )
    batch = {key: torch.stack(tensors)}
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([int(example["labels"]) for example in examples], dtype=torch.int64)
    return batch
