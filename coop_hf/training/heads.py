"""`fit_head`: a head on image features from start to end, with the trainer where it has something to train."""

import tempfile
from typing import Any

import numpy as np
import torch

from ..adapters.heads import Head
from ..data.feature_cache import EmbeddedImages
from ..modeling import CoOpModel
from .arguments import CoOpTrainingArguments
from .screen import TrainingScreen
from .trainer import CoOpTrainer


__all__ = ["class_embeds_for", "fit_head"]


def class_embeds_for(model: CoOpModel, source: Any = None) -> torch.Tensor:
    """Class embeddings that a head may stand on.

    Args:
        model (`CoOpModel`): the model, whose active adapter names the classes.
        source (*optional*): `None`: the hand-written template. A `str`: the name of another adapter of the model,
            whose learned prompt gives them. A list of `str`: an ensemble of templates. A tensor `(num_classes,
            projection_dim)`: the class embeddings themselves, such as those of `cupl_class_embeddings`.

    Returns:
        `torch.Tensor` `(num_classes, projection_dim)`.

    Raises:
        ValueError: the other adapter does not exist, or has other classes.
    """
    if isinstance(source, torch.Tensor):
        return source
    if not isinstance(source, str):
        return model.template_embeds() if source is None else model.template_embeds(list(source))
    active, names = model.active_adapter, model.class_names
    model.set_adapter(source)
    try:
        if model.class_names != names:
            raise ValueError(
                f"the adapter {source!r} has other classes than {active!r}, or another order: give both the same "
                "with `model.set_class_names`."
            )
        with torch.no_grad():
            return model.get_text_features()
    finally:
        model.set_adapter(active)


def fit_head(
    model: CoOpModel,
    image_embeds: torch.Tensor,
    labels: Any,
    class_embeds: Any = None,
    val_image_embeds: torch.Tensor | None = None,
    val_labels: Any = None,
    **arguments: Any,
) -> dict[str, float]:
    """Fits the active adapter, a head, on image embeddings by its published recipe; the last step counts.

    Args:
        model (`CoOpModel`): a model whose active adapter is a [`Head`].
        image_embeds (`torch.Tensor`): `(num_images, dim)`, or `(num_views, num_images, dim)`, as [`embed_images`]
            gives them: an epoch sees one view of each image.
        labels (`torch.Tensor`, `np.ndarray` or `list[int]`): `(num_images,)`, class indices.
        class_embeds (*optional*): which class embeddings the head stands on, see [`class_embeds_for`]; defaults to
            those of the hand-written template.
        val_image_embeds (`torch.Tensor`, *optional*), val_labels: validation images, on which Tip-Adapter and GDA
            choose from their published grids; the papers take min(shots, 4) of each class. Other heads ignore them.
        arguments: of [`CoOpTrainingArguments`], instead of the recipe's.

    Returns:
        `dict`: what was chosen on validation; empty without.

    Raises:
        TypeError: the active adapter is not a head.
        ValueError: shapes or labels that do not fit, or a class without images.
    """
    head = model.adapter
    if not isinstance(head, Head):
        raise TypeError(
            f"`fit_head` fits heads on image features, and the active adapter {model.active_adapter!r} is a "
            f"{type(head).__name__}: train it with CoOpTrainer."
        )
    labels = torch.as_tensor(np.asarray(labels)).long()
    head.fit(image_embeds, labels, class_embeds_for(model, class_embeds))
    recipe = head.arguments(int(torch.bincount(labels).max()))
    if recipe:
        with tempfile.TemporaryDirectory() as folder:
            quiet = {"output_dir": folder, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
            args = CoOpTrainingArguments(**{**quiet, **recipe, **arguments})
            trainer = CoOpTrainer(model, args, train_dataset=EmbeddedImages(image_embeds, labels))
            trainer.remove_callback(TrainingScreen)
            trainer.train()
    return {} if val_image_embeds is None else head.search(val_image_embeds, torch.as_tensor(np.asarray(val_labels)))
