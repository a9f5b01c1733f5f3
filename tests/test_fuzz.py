"""Adapter files from strangers: mutated at random, each ends in a clear error or a safe reading.

2,000 files stay in the suite. `COOP_HF_FUZZ=10000 pytest tests/test_fuzz.py` reads more, `COOP_HF_FUZZ_SEED=1` others.
"""

import json
import os
import random
import resource
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from coop_hf import CoOpConfig
from coop_hf.config import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from coop_hf.files.adapter_files import WEIGHTS_KEY, _binding, read_adapter


sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from fuzz import mutate_config, mutate_weights  # noqa: E402


COUNT = int(os.environ.get("COOP_HF_FUZZ", 2000))
SEED = int(os.environ.get("COOP_HF_FUZZ_SEED", 20260101))
SECONDS_EACH = 2.0
MEGABYTES = 300  # what all of it together may add to the process at its largest
CLASSES = ["cat", "dog", "sea_lion"]


def good_files(rng):
    class_specific = rng.random() < 0.5
    config = CoOpConfig(n_ctx=4, class_specific=class_specific, class_names=list(CLASSES), revision="main")
    shape = (3, 4, 8) if class_specific else (4, 8)
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    text = config.to_json()
    metadata = {"format": "pt"}
    if rng.random() < 0.3:  # as coop_hf writes them; the others are bound to no configuration
        metadata |= _binding(json.loads(text))
    weights = save({WEIGHTS_KEY: torch.full(shape, 0.5, dtype=dtype)}, metadata=metadata)
    return text.encode(), weights


def test_mutated_files(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    rng = random.Random(SEED)
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read, refused = 0, {}
    for number in range(COUNT):
        config, weights = good_files(rng)
        which = rng.randrange(3)
        if which != 1:
            config = mutate_config(rng, config)
        if which != 0:
            weights = mutate_weights(rng, weights)
        (folder / ADAPTER_CONFIG_NAME).write_bytes(config)
        (folder / ADAPTER_WEIGHTS_NAME).write_bytes(weights)
        before = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found, tensors = read_adapter(folder)
        except (ValueError, OSError) as error:
            assert type(error) in (ValueError, OSError), f"file {number}: {type(error).__name__}: {error}"
            assert 20 < len(str(error)) < 2_000, f"file {number}: {str(error)[:500]}"
            reason = str(error).split(": ")[-1][:20]
            refused[reason] = refused.get(reason, 0) + 1
        except Exception as error:
            pytest.fail(f"file {number} ({config[:300]!r}, {weights[:300]!r}): {type(error).__name__}: {error}")
        else:
            read += 1
            (context,) = tensors.values()
            expected = (found.n_ctx,) if not found.class_specific else (len(found.class_names), found.n_ctx)
            assert context.shape[:-1] == expected and context.dtype == torch.float32
            assert torch.isfinite(context).all() and context.numel() <= len(weights)
            CoOpConfig.from_dict(json.loads(found.to_json()))  # what was read can be written and read again
        assert time.monotonic() - before < SECONDS_EACH, f"file {number} took {time.monotonic() - before:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started) / 1024
    assert grown < MEGABYTES, f"memory grew by {grown:.0f} MB"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "outside"]
    assert sorted(path.name for path in folder.iterdir()) == [ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME]
    assert outside.read_text() == "untouched"
    # Both ways out are well travelled, and for many reasons, or the mutations are too tame or too wild.
    assert read > COUNT / 50 and len(refused) > 20
