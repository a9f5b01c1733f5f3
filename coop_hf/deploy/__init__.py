"""Out of coop_hf: exported classifiers, and learned prompts inside stock models."""

from .._moved import moved_names
from .export import ImageClassifier, as_image_classifier, export_onnx


__all__ = ["ImageClassifier", "as_image_classifier", "export_onnx"]

__getattr__ = moved_names(__name__)
