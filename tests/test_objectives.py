"""Each objective against its closed form, loss and gradient, in float64; then through the trainer."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import reference_methods as reference
import torch
from family_kit import make_family
from test_trainer import NAMES, arguments, embedded, make_method, make_model, pictures
from torch.nn import functional as F

from coop_hf import CoOpConfig, CoOpModel, CoOpTrainer, EmbeddedImages
from coop_hf.training.objectives import OBJECTIVES, PROMPTSRC_TEMPLATES, get_objective


IMAGES, CLASSES, DIM, SCALE = 5, 4, 6, 7.0


def normalised(*shape, seed):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.fixture
def batch():
    """Leaves: logits, class and image embeddings, each free of the others; the frozen ones; labels, the last of which
    does not count."""
    output = SimpleNamespace(
        logits=3 * torch.randn(IMAGES, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        text_embeds=normalised(CLASSES, DIM, seed=1),
        image_embeds=normalised(IMAGES, DIM, seed=2),
    )
    for tensor in vars(output).values():
        tensor.requires_grad_()
    text, image, ensemble = (
        normalised(CLASSES, DIM, seed=3),
        normalised(IMAGES, DIM, seed=4),
        normalised(CLASSES, DIM, seed=5),
    )
    frozen = SimpleNamespace(
        text_embeds=text,
        image_embeds=image,
        logits=SCALE * image @ text.T,
        scores=lambda t: SCALE * image @ t.T,
        ensemble_embeds=lambda templates: ensemble,
    )
    return output, torch.tensor([0, 3, 1, 1, -100]), frozen


def parts(batch):
    """The same as arrays, without the image that does not count, and its one-hot labels."""
    output, labels, frozen = batch
    keep = labels != -100
    arrays = {name: tensor.detach().numpy() for name, tensor in vars(output).items()}
    logits, image = arrays["logits"][keep], arrays["image_embeds"][keep]
    return logits, arrays["text_embeds"], image, np.eye(CLASSES)[labels[keep]], keep.numpy()


def check(objective, batch, loss, logits=0.0, text=0.0, image=0.0, **kwargs):
    """The value, and the gradients by logits, class and image embeddings."""
    output, labels, frozen = batch
    value = OBJECTIVES[objective](output, labels, frozen, **kwargs)
    assert value.item() == pytest.approx(loss, rel=1e-12)
    gradients = torch.autograd.grad(value, list(vars(output).values()), allow_unused=True)
    keep = labels.ne(-100).numpy()
    for got, expected, masked in zip(gradients, (logits, text, image), (True, False, True)):
        whole = np.zeros((IMAGES, *np.shape(expected)[1:])) if masked and np.ndim(expected) else expected
        if masked and np.ndim(expected):
            whole[keep] = expected
        got = np.zeros(1) if got is None else got.numpy()
        np.testing.assert_allclose(got, np.broadcast_to(whole, got.shape), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy(batch, smoothing):
    logits, _, _, truth, _ = parts(batch)
    target = (1 - smoothing) * truth + smoothing / CLASSES
    loss = -(target * np.log(softmax(logits))).sum() / len(logits)
    check("cross_entropy", batch, loss, (softmax(logits) - target) / len(logits), label_smoothing=smoothing)


@pytest.mark.parametrize("weight", [8.0, 0.5])
def test_kgcoop(batch, weight):
    logits, text, _, truth, _ = parts(batch)
    template = batch[2].text_embeds.numpy()
    cosine = (text * template).sum(-1, keepdims=True)
    loss = -(truth * np.log(softmax(logits))).sum() / len(logits) + weight * (1 - cosine).mean()
    # d cos / dt = t⁰ - cos · t, for vectors of length 1
    gradient = -weight * (template - cosine * text) / CLASSES
    check("kgcoop", batch, loss, (softmax(logits) - truth) / len(logits), text=gradient, weight=weight)
    # the paper's squared distance is twice 1 - cos
    np.testing.assert_allclose(((text - template) ** 2).sum(-1, keepdims=True), 2 * (1 - cosine))


@pytest.mark.parametrize("templates", [None, ["a {}.", "the {}."]])
def test_promptsrc(batch, templates):
    logits, text, image, truth, keep = parts(batch)
    t0 = (batch[2].ensemble_embeds(templates) if templates else batch[2].text_embeds).numpy()
    v0 = batch[2].image_embeds.numpy()[keep]
    p, p0, count = softmax(logits), softmax(SCALE * v0 @ t0.T), len(logits)
    loss = -(truth * np.log(p)).sum() / count + 25 * np.abs(text - t0).mean() + 10 * np.abs(image - v0).mean()
    loss += (p0 * np.log(p0 / p)).sum() / (count * CLASSES)
    check(
        "promptsrc",
        batch,
        loss,
        (p - truth) / count + (p - p0) / (count * CLASSES),
        text=25 * np.sign(text - t0) / text.size,
        image=10 * np.sign(image - v0) / image.size,
        templates=templates,
    )


def test_sigmoid(batch):
    logits, _, _, truth, _ = parts(batch)
    signs = 2 * truth - 1
    loss = np.log1p(np.exp(-signs * logits)).sum() / len(logits)
    check("sigmoid", batch, loss, (1 / (1 + np.exp(-logits)) - truth) / len(logits))


@pytest.mark.parametrize("weight, temperature, seed", [(1.0, 1.0, 0), (0.8, 2.0, 2), (1.0, 1.0, 6), (0.8, 2.0, 8)])
def test_prograd(weight, temperature, seed):
    # A linear model, whose gradients are known: logits = x W + b. Each parameter is projected for itself.
    rng = np.random.default_rng(seed)
    x, w, b = rng.normal(size=(IMAGES, DIM)), rng.normal(size=(DIM, CLASSES)), rng.normal(size=CLASSES)
    logits0, labels = 4 * rng.normal(size=(IMAGES, CLASSES)), np.array([0, 3, 1, 1, -100])
    keep = labels != -100
    parameters = [torch.tensor(w, requires_grad=True), torch.tensor(b, requires_grad=True)]
    frozen = SimpleNamespace(
        logits=torch.tensor(logits0),
        parameters=parameters,
        gradients=lambda loss: torch.autograd.grad(loss, parameters, retain_graph=True),
    )
    output = SimpleNamespace(logits=torch.tensor(x) @ parameters[0] + parameters[1])
    value = OBJECTIVES["prograd"](output, torch.tensor(labels), frozen, weight=weight, temperature=temperature)
    logits, truth, count = (x @ w + b)[keep], np.eye(CLASSES)[labels[keep]], keep.sum()
    assert value.item() == pytest.approx(-(truth * np.log(softmax(logits))).sum() / count)
    by_logits = (softmax(logits) - truth) / count
    general = temperature * (softmax(logits / temperature) - softmax(logits0[keep] / temperature)) / count
    conflicts = 0
    for got, jacobian in zip(torch.autograd.grad(value, parameters), (x[keep], np.ones((count, 1)))):
        g, general_g = jacobian.T @ by_logits, jacobian.T @ general
        if (g * general_g).sum() < 0:
            unit = general_g / np.linalg.norm(general_g)
            g, conflicts = g - weight * (g * unit).sum() * unit, conflicts + 1
        np.testing.assert_allclose(got.numpy().reshape(g.shape), g, rtol=1e-9, atol=1e-12)
    assert conflicts == {0: 0, 2: 1, 6: 1, 8: 2}[seed]


def test_names_and_keywords_are_checked_before_work(tmp_path):
    with pytest.raises(ValueError, match="'kgcoop'.*got 'kg'"):
        get_objective("kg")
    with pytest.raises(ValueError, match="'sigmoid'.*label_smoothing=0.1"):
        arguments(tmp_path, objective="sigmoid", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="unexpected keyword argument 'wieght'"):
        arguments(tmp_path, objective="kgcoop", objective_kwargs={"wieght": 1.0})
    assert arguments(tmp_path, objective="kgcoop", objective_kwargs='{"weight": 4}').objective_kwargs == {"weight": 4}


# ---------------------------------------------------------------------- through the trainer


def hand_gradient(model, data, objective):
    """The gradient by the context, from the formulas, on the data set at once."""
    templates = PROMPTSRC_TEMPLATES if objective == "promptsrc" else ["a photo of a {}."]
    t0 = 0
    for template in templates:
        texts = [template.replace("{}", name) for name in model.class_names]
        with torch.no_grad():
            inputs = model.tokenizer(texts, padding=True, return_tensors="pt")
            t0 = t0 + model.get_base_model().get_text_features(**inputs).pooler_output
    t0 = F.normalize(t0, dim=-1)
    output = model(image_embeds=data.image_embeds[0], labels=data.labels)
    p0 = (model.logit_scale * output.image_embeds @ t0.T).softmax(-1).detach()
    log_p = output.logits.log_softmax(-1)
    ce = -log_p[range(len(data)), data.labels].mean()

    def gradient(loss):
        return torch.autograd.grad(loss, model.context, retain_graph=True)[0]

    if objective == "kgcoop":
        return gradient(ce + 8 * (1 - (output.text_embeds * t0).sum(-1)).mean())
    if objective == "sigmoid":
        signs = 2 * torch.eye(len(t0))[data.labels] - 1
        return gradient(torch.log1p((-signs * output.logits).exp()).sum(-1).mean())
    if objective == "promptsrc":
        divergence = (p0 * (p0.log() - log_p)).mean()
        return gradient(ce + 25 * (output.text_embeds - t0).abs().mean() + divergence)
    g, general = gradient(ce), gradient(-(p0 * log_p).sum(-1).mean())
    unit = general / general.norm()
    assert (g * unit).sum() < 0, "a case without a conflict shows nothing"
    return g - (g * unit).sum() * unit


def one_step(model, folder, data, **given):
    start = model.context.detach().clone()
    defaults = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "lr_scheduler_type": "constant"}
    trainer = CoOpTrainer(model, arguments(folder, max_steps=1, **{**defaults, **given}), data)
    trainer.train()
    return start - model.context.detach()


@pytest.mark.parametrize("objective", ["kgcoop", "prograd", "promptsrc", "sigmoid"])
@pytest.mark.parametrize("given", [{}, {"text_chunk_size": 2}, {"gradient_accumulation_steps": 3}])
def test_a_step_of_the_trainer(base, processor, tmp_path, objective, given):
    data = embedded(24, seed=4)
    if objective == "prograd" and "gradient_accumulation_steps" in given:
        with pytest.raises(ValueError, match="'prograd' needs the gradient of the whole batch"):
            one_step(make_model(base, processor), tmp_path, data, objective=objective, **given)
        return
    expected = hand_gradient(make_model(base, processor), data, objective)
    step = one_step(make_model(base, processor), tmp_path, data, objective=objective, **given)
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)


def test_an_objective_of_ones_own(base, processor, tmp_path):
    def focal(output, labels, frozen, gamma=2.0):
        log_p = output.logits.log_softmax(-1).gather(1, labels[:, None])
        return -((1 - log_p.exp()) ** gamma * log_p).mean()

    data, model = embedded(24), make_model(base, processor)
    output = model(image_embeds=data.image_embeds[0])
    expected = torch.autograd.grad(focal(output, data.labels, None, 3.0), model.context)[0]
    given = {"objective": focal, "objective_kwargs": {"gamma": 3.0}, "save_strategy": "steps", "save_steps": 1}
    step = one_step(model, tmp_path, data, **given)
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)
    assert "focal" in (tmp_path / "checkpoint-1" / "training_args.json").read_text()


def test_the_evaluation_measures_cross_entropy_or_the_sigmoid_loss(base, processor, tmp_path):
    data, model = embedded(10), make_model(base, processor)
    with torch.no_grad():
        logits = model(image_embeds=data.image_embeds[0]).logits
    signs = 2 * torch.eye(3)[data.labels] - 1
    expected = {
        "kgcoop": F.cross_entropy(logits, data.labels),
        "sigmoid": -F.logsigmoid(signs * logits).sum(-1).mean(),
    }
    for objective, loss in expected.items():
        args = arguments(tmp_path, objective=objective, per_device_eval_batch_size=4)
        trainer = CoOpTrainer(model, args, data, eval_dataset=data)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_prograd_learns_on_images_too(base, processor, tmp_path):
    given = {"objective": "prograd", "recipe": "paper", "num_train_epochs": 2, "learning_rate": 0.1}
    results = []
    for cached in (True, False):
        model = make_model(base, processor)
        CoOpTrainer(model, arguments(tmp_path, cache_features=cached, **given), pictures()).train()
        results.append(model.context.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    assert math.isfinite(results[0].sum())


# ---------------------------------------------------------------------- on other methods and families


def of_the_reference(model, pixels):
    """What a model learns as free tensors, and the logits, class and image embeddings that the reference gives."""
    method, base, tokenizer = model.config.method, model.get_base_model(), model.tokenizer
    tensors = {name: p.detach().clone().requires_grad_() for name, p in model.learned_parameters().items()}
    if method == "cocoop":
        net = [tensors[f"meta_net.linear{layer}.{kind}"] for layer in (1, 2) for kind in ("weight", "bias")]
        text, image = reference.cocoop_features(base, tokenizer, NAMES, pixels, tensors["context"], net)
    elif method == "tcp":
        net = [tensors[f"meta_net.linear{layer}.{kind}"] for layer in (1, 2) for kind in ("weight", "bias")]
        layer = model.config.layer
        text, image = reference.tcp_features(base, tokenizer, NAMES, pixels, tensors["context"], net, layer=layer)
    else:
        prompts = [tensors["context"], *tensors["deep_text"]]
        if method == "maple":
            pairs = [(tensors[f"couplings.{k}.weight"], tensors[f"couplings.{k}.bias"]) for k in range(len(prompts))]
            text, image = reference.maple_features(base, tokenizer, NAMES, pixels, prompts, pairs)
        else:
            visual = list(tensors["visual"])
            text, image = reference.ivlp_features(base, tokenizer, NAMES, pixels, prompts, visual, "of a {}.")
    outputs = {"text": reference.normalised(text), "image": reference.normalised(image)}
    outputs["logits"] = reference.cosine_logits(base, text, image)
    return tensors, outputs


def reference_gradients(model, pixels, labels, objective):
    """The gradient of each learned tensor, by the references of methods and objectives."""
    base, tokenizer = model.get_base_model(), model.tokenizer
    tensors, outputs = of_the_reference(model, pixels)
    with torch.no_grad():
        text = reference.template_features(base, tokenizer, NAMES)
        if objective == "promptsrc":
            text = reference.ensemble_features(base, tokenizer, NAMES, PROMPTSRC_TEMPLATES)
        image = reference.vision_pass(base, pixels)
        frozen_logits = reference.cosine_logits(base, text, image)
        text, image = reference.normalised(text), reference.normalised(image)
    logits = outputs["logits"]
    if objective == "kgcoop":
        _, gradients = reference.kgcoop(logits, labels, outputs["text"], text)
    elif objective == "promptsrc":
        given = (logits, labels, outputs["text"], outputs["image"], text, image, frozen_logits)
        _, gradients = reference.promptsrc(*given)
    else:
        each = (reference.cross_entropy(logits, labels), reference.distillation(logits, labels, frozen_logits))
        data, general = (reference.pull_back(tensors, gradients, **outputs) for _, gradients in each)
        return reference.prograd_gradients(data, general)
    if not outputs["image"].requires_grad:
        gradients.pop("image", None)  # the image tower is left alone
    return reference.pull_back(tensors, gradients, **outputs)


@pytest.mark.parametrize("objective", ["kgcoop", "prograd", "promptsrc"])
@pytest.mark.parametrize("method", ["cocoop", "tcp", "ivlp", "maple"])
@pytest.mark.parametrize("cached", [True, False])
def test_methods_and_objectives_together(tokenizer, processor, tmp_path, method, objective, cached):
    base = reference.make_deep_base(tokenizer, layers=2, vision_layers=2)
    model, data = make_method(method, base, processor), pictures(6)
    pixels = processor(images=data["image"][:], return_tensors="pt")["pixel_values"]
    labels = torch.tensor(data["label"])
    expected = reference_gradients(model, pixels, labels, objective)
    start = {name: p.detach().clone() for name, p in model.learned_parameters().items()}
    one_step(model, tmp_path, data, objective=objective, cache_features=cached)
    for name, parameter in model.learned_parameters().items():
        gradient = start[name].double() - parameter.detach().double()
        scale = expected[name].abs().max().item()
        np.testing.assert_allclose(
            gradient, expected[name].double(), rtol=1e-3, atol=1e-4 * scale + 1e-6, err_msg=name
        )


@pytest.mark.parametrize("objective", ["sigmoid", "kgcoop", "prograd", "promptsrc"])
def test_the_bias_of_siglip_is_in_every_score(tmp_path, objective):
    base, processor = make_family("siglip")
    torch.manual_seed(0)
    model = CoOpModel(base, CoOpConfig(n_ctx=2), class_names=NAMES, processor=processor)
    embeds = torch.randn(1, 12, model.family.projection_dim, generator=torch.Generator().manual_seed(1))
    data = EmbeddedImages(embeds, [i % 3 for i in range(12)])
    output = model(image_embeds=data.image_embeds[0])
    scale, bias = base.logit_scale.exp().item(), base.logit_bias.item()
    t0, image = model.template_embeds(), F.normalize(data.image_embeds[0], dim=-1)
    p0 = (scale * image @ t0.T + bias).softmax(-1)
    torch.testing.assert_close(output.logits, scale * image @ output.text_embeds.T + bias, rtol=1e-4, atol=1e-4)
    log_p = output.logits.log_softmax(-1)
    ce = -log_p[range(12), data.labels].mean()
    signs = 2 * torch.eye(3)[data.labels] - 1
    losses = {
        "sigmoid": torch.log1p((-signs * output.logits).exp()).sum(-1).mean(),
        "kgcoop": ce + 8 * (1 - (output.text_embeds * t0).sum(-1)).mean(),
        "promptsrc": ce + 25 * (output.text_embeds - t0).abs().mean() + (p0 * (p0.log() - log_p)).mean(),
        "prograd": ce,
    }
    expected = torch.autograd.grad(losses[objective], model.context, retain_graph=True)[0]
    if objective == "prograd":
        general = torch.autograd.grad(-(p0 * log_p).sum(-1).mean(), model.context)[0]
        expected = expected - min((expected * general).sum(), 0) * general / (general**2).sum()
    given = {"objective": objective, "objective_kwargs": {"templates": []} if objective == "promptsrc" else None}
    step = one_step(model, tmp_path, data, **given)
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-5)
