"""Small random CLIP models, tokenizers and images, built here: the tests need no network and no downloaded file.

Session fixtures are shared: a test that changes a model makes its own with `make_base`.
"""

import io
import math
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from coop_hf import CoOpModel
from coop_hf.experiments.methods import Options
from coop_hf.experiments.tasks import make_task


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL_TOKENIZER = SHARED / "clip_tokenizer"
MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "s e", "se a</w>", "p h", "ph o", "pho t", "phot o</w>", "o f</w>"]
# ")" and "!" merge with a full stop that ends the word, as ")" does in CLIP's own vocabulary.
MERGES += [") .</w>", "! .</w>"]

CLASS_NAMES = ["cat", "dog", "sea_lion"]
COLOUR_NAMES = ["cat", "dog", "sea", "photo", "of", "cat sea"]
COLOUR_OPTIONS = Options("a {}.", ("a {}.", "{} of sea."))


def byte_characters():
    """The 256 printable characters that byte-level BPE writes bytes as."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def make_tokenizer():
    """A CLIP tokenizer of bytes and a few merges; EOS has the highest id, as in CLIP's."""
    characters = byte_characters()
    tokens = characters + [c + "</w>" for c in characters] + [m.replace(" ", "") for m in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split(" ")) for m in MERGES])


def make_base(
    tokenizer, eos_token_id=2, positions=40, hidden_act="quick_gelu", layers=2, width=32, seed=0, attn="sdpa", **kwargs
):
    """A small random CLIPModel.

    CLIP's own initialisation is so small that attention is nearly uniform and biases are 0, which hides mistakes:
    the weights here are large enough that every token, position, norm and bias matters.
    """
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": positions,
            "hidden_act": hidden_act,
            "eos_token_id": eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
        projection_dim=24,
        attn_implementation=attn,
        **kwargs,
    )
    model = CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "logit_scale":
                parameter.fill_(math.log(10.0))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif "embedding" in name:
                parameter.copy_(0.3 * noise)
            elif parameter.dim() >= 2:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.1 * noise)
    return model


def make_image_processor(size):
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def picture(seed, size=(37, 29), mode="RGB"):
    rng = np.random.default_rng(seed)
    bands = len(PIL.Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    return PIL.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def image_dataset(count=9, **columns):
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": encoded(picture(i)), "path": None} for i in range(count)],
            "label": [i % 3 for i in range(count)],
            **columns,
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=CLASS_NAMES),
                **{k: datasets.Value("string") for k in columns},
            }
        ),
    )


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def real_tokenizer():
    if not REAL_TOKENIZER.is_dir():
        pytest.skip("no real CLIP tokenizer in ../shared/data/clip_tokenizer")
    return CLIPTokenizer.from_pretrained(REAL_TOKENIZER)


@pytest.fixture(scope="session")
def image_processor():
    return make_image_processor(16)


@pytest.fixture(scope="session")
def processor(tokenizer, image_processor):
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def base(tokenizer):
    """`eos_token_id` 2, as every `openai/clip-*` configuration says: CLIP pools at the highest id."""
    return make_base(tokenizer)


@pytest.fixture(scope="session")
def base_with_eos_id(tokenizer):
    """The true `eos_token_id`: CLIP pools at its first occurrence. GELU, and 3 layers, for a second kind of tower."""
    return make_base(tokenizer, eos_token_id=tokenizer.eos_token_id, hidden_act="gelu", layers=3, seed=1)


@pytest.fixture(scope="session")
def long_base(tokenizer):
    """All of CLIP's 77 positions: room for names longer than a block of the shared pass."""
    return make_base(tokenizer, positions=77, seed=2)


@pytest.fixture(scope="session")
def real_base(real_tokenizer):
    return make_base(real_tokenizer, positions=77, seed=3)


@pytest.fixture(scope="session")
def real_base_with_eos_id(real_tokenizer):
    return make_base(real_tokenizer, eos_token_id=49407, positions=77, hidden_act="gelu", seed=4)


@pytest.fixture(scope="session")
def base_folder(base, processor, tmp_path_factory):
    """A base model on disk, with its processor."""
    folder = tmp_path_factory.mktemp("base") / "tiny-clip"
    base.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def splits():
    """Images of six classes, each of a colour of its own."""
    random = np.random.RandomState(0)
    colours = np.random.RandomState(7).randint(0, 255, (len(COLOUR_NAMES), 3))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=COLOUR_NAMES)})
    splits = {}
    for part, size in {"train": 6, "validation": 4, "test": 8}.items():
        labels = random.permutation(np.arange(len(COLOUR_NAMES)).repeat(size))
        noise = random.randint(-40, 40, (len(labels), 16, 16, 3))
        pixels = np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
        rows = {"image": [PIL.Image.fromarray(x) for x in pixels], "label": labels}
        splits[part] = datasets.Dataset.from_dict(rows, features=features)
    return splits


@pytest.fixture(scope="session")
def model(base, processor):
    """For the classes of `splits`."""
    return CoOpModel(base, class_names=COLOUR_NAMES, processor=processor)


@pytest.fixture(scope="session")
def task(model, splits, tmp_path_factory):
    """`splits` as a task of the protocols."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COOP_HF_CACHE", str(tmp_path_factory.mktemp("cache")))
        return make_task(model, splits, "colours", progress=False)
