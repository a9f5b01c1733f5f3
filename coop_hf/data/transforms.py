"""From images to pixels.

What an image column holds -> [`decode_image`] -> PIL -> [`eval_transform`] or [`train_transform`] -> `Pixels`:
`(3, height, width)`, or what the model's image processor makes of an image, by name, where that is more than one
tensor (NaFlex: `pixel_values`, `pixel_attention_mask`, `spatial_shapes`).
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch


__all__ = ["Pixels", "check_image_size", "decode_image", "eval_transform", "to_rgb", "train_transform"]

Pixels = torch.Tensor | dict[str, torch.Tensor]

# After resizing: a short side of 224 and a long one of 74,898. In fp32 such an image takes 200 MB.
MAX_RESIZED_PIXELS = 2**24


def decode_image(value: Any, mode: str | None = None) -> PIL.Image.Image:
    """
    A PIL image from what an image column may hold.

    Files and bytes are decoded by `datasets.Image`, so that EXIF orientation is applied as it does.

    Args:
        value (`PIL.Image.Image`, `str`, `os.PathLike`, `bytes`, `dict`, `np.ndarray` or nested `list`):
            An image, a path, an encoded file, `{"bytes", "path"}`, or pixels: integers from 0 to 255, of shape
            `(height, width)`, `(height, width, channels)` or `(channels, height, width)` with 1, 3 or 4 channels.
        mode (`str`, *optional*):
            PIL mode to convert to.

    Returns:
        `PIL.Image.Image`: the image, loaded, in its own mode unless `mode` is given.

    Raises:
        Exception: whatever PIL raises for files that it cannot read.
        ValueError: for values of no such kind.
    """
    if value is None:
        raise ValueError("the image is missing (None)")
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


def content_key(value: Any) -> bytes:
    """Hash of what an image column holds; of a file on disk, of its path, size and time of change."""
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


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    An image of any mode in RGB, as `CLIPImageProcessor` converts it: transparent parts on white.

    One difference: 16-bit grey is scaled to 8 bits (divided by 256), where PIL and with it the processor cuts every
    value at 255, which leaves a white area of most such images.

    Args:
        image (`PIL.Image.Image`):
            An image in any mode.

    Returns:
        `PIL.Image.Image`: the image in mode RGB, the same object if it was.
    """
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _image_processor(processor: Any) -> Any:
    processor = getattr(processor, "image_processor", processor)
    if not callable(processor) or not hasattr(processor, "image_mean"):
        raise TypeError(
            f"Expected an image processor, such as CLIPImageProcessor or a CLIPProcessor that holds one, got "
            f"{type(processor).__name__}: load it with `AutoImageProcessor.from_pretrained`."
        )
    return processor


def _edges(size: Any) -> dict[str, int | None]:
    """The size of an image processor as a dict: it is one in older versions of transformers, an object in newer."""
    keys = ("height", "width", "shortest_edge")
    return {key: size.get(key) if isinstance(size, dict) else getattr(size, key, None) for key in keys}


def _crops(image_processor: Any) -> bool:
    return bool(getattr(image_processor, "do_center_crop", False) and getattr(image_processor, "crop_size", None))


def _output_size(image_processor: Any) -> tuple[int, int]:
    """(height, width) that an image processor gives."""
    size = _edges(image_processor.crop_size if _crops(image_processor) else image_processor.size)
    height, width = (size[key] or size["shortest_edge"] for key in ("height", "width"))
    if not height or not width:
        raise ValueError(
            f"The image processor gives images of no fixed size (size={image_processor.size}), but a batch needs "
            "one: set its `crop_size` or `size` to a height and a width."
        )
    return int(height), int(width)


def check_image_size(image: PIL.Image.Image, image_processor: Any) -> None:
    """
    Refuses an image so long and thin that resizing its short side to the model's would make it huge.

    Raises:
        ValueError: if it would have more than `MAX_RESIZED_PIXELS` pixels.
    """
    edge = _edges(getattr(image_processor, "size", None))["shortest_edge"]
    if not edge or not getattr(image_processor, "do_resize", True):
        return
    short, long = sorted(image.size)
    if edge * (edge * long // short) > MAX_RESIZED_PIXELS:
        raise ValueError(
            f"an image of {image.width} x {image.height} pixels is too long and thin: with its short side resized to "
            f"{edge} it would be {edge * long // short:,} pixels long. Crop it."
        )


def _is_flexible(image_processor: Any) -> bool:
    """Whether it takes images of any aspect ratio as they are (NaFlex)."""
    return getattr(image_processor, "max_num_patches", None) is not None


def _is_known(image_processor: Any) -> bool:
    """Whether it is one of transformers' own; others may do more than resize, crop and scale."""
    return type(image_processor).__module__.startswith("transformers.") and not _is_flexible(image_processor)


def _of_levels(image_processor: Any, **given: Any) -> np.ndarray:
    """What an image processor makes of the values 0 to 255, for each channel: `(3, 256)`."""
    image = PIL.Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3))
    pixels = image_processor(images=image, do_resize=False, do_center_crop=False, **given)["pixel_values"][0]
    return np.asarray(pixels).reshape(3, 256)


def _scaling(processor: Any) -> np.ndarray:
    """The table of [`_scaled`] that does what an image processor does."""
    if _is_known(processor):
        return np.ascontiguousarray(_of_levels(processor), dtype=np.float32)
    mean, std = np.zeros(3), np.ones(3)
    if getattr(processor, "do_normalize", True):
        mean, std = np.asarray(processor.image_mean), np.asarray(processor.image_std)
    factor = processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0
    return ((np.arange(256) * factor - mean[:, None]) / std[:, None]).astype(np.float32)


def _scaled(pixels: np.ndarray, table: np.ndarray) -> torch.Tensor:
    """`(3, height, width)` of whole numbers, by a table for each channel: faster than to compute, and the same."""
    scaled = np.empty(pixels.shape, dtype=np.float32)
    for channel in range(len(table)):
        np.take(table[channel], pixels[channel], out=scaled[channel], mode="clip")
    return torch.from_numpy(scaled)


def _channels(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def _own_pixels(image: PIL.Image.Image, image_processor: Any, table: np.ndarray | None = None) -> Pixels:
    check_image_size(image, image_processor)
    image = to_rgb(image)
    if table is not None:
        sized = image_processor(images=image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        return _scaled(np.asarray(sized), table)
    made = {name: value[0] for name, value in image_processor(images=image, return_tensors="pt").items()}
    made["pixel_values"] = made["pixel_values"].to(torch.float32)
    return made if len(made) > 1 else made["pixel_values"]


def _original_pixels(
    image: PIL.Image.Image, image_processor: Any, edge: int, size: tuple[int, int], table: np.ndarray
) -> torch.Tensor:
    check_image_size(image, image_processor)
    image = to_rgb(image)
    width, height = image.size
    if width <= height:
        width, height = edge, int(edge * height / width)
    else:
        width, height = int(edge * width / height), edge
    image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = round((width - size[1]) / 2), round((height - size[0]) / 2)  # a half to the even neighbour
    return _scaled(_channels(image.crop((left, top, left + size[1], top + size[0]))), table)


def eval_transform(image_processor: Any, original: bool = False) -> functools.partial:
    """
    The test transform: the model's own image processor, or the public CoOp code's.

    The two differ by one pixel for images of some sizes (14 of 140 common ones): where the centre crop leaves an odd
    rest, torchvision's `CenterCrop`, which the public code uses, rounds half of it, and the processor rounds it down.

    Args:
        image_processor (`BaseImageProcessor` or `ProcessorMixin`):
            The model's image processor, or a processor that holds it.
        original (`bool`, *optional*, defaults to `False`):
            Follow the public code: resize the short side (bicubic), then torchvision's centre crop. For results that
            are to be compared with the paper's. A processor that does not resize the short side and crop, such as
            SigLIP's, is used as it is: the public code has no such model.

    Returns:
        `Callable[[PIL.Image.Image], Pixels]`: gives `(3, height, width)` float32, or a dict of tensors where the
        image processor gives more than `pixel_values`. It can be pickled.
    """
    processor = _image_processor(image_processor)
    edge = _edges(getattr(processor, "size", None))["shortest_edge"]
    if not original or not edge or not _crops(processor) or max(_output_size(processor)) > edge:
        leaves_scaling = _is_known(processor) and (  # ALIGN's scales whatever it is told
            _of_levels(processor, do_rescale=False, do_normalize=False).dtype == np.uint8
        )
        table = _scaling(processor) if leaves_scaling else None
        return functools.partial(_own_pixels, image_processor=processor, table=table)
    return functools.partial(
        _original_pixels, image_processor=processor, edge=edge, size=_output_size(processor), table=_scaling(processor)
    )


def _crop_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
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
    # None fits, as in very long images: the largest centre crop within the aspect ratios.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def train_pixels(
    image: PIL.Image.Image,
    rng: np.random.Generator,
    size: tuple[int, int] | None,
    flip: bool,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    resample: int,
    image_processor: Any = None,
    table: np.ndarray | None = None,
) -> Pixels:
    image = to_rgb(image)
    # Cut first, resize then: resizing with `box=` would let pixels from outside the crop into its border.
    image = image.crop(_crop_box(*image.size, rng, scale, ratio))
    if size is not None:
        image = image.resize((size[1], size[0]), resample)
    if flip and rng.random() < 0.5:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return _own_pixels(image, image_processor) if table is None else _scaled(_channels(image), table)


def train_transform(
    image_processor: Any,
    flip: bool = True,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    resample: int | None = None,
) -> Callable[[PIL.Image.Image, np.random.Generator], Pixels]:
    """
    The training transform of the [CoOp paper](https://arxiv.org/abs/2109.01134): a random crop of random size and
    aspect ratio, resized to the model's size (as its image processor resizes, bicubic for CLIP), flipped left to right
    in half of the cases, then rescaled and normalised as the image processor does. Where that takes images of any
    aspect ratio (NaFlex), the flipped crop is given to it as it is.

    The crop is torchvision's `RandomResizedCrop`: its area is `scale` times the image's, its aspect ratio
    log-uniform in `ratio`; after ten draws that do not fit, the largest centre crop within `ratio`.

    Args:
        image_processor (`BaseImageProcessor` or `ProcessorMixin`):
            The model's image processor, or a processor that holds it: gives size, mean and standard deviation.
        flip (`bool`, *optional*, defaults to `True`):
            Whether to flip. Turn it off where left and right matter, as in letters and traffic signs.
        scale (`tuple(float, float)`, *optional*, defaults to `(0.08, 1.0)`):
            Smallest and largest share of the image's area.
        ratio (`tuple(float, float)`, *optional*, defaults to `(3/4, 4/3)`):
            Smallest and largest width / height.
        resample (`int`, *optional*, defaults to the image processor's):
            How crops are resized, one of `PIL.Image.Resampling`.

    Returns:
        `Callable[[PIL.Image.Image, np.random.Generator], Pixels]`: gives `(3, height, width)` float32, or a dict of
        tensors, see [`eval_transform`]. It can be pickled.

    Raises:
        ValueError: if `scale` or `ratio` is not an increasing pair of positive numbers, or scale exceeds 1.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"`scale` must be two shares of the area, 0 < low <= high <= 1, got {scale}.")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"`ratio` must be two aspect ratios, 0 < low <= high, got {ratio}.")
    processor = _image_processor(image_processor)
    is_flexible = _is_flexible(processor)
    return functools.partial(
        train_pixels,
        size=None if is_flexible else _output_size(processor),
        flip=flip,
        scale=(scale[0], scale[1]),
        ratio=(ratio[0], ratio[1]),
        resample=int(resample or getattr(processor, "resample", None) or PIL.Image.Resampling.BICUBIC),
        **({"image_processor": processor} if is_flexible else {"table": _scaling(processor)}),
    )
