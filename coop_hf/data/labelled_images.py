"""[`LabelledImages`], the data set of a training: pixels and class indices, decoded in the workers of a
`DataLoader`; [`collate`] batches them.
"""

import hashlib
import logging
import operator
import os
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch

from ..checks import some
from .few_shot import _check_column, resolve_labels
from .sources import as_dataset
from .transforms import (
    Pixels,
    check_image_size,
    content_key,
    decode_image,
    eval_transform,
    train_pixels,
    train_transform,
)


__all__ = ["LabelledImages", "collate"]

logger = logging.getLogger(__name__)

# What image towers take beside `pixel_values`: SigLIP 2's with images of any aspect ratio.
IMAGE_INPUTS = ("pixel_attention_mask", "spatial_shapes")

_KEY_ROWS = 256  # images that are read at a time to be hashed


class LabelledImages(torch.utils.data.Dataset):
    """
    Images and labels of a `datasets.Dataset` as tensors, decoded where they are asked for: in the workers of a
    `DataLoader`.

    The augmentation of a row is a function of `seed`, epoch and row alone. Number of workers, number of processes,
    order and resuming do not change it. Call [`~LabelledImages.set_epoch`] before each epoch is iterated; it reaches
    workers that are already running.

    Args:
        dataset (`datasets.Dataset` or `Iterable`):
            One split of a data set, or any iterable that `coop_hf.data.sources.as_dataset` takes.
        image_processor (`BaseImageProcessor` or `ProcessorMixin`):
            The model's image processor, or a processor that holds it.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column with a `datasets.Image`, paths, encoded files or pixels, see
            `coop_hf.data.transforms.decode_image`.
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
            `"raise"` when an unreadable image is asked for, or `"skip"`: decode all images once now, leave the
            unreadable ones out, and say how many.
        original (`bool`, *optional*, defaults to `False`):
            Whether plain views are those of the public CoOp code, see `coop_hf.data.transforms.eval_transform`.

    Attributes:
        class_names (`list[str]`): names of the classes.
        labels (`np.ndarray`): class index of each item, `(num_items,)` int64.
        rows (`np.ndarray`): row of `dataset` that each item comes from, `(num_items,)` int64.
        skipped (`list[int]`): rows of `dataset` that were left out.

    Raises:
        ValueError: if a column is missing or of the wrong type, a label is wrong, or no image is readable.

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
        dataset: datasets.Dataset | Iterable,
        image_processor: Any,
        image_column: str = "image",
        label_column: str = "label",
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        augment: bool = False,
        transform: Callable[[PIL.Image.Image, np.random.Generator], Pixels] | None = None,
        on_bad_image: str = "raise",
        original: bool = False,
    ) -> None:
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"`on_bad_image` must be 'raise' or 'skip', got {on_bad_image!r}.")
        if not 0 <= operator.index(seed) < 2**32:
            raise ValueError(f"`seed` must be from 0 to 2**32 - 1, got {seed}.")
        dataset = as_dataset(dataset, image_column, label_column)
        _check_column(dataset, image_column, "image_column")
        if len(dataset) == 0:
            raise ValueError("The data set has no rows: check the split and any filter or selection before this.")
        self.class_names, self.labels = resolve_labels(dataset, label_column, class_names)
        self.image_column = image_column
        self.seed = operator.index(seed)
        self.augment = augment
        self._plain = eval_transform(image_processor, original)
        self._augmented = train_transform(image_processor) if transform is None else transform
        if getattr(self._augmented, "func", None) is train_pixels:
            self._augmentation = f"train_transform {sorted(self._augmented.keywords.items())}"  # type: ignore[attr-defined]
        else:
            self._augmentation = uuid.uuid4().hex  # what an unknown function gives is not kept for other runs

        feature = dataset.features[image_column]
        dtype = getattr(feature, "dtype", None)
        is_image = isinstance(feature, datasets.Image)
        if isinstance(feature, datasets.ClassLabel) or (
            isinstance(feature, datasets.Value) and not re.fullmatch(r"(large_)?(string|binary)", str(dtype))
        ):
            images = [name for name, other in dataset.features.items() if isinstance(other, datasets.Image)]
            raise ValueError(
                f"The column '{image_column}' holds {feature}, which is not an image. Pass as `image_column=` a "
                "column of datasets.Image, paths, encoded files or pixels (columns with a datasets.Image: "
                f"{some(images) or 'none'})."
            )
        self._mode = feature.mode if is_image else None
        images = dataset.select_columns([image_column]).with_format(None)
        self._images = images.cast_column(image_column, datasets.Image(decode=False)) if is_image else images

        # In shared memory, so that set_epoch reaches workers that are already running.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.rows = np.arange(len(dataset), dtype=np.int64)
        self.skipped: list[int] = []
        if on_bad_image == "skip":
            self._drop_unreadable()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        # A copy (deepcopy, pickle) has an epoch of its own; a worker process gets the shared one and keeps it.
        if not self._epoch.is_shared():
            self._epoch.share_memory_()

    def _drop_unreadable(self) -> None:
        def problem(row: int) -> str | None:
            try:
                self._decode(row)
            except ValueError as error:
                return str(error)
            return None

        # PIL decodes without holding the interpreter lock.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            problems = list(pool.map(problem, range(len(self.rows))))
        bad = np.array([text is not None for text in problems])
        self.skipped = np.flatnonzero(bad).tolist()
        if not self.skipped:
            return
        first = problems[self.skipped[0]]
        if bad.all():
            raise ValueError(f"None of the {len(bad)} images can be read. The first: {first}")
        self.rows, self.labels = self.rows[~bad], self.labels[~bad]
        logger.warning(
            "Left out %d of %d images that cannot be read (rows %s). The first: %s",
            len(self.skipped),
            len(bad),
            some(self.skipped),
            first,
        )

    def _decode(self, row: int) -> PIL.Image.Image:
        value = self._images[row][self.image_column]
        try:
            image = decode_image(value, self._mode)
            check_image_size(image, self._plain.keywords["image_processor"])
            return image
        # PIL's decoders raise many types for broken files (OSError, SyntaxError, struct.error, ...).
        except Exception as error:
            path = value.get("path") if isinstance(value, dict) else value
            where = f" ('{path}')" if isinstance(path, (str, os.PathLike)) else ""
            raise ValueError(
                f"The image in row {row}{where}, column '{self.image_column}', cannot be read: "
                f"{type(error).__name__}: {error}. Replace it or drop the row, or pass on_bad_image='skip'."
            ) from error

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch(self) -> int:
        """`int`: the epoch whose augmented views the items are."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """
        Set the epoch, which chooses the augmented views. `accelerate`'s data loaders call this in single-process runs.

        Args:
            epoch (`int`):
                Epoch, from 0.
        """
        if int(epoch) < 0:
            raise ValueError(f"`epoch` must be at least 0, got {epoch}.")
        self._epoch.fill_(int(epoch))

    def view(self, index: int, epoch: int | None = None) -> Pixels:
        """
        The pixels of an item as it is in a given epoch of augmented training.

        Args:
            index (`int`):
                Item.
            epoch (`int`, *optional*):
                Epoch, from 0. `None` is the plain view, that of evaluation.

        Returns:
            `Pixels`: `(3, height, width)` float32, or a dict of tensors where the image processor gives more than
            `pixel_values`.

        Raises:
            IndexError: if there is no such item.
            ValueError: if the image cannot be read; names the row and the path.
        """
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no item {index}: the data set has {len(self)}.")
        # The row and not the index seeds: skipping an image must not change the augmentation of others.
        row = int(self.rows[index])
        image = self._decode(row)
        if epoch is None:
            return self._plain(image)
        return self._augmented(image, np.random.default_rng([self.seed, operator.index(epoch), row]))

    def image(self, index: int) -> PIL.Image.Image:
        """`PIL.Image.Image`: an item as it is, decoded."""
        return self._decode(int(self.rows[index]))

    def source(self, index: int) -> Any:
        """An item as the data set holds it: a dict of `bytes` and `path`, a path, an encoded file, or pixels."""
        if self._mode is not None:  # a mode of the column's own
            return self.image(index)
        return self._images[int(self.rows[index])][self.image_column]

    def preprocessing_key(self) -> str:
        """`str`: names the plain transform, for a cache of what it gives.

        The base classes tell apart image processors on PIL and on torchvision, which resize differently.
        """
        processor = self._plain.keywords["image_processor"]
        kind = [kind.__name__ for kind in type(processor).__mro__]
        return f"{processor.to_json_string()} {kind} {self._plain.func.__name__} {self._mode}"

    def view_key(self, index: int, epoch: int | None = None) -> str:
        """`str`: names a view of an item; see [`~LabelledImages.view`]."""
        if epoch is None:
            return "plain"
        return f"{self._augmentation} {self.seed} {operator.index(epoch)} {int(self.rows[index])}"

    def content_keys(self) -> list[bytes]:
        """`list[bytes]`: for each item a hash of its encoded image; of a file on disk, of path, size and change."""
        images, keys = self._images.select(self.rows.tolist()) if self.skipped else self._images, []
        for batch in images.iter(_KEY_ROWS):
            keys += [content_key(value) for value in batch[self.image_column]]
        return keys

    def set_key(self, num_views: int | None = None) -> str:
        """`str`: names all views of all items, in their order; the same for the same data set in another process.

        Where the data set holds the images themselves, its fingerprint stands for them, and no image is read.
        """
        digest = hashlib.blake2b(f"{num_views} {self.rows.tolist() if self.skipped else ''}".encode(), digest_size=16)
        if num_views is not None:
            digest.update(f"{self._augmentation} {self.seed}".encode())
        if self._holds_images():
            digest.update(self._images._fingerprint.encode())
        else:
            digest.update(b"".join(self.content_keys()))
        return digest.hexdigest()

    def _holds_images(self) -> bool:
        """Whether no image is a file that lies elsewhere, and may change."""
        kind = self._images.features[self.image_column]
        if isinstance(kind, datasets.Value):
            return "binary" in kind.dtype
        if not isinstance(kind, (datasets.Image, dict)):
            return True
        column = self._images.data.column(self.image_column)
        return all(chunk.field("bytes").null_count == 0 for chunk in column.chunks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        view = self.view(index, self.epoch if self.augment else None)
        pixels = view if isinstance(view, dict) else {"pixel_values": view}
        return {**pixels, "labels": int(self.labels[index])}


def is_prepared(dataset: Any) -> bool:
    """Whether the items of a data set are inputs of the model already, as those of [`LabelledImages`] are."""
    if hasattr(dataset, "column_names") or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return False
    if isinstance(dataset, LabelledImages) or len(dataset) == 0:
        return True
    item = dataset[0]
    return isinstance(item, dict) and ("pixel_values" in item or "image_embeds" in item)


def collate(examples: list[dict] | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A batch from examples of [`LabelledImages`], or from examples that hold image embeddings instead of pixels.

    Args:
        examples (`list[dict]` or `dict[str, torch.Tensor]`):
            A batch already, which is returned as it is, or examples, each with `pixel_values`
            `(3, height, width)` or `image_embeds` `(projection_dim,)`, and `labels` `()`, which may be left out in
            prediction. With `pixel_values` go `pixel_attention_mask` and `spatial_shapes`, if there are any.

    Returns:
        `dict[str, torch.Tensor]`: `image_embeds` `(batch, projection_dim)` if present, else `pixel_values`
        `(batch, 3, height, width)`, both float32, and the other inputs of the image tower; `labels` `(batch,)` int64.

    Raises:
        ValueError: if examples hold neither, or images of different sizes.
    """
    if isinstance(examples, dict):
        return examples
    key = "image_embeds" if "image_embeds" in examples[0] else "pixel_values"
    if key not in examples[0]:
        raise ValueError(f"Examples need 'pixel_values' or 'image_embeds', got {some(examples[0])}.")
    batch = {}
    for name in (key, *(other for other in IMAGE_INPUTS if key == "pixel_values" and other in examples[0])):
        dtype = torch.float32 if name == key else None
        tensors = [torch.as_tensor(example[name], dtype=dtype) for example in examples]
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        if len(shapes) > 1:
            raise ValueError(
                f"The '{name}' of a batch must have one shape, got {some(shapes)}: use an image processor that crops "
                "or resizes to a fixed height and width."
            )
        batch[name] = torch.stack(tensors)
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([int(example["labels"]) for example in examples], dtype=torch.int64)
    return batch
