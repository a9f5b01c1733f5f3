"""Prompt learning for CLIP-like models in the Hugging Face ecosystem: CoOp and what came after it, on one model class,
one Trainer and one kind of file.

What it holds is imported when it is first asked for (PEP 562): `import coop_hf` alone loads neither torch nor
transformers.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from . import _moved as _moved  # old module names
from ._lazy import register_pipeline as _register_pipeline
from .version import __version__


if TYPE_CHECKING:  # the same names as in _MODULES, which tests/test_lazy.py compares
    from .adapters.base import Adapter, Prompts
    from .adapters.cocoop import CoCoOpConfig
    from .adapters.deep import DeepTextConfig, IVLPConfig, MaPLeConfig, VPTConfig
    from .adapters.heads import (
        CLAPConfig,
        CLIPAdapterConfig,
        TaskResConfig,
        TipAdapterConfig,
        TipAdapterFConfig,
        ZSLPConfig,
    )
    from .adapters.linear_heads import GDAConfig, LPPlusPlusConfig
    from .adapters.tcp import TCPConfig
    from .adapters.tpt import tpt
    from .config import CoOpConfig, PromptConfig
    from .data.feature_cache import EmbeddedImages, embed_images
    from .data.few_shot import sample_few_shot
    from .data.labelled_images import LabelledImages
    from .data.sources import load_images, read_coop_split, read_few_shot_indices
    from .demo.emoji import emoji_model_path, load_emoji
    from .interpret import format_nearest_tokens, nearest_tokens
    from .modeling import CoOpModel, CoOpOutput
    from .training.arguments import CoOpTrainingArguments
    from .training.heads import fit_head
    from .training.metrics import ClassificationAccuracy
    from .training.trainer import CoOpTrainer


__all__ = [
    "Adapter",
    "CLAPConfig",
    "CLIPAdapterConfig",
    "ClassificationAccuracy",
    "CoCoOpConfig",
    "CoOpConfig",
    "CoOpModel",
    "CoOpOutput",
    "CoOpTrainer",
    "CoOpTrainingArguments",
    "DeepTextConfig",
    "EmbeddedImages",
    "GDAConfig",
    "IVLPConfig",
    "LPPlusPlusConfig",
    "LabelledImages",
    "MaPLeConfig",
    "PromptConfig",
    "Prompts",
    "TCPConfig",
    "TaskResConfig",
    "TipAdapterConfig",
    "TipAdapterFConfig",
    "VPTConfig",
    "ZSLPConfig",
    "__version__",
    "embed_images",
    "emoji_model_path",
    "fit_head",
    "format_nearest_tokens",
    "load_emoji",
    "load_images",
    "nearest_tokens",
    "read_coop_split",
    "read_few_shot_indices",
    "sample_few_shot",
    "tpt",
]

# Module -> what of it stands here.
_MODULES = {
    "adapters.base": "Adapter Prompts",
    "adapters.cocoop": "CoCoOpConfig",
    "adapters.deep": "DeepTextConfig IVLPConfig MaPLeConfig VPTConfig",
    "adapters.heads": "CLAPConfig CLIPAdapterConfig TaskResConfig TipAdapterConfig TipAdapterFConfig ZSLPConfig",
    "adapters.linear_heads": "GDAConfig LPPlusPlusConfig",
    "adapters.tcp": "TCPConfig",
    "adapters.tpt": "tpt",
    "config": "CoOpConfig PromptConfig",
    "data.feature_cache": "EmbeddedImages embed_images",
    "data.few_shot": "sample_few_shot",
    "data.labelled_images": "LabelledImages",
    "data.sources": "load_images read_coop_split read_few_shot_indices",
    "demo.emoji": "emoji_model_path load_emoji",
    "interpret": "format_nearest_tokens nearest_tokens",
    "modeling": "CoOpModel CoOpOutput",
    "training.arguments": "CoOpTrainingArguments",
    "training.heads": "fit_head",
    "training.metrics": "ClassificationAccuracy",
    "training.trainer": "CoOpTrainer",
}

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and any(module.name == name for module in pkgutil.iter_modules(__path__)):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register_pipeline()
