"""Linear probe CLIP: logistic regression on frozen image features, the few-shot baseline of CLIP and CoOp.

    minimise over W, b:   1/2 ‖W‖²  +  C · Σ_i cross-entropy(W x_i + b, y_i)

by L-BFGS (https://arxiv.org/abs/2103.00020, section A.3). C is chosen on validation in two levels: the best of seven
powers of ten, then bisection of the decade on each side of it.
"""

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F

from ..atomic import save_tensors, write_atomically, write_text
from ..checks import check_class_names
from ..hub import find_file
from ..version import __version__


__all__ = ["COARSE_C", "LinearProbe", "fit_linear_probe"]

COARSE_C = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)
CONFIG_NAME = "linear_probe_config.json"
WEIGHTS_NAME = "linear_probe.safetensors"
FORMAT_VERSION = 1
_ABSENT = -1e9  # bias of a class without training examples: finite, and never the largest
_MAX_CONFIG_BYTES = 64 * 2**20


def _logistic_regression() -> type:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "the linear probe needs scikit-learn, which is not installed: `pip install coop_hf[probe]`."
        ) from error
    return LogisticRegression


def _to_tensor(features: torch.Tensor | np.ndarray, name: str) -> torch.Tensor:
    features = torch.as_tensor(features).detach()
    if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
        raise ValueError(
            f"`{name}` must be image features, floating point, (num_examples, dim), got {features.dtype} of shape "
            f"{tuple(features.shape)}."
        )
    if not torch.isfinite(features).all():
        row = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
        raise ValueError(f"`{name}` holds NaN or infinity in row {row}.")
    return features.float()


def _to_labels(
    labels: torch.Tensor | np.ndarray | list[int], count: int, num_classes: int | None, name: str
) -> np.ndarray:
    labels = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"`{name}` must be {count} class indices, one for each row of the features, got {labels.dtype} of shape "
            f"{labels.shape}."
        )
    if labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes):
        top = "" if num_classes is None else f" to {num_classes - 1}"
        raise ValueError(f"`{name}` goes from {labels.min()} to {labels.max()}; class indices go from 0{top}.")
    return labels.astype(np.int64)


@dataclass
class LinearProbe:
    """A linear classifier on image features.

    Args:
        weight (`torch.Tensor`): `(num_classes, dim)`, fp32.
        bias (`torch.Tensor`): `(num_classes,)`, fp32.
        normalize (`bool`): whether features are L2-normalised before they enter.
        class_names (`list[str]`, *optional*): the classes.
        c (`float`, *optional*): the inverse strength of regularisation that was chosen.
        val_accuracy (`float`, *optional*): its accuracy on validation, a fraction.
        search (`list[dict]`, *optional*): every value tried, in order, as `{"c", "val_accuracy"}`.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    normalize: bool
    class_names: list[str] | None = None
    c: float | None = None
    val_accuracy: float | None = None
    search: list[dict] | None = None

    def logits(self, image_embeds: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Scores images.

        Args:
            image_embeds (`torch.Tensor` or `np.ndarray`): `(num_examples, dim)`, as given in fitting, for example
                `model.get_image_features(pixel_values)`.

        Returns:
            `torch.Tensor` `(num_examples, num_classes)`, fp32; softmax makes them probabilities.
        """
        features = _to_tensor(image_embeds, "image_embeds")
        if features.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"`image_embeds` has {features.shape[1]} dimensions, and the probe was fitted on "
                f"{self.weight.shape[1]}: features must come from the same model."
            )
        if self.normalize:
            features = F.normalize(features, dim=-1)
        return features @ self.weight.to(features.device).T + self.bias.to(features.device)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `linear_probe.safetensors` and `linear_probe_config.json`, each whole or not at all; no pickle."""
        os.makedirs(save_directory, exist_ok=True)
        config = {
            "c": self.c,
            "class_names": self.class_names,
            "coop_hf_version": __version__,
            "format_version": FORMAT_VERSION,
            "normalize": self.normalize,
            "search": self.search,
            "val_accuracy": self.val_accuracy,
        }
        tensors = {"weight": self.weight.detach().cpu().contiguous(), "bias": self.bias.detach().cpu().contiguous()}
        with write_atomically(os.path.join(save_directory, WEIGHTS_NAME)) as path:
            save_tensors(tensors, path, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_text(os.path.join(save_directory, CONFIG_NAME), text)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **kwargs: Any) -> "LinearProbe":
        """Reads a probe from a local folder, the cache or the Hub.

        Args:
            name_or_path (`str` or `os.PathLike`): folder or Hub id.
            kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            ValueError: the files are damaged or contradict each other; says how.
        """
        config = _read_config(find_file(name_or_path, CONFIG_NAME, **kwargs))
        path = find_file(name_or_path, WEIGHTS_NAME, **kwargs)
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a usable linear probe: {str(error)[:200]}.") from None
        weight, bias = (tensors.get(name, torch.empty(())) for name in ("weight", "bias"))
        if set(tensors) != {"weight", "bias"} or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(
                f"{path} must hold weight (num_classes, dim) and bias (num_classes,), it holds {str(shapes)[:200]}."
            )
        if not all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in (weight, bias)):
            raise ValueError(f"{path} must hold finite fp32 values.")
        names = config["class_names"]
        if names is not None and len(check_class_names(names)) != len(weight):
            raise ValueError(f"{path} has {len(weight)} classes, and {CONFIG_NAME} names {len(names)}.")
        return cls(weight, bias, **config)


def _read_config(path: str) -> dict:
    if os.path.getsize(path) > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {os.path.getsize(path):,} bytes; at most {_MAX_CONFIG_BYTES:,} are accepted.")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        if not isinstance(config["normalize"], bool):
            raise ValueError("`normalize` must be true or false")
        if config["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {config['format_version']!r}; this coop_hf reads {FORMAT_VERSION}")
        return {key: config.get(key) for key in ("normalize", "class_names", "c", "val_accuracy", "search")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a usable linear probe configuration: {str(error)[:200]}.") from None


def fit_linear_probe(
    features: torch.Tensor | np.ndarray,
    labels: torch.Tensor | np.ndarray | list[int],
    val_features: torch.Tensor | np.ndarray,
    val_labels: torch.Tensor | np.ndarray | list[int],
    class_names: list[str] | None = None,
    normalize: bool = True,
    num_steps: int = 8,
    max_iter: int = 1000,
    coarse: Sequence[float] = COARSE_C,
) -> LinearProbe:
    """Fits a linear probe, and chooses its regularisation on validation.

    First level: the best of `coarse` (the first of equals). Second level: around it the interval of one decade to each
    side; `num_steps` times, both ends are compared and the half next to the better one is kept, the left one on ties.
    This is the search of CLIP and of CoOp's linear probe baseline. The last winner is the answer; only if another
    value tried was better on validation, that one is.

    Args:
        features (`torch.Tensor` or `np.ndarray`): `(num_examples, dim)`, image features of the training images.
        labels (`torch.Tensor`, `np.ndarray` or `list[int]`): `(num_examples,)`, class indices.
        val_features, val_labels: the same of the validation images. CoOp's few-shot protocol takes min(shots, 4)
            images of each class.
        class_names (`list[str]`, *optional*): the classes; without them there are as many as the largest label says.
        normalize (`bool`, *optional*, defaults to `True`): L2-normalise the features. CoOp's public code takes them as
            the image tower gives them (`False`), which only shifts the search along C where norms are alike.
        num_steps (`int`, *optional*, defaults to 8): bisections; 0 leaves the coarse value.
        max_iter (`int`, *optional*, defaults to 1000): L-BFGS iterations, as in CLIP.
        coarse (`Sequence[float]`, *optional*, defaults to `COARSE_C`): values of C tried first.

    Returns:
        [`LinearProbe`].

    Raises:
        ImportError: scikit-learn is missing (`pip install coop_hf[probe]`).
        ValueError: features or labels of the wrong shape, NaN, or fewer than two classes in training.
    """
    regression = _logistic_regression()
    class_names = None if class_names is None else check_class_names(class_names)
    features, val_features = _to_tensor(features, "features"), _to_tensor(val_features, "val_features")
    if features.shape[1] != val_features.shape[1]:
        raise ValueError(f"features have {features.shape[1]} dimensions, val_features {val_features.shape[1]}.")
    num_classes = None if class_names is None else len(class_names)
    labels = _to_labels(labels, len(features), num_classes, "labels")
    val_labels = _to_labels(val_labels, len(val_features), num_classes, "val_labels")
    num_classes = num_classes or int(max(labels.max(), val_labels.max())) + 1
    if len(np.unique(labels)) < 2:
        raise ValueError(f"a classifier needs at least two classes; all training labels are {labels[0]}.")
    if normalize:
        features, val_features = F.normalize(features, dim=-1), F.normalize(val_features, dim=-1)
    train_x, val_x = features.cpu().double().numpy(), val_features.cpu().double().numpy()
    tried: dict[float, tuple] = {}

    def accuracy(log_c: float) -> float:
        log_c = round(log_c, 9)  # the bisection meets its own ends again
        if log_c not in tried:
            with warnings.catch_warnings():
                # Weakly regularised fits stop at max_iter, as in CLIP; validation decides whether that does harm.
                warnings.filterwarnings("ignore", message=".*lbfgs failed to converge.*")
                warnings.filterwarnings("ignore", message=".*number of unique classes is greater than.*")  # one shot
                fit = regression(C=10.0**log_c, max_iter=max_iter, solver="lbfgs").fit(train_x, labels)
            tried[log_c] = (float((fit.predict(val_x) == val_labels).mean()), fit.coef_, fit.intercept_, fit.classes_)
        return tried[log_c][0]

    coarse = [float(np.log10(c)) for c in coarse]
    chosen = max(coarse, key=accuracy)  # the first of equals
    left, right = chosen - 1, chosen + 1
    for _ in range(num_steps):
        middle = (left + right) / 2
        if accuracy(left) < accuracy(right):
            chosen, left = right, middle
        else:
            chosen, right = left, middle
    best = max(value[0] for value in tried.values())
    if accuracy(chosen) < best:
        chosen = next(log_c for log_c, value in tried.items() if value[0] == best)
    val_accuracy, coef, intercept, present = tried[round(chosen, 9)]
    if len(present) == 2:  # scikit-learn keeps one row for two classes: the logit of the second against 0
        coef, intercept = np.concatenate([0 * coef, coef]), np.array([0.0, intercept[0]])
    weight = torch.zeros(num_classes, train_x.shape[1])
    bias = torch.full((num_classes,), _ABSENT)
    weight[present], bias[present] = torch.tensor(coef).float(), torch.tensor(intercept).float()
    search = [{"c": 10.0**log_c, "val_accuracy": value[0]} for log_c, value in tried.items()]
    return LinearProbe(weight, bias, normalize, class_names, 10.0**chosen, val_accuracy, search)
