import io
import struct
import zlib

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import SHARED, encoded, make_image_processor, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    ChineseCLIPImageProcessor,
    CLIPImageProcessor,
    EfficientNetImageProcessor,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
)
from transformers.image_transforms import convert_to_rgb

from coop_hf.data.transforms import _crop_box, check_image_size, decode_image, eval_transform, to_rgb, train_transform


PUTS_ON_WHITE = np.asarray(convert_to_rgb(PIL.Image.new("RGBA", (1, 1), (10, 20, 30, 0)))).min() == 255


@pytest.fixture(scope="module")
def processor():
    return make_image_processor(24)


def png16(values):
    """A 16-bit grey PNG, written by hand."""
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks
    )


def modes():
    palette = picture(1).quantize(16)
    transparent = io.BytesIO()
    palette.save(transparent, "PNG", transparency=3)
    return {
        "RGB": picture(2),
        "L": picture(3, mode="L"),
        "1": picture(3, mode="L").convert("1"),
        "RGBA": picture(4, mode="RGBA"),
        "LA": picture(4, mode="LA"),
        "P": palette,
        "P with transparency": PIL.Image.open(io.BytesIO(transparent.getvalue())),
        "CMYK": picture(5, mode="CMYK"),
        "YCbCr": picture(6, mode="YCbCr"),
        "F": picture(3, mode="L").convert("F"),
        "I": picture(3, mode="L").convert("I"),
    }


@pytest.mark.parametrize("mode", list(modes()))
@pytest.mark.parametrize("size", [(37, 29), (24, 24), (10, 90)])
def test_eval_transform_is_the_processor(processor, mode, size):
    image = modes()[mode].resize(size) if size != (37, 29) else modes()[mode]
    pixels = eval_transform(processor)(image)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 24, 24)
    if not PUTS_ON_WHITE:  # older transformers show what a picture holds where it is transparent
        image = to_rgb(image)
    assert torch.equal(pixels, processor(images=image, return_tensors="pt")["pixel_values"][0].float())


def test_eval_transform_is_the_real_processor():
    if not (SHARED / "clip_tokenizer").is_dir():
        pytest.skip("no ../shared/data/clip_tokenizer here")
    real = CLIPImageProcessor.from_pretrained(SHARED / "clip_tokenizer")
    image = picture(7, (301, 260))
    pixels = eval_transform(real)(image)
    assert pixels.shape == (3, 224, 224)
    assert torch.equal(pixels, real(images=image, return_tensors="pt")["pixel_values"][0].float())
    # Without resizing, the whole way in closed form.
    image = picture(8, (224, 224))
    expected = (np.asarray(image) / 255 - real.image_mean) / real.image_std
    assert np.allclose(eval_transform(real)(image), expected.transpose(2, 0, 1), atol=1e-6)


def test_to_rgb():
    clear = PIL.Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    image = picture(1)
    assert to_rgb(image) is image
    values = np.linspace(0, 65535, 12).reshape(3, 4).astype(np.uint16)
    decoded = decode_image(png16(values))
    assert np.array_equal(np.asarray(to_rgb(decoded)), np.repeat((values // 256).astype(np.uint8)[..., None], 3, -1))


def test_decode_image_as_datasets_does(tmp_path):
    image = picture(1)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    data = encoded(image, "PNG", exif=exif.tobytes())
    (tmp_path / "x.png").write_bytes(data)
    turned = np.rot90(np.asarray(image), -1)
    expected = datasets.Image().decode_example({"bytes": data, "path": None})
    assert np.array_equal(np.asarray(expected), turned)
    for value in (
        data,
        str(tmp_path / "x.png"),
        tmp_path / "x.png",
        {"bytes": data, "path": None},
        {"path": str(tmp_path / "x.png")},
    ):
        assert np.array_equal(np.asarray(decode_image(value)), turned)
    pixels = np.asarray(image)
    assert decode_image(image) is image
    for value in (pixels, pixels.tolist(), pixels.transpose(2, 0, 1), pixels.astype(np.int64)):
        assert np.array_equal(np.asarray(decode_image(value)), pixels)
    assert decode_image(pixels[..., 0]).mode == decode_image(pixels[..., :1]).mode == "L"
    assert decode_image(pixels, "L").mode == "L"


@pytest.mark.parametrize(
    "value, message",
    [
        (None, "missing"),
        (np.zeros((4, 4, 3)), "integers from 0 to 255, got float64"),
        (np.full((4, 4), 300), "integers from 0 to 255"),
        (np.zeros((5, 4, 2), np.uint8), r"got the shape \(5, 4, 2\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "got the shape"),
    ],
)
def test_bad_pixels(value, message):
    with pytest.raises(ValueError, match=message):
        decode_image(value)


class Draws:
    """A generator that gives the numbers it was made with."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def test_train_transform_in_closed_form(processor):
    image = picture(1, (80, 60))
    # Share of the area 0.08 + 0.92·0.5 = 0.54; log-ratio half way, ratio 1: a square of √(0.54·4800) = 50.9 → 51.
    # left = ⌊0.5·(80 - 51 + 1)⌋ = 15, top = ⌊0.9·(60 - 51 + 1)⌋ = 9
    crop = image.crop((15, 9, 66, 60)).resize((24, 24), PIL.Image.Resampling.BICUBIC)
    expected = (np.asarray(crop) / 255 - processor.image_mean) / processor.image_std
    for last, step in ((0.4, -1), (0.6, 1)):
        pixels = train_transform(processor)(image, Draws(0.5, 0.5, 0.5, 0.9, last))
        assert pixels.dtype == torch.float32 and pixels.shape == (3, 24, 24)
        assert np.allclose(pixels, expected[:, ::step].transpose(2, 0, 1), atol=1e-5)
    pixels = train_transform(processor, flip=False)(image, Draws(0.5, 0.5, 0.5, 0.9))
    assert np.allclose(pixels, expected.transpose(2, 0, 1), atol=1e-5)


def test_whole_crop_is_the_processor(processor):
    image = picture(1, (48, 48))
    pixels = train_transform(processor, flip=False, scale=(1, 1), ratio=(1, 1))(image, np.random.default_rng(0))
    assert np.allclose(pixels, eval_transform(processor)(image), atol=1e-5)


@pytest.mark.parametrize("size, box", [((1000, 6), (496, 0, 504, 6)), ((6, 1000), (0, 496, 6, 504))])
def test_train_transform_falls_back_to_the_centre(processor, size, box):
    image = picture(1, size)
    pixels = train_transform(processor, scale=(0.5, 1))(image, Draws(*[0.9] * 20, 0.9))
    crop = image.crop(box).resize((24, 24), PIL.Image.Resampling.BICUBIC)
    expected = (np.asarray(crop) / 255 - processor.image_mean) / processor.image_std
    assert np.allclose(pixels, expected.transpose(2, 0, 1), atol=1e-5)


def test_crops_have_the_published_distribution():
    rng = np.random.default_rng(0)
    boxes = np.array([_crop_box(400, 400, rng, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 400
    area, ratio = width * height / 160000, width / height
    assert area.min() > 0.078 and 0.74 < ratio.min() and ratio.max() < 1.35
    # Small crops always fit, so there the area is uniform and the log-ratio symmetric.
    small = area < 0.6
    assert abs(area[small].mean() - 0.34) < 0.012 and abs(np.log(ratio[small]).mean()) < 0.012
    centre = (boxes[:, 0] + boxes[:, 2]) / 2
    assert abs(centre.mean() - 200) < 5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_crops_lie_inside_any_image(width, height, seed):
    left, top, right, bottom = _crop_box(width, height, np.random.default_rng(seed), (0.08, 1.0), (3 / 4, 4 / 3))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_other_processors_and_bad_ones():
    class Square:
        size = {"height": 20, "width": 30}
        do_rescale, rescale_factor, do_normalize, image_mean, image_std = True, 1 / 255, False, None, None

        def __call__(self, images, return_tensors):
            raise NotImplementedError

    pixels = train_transform(Square())(picture(1), np.random.default_rng(0))
    assert pixels.shape == (3, 20, 30) and 0 <= pixels.min() and pixels.max() <= 1
    holder = type("Processor", (), {"image_processor": Square()})()
    assert torch.equal(train_transform(holder)(picture(1), np.random.default_rng(0)), pixels)
    free = Square()
    free.size = {"longest_edge": 20}
    with pytest.raises(ValueError, match="no fixed size"):
        train_transform(free)
    with pytest.raises(TypeError, match="Expected an image processor.*got str"):
        eval_transform("openai/clip-vit-base-patch32")
    with pytest.raises(ValueError, match="`scale` must be"):
        train_transform(Square(), scale=(0, 1))
    with pytest.raises(ValueError, match="`ratio` must be"):
        train_transform(Square(), ratio=(2, 1))


# The public code's test transform, as torchvision publishes it: `Resize(224)` makes the short side 224 and the long
# one int(224 · long / short); `CenterCrop` starts at int(round((height - 224) / 2.0)), and so for the width.
LONG_SIDES = (320, 400, 427, 480, 500, 512, 600, 640, 768, 800, 1000, 1024, 1280, 1600)
COMMON_SIZES = [
    size
    for long in LONG_SIDES
    for across, down in ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9))
    for size in ((long, round(long * down / across)), (round(long * down / across), long))
]


def test_original_is_torchvisions_centre_crop():
    processor, noise = make_image_processor(224), picture(3, (1600, 1600))
    original, own = eval_transform(processor, original=True), eval_transform(processor)
    assert len(COMMON_SIZES) == 140
    other = set()
    for width, height in [*COMMON_SIZES, (640, 427), (500, 334), (333, 427)]:
        image = noise.crop((0, 0, width, height))
        short, long = min(width, height), max(width, height)
        resized = [224 if side == short else int(224 * long / short) for side in (width, height)]
        left, top = (int(round((side - 224) / 2.0)) for side in resized)
        crop = np.asarray(image.resize(resized, PIL.Image.Resampling.BICUBIC))[top : top + 224, left : left + 224]
        expected = (crop / 255.0 - processor.image_mean) / processor.image_std
        pixels = original(image)
        assert pixels.dtype == torch.float32 and np.allclose(pixels, expected.transpose(2, 0, 1), atol=1e-5)
        if not torch.allclose(pixels, own(image), atol=1e-5):
            other.add((width, height))
            assert (max(resized) - 224) % 4 == 3  # a rest of 4n + 3: half of it rounds up to the even neighbour
    assert {(640, 427), (500, 334), (333, 427)} <= other and 10 < len(other) < 50


def test_original_leaves_other_processors_alone():
    image = picture(5, (70, 50))
    for processor in (
        SiglipImageProcessor(size={"height": 24, "width": 24}),
        Siglip2ImageProcessor(patch_size=8, max_num_patches=12),
        CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 24, "width": 24}),  # pads
    ):
        transform = eval_transform(processor, original=True)
        assert transform.func is eval_transform(processor).func and transform(image) is not None


def families():
    fixed = {"height": 24, "width": 20}
    return {
        "SigLIP": SiglipImageProcessor(size=fixed),
        "SigLIP 2, bilinear": SiglipImageProcessor(size=fixed, resample=2),
        "ChineseCLIP": ChineseCLIPImageProcessor(size={"shortest_edge": 24}, crop_size=fixed),
        "ALIGN": EfficientNetImageProcessor(
            size=fixed,
            resample=2,
            rescale_factor=1 / 127.5,
            rescale_offset=True,
            do_normalize=False,
            include_top=False,
        ),
        "EfficientNet": EfficientNetImageProcessor(size=fixed, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.5]),
    }


@pytest.mark.parametrize("name", list(families()))
def test_other_families(name):
    processor, image = families()[name], picture(6, (60, 72))
    own = processor(images=image, return_tensors="pt")["pixel_values"][0].float()
    assert own.shape == (3, 24, 20) and torch.equal(eval_transform(processor)(image), own)
    # A crop of the whole image, or of the part that the processor keeps: the same pixels as the processor's own.
    whole = image if name != "ChineseCLIP" else image.resize((24, 28), 3).crop((2, 2, 22, 26))
    transform = train_transform(processor, flip=False, scale=(1, 1), ratio=(5 / 6, 5 / 6))
    pixels = transform(whole, np.random.default_rng(0))
    assert pixels.dtype == torch.float32 and torch.allclose(pixels, own, atol=1e-5)
    flipped = train_transform(processor, scale=(1, 1), ratio=(5 / 6, 5 / 6))(whole, Draws(0.5, 0.5, 0.5, 0.5, 0.1))
    assert torch.allclose(flipped, own.flip(-1), atol=1e-5)


class Negative(type(make_image_processor(24))):
    """Somebody's own: does one thing more, and more slowly."""

    def __call__(self, images, **kwargs):
        made = super().__call__(images, **kwargs)
        made["pixel_values"] = -made["pixel_values"]
        return made


def test_a_processor_of_somebodys_own_is_used_as_it_is(processor):
    own, image = Negative.from_dict(processor.to_dict()), picture(6, (24, 24))
    assert torch.equal(eval_transform(own)(image), -eval_transform(processor)(image))
    # Of what it does to training images, only its numbers are known.
    whole = {"flip": False, "scale": (1, 1), "ratio": (1, 1)}
    pixels = [train_transform(kind, **whole)(image, np.random.default_rng(0)) for kind in (own, processor)]
    assert torch.allclose(*pixels, atol=1e-6) and torch.equal(pixels[1], eval_transform(processor)(image))


def test_naflex():
    processor, image = Siglip2ImageProcessor(patch_size=8, max_num_patches=12), picture(7, (96, 40))
    made = eval_transform(processor)(image)
    expected = processor(images=image, return_tensors="pt")
    assert set(made) == {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
    assert all(torch.equal(made[name], expected[name][0]) for name in made)
    assert made["pixel_values"].shape == (12, 3 * 8 * 8) and made["spatial_shapes"].tolist() == [2, 5]
    assert made["pixel_attention_mask"].sum() == 10
    # A quarter of the area, ratio 1: √960 = 30.98 → 31; left = ⌊0.5·(96 - 31 + 1)⌋, top = ⌊0.45·(40 - 31 + 1)⌋.
    crop = image.crop((33, 4, 64, 35))
    draws = Draws((0.25 - 0.08) / 0.92, 0.5, 0.5, 0.45, 0.2)
    got = train_transform(processor)(image, draws)
    expected = processor(images=crop.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT), return_tensors="pt")
    assert all(torch.equal(got[name], expected[name][0]) for name in got) and not draws.numbers
    assert got["spatial_shapes"].tolist() == [3, 3]


def test_long_and_thin_images_are_refused_before_they_are_resized(processor):
    thread = PIL.Image.new("1", (5_000, 1))  # 94 bytes in a file
    for transform in (eval_transform(make_image_processor(224)), eval_transform(make_image_processor(224), True)):
        with pytest.raises(ValueError, match="5000 x 1 pixels is too long and thin: .* 1,120,000 pixels long. Crop"):
            transform(thread)
    assert eval_transform(processor)(PIL.Image.new("RGB", (24 * 200, 24))).shape == (3, 24, 24)
    check_image_size(thread, SiglipImageProcessor())  # a fixed size
    check_image_size(thread, CLIPImageProcessor(do_resize=False))
