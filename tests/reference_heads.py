"""The heads, each written down again from its formula in float64, image by image and class by class."""

import math

import numpy as np
import torch


def unit(x):
    return x / x.norm()


def tip(v, t0, keys, key_labels, alpha, beta, s):
    """s · v · t + α · Σ_k of the class exp(−β (1 − v · k)): logits."""
    rows = []
    for image in v:
        row = [s * image @ t for t in t0]
        for key, label in zip(keys, key_labels.tolist()):
            row[label] = row[label] + alpha * torch.exp(-beta * (1 - image @ key))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def residual(v, t0, x, alpha, norm, s):
    """s · cos(v, norm · t + α · x): logits."""
    return torch.stack([torch.stack([s * image @ unit(norm * t + alpha * r) for t, r in zip(t0, x)]) for image in v])


def clip_adapter(v, t0, down, up, ratio, s, length=1.0):
    """Logits of image embeddings of any length."""
    rows = []
    for image in v:
        image = length * image
        hidden = torch.stack([torch.clamp(row @ image, min=0) for row in down])
        changed = torch.stack([torch.clamp(row @ hidden, min=0) for row in up])
        mixed = unit(ratio * changed + (1 - ratio) * image)
        rows.append(torch.stack([s * mixed @ t for t in t0]))
    return torch.stack(rows)


def clap_multipliers(v, labels, t0, s):
    values = []
    for c in range(len(t0)):
        own = []
        for image, label in zip(v, labels.tolist()):
            if label == c:
                exponentials = [math.exp(s * float(image @ t)) for t in t0]
                own.append(exponentials[c] / sum(exponentials))
        values.append(sum(own) / len(own))
    return torch.tensor(values, dtype=torch.float64)


def clap_loss(logits, labels, x, multipliers):
    """Cross-entropy and the mean over classes of λ_c ‖w_c − t_c‖²."""
    entropies = [-row[label] + torch.logsumexp(row, 0) for row, label in zip(logits, labels.tolist())]
    penalty = sum(m * (row**2).sum() for m, row in zip(multipliers, x)) / len(x)
    return sum(entropies) / len(entropies) + penalty


def lp_plus_plus(v, labels, t0, steps):
    """By autograd and torch's own SGD; the largest eigenvalue from singular values."""
    classes, count = len(t0), len(v)
    largest = np.linalg.svd(v.numpy(), compute_uv=False)[0] ** 2
    alpha_step = count / (4 * max(sum(float(image @ t) ** 2 for image in v) for t in t0))
    weight = torch.stack([v[labels == c].sum(0) for c in range(classes)]).requires_grad_()
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    start = 250 * np.mean([float((v[labels == c] @ t0[c]).mean()) for c in range(classes)])
    alpha = torch.full((classes,), start, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([weight, bias], lr=4 * count / largest, momentum=0.9)
    for step in range(steps):
        logits = torch.stack(
            [torch.stack([i @ w + b + a * (i @ t) for w, b, a, t in zip(weight, bias, alpha, t0)]) for i in v]
        )
        sgd.zero_grad()
        alpha.grad = None
        torch.nn.functional.cross_entropy(logits, labels).backward()
        sgd.step()
        if step % 10 == 9:
            with torch.no_grad():
                alpha -= alpha_step * alpha.grad
    return weight.detach(), bias.detach(), alpha.detach()


def gda(v, labels, classes):
    """By numpy: the covariance of what is left of each image without its class mean, inverted by a linear solve."""
    x, y = v.numpy(), labels.numpy()
    means = np.stack([x[y == c].mean(axis=0) for c in range(classes)])
    covariance = np.cov(np.stack([row - means[label] for row, label in zip(x, y)]).T)
    dim = x.shape[1]
    shrunk = (len(x) - 1) * covariance + np.trace(covariance) * np.eye(dim)
    weight = np.stack([dim * np.linalg.solve(shrunk, mean) for mean in means])
    bias = np.array([math.log(1 / classes) - mean @ w / 2 for mean, w in zip(means, weight)])
    return torch.tensor(weight), torch.tensor(bias)
