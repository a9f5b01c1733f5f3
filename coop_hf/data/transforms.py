"""From images to pixels.

What an image column holds -> [`decode_image`] -> PIL -> [`eval_transform`] or [`train_transform`] ->
`(3, height, width)`.
"""

import functools
import math
import os

import datasets
import numpy as np
import PIL.Image
import torch


__all__ = ["decode_image", "eval_transform", "to_rgb", "train_transform"]


def decode_image(value, mode=None):
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


def to_rgb(image):
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
            f"The image processor gives images of no fixed size (size={image_processor.size}), but a batch needs "
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
    # None fits, as in very long images: the largest centre crop within the aspect ratios.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def train_pixels(image, rng, size, flip, scale, ratio, factor, mean, std):
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
        train_pixels,
        size=_output_size(processor),
        flip=flip,
        scale=tuple(scale),
        ratio=tuple(ratio),
        factor=processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0,
        mean=np.asarray(processor.image_mean if normalise else 0.0, dtype=np.float32),
        std=np.asarray(processor.image_std if normalise else 1.0, dtype=np.float32),
    )
