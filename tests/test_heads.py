"""Heads on image features, against the formulas written again in `reference_heads.py`."""

import math

import pytest
import reference_heads as reference
import torch
from torch.nn import functional as F

from coop_hf.adapters import heads


CLASSES, DIM, SHOTS, SCALE = 4, 12, 3, 20.0


def problem(shots=SHOTS, classes=CLASSES, dim=DIM, seed=0, dtype=torch.float64):
    """Normalised image embeddings around class centres in a mixed order, labels, and class embeddings near them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator, dtype=dtype)
    labels = torch.arange(classes).repeat_interleave(shots)[torch.randperm(classes * shots, generator=generator)]
    v = centres[labels] + 0.8 * torch.randn(len(labels), dim, generator=generator, dtype=dtype)
    t0 = centres + torch.randn(classes, dim, generator=generator, dtype=dtype)
    return F.normalize(v, dim=-1), labels, F.normalize(t0, dim=-1)


def some(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_with_gradients(ours, theirs, labels, *learned):
    """Logits agree, and so do the gradients of their cross-entropy."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for tensor in learned:
        mine = torch.autograd.grad(F.cross_entropy(ours, labels), tensor, retain_graph=True)[0]
        other = torch.autograd.grad(F.cross_entropy(theirs, labels), tensor, retain_graph=True)[0]
        assert other.abs().max() > 1e-6
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------- mathematics


def test_tip_scores():
    v, labels, t0 = problem()
    keys, key_labels, _ = problem(seed=5)
    keys = (1.1 * keys).requires_grad_()  # learned keys do not stay normalised
    ours = SCALE * heads.tip_scores(v, t0, keys, key_labels, 1.7, 2.5, SCALE)
    theirs = reference.tip(v, t0, keys, key_labels, 1.7, 2.5, SCALE)
    assert_same_with_gradients(ours, theirs, labels, keys)


def test_residual_scores():
    v, labels, t0 = problem()
    x = some(CLASSES, DIM).requires_grad_()
    ours = SCALE * heads.residual_scores(v, t0, x, 0.5, 3.0)
    assert_same_with_gradients(ours, reference.residual(v, t0, x, 0.5, 3.0, SCALE), labels, x)


def test_clip_adapter_scores_and_that_length_makes_no_difference():
    v, labels, t0 = problem()
    down, up = some(3, DIM).requires_grad_(), some(DIM, 3, seed=2).requires_grad_()
    ours = SCALE * heads.adapter_scores(v, t0, down, up, 0.2)
    assert_same_with_gradients(ours, reference.clip_adapter(v, t0, down, up, 0.2, SCALE), labels, down, up)
    raw = reference.clip_adapter(v, t0, down, up, 0.2, SCALE, length=10.0)
    torch.testing.assert_close(ours, raw, rtol=1e-9, atol=1e-9)


def test_clap_multipliers():
    v, labels, t0 = problem()
    ours = heads.clap_weights(v, labels, t0, SCALE)
    torch.testing.assert_close(ours, reference.clap_multipliers(v, labels, t0, SCALE))
    assert ours.std() > 0.01


def test_lp_plus_plus():
    v, labels, t0 = problem()
    for ours, theirs in zip(heads.lp_plus_plus(v, labels, t0, 35), reference.lp_plus_plus(v, labels, t0, 35)):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    # Steps of α have been taken, and classes have their own.
    assert heads.lp_plus_plus(v, labels, t0, 35)[2].std() > 1e-3
    assert heads.lp_plus_plus(v, labels, t0, 9)[2].std() == 0


def test_gda():
    v, labels, t0 = problem()
    for ours, theirs in zip(heads.gda(v, labels, CLASSES), reference.gda(v, labels, CLASSES)):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_gda_is_the_bayes_rule_of_gaussians():
    """With many images the discriminant's direction is that of the true covariance, which no shrinkage hides."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.diag(torch.tensor([3.0, 0.2, 1.0], dtype=torch.float64))
    means = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    labels = torch.arange(2).repeat(20000)
    v = means[labels] + torch.randn(len(labels), 3, generator=generator, dtype=torch.float64) @ spread
    weight, _ = heads.gda(v, labels, 2)
    expected = torch.linalg.inv(spread @ spread) @ (means[0] - means[1])
    assert F.cosine_similarity(weight[0] - weight[1], expected, dim=0) > 0.999


@pytest.mark.parametrize("copies", [1, 3])
def test_gda_without_spread_leaves_zero_shot(copies):
    v, labels, _ = problem(shots=1)
    weight, bias = heads.gda((v * 1.1).repeat(copies, 1), labels.repeat(copies), CLASSES)
    assert weight.abs().max() == 0 and bias.tolist() == pytest.approx([-math.log(CLASSES)] * CLASSES)
