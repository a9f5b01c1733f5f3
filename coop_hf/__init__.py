"""Prompt learning for CLIP-like models in the Hugging Face ecosystem: CoOp and what came after it, on one model class,
one Trainer and one kind of file.
"""

from . import _moved as _moved  # old module names
from . import pipeline as _pipeline  # noqa: F401 (registers the pipeline)
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
from .version import __version__


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
