"""Adapters of every release load for ever, and score as when they were saved.

`tests/data/adapter_v2/` holds one adapter of each method, saved by coop_hf 0.2 on the random base below, and the
logits that they gave. `python tests/test_regression.py METHOD ...` writes those of methods that are new; what is there
is never written again.
"""

import sys
from pathlib import Path

import pytest
import torch
from conftest import make_image_processor, make_tokenizer
from reference_methods import make_deep_base
from safetensors.torch import load_file, save_file
from transformers import CLIPProcessor

from coop_hf import CoOpModel
from coop_hf.config import CONFIGS


FOLDER = Path(__file__).parent / "data" / "adapter_v2"
NAMES = ["cat", "dog (cat)", "sea_lion"]
SAVED = sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) if FOLDER.is_dir() else []


def base_and_processor():
    tokenizer = make_tokenizer()
    processor = CLIPProcessor(image_processor=make_image_processor(16), tokenizer=tokenizer)
    return make_deep_base(tokenizer), processor


def pixels(base):
    size = base.config.vision_config.image_size
    return torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)


@torch.no_grad()
def logits_of(model):
    return model.eval()(pixel_values=pixels(model.get_base_model())).logits


@pytest.fixture(scope="module")
def base():
    return base_and_processor()


def test_every_method_is_kept():
    ours = {method for method, config in CONFIGS.items() if config.__module__.startswith("coop_hf.")}
    assert set(SAVED) == ours - {"coop"}, "a new method: python tests/test_regression.py METHOD"


@pytest.mark.parametrize("method", SAVED)
def test_saved_adapters_load(method, base):
    model = CoOpModel.from_pretrained(FOLDER / method, base_model=base[0], processor=base[1])
    assert model.config.method == method and model.class_names == NAMES
    expected = load_file(FOLDER / method / "expected.safetensors")["logits"]
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-4)


def write(method):
    base, processor = base_and_processor()
    torch.manual_seed(0)
    model = CoOpModel(base, CONFIGS[method](class_names=NAMES), None, processor)
    if hasattr(model.adapter, "fit"):
        images = torch.randn(9, model.family.projection_dim, generator=torch.Generator().manual_seed(1))
        model.adapter.fit(torch.nn.functional.normalize(images, dim=-1), torch.arange(9) % 3, model.template_embeds())
    with torch.no_grad():
        for parameter in model.learned_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.save_adapters(FOLDER / method)
    save_file({"logits": logits_of(model)}, FOLDER / method / "expected.safetensors")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if (FOLDER / name).exists():
            sys.exit(f"{FOLDER / name} is there already, and is never written again.")
        write(name)
