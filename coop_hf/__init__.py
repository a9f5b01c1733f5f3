"""Prompt learning for CLIP in the Hugging Face ecosystem: Context Optimization (CoOp) and what it is compared with."""

from . import deploy as _deploy  # noqa: F401 (registers the pipeline)
from .config import CoOpConfig
from .data import LabelledImages, sample_few_shot
from .embedded import emoji_model_path, load_emoji
from .feature_cache import EmbeddedImages, embed_images
from .interpret import format_nearest_tokens, nearest_tokens
from .metrics import ClassificationAccuracy
from .modeling import CoOpModel, CoOpOutput
from .sources import load_images, read_coop_split, read_few_shot_indices
from .trainer import CoOpTrainer
from .training_args import CoOpTrainingArguments
from .version import __version__


__all__ = [
    "ClassificationAccuracy",
    "CoOpConfig",
    "CoOpModel",
    "CoOpOutput",
    "CoOpTrainer",
    "CoOpTrainingArguments",
    "EmbeddedImages",
    "LabelledImages",
    "__version__",
    "embed_images",
    "emoji_model_path",
    "format_nearest_tokens",
    "load_emoji",
    "load_images",
    "nearest_tokens",
    "read_coop_split",
    "read_few_shot_indices",
    "sample_few_shot",
]
