"""Long tails: class weights against torch's own and the closed form, balanced epochs by counting."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_objectives import one_step
from test_trainer import arguments, make_model
from torch.nn import functional as F

from coop_hf import CoOpTrainer, CoOpTrainingArguments, EmbeddedImages
from coop_hf.training.epochs import Epochs
from coop_hf.training.objectives import OBJECTIVES, cross_entropy, scaled_class_weights


COUNTS = np.array([12, 5, 1])


def long_tail(seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = np.repeat([0, 1, 2], COUNTS)
    return EmbeddedImages(torch.randn(1, len(labels), 24, generator=generator), labels)


def test_balanced_weights_are_sklearns_and_a_list_keeps_its_ratios():
    balanced = scaled_class_weights("balanced", COUNTS)
    torch.testing.assert_close(balanced, torch.tensor([18 / (3 * 12), 18 / (3 * 5), 18 / 3]))
    given = scaled_class_weights([1, 2, 0.5], COUNTS)
    torch.testing.assert_close(given / given[0], torch.tensor([1.0, 2.0, 0.5]))
    for weights in (balanced, given):  # the mean over the training images
        assert (weights.numpy() * COUNTS).sum() / COUNTS.sum() == pytest.approx(1)


@pytest.mark.parametrize("weights", [[1, 2], [1, -1, 1], ["a", "b", "c"], [0, 0, 0], [1, float("nan"), 1], "even"])
def test_bad_weights(base, processor, tmp_path, weights):
    with pytest.raises(ValueError, match="class_weights"):
        CoOpTrainer(make_model(base, processor), arguments(tmp_path, class_weights=weights), long_tail())


def test_both_ways_at_once_and_an_objective_without_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="correct the same thing twice"):
        CoOpTrainingArguments(tmp_path, class_weights="balanced", balanced_sampling=True)
    with pytest.raises(ValueError, match="class_weights.*unexpected keyword"):
        CoOpTrainingArguments(
            tmp_path, class_weights="balanced", objective=lambda output, labels, frozen: output.logits.sum()
        )
    assert CoOpTrainingArguments(tmp_path, class_weights="[1, 2]").class_weights == [1, 2]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_cross_entropy(smoothing):
    logits = torch.randn(18, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels, weights = torch.from_numpy(np.repeat([0, 1, 2], COUNTS)), scaled_class_weights("balanced", COUNTS)
    labels[3] = -100
    output = SimpleNamespace(logits=logits)
    loss = cross_entropy(output, labels, None, smoothing, weights)
    target = (1 - smoothing) * torch.eye(3)[labels.clamp_min(0)] + smoothing / 3
    each = -(target * logits.log_softmax(-1)).sum(-1) * torch.tensor(
        [18 / (3 * COUNTS[c]) for c in labels.clamp_min(0)]
    )
    assert loss.item() == pytest.approx(each[labels >= 0].sum().item() / 17, rel=1e-6)
    if not smoothing:  # torch divides by the weights' sum, which for the whole training set is the number of images
        labels[3] = 0
        ours = cross_entropy(output, labels, None, 0.0, weights)
        assert ours.item() == pytest.approx(F.cross_entropy(logits, labels, weights.double()).item(), rel=1e-6)


def test_every_objective_takes_weights_and_ones_change_nothing(base, processor):
    from coop_hf.training.objectives import Frozen

    data, model = long_tail(), make_model(base, processor)
    for name in ("cross_entropy", "kgcoop", "prograd", "promptsrc", "sigmoid"):
        values = []
        for weights in ({}, {"class_weights": torch.ones(3)}, {"class_weights": torch.tensor([0.5, 1.2, 6.0])}):
            output = model(image_embeds=data.image_embeds[0])
            values.append(OBJECTIVES[name](output, data.labels, Frozen(model, output), **weights).item())
        assert values[0] == pytest.approx(values[1], rel=1e-6) and values[0] != pytest.approx(values[2], rel=1e-3)


@pytest.mark.parametrize("accumulation, batch", [(1, 18), (3, 6)])
def test_a_weighted_step_whatever_the_accumulation(base, processor, tmp_path, accumulation, batch):
    data, model = long_tail(), make_model(base, processor)
    logits = model(image_embeds=data.image_embeds[0]).logits
    weights = torch.tensor([18 / (3 * c) for c in COUNTS], dtype=torch.float32)
    expected = torch.autograd.grad(F.cross_entropy(logits, data.labels, weights), model.context)[0]
    given = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": batch}
    step = one_step(model, tmp_path, data, class_weights="balanced", **given)
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)


def test_balanced_epochs():
    data = long_tail()
    epochs = Epochs(data, batch_size=6, seed=3, is_balanced=True)
    seen = np.zeros((40, 18), dtype=int)
    for epoch in range(40):
        epochs.begin(epoch)
        epochs.__getitems__(list(range(18)))
        rows = epochs._order[1]
        np.add.at(seen[epoch], rows, 1)
        assert np.bincount(data.labels.numpy()[rows]).tolist() == [6, 6, 6]
        assert seen[epoch, :12].max() == 1 and seen[epoch, 12:17].max() == 2 and seen[epoch, 17] == 6
        again = Epochs(data, batch_size=6, seed=3, is_balanced=True)._draw(epoch)
        assert np.array_equal(again, rows)  # of seed and epoch alone: any process, any resume
    assert seen.sum(axis=0)[:12].min() >= 10  # 20 on average: large classes take turns
    assert len({tuple(row) for row in seen}) > 30


def test_balanced_epochs_of_a_size_that_does_not_divide_and_unlabelled_rows():
    labels = np.array([0] * 7 + [1] * 2 + [2] * 2 + [-100] * 9)
    epochs = Epochs(EmbeddedImages(torch.zeros(20, 4), labels), 4, 0, is_balanced=True)
    totals = np.zeros(3, dtype=int)
    for epoch in range(60):
        counts = np.bincount(labels[epochs._draw(epoch)], minlength=3)
        assert counts.sum() == 20 and set(counts.tolist()) == {6, 7}
        totals += counts
    assert np.ptp(totals) < 20  # what is left over goes to other classes in each epoch


def test_training_with_balanced_epochs(base, processor, tmp_path):
    data, model = long_tail(), make_model(base, processor)
    rows = Epochs(data, 18, 7, is_balanced=True)._draw(0)
    loss = model(image_embeds=data.image_embeds[0, rows], labels=data.labels[rows]).loss
    expected = torch.autograd.grad(loss, model.context)[0]
    step = one_step(model, tmp_path, data, balanced_sampling=True, seed=7)
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)
