"""The transformers pipeline for adapters."""

from typing import Any

from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

from .checks import check_counts
from .data.transforms import decode_image, eval_transform
from .modeling import CoOpModel


__all__ = ["CoOpImageClassificationPipeline", "PIPELINE_TASK"]

PIPELINE_TASK = "coop-image-classification"


class _AdapterLoader:
    """What `pipeline` loads a named adapter with."""

    @classmethod
    def from_pretrained(cls, name: Any, config: Any = None, **kwargs: Any) -> CoOpModel:
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

    Takes an image or a list of them (`PIL.Image.Image`, path or URL) and gives for each a list of
    `{"label": str, "score": float}`, best first; `top_k` (`int`, *optional*, defaults to 5) says how many.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model: CoOpModel, **kwargs: Any):
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
        if top_k is not None:
            check_counts(top_k=top_k)
        return (
            {} if timeout is None else {"timeout": timeout},
            {},
            {} if top_k is None else {"top_k": top_k},
        )

    def preprocess(self, image: Any, timeout: float | None = None) -> dict[str, Any]:
        """An image of any kind, as the model takes it."""
        is_url = isinstance(image, str) and image.startswith(("http://", "https://"))
        image = load_image(image, timeout=timeout) if is_url else decode_image(image)
        inputs = eval_transform(self.model.image_processor, self.model.config.original_crop)(image)
        inputs = inputs if isinstance(inputs, dict) else {"pixel_values": inputs}
        return {key: value[None] for key, value in inputs.items()}

    def _forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        view = self.model.view()
        logits = self.model(_view=view, **inputs).logits
        return {"logits": logits, "classes": [view.classes] * len(logits)}  # the names that these scores belong to

    def postprocess(self, outputs: dict[str, Any], top_k: int = 5) -> list[dict[str, Any]]:
        """The classes of one image, best first."""
        classes = outputs["classes"]  # of one image, or of a batch that was taken apart
        names = (classes[0] if isinstance(classes, list) else classes).class_names
        best = self.model.logits_to_probabilities(outputs["logits"][0]).topk(min(top_k, len(names)))
        return [{"label": names[c], "score": s} for s, c in zip(best.values.tolist(), best.indices.tolist())]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves the adapters; see `CoOpModel.save_pretrained`."""
        self.model.save_pretrained(save_directory, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(classes={len(self.model.class_names or [])}, device={self.device})"


if PIPELINE_TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        PIPELINE_TASK, pipeline_class=CoOpImageClassificationPipeline, pt_model=_AdapterLoader, type="image"
    )
