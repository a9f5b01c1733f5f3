"""Test images and the scores of a method on them.

A method learns from a [`FewShot`] and gives a function from images and class names to logits. It is asked once for
each test image, in batches and in an order that says nothing about the labels; labels stay here.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from ..modeling import CoOpModel
from ..training.metrics import classification_scores
from .methods import Method, Options, Predictor
from .tasks import FewShot, Task, draw_few_shot


__all__ = [
    "Ask",
    "Exam",
    "accuracies",
    "allowed",
    "answer_here",
    "calibration",
    "draw_for",
    "fit",
    "harmonic_mean",
    "make_exam",
    "measure",
    "score",
]

NUM_BINS = 15

EMBEDDED_AT_ONCE = 1024  # test images in a batch where their embeddings are asked for

# Logits for some rows of an exam: (exam, rows) -> (len(rows), len(exam.class_names)).
Ask = Callable[["Exam", np.ndarray], torch.Tensor]


@dataclass
class Exam:
    """Test images with their labels.

    Args:
        name (`str`): its name among the scores.
        class_names (`list[str]`): classes that a method scores.
        embeds (`torch.Tensor`): `(num_images, projection_dim)`.
        labels (`torch.Tensor`): `(num_images,)`, class indices.
        views (`torch.utils.data.Dataset`, *optional*): the images as plain views, for methods that change the image
            tower; their labels are not looked at.
        mapped (`Callable`, *optional*): logits over `class_names` to logits over the classes of the labels.
        label_names (`list[str]`, *optional*, defaults to `class_names`): the classes of the labels.
    """

    name: str
    class_names: list[str]
    embeds: torch.Tensor
    labels: torch.Tensor
    views: Any = None
    mapped: Callable[[torch.Tensor], torch.Tensor] | None = None
    label_names: list[str] = field(default_factory=list)

    def order(self) -> np.ndarray:
        """A permutation that can be repeated by who knows the labels, and says nothing about them."""
        digest = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=4).digest()
        return np.random.RandomState(int.from_bytes(digest, "little")).permutation(len(self.labels))


def make_exam(task: Task, name: str | None = None, part: str = "test", **more: Any) -> Exam:
    """The test images of a task, or another part of it.

    Args:
        task (`Task`): the data set.
        name (`str`, *optional*, defaults to the task's): name among the scores.
        part (`str`, *optional*, defaults to `"test"`): which part.
        more: fields of [`Exam`].
    """
    embeds, labels = task.parts[part]
    names = list(task.class_names)
    values: dict[str, Any] = {"class_names": names, "label_names": names, **more}
    return Exam(name=name or task.name, embeds=embeds, labels=labels, views=task.views.get(part), **values)


# ---------------------------------------------------------------------- learning


def allowed(method: Method, shots: FewShot | None, options: Options) -> tuple[FewShot | None, Options, list[str]]:
    """What a method may see, and no more: what it has no use for, by its own word, is taken out.

    Args:
        method (`Method`): the method; its `knowledge` and `chooses` say what it needs beside class names and shots.
        shots (`FewShot`, *optional*): the draw; `None` for a method that does not learn.
        options (`Options`): templates, sentences, and whether there is validation.

    Returns:
        the draw and the options with the rest taken out, and in words what is left.
    """
    seen = ["class names", "the template"]
    if "templates" in method.knowledge:
        seen.append("further hand-written templates")
    else:
        options = replace(options, ensemble=(options.template,))
    if "sentences" in method.knowledge and options.cupl is not None:
        seen.append("sentences of a language model")
    else:
        options = replace(options, cupl=None)
    if "test views" in method.knowledge:
        seen.append("views of each test image, one image at a time, without label")
    if shots is None:
        return None, options, seen
    seen.append(f"{shots.shots} labelled images of each class")
    if method.chooses and options.validation != "none":
        seen.append(f"{min(shots.shots, 4)} validation images of each class")
    else:
        shots = replace(shots, val_embeds=shots.val_embeds[:0], val_labels=shots.val_labels[:0])
    if "unlabelled" in method.knowledge:
        seen.append("the other training images, without labels")
    else:
        shots = replace(shots, unlabelled_embeds=shots.unlabelled_embeds[:0])
    return shots, options, seen


def fit(method: Method, model: CoOpModel, shots: FewShot | None, options: Options) -> tuple[Predictor, dict[str, Any]]:
    """Lets a method learn.

    Returns:
        what scores images, and plain values: `fit_seconds`, `learned_values` (how many numbers it holds; `None`: it
        does not say) and `sees_images`.
    """
    start = time.perf_counter()
    predict = method.fit(model, shots, options)
    seconds = time.perf_counter() - start
    values = getattr(predict, "learned_values", None if method.learns else 0)
    sees = bool(getattr(predict, "sees_images", False))
    return predict, {"fit_seconds": seconds, "learned_values": values, "sees_images": sees}


def draw_for(method: Method, task: Task, options: Options, cell: dict[str, Any]) -> FewShot | None:
    """What a method learns from in a cell, with images where it looks at them; `None` if it does not learn."""
    if not method.learns:
        return None
    with_images = options.recipe != "fast" or method.sees_images
    return draw_few_shot(task, cell["shots"], cell["seed"], cell.get("noise", 0.0), with_images)


@contextmanager
def answer_here(
    method: Method, model: CoOpModel, shots: FewShot | None, options: Options
) -> Iterator[tuple[dict[str, Any], Ask]]:
    """Lets a method learn in this process; yields what [`fit`] says and what answers. Ends with the block."""
    predict, facts = fit(method, model, shots, options)

    def ask(exam: Exam, rows: np.ndarray) -> torch.Tensor:
        images = Subset(exam.views, rows.tolist()) if facts["sees_images"] else exam.embeds[rows]
        return predict(images, exam.class_names)

    yield facts, ask


# ---------------------------------------------------------------------- scores


def harmonic_mean(base: float, new: float) -> float:
    """2ab/(a + b), and 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def accuracies(details: dict[str, dict]) -> dict[str, float]:
    """The accuracy of each exam, from what [`score`] gives; of base and new classes their harmonic mean H, too."""
    scores = {exam: found["accuracy"] for exam, found in details.items()}
    return {**scores, "H": harmonic_mean(**scores)} if list(scores) == ["base", "new"] else scores


def calibration(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> tuple[float, list]:
    """Expected calibration error, and the bins that it is made of.

    ECE = Σ_b n_b/N · |accuracy_b - confidence_b| over bins of equal width of the largest probability
    (https://arxiv.org/abs/1706.04599, equation 3); a bin holds its upper end.

    Args:
        probabilities (`np.ndarray`): `(num_images, num_classes)`.
        labels (`np.ndarray`): `(num_images,)`.
        num_bins (`int`, *optional*, defaults to 15): number of bins.

    Returns:
        `tuple(float, list)`: the error, and for each bin `[images, mean confidence, accuracy]`.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    error, bins = 0.0, []
    for index in range(num_bins):
        own = place == index
        count = int(own.sum())
        mean, accuracy = (float(confidence[own].mean()), float(right[own].mean())) if count else (0.0, 0.0)
        error += count / len(labels) * abs(accuracy - mean)
        bins.append([count, round(mean, 6), round(accuracy, 6)])
    return error, bins


def measure(logits: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """What logits are worth: accuracy, macro-F1, calibration, and the accuracy of each class.

    Args:
        logits (`torch.Tensor`): `(num_images, num_classes)`; probabilities are their softmax, in all families.
        labels (`torch.Tensor`): `(num_images,)`, class indices.
        class_names (`list[str]`): the classes; two of one name are two classes.

    Returns:
        `dict`: `accuracy`, `macro_f1`, `ece`, all fractions; `bins`, see [`calibration`]; `per_class`, the accuracy of
        each class in the order of their indices, `None` for one without images.
    """
    values, truth = logits.double().cpu(), labels.numpy()
    if values.shape != (len(truth), len(class_names)) or torch.isnan(values).any():
        raise ValueError(
            f"expected logits of {len(truth)} images over {len(class_names)} classes, without NaN, got "
            f"{tuple(values.shape)}{', with NaN' if torch.isnan(values).any() else ''}."
        )
    found = classification_scores(values.argmax(dim=1).numpy(), truth, list(class_names))
    error, bins = calibration(torch.softmax(values, dim=1).numpy(), truth)
    per_class = [value if value is None else round(value, 6) for value in found["per_class_accuracy"].values()]
    scores = {"accuracy": found["accuracy"], "macro_f1": round(found["macro_f1"], 6), "ece": round(error, 6)}
    return {**scores, "bins": bins, "per_class": per_class}


def score(ask: Ask, exams: Sequence[Exam], batch_size: int = EMBEDDED_AT_ONCE) -> tuple[dict[str, dict], float]:
    """Asks for the logits of all test images, once, and scores them.

    Args:
        ask ([`Ask`]): gives logits.
        exams (`list[Exam]`): what is asked.
        batch_size (`int`, *optional*): images in a batch.

    Returns:
        `{exam: scores}`, see [`measure`], and the seconds that all answers took for one image.
    """
    scores, seconds, count = {}, 0.0, 0
    for exam in exams:
        order, answers = exam.order(), []
        start = time.perf_counter()
        for first in range(0, len(order), batch_size):
            answers.append(ask(exam, order[first : first + batch_size]).detach().cpu())
        seconds, count = seconds + time.perf_counter() - start, count + len(order)
        logits = torch.empty(len(order), answers[0].shape[1])
        logits[torch.as_tensor(order)] = torch.cat(answers).float()
        logits = logits if exam.mapped is None else exam.mapped(logits)
        scores[exam.name] = measure(logits, exam.labels, exam.label_names or exam.class_names)
    return scores, seconds / max(count, 1)
