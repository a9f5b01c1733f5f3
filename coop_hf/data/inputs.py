"""What `predict` takes: images in memory, files, folders, addresses, data sets, iterables, and pixels made before."""

import logging
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import torch
from transformers.image_utils import load_image

from .sources import IMAGE_EXTENSIONS
from .transforms import decode_image


__all__ = ["image_files", "open_images", "read_batches", "read_image"]

logger = logging.getLogger(__name__)


def image_files(folder: str | os.PathLike) -> list[str]:
    """The images of a folder and of those below it, sorted; hidden ones are left out.

    Raises:
        ValueError: there are none.
    """
    root = Path(folder)
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in IMAGE_EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not files:
        raise ValueError(f"There are no images ({', '.join(IMAGE_EXTENSIONS)}) in the folder '{root}'.")
    return [str(path) for path in files]


def open_images(images: Any, image_column: str = "image") -> tuple[Iterable[Any], bool, list[str] | None]:
    """The single images of what `CoOpModel.predict` takes.

    Args:
        images: see there.
        image_column (`str`, *optional*, defaults to `"image"`): which column, or key of dicts, holds the images.

    Returns:
        the images, each something for [`read_image`]; whether it was one image and no list; and the names of files if
        it was a folder.

    Raises:
        ValueError: an empty folder, or a data set without the column.
        TypeError: nothing that holds images.
    """
    if isinstance(images, (str, os.PathLike)) and os.path.isdir(images):
        files = image_files(images)
        return files, False, files
    if isinstance(images, (str, bytes, bytearray, os.PathLike, PIL.Image.Image)):
        return [images], True, None
    if hasattr(images, "keys") and not isinstance(images, datasets.DatasetDict):
        pixels = images.get("pixel_values")
        if pixels is not None and getattr(pixels, "ndim", 3) == 4:  # what an image processor gives
            return [{key: value[row] for key, value in images.items()} for row in range(len(pixels))], False, None
        return [images.get(image_column, images)], True, None
    if getattr(images, "ndim", None) in (2, 3):
        return [images], True, None
    if isinstance(images, (datasets.Dataset, datasets.IterableDataset)):
        columns = images.column_names
        if columns is not None and image_column not in columns:
            raise ValueError(
                f"The data set has no column '{image_column}'; it has {', '.join(map(repr, columns))}. Pass the right "
                "one as `image_column=`."
            )
        if isinstance((images.features or {}).get(image_column), datasets.Image):
            images = images.cast_column(image_column, datasets.Image(decode=False))  # each is decoded when it is read
    if isinstance(images, datasets.DatasetDict) or not (hasattr(images, "__iter__") or hasattr(images, "__getitem__")):
        raise TypeError(
            "`images` must be an image (PIL, path, URL, array), a folder, or several images: a list, an array stack, "
            f"one split of a data set, an iterable; got {type(images).__name__}."
        )
    has_length = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    items = (images[index] for index in range(len(images))) if has_length else images
    return (_image_of(item, image_column) for item in items), False, None


def _image_of(item: Any, image_column: str) -> Any:
    """The image of a row of a data set, of a pair of image and label, or the item itself."""
    if isinstance(item, dict) and image_column in item:
        return item[image_column]
    return item[0] if isinstance(item, tuple) and len(item) == 2 else item


def read_image(value: Any, index: int, transform: Any = None) -> Any:
    """What `transform` makes of an image, by name; without, the PIL image.

    Args:
        value: what `coop_hf.data.transforms.decode_image` takes, an address, or what the image processor gave.
        index (`int`): which of several it is, for the error.
        transform (`Callable`, *optional*): gives `Pixels`.

    Raises:
        ValueError: it cannot be read; says which, and why.
    """
    if transform is not None and isinstance(value, dict) and "pixel_values" in value:
        return {key: torch.as_tensor(part) for key, part in value.items() if key != "labels"}
    if transform is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
        return {"pixel_values": value}
    try:
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            value = load_image(value, timeout=60)
        image = decode_image(value)
        pixels = image if transform is None else transform(image)
    except Exception as error:
        shown = f" ({value!r})" if isinstance(value, (str, os.PathLike)) else ""
        raise ValueError(
            f"image {index}{shown} cannot be read: {error}. Pass a PIL image, the path of an image, or an array of "
            "numbers from 0 to 255."
        ) from error
    return pixels if transform is None or isinstance(pixels, dict) else {"pixel_values": pixels}


def read_batches(
    images: Iterable[Any], batch_size: int, transform: Any = None, on_bad_image: str = "raise"
) -> Iterator[list[Any]]:
    """What [`read_image`] makes of images, so many at a time; `None` for those that cannot be read, with "skip".

    Raises:
        ValueError: there is no image, or one that cannot be read.
    """
    numbered, bad, count = enumerate(images), 0, 0
    while part := list(islice(numbered, batch_size)):
        batch = []
        for index, value in part:
            try:
                batch.append(read_image(value, index, transform))
            except ValueError as error:
                if on_bad_image != "skip":
                    raise
                if not bad:
                    logger.warning("Left out: %s", error)
                bad += 1
                batch.append(None)
        count += len(part)
        yield batch
    if not count:
        raise ValueError("`images` is empty: pass at least one image.")
    if bad > 1:
        logger.warning("%d of %d images cannot be read and were left out.", bad, count)
