"""Into production: the classifier as one plain module that exports."""

import copy
import os

import torch
from torch import nn
from torch.nn import functional as F


__all__ = ["ImageClassifier", "as_image_classifier", "export_onnx"]


class ImageClassifier(nn.Module):
    """Image tower, projection and class matrix: images to logits, without a text tower.

    A plain module: `torch.export`, `torch.compile`, `safetensors.torch.save_model` and ONNX take it as it is. Its
    parts are copies; nothing it is used for reaches the model that it was made from.

    Args:
        vision_model, visual_projection (`nn.Module`): of a CLIP model.
        class_embeddings (`torch.Tensor`): `(num_classes, projection_dim)`; normalised here.
        logit_scale (`torch.Tensor`): scalar, exp(logit_scale) of the model.
        class_names (`list[str]`): the classes, in the order of the logits.
    """

    def __init__(self, vision_model, visual_projection, class_embeddings, logit_scale, class_names):
        super().__init__()
        self.vision_model = vision_model
        self.visual_projection = visual_projection
        self.class_names = list(class_names)
        self.register_buffer("class_embeddings", F.normalize(class_embeddings.detach().float(), dim=-1))
        self.register_buffer("logit_scale", logit_scale.detach().float().clone())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, num_classes)`, fp32, of images `(batch, 3, height, width)` as the image processor gives
        them; their softmax are the scores of `CoOpModel.predict`."""
        pixel_values = pixel_values.to(self.vision_model.embeddings.patch_embedding.weight.dtype)
        image_embeds = self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)
        image_embeds = F.normalize(image_embeds.float(), dim=-1)
        return self.logit_scale.float() * image_embeds @ self.class_embeddings.float().T


@torch.no_grad()
def as_image_classifier(model) -> ImageClassifier:
    """The active adapter as an image classifier with its classes fixed; within `model.disable_adapter()`, zero-shot.

    Args:
        model (`CoOpModel`): the model; its active adapter must have class names.

    Returns:
        `ImageClassifier`, in evaluation mode, without gradients, on the base's device.
    """
    base = model.base_model
    classifier = ImageClassifier(
        copy.deepcopy(base.vision_model),
        copy.deepcopy(base.visual_projection),
        model.get_text_features(),
        model.logit_scale,
        model.class_names,
    )
    return classifier.eval().requires_grad_(False)


def export_onnx(classifier: ImageClassifier, path: str | os.PathLike) -> None:
    """Writes an image classifier as an ONNX file: input `pixel_values` `(batch, 3, size, size)` with any batch size,
    output `logits` `(batch, num_classes)`.

    Args:
        classifier (`ImageClassifier`): from [`as_image_classifier`].
        path (`str` or `os.PathLike`): the file.

    Raises:
        ImportError: the extra is missing: `pip install coop_hf[onnx]`.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError(
            "writing ONNX needs the packages onnx and onnxscript: `pip install coop_hf[onnx]`."
        ) from None
    size = classifier.vision_model.config.image_size
    pixel_values = torch.zeros(2, classifier.vision_model.config.num_channels, size, size)
    torch.onnx.export(
        classifier,
        (pixel_values.to(classifier.class_embeddings.device),),
        os.fspath(path),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
