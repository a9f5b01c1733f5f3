"""Prompt learning for CLIP in the Hugging Face ecosystem: Context Optimization (CoOp) and what it is compared with."""

from . import _moved as _moved  # old module names
from . import pipeline as _pipeline  # noqa: F401 (registers the pipeline)
from .config import CoOpConfig, PromptConfig
from .data.feature_cache import EmbeddedImages, embed_images
from .data.few_shot import sample_few_shot
from .data.labelled_images import LabelledImages
from .data.sources import load_images, read_coop_split, read_few_shot_indices
from .demo.emoji import emoji_model_path, load_emoji
from .interpret import format_nearest_tokens, nearest_tokens
from .modeling import CoOpModel, CoOpOutput
from .training.arguments import CoOpTrainingArguments
from .training.metrics import ClassificationAccuracy
from .training.trainer import CoOpTrainer
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
    "PromptConfig",
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
