"""The mathematics of heads on image features: scores and closed forms, on tensors alone."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


__all__ = ["adapter_scores", "cache_scores", "clap_weights", "class_means", "gda", "lp_plus_plus", "residual_scores"]


def residual_scores(v: Tensor, t0: Tensor, residual: Tensor, alpha: float, norm: float) -> Tensor:
    """cos(v, norm · t⁰ + α · x): TaskRes, ZS-LP and CLAP. `(images, C)`."""
    return v @ F.normalize(norm * t0 + alpha * residual, dim=-1).T


def cache_scores(products: Tensor, key_labels: Tensor, num_classes: int, beta: float) -> Tensor:
    """exp(−β (1 − v · Kᵀ)) · L of Tip-Adapter from v · Kᵀ; L has a 1 at each key's class. `(images, C)`."""
    zeros = products.new_zeros(len(products), num_classes)
    return zeros.index_add(1, key_labels, torch.exp(beta * (products - 1)))


def adapter_scores(v: Tensor, t0: Tensor, down: Tensor, up: Tensor, ratio: float) -> Tensor:
    """cos(ρ · relu(relu(v · down) · up) + (1 − ρ) · v, t⁰): CLIP-Adapter. `(images, C)`.

    There is no bias, so the length of v makes no difference: normalised features do as well as those of the tower.
    """
    changed = F.relu(F.linear(F.relu(F.linear(v, down)), up))
    return F.normalize(ratio * changed + (1 - ratio) * v, dim=-1) @ t0.T


def class_means(v: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean image embedding of each class, `(num_classes, dim)`."""
    sums = v.new_zeros(num_classes, v.shape[1]).index_add(0, labels, v)
    return sums / torch.bincount(labels, minlength=num_classes)[:, None]


def clap_weights(v: Tensor, labels: Tensor, t0: Tensor, scale: float) -> Tensor:
    """λ_c: the mean zero-shot probability of class c on its own shots, `(num_classes,)`."""
    own = (scale * v @ t0.T).softmax(dim=-1).gather(1, labels[:, None])
    return class_means(own, labels, len(t0))[:, 0]


def lp_plus_plus(
    v: Tensor, labels: Tensor, t0: Tensor, num_steps: int = 300, every: int = 10, momentum: float = 0.9
) -> tuple[Tensor, Tensor, Tensor]:
    """LP++ (https://arxiv.org/abs/2404.02285): block descent with step sizes from the data; nothing is tuned.

    Logits ⟨v, w_c⟩ + b_c + α_c ⟨v, t⁰_c⟩; w starts at the sum of the class's features, α at 250 times the mean over
    classes of the mean cosine with the own class, b at 0. Steps: 4N / λ_max(VᵀV) for w and b, with momentum; and
    N / (4 · max_c Σ_i ⟨v_i, t⁰_c⟩²) for α, every `every` steps. The paper's code takes the step with the best
    validation accuracy, and never clears the gradient of α; here the last step counts, and α follows its gradient.

    Returns:
        weight `(num_classes, dim)`, bias `(num_classes,)`, alpha `(num_classes,)`.
    """
    num, target = len(v), F.one_hot(labels, len(t0)).to(v.dtype)
    text = v @ t0.T
    step = 4 * num / torch.linalg.eigvalsh(v.T @ v)[-1]
    alpha_step = num / (4 * text.square().sum(dim=0).max())
    weight, bias = target.T @ v, v.new_zeros(len(t0))
    own = class_means(text.gather(1, labels[:, None]), labels, len(t0))
    alpha = (250 * own.mean()).expand(len(t0)).clone()
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    for index in range(1, num_steps + 1):
        error = ((v @ weight.T + bias + alpha * text).softmax(dim=-1) - target) / num
        weight_speed = momentum * weight_speed + error.T @ v
        bias_speed = momentum * bias_speed + error.sum(dim=0)
        weight, bias = weight - step * weight_speed, bias - step * bias_speed
        if index % every == 0:
            alpha = alpha - alpha_step * (error * text).sum(dim=0)
    return weight, bias, alpha


def gda(v: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Gaussian discriminant analysis with one shrunk covariance (https://arxiv.org/abs/2402.04087, equations 3 to 5).

    Σ⁻¹ = d · pinv((n − 1) Σ̂ + tr(Σ̂) I), w_c = Σ⁻¹ μ_c, b_c = log(1/C) − ½ μ_cᵀ Σ⁻¹ μ_c; Σ̂ is the covariance within
    classes. Where there is no spread within classes, as with one view of one shot, weights are 0: zero-shot remains.

    Returns:
        weight `(num_classes, dim)`, bias `(num_classes,)`.
    """
    means = class_means(v, labels, num_classes)
    spread = v - means[labels]
    scatter = spread.T @ spread  # (n − 1) Σ̂
    dim, trace = v.shape[1], scatter.trace()
    weight = torch.zeros_like(means)
    if trace > 1e-9 * len(v):  # of images that are all alike rounding would be inverted
        eye = torch.eye(dim, dtype=v.dtype, device=v.device)
        weight = means @ (dim * torch.linalg.pinv(scatter + trace / (len(v) - 1) * eye, hermitian=True))
    return weight, -math.log(num_classes) - 0.5 * (weight * means).sum(dim=-1)
