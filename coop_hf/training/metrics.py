"""Accuracy, macro-F1 and per-class accuracy, as an `evaluate.Metric` and for `transformers.Trainer`."""

import functools
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

from ..checks import unique_names


__all__ = ["ClassificationAccuracy", "classification_scores", "make_compute_metrics"]

_DESCRIPTION = "Accuracy, macro-averaged F1 and the accuracy of each class, for single-label image classification."

_INPUTS = """
Args:
    predictions (`list[int]`): predicted class indices, `(num_examples,)`.
    references (`list[int]`): true class indices, `(num_examples,)`.
    class_names (`list[str]`, *optional*): names of the classes; "0", "1", ... by default.
    num_classes (`int`, *optional*): number of classes, if there are no names.
Returns:
    accuracy (`float`), macro_f1 (`float`), per_class_accuracy (`dict[str, float or None]`).
"""


def _class_indices(values: Any, what: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or (values.dtype.kind not in "iu" and not (values == np.floor(values)).all()):
        raise ValueError(
            f"`{what}` must be class indices, (num_examples,), got {values.dtype} of shape {values.shape}."
        )
    return values.astype(np.int64)


def classification_scores(
    predictions: Any, references: Any, class_names: list[str] | None = None, num_classes: int | None = None
) -> dict[str, Any]:
    """
    Accuracy, macro-F1 and the accuracy of each class.

    Args:
        predictions (`np.ndarray` or `list[int]`):
            Predicted class indices, `(num_examples,)`.
        references (`np.ndarray` or `list[int]`):
            True class indices, `(num_examples,)`.
        class_names (`list[str]`, *optional*):
            Names of the classes; "0", "1", ... by default. Of several classes with one name the keys hold the index,
            as in "missile (class 657)".
        num_classes (`int`, *optional*):
            Number of classes, if there are no names. The default goes to the largest index that occurs.

    Returns:
        `dict`: `accuracy` (`float`), share of right predictions; `macro_f1` (`float`), the mean of F1 over the classes
        that occur among predictions or references, as scikit-learn's `f1_score(average="macro")`;
        `per_class_accuracy` (`dict[str, float or None]`), share of right predictions among the examples of each class,
        `None` for a class without examples. All are fractions.

    Raises:
        ValueError: if there are no examples, lengths differ, or an index is outside the classes.
    """
    predictions, references = _class_indices(predictions, "predictions"), _class_indices(references, "references")
    if len(predictions) != len(references) or len(references) == 0:
        raise ValueError(
            f"Expected as many predictions as references, at least one, got {len(predictions)} and {len(references)}."
        )
    if class_names is not None:
        if num_classes not in (None, len(class_names)):
            raise ValueError(f"`num_classes` is {num_classes}, but there are {len(class_names)} `class_names`.")
        num_classes = len(class_names)
    elif num_classes is None:
        num_classes = int(max(predictions.max(), references.max())) + 1
    for what, values in (("predictions", predictions), ("references", references)):
        outside = np.flatnonzero((values < 0) | (values >= num_classes))
        if len(outside):
            raise ValueError(
                f"`{what}` has {values[outside[0]]} at position {outside[0]}, but there are {num_classes} classes, so "
                f"indices go from 0 to {num_classes - 1}: predictions and labels must stand on the same class list."
            )
    right = np.bincount(references[predictions == references], minlength=num_classes)
    true = np.bincount(references, minlength=num_classes)
    predicted = np.bincount(predictions, minlength=num_classes)
    # F1 = 2 TP / (2 TP + FP + FN), where TP + FN = true and TP + FP = predicted.
    occurs = true + predicted > 0
    names = [str(index) for index in range(num_classes)] if class_names is None else unique_names(class_names)
    return {
        "accuracy": float(right.sum() / len(references)),
        "macro_f1": float((2 * right[occurs] / (true + predicted)[occurs]).mean()),
        "per_class_accuracy": {
            name: float(hits / count) if count else None for name, hits, count in zip(names, right, true)
        },
    }


class ClassificationAccuracy(evaluate.Metric):
    """
    [`classification_scores`] as an `evaluate.Metric`, which needs no script from the Hub.

    Args:
        keep_in_memory (`bool`, *optional*):
            Keep what is added in memory instead of a cache file. The default is `True` in one process; several
            processes (`num_process > 1`) share files, so there it is `False`.
        kwargs (*optional*):
            Passed to `evaluate.Metric` (`num_process`, `process_id`, `experiment_id`, ...).

    Example:

    ```python
    >>> metric = ClassificationAccuracy()
    >>> metric.compute(predictions=[0, 1, 1], references=[0, 1, 0], class_names=["cat", "dog"])
    {'accuracy': 0.6666666666666666, 'macro_f1': 0.6666666666666666, 'per_class_accuracy': {'cat': 0.5, 'dog': 1.0}}
    ```
    """

    def __init__(self, keep_in_memory: bool | None = None, **kwargs: Any):
        if keep_in_memory is None:
            keep_in_memory = kwargs.get("num_process", 1) == 1
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self, predictions: Any, references: Any, class_names: list[str] | None = None, num_classes: int | None = None
    ) -> dict[str, Any]:
        return classification_scores(predictions, references, class_names, num_classes)


def _scores_for_trainer(
    eval_prediction: EvalPrediction, class_names: list[str] | None, per_class: bool
) -> dict[str, float]:
    predictions, references = eval_prediction.predictions, eval_prediction.label_ids
    # A model with several outputs gives a tuple, logits first.
    predictions = np.asarray(predictions[0] if isinstance(predictions, (tuple, list)) else predictions)
    if predictions.ndim == 2:
        if np.isnan(predictions).any():
            row = int(np.flatnonzero(np.isnan(predictions).any(axis=1))[0])
            raise ValueError(
                f"The logits of evaluation example {row} hold NaN: the model diverged or was loaded wrongly."
            )
        if class_names is not None and predictions.shape[1] != len(class_names):
            raise ValueError(
                f"The logits have {predictions.shape[1]} columns, but there are {len(class_names)} class names: the "
                "model and the evaluation must have the same class list."
            )
        num_classes, predictions = predictions.shape[1], predictions.argmax(axis=1)
    else:
        num_classes = None if class_names is None else len(class_names)
    scores = classification_scores(predictions, references, class_names, num_classes)
    result = {"accuracy": scores["accuracy"], "macro_f1": scores["macro_f1"]}
    if per_class:
        for name, value in scores["per_class_accuracy"].items():
            if value is not None:
                result[f"accuracy_per_class/{name}"] = value
    return result


def make_compute_metrics(
    class_names: list[str] | None = None, per_class: bool = False
) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    A `compute_metrics` function for `transformers.Trainer`.

    Its values are plain floats under flat keys, which logs and trackers can carry.

    Args:
        class_names (`list[str]`, *optional*):
            Names of the classes.
        per_class (`bool`, *optional*, defaults to `False`):
            Add `accuracy_per_class/<name>` for each class with examples.

    Returns:
        `Callable[[EvalPrediction], dict[str, float]]`: takes logits `(num_examples, num_classes)`, alone or first in a
        tuple, or class indices `(num_examples,)`; gives `accuracy`, `macro_f1` and, if asked for, the accuracy of each
        class. It can be pickled.
    """
    class_names = None if class_names is None else list(class_names)
    return functools.partial(_scores_for_trainer, class_names=class_names, per_class=per_class)
