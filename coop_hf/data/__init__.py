"""Data: sources, few-shot sampling, images as tensors, and cached embeddings."""

from .few_shot import resolve_labels, sample_few_shot
from .labelled_images import LabelledImages, collate


__all__ = ["LabelledImages", "collate", "resolve_labels", "sample_few_shot"]
