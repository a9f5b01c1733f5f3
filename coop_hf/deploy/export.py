"""Into production: the classifier as one plain module that exports."""

import copy
import json
import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters import Adapter
from ..atomic import write_atomically
from ..core.families import Family


__all__ = ["ImageClassifier", "as_image_classifier", "export_onnx"]


class ImageClassifier(nn.Module):
    """Image tower, projection and class matrix: images to logits, without a text tower.

    A plain module: `torch.export`, `torch.compile`, `safetensors.torch.save_model` and ONNX take it as it is. Its
    parts are copies; nothing it is used for reaches the model that it was made from.

    Args:
        family (`Family`): the base model; its image tower is copied.
        class_embeddings (`torch.Tensor`): `(num_classes, projection_dim)`; normalised here.
        class_names (`list[str]`): the classes, in the order of the logits.
        adapter (`Adapter`, *optional*): gives visual prompts and its own way of scoring; copied.
        preprocessing (`dict`, *optional*): how images are prepared, as the image processor's configuration says it.
    """

    class_embeddings: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None

    def __init__(
        self,
        family: Family,
        class_embeddings: torch.Tensor,
        class_names: list[str],
        adapter: Adapter | None = None,
        preprocessing: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.preprocessing = preprocessing
        base = family.base_model
        self.vision_model = copy.deepcopy(base.vision_model)
        self.visual_projection = copy.deepcopy(getattr(base, "visual_projection", None))
        self.class_names = list(class_names)
        self.register_buffer("class_embeddings", F.normalize(class_embeddings.detach().float(), dim=-1))
        self.register_buffer("logit_scale", family.logit_scale.detach().clone())
        bias = family.logit_bias
        self.register_buffer("logit_bias", None if bias is None else bias.detach().clone())
        prompts = adapter.prompts().vision if adapter is not None and adapter.prompts_image_tower else {}
        self.visual_prompts = nn.ParameterDict(
            {str(layer): value.detach().clone() for layer, value in prompts.items()}
        )
        self._family = type(family)  # runs on any module with the same image tower
        own = type(adapter).cosines if adapter is not None else Adapter.cosines
        self.head: Any = None
        if adapter is not None and own is not Adapter.cosines:
            # Without what computes class embeddings, which would bring the base along.
            self.head = copy.deepcopy(adapter, {id(adapter.class_prompts): None})
        self.is_sigmoid = family.is_sigmoid

    def forward(self, pixel_values: torch.Tensor, **image_inputs: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, num_classes)`, fp32, of images `(batch, 3, height, width)` as the image processor gives
        them; their softmax (on SigLIP their sigmoid) are the scores of `CoOpModel.predict`."""
        prompts = {int(layer): value for layer, value in self.visual_prompts.items()}
        image_embeds = self._family(self).run_image_tower(pixel_values, prompts, **image_inputs)
        image_embeds = F.normalize(image_embeds.float(), dim=-1)
        score = Adapter.cosines if self.head is None else type(self.head).cosines
        logits = self.logit_scale.float() * score(self.head, image_embeds, self.class_embeddings.float())
        return logits if self.logit_bias is None else logits + self.logit_bias.float()


@torch.no_grad()
def as_image_classifier(model: Any) -> ImageClassifier:
    """The active adapter as an image classifier with its classes fixed; within `model.disable_adapter()`, zero-shot.

    Args:
        model (`CoOpModel`): the model; its active adapter must have class names.

    Returns:
        `ImageClassifier`, in evaluation mode, without gradients, on the base's device.

    Raises:
        ValueError: the adapter computes class embeddings for each image, so they cannot be fixed.
    """
    view = model.view()  # read once: other threads may choose other adapters and classes meanwhile
    adapter = None if view.is_disabled else view.adapter
    if adapter is not None and adapter.reads_image:
        raise ValueError(
            f"the method {adapter.method!r} computes class embeddings for each image, and an exported classifier has "
            "fixed ones: use `CoOpModel.predict`, or learn a method that does not read the image."
        )
    image_processor = getattr(model.processor, "image_processor", None)  # a model may have a tokenizer alone
    preprocessing = None if image_processor is None else json.loads(image_processor.to_json_string())
    while True:
        features = model.get_text_features(_view=view)
        classifier = ImageClassifier(model.family, features, view.classes.class_names, adapter, preprocessing)
        if view.is_current:  # what a head learned for the classes was copied in the order of their names
            return classifier.eval().requires_grad_(False)
        view.read()


def export_onnx(classifier: ImageClassifier, path: str | os.PathLike) -> None:
    """Writes an image classifier as an ONNX file: input `pixel_values` `(batch, 3, size, size)` with any batch size,
    output `logits` `(batch, num_classes)`.

    Its metadata hold, as JSON, `class_names` in the order of the logits and `preprocessing`, the image processor's
    configuration; and `scores`, what makes scores of logits, `softmax` or `sigmoid`.

    Args:
        classifier (`ImageClassifier`): from [`as_image_classifier`].
        path (`str` or `os.PathLike`): the file.

    Raises:
        TypeError: something else than an image classifier; before any work.
        FileNotFoundError, IsADirectoryError: the file's folder is missing, or the path is a folder; before any work.
        ImportError: the extra is missing: `pip install coop_hf[onnx]`.
    """
    if not isinstance(classifier, ImageClassifier):
        hint = "call `.as_image_classifier()` on it first" if hasattr(classifier, "as_image_classifier") else ""
        raise TypeError(
            f"export_onnx() takes an ImageClassifier, got {type(classifier).__name__}: "
            f"{hint or 'make one with `model.as_image_classifier()`'}."
        )
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"there is no folder {folder!r} to write {os.path.basename(path)!r} into: make it first."
        )
    if os.path.isdir(path):
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder: name a file in it, such as 'classifier.onnx'.")
    try:
        import onnx
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
    written = onnx.load(os.fspath(path))
    values = {
        "class_names": json.dumps(classifier.class_names, ensure_ascii=False),
        "scores": "sigmoid" if classifier.is_sigmoid else "softmax",
    }
    if classifier.preprocessing is not None:
        values["preprocessing"] = json.dumps(classifier.preprocessing, ensure_ascii=False)
    onnx.helper.set_model_props(written, values)
    with write_atomically(path) as temporary:
        onnx.save(written, temporary, save_as_external_data=False)
