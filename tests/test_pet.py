import pytest
import torch
from conftest import make_base
from torch.nn import functional as F

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.baselines import (
    class_embeddings,
    fit_pet,
    prompt_weights,
    soft_label_loss,
    soft_labels,
    teacher_logits,
    zero_shot_logits,
)
from coop_hf.baselines.pet import _most_confident


NAMES = ["cat", "dog", "sea", "photo of sea"]


def make_model(base, processor, **config):
    torch.manual_seed(0)
    return CoOpModel(base, CoOpConfig(n_ctx=4, **config), NAMES, processor)


def images_of(model, template, per_class, noise, seed):
    """Images around the class embeddings of a template, which knows the truth."""
    generator = torch.Generator().manual_seed(seed)
    centres = class_embeddings(model, None, NAMES, template)
    # Class embeddings of one tower are close to each other: only what sets them apart is amplified.
    centres = F.normalize(centres + 3 * (centres - centres.mean(dim=0)), dim=-1)
    labels = torch.arange(len(NAMES)).repeat(per_class)
    return centres[labels] + noise * torch.randn(len(labels), centres.shape[1], generator=generator), labels


def test_weights_by_hand():
    logits = torch.tensor([[[2.0, 1.0], [0.0, 3.0]], [[2.0, 1.0], [3.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    labels = torch.tensor([0, 1])  # accuracies 1, 1/2 and 0
    torch.testing.assert_close(prompt_weights(logits, labels), torch.tensor([2 / 3, 1 / 3, 0.0]))
    torch.testing.assert_close(prompt_weights(logits, labels, "uniform"), torch.full((3,), 1 / 3))
    torch.testing.assert_close(prompt_weights(logits[2:], labels), torch.ones(1))  # none right: nothing to go by


def test_soft_labels_by_hand():
    logits = torch.tensor([[[4.0, 0.0]], [[0.0, 2.0]]])
    # (3 · (4, 0) + 1 · (0, 2)) / 4 = (3, 1/2); over a temperature of 2 they are 5/4 apart
    expected = torch.sigmoid(torch.tensor([[1.25, -1.25]]))
    torch.testing.assert_close(soft_labels(logits, torch.tensor([3.0, 1.0]), temperature=2.0), expected)
    torch.testing.assert_close(soft_labels(logits, temperature=1.0), torch.sigmoid(torch.tensor([[1.0, -1.0]])))


def test_teachers_are_zero_shot_classifiers(base, processor):
    model = make_model(base, processor)
    images = torch.randn(5, 24)
    pair = ["a {}.", "{} of sea."]
    embeds = torch.randn(4, 24)
    logits = teacher_logits(model, ["a {}.", pair, embeds], images)
    assert logits.shape == (3, 5, 4)
    for got, own in zip(logits, [class_embeddings(model, None, NAMES, t) for t in ("a {}.", pair)] + [embeds]):
        torch.testing.assert_close(got, zero_shot_logits(model, own, image_embeds=images))


def test_gradient_of_the_loss_is_written_by_hand():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(6, 4, dtype=torch.float64).softmax(dim=-1)
    loss = soft_label_loss(logits, targets)
    loss.backward()
    student = logits.detach().softmax(dim=-1)
    torch.testing.assert_close(loss.detach(), (targets * (targets.log() - student.log())).sum() / 6)
    torch.testing.assert_close(logits.grad, (student - targets) / 6)
    assert soft_label_loss(targets.log(), targets).abs() < 1e-12


def test_one_step_is_adam_on_the_stated_objective(base, processor):
    """A single step of Adam moves every value by the learning rate, against the sign of its gradient."""
    model = make_model(base, processor)
    start = model.context.detach().clone()
    images, labels = images_of(model, "a {}.", 2, 0.1, 0)
    unlabelled = images_of(model, "a {}.", 3, 0.1, 1)[0]
    targets = soft_labels(teacher_logits(model, ["a {}.", "{} of sea."], unlabelled), temperature=3.0)
    student = model(image_embeds=unlabelled).logits.log_softmax(dim=-1)
    loss = (targets * (targets.log() - student)).sum(dim=-1).mean()
    loss = loss + 0.5 * F.cross_entropy(model(image_embeds=images).logits, labels)
    (gradient,) = torch.autograd.grad(loss, model.context)
    result = fit_pet(
        model,
        ["a {}.", "{} of sea."],
        images,
        labels,
        unlabelled,
        weighting="uniform",
        temperature=3.0,
        label_weight=0.5,
        num_steps=1,
        learning_rate=1e-3,
    )
    torch.testing.assert_close(result.soft_labels, targets)
    assert result.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    clear = gradient.abs() > 1e-4
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(
        (model.context.detach() - start)[clear], -1e-3 * gradient[clear].sign(), rtol=1e-3, atol=0
    )


def test_soft_labels_beat_labels_alone(base, processor, tmp_path):
    """One very noisy labelled image of each class, and many unlabelled ones that a teacher reads well."""
    truth = "a photo of a {}."
    model = make_model(base, processor)
    labelled = images_of(model, truth, 1, 1.0, 1)
    unlabelled, _ = images_of(model, truth, 40, 0.1, 11)
    test, test_labels = images_of(model, truth, 50, 0.1, 21)

    def accuracy(student):
        return (student(image_embeds=test).logits.argmax(dim=-1) == test_labels).float().mean().item()

    alone = make_model(base, processor)
    optimizer = torch.optim.Adam([alone.context], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        alone(image_embeds=labelled[0], labels=labelled[1]).loss.backward()
        optimizer.step()
    result = fit_pet(model, [truth, "{} of sea."], *labelled, unlabelled, label_weight=0.2, num_steps=60)
    assert result.history[-1]["num_unlabelled"] == 160
    assert accuracy(model) > accuracy(alone) + 0.1
    model.save_pretrained(tmp_path)  # an ordinary adapter
    loaded = CoOpModel.from_pretrained(tmp_path, base_model=base, processor=processor)
    torch.testing.assert_close(loaded(image_embeds=test).logits, model(image_embeds=test).logits)


def test_rounds_grow_and_the_student_becomes_a_teacher(base, processor):
    model = make_model(base, processor)
    images, labels = images_of(model, "a {}.", 2, 0.1, 0)
    unlabelled = images_of(model, "a {}.", 10, 0.1, 1)[0]
    result = fit_pet(model, ["a {}."], images, labels, unlabelled, num_rounds=3, num_steps=2)
    assert [len(entry["weights"]) for entry in result.history] == [1, 2, 2]
    sizes = [entry["num_unlabelled"] for entry in result.history]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[2] == 40
    torch.testing.assert_close(result.weights.sum(), torch.tensor(1.0))


def test_most_confident_of_each_class():
    targets = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.45, 0.55]])
    assert _most_confident(targets, 0.5).tolist() == [0, 3, 4]
    assert _most_confident(targets, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_seed_and_base(processor, tokenizer):
    base = make_base(tokenizer)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    contexts = []
    for seed in (1, 1, 2):
        model = make_model(base, processor, class_specific=True)
        images, labels = images_of(model, "a {}.", 1, 0.1, 0)
        random = torch.random.get_rng_state()
        fit_pet(model, ["a {}."], images, labels, images, num_steps=2, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), random)
        contexts.append(model.context.detach().clone())
    assert contexts[0].shape == (4, 4, 32)
    assert torch.equal(contexts[0], contexts[1]) and not torch.equal(contexts[0], contexts[2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_errors_say_what_is_wrong(base, processor):
    model = make_model(base, processor)
    images, labels = torch.randn(4, 24), torch.arange(4)
    with pytest.raises(ValueError, match="at least one"):
        fit_pet(model, [], images, labels, images)
    with pytest.raises(ValueError, match=r"prompt 0 gives class embeddings of shape \(3, 24\)"):
        fit_pet(model, [torch.randn(3, 24)], images, labels, images)
    with pytest.raises(ValueError, match="expected 4 labels"):
        fit_pet(model, ["a {}."], images, labels + 1, images)
    with pytest.raises(ValueError, match="without unlabelled images"):
        fit_pet(model, ["a {}."], images, labels, images[:0])
    with pytest.raises(ValueError, match="temperature"):
        fit_pet(model, ["a {}."], images, labels, images, temperature=0)
    with pytest.raises(ValueError, match="weighting"):
        fit_pet(model, ["a {}."], images, labels, images, weighting="best")
    with pytest.raises(ValueError, match="num_rounds"):
        fit_pet(model, ["a {}."], images, labels, images, num_rounds=0)
    with pytest.raises(ValueError, match="one weight for each"):
        soft_labels(torch.zeros(2, 3, 4), torch.ones(3))
    with pytest.raises(ValueError, match="one must be above 0"):
        soft_labels(torch.zeros(2, 3, 4), torch.zeros(2))
