"""Into production: the classifier as one plain module that exports, and a transformers pipeline for adapters."""

import copy
import os

import torch
from torch import nn
from torch.nn import functional as F
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

from .modeling import CoOpModel
from .transforms import decode_image, eval_transform


__all__ = ["CoOpImageClassificationPipeline", "ImageClassifier", "PIPELINE_TASK", "as_image_classifier", "export_onnx"]

PIPELINE_TASK = "coop-image-classification"


class ImageClassifier(nn.Module):
    """Image tower, projection and class matrix: pictures to logits, without a text tower.

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
        """Logits `(batch, num_classes)`, fp32, of pictures `(batch, 3, height, width)` as the image processor gives
        them; their softmax are the scores of `CoOpModel.predict`."""
        pixel_values = pixel_values.to(self.vision_model.embeddings.patch_embedding.weight.dtype)
        image_embeds = self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)
        image_embeds = F.normalize(image_embeds.float(), dim=-1)
        return self.logit_scale.float() * image_embeds @ self.class_embeddings.float().T


@torch.no_grad()
def as_image_classifier(model: CoOpModel) -> ImageClassifier:
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


class _AdapterLoader:
    """What `pipeline` loads a named adapter with."""

    @classmethod
    def from_pretrained(cls, name, config=None, **kwargs) -> CoOpModel:
        # transformers hands over the base's configuration and the base's revision, which an adapter names by itself,
        # and options that only its own classes know. The base's own precision is what dtype="auto" asks for.
        known = ("cache_dir", "device_map", "dtype", "force_download", "local_files_only", "subfolder", "token")
        return CoOpModel.from_pretrained(name, **{key: kwargs[key] for key in known if kwargs.get(key) is not None})


class CoOpImageClassificationPipeline(Pipeline):
    """Image classification with a learned prompt, as a transformers pipeline.

    Registered as `"coop-image-classification"` when `coop_hf` is imported.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> from coop_hf import CoOpModel

    >>> classifier = pipeline("coop-image-classification", model=CoOpModel.from_pretrained("path/to/adapter"))
    >>> classifier(["one.jpg", "two.jpg"], top_k=3, batch_size=2)
    ```

    Takes a picture or a list of them (`PIL.Image.Image`, path or URL) and gives for each a list of
    `{"label": str, "score": float}`, best first; `top_k` (`int`, *optional*, defaults to 5) says how many.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model, **kwargs):
        if not isinstance(model, CoOpModel):
            raise ValueError(
                f"the {PIPELINE_TASK!r} pipeline runs on a CoOpModel, got {type(model).__name__}: pass "
                "`model=CoOpModel.from_pretrained(...)`."
            )
        kwargs.setdefault("image_processor", model.image_processor)  # which also tells how to collate a batch
        super().__init__(model=model, **kwargs)
        self.model.eval()

    def _sanitize_parameters(self, top_k=None, timeout=None, **unknown):
        if unknown:
            raise ValueError(
                f"unknown argument {', '.join(map(repr, unknown))}: this pipeline knows `top_k` and `timeout`."
            )
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k` must be a positive whole number, got {top_k!r}.")
        return (
            {} if timeout is None else {"timeout": timeout},
            {},
            {} if top_k is None else {"top_k": top_k},
        )

    def preprocess(self, image, timeout=None):
        is_url = isinstance(image, str) and image.startswith(("http://", "https://"))
        image = load_image(image, timeout=timeout) if is_url else decode_image(image)
        return {"pixel_values": eval_transform(self.model.image_processor)(image)[None]}

    def _forward(self, inputs):
        return {"logits": self.model(pixel_values=inputs["pixel_values"]).logits}

    def postprocess(self, outputs, top_k=5):
        names = self.model.class_names
        best = outputs["logits"][0].softmax(dim=-1).topk(min(top_k, len(names)))
        return [{"label": names[c], "score": s} for s, c in zip(best.values.tolist(), best.indices.tolist())]

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Saves the adapters; see `CoOpModel.save_pretrained`."""
        self.model.save_pretrained(save_directory, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(classes={len(self.model.class_names or [])}, device={self.device})"


if PIPELINE_TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        PIPELINE_TASK, pipeline_class=CoOpImageClassificationPipeline, pt_model=_AdapterLoader, type="image"
    )
