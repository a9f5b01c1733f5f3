import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coop_hf.baselines.linear_probe import COARSE_C, LinearProbe, fit_linear_probe


sklearn = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
FEATURES = SHARED / "clip_vit_b32_features" / "caltech101_openai_clip_vitb32_image.npz"
needs_features = pytest.mark.skipif(not FEATURES.is_file(), reason="no ../shared/data/clip_vit_b32_features here")


def clusters(num_classes=4, per_class=12, dim=6, noise=0.9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num_classes).repeat(per_class)
    return centres[labels] + noise * torch.randn(len(labels), dim, generator=generator), labels


def reference_search(train, val, num_steps=8):
    """The search written down again, from its description, without memory of earlier fits."""
    (x, y), (val_x, val_y) = train, val

    def fit(c):
        model = sklearn.LogisticRegression(C=c, max_iter=1000).fit(x, y)
        return (model.predict(val_x) == val_y).mean(), c

    scores = [fit(c) for c in (1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6)]
    best = max(scores, key=lambda pair: pair[0])
    low, high, seen = best[1] / 10, best[1] * 10, list(scores)
    for _ in range(num_steps):
        pair = fit(low), fit(high)
        seen += pair
        middle = np.sqrt(low * high)
        winner = pair[1] if pair[0][0] < pair[1][0] else pair[0]
        low, high = (middle, high) if winner is pair[1] else (low, middle)
    return winner, max(seen, key=lambda pair: pair[0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_search_is_the_published_one(seed):
    train = [t.double().numpy() for t in clusters(seed=seed)]
    val = [t.double().numpy() for t in clusters(seed=seed + 10)]
    train[1], val[1] = train[1].astype(int), val[1].astype(int)
    probe = fit_linear_probe(*map(torch.tensor, train), *map(torch.tensor, val), normalize=False)
    last, best = reference_search([train[0].astype("f4").astype("f8"), train[1]], val)
    expected = last if last[0] == best[0] else best
    assert probe.val_accuracy == expected[0] and probe.c == pytest.approx(expected[1])
    assert [entry["c"] for entry in probe.search[:7]] == pytest.approx(list(COARSE_C))


def test_weights_minimise_the_stated_objective():
    features, labels = clusters()
    probe = fit_linear_probe(features, labels, features, labels, coarse=[0.5], num_steps=0, normalize=True)
    weight, bias = probe.weight.double().requires_grad_(), probe.bias.double().requires_grad_()
    x = torch.nn.functional.normalize(features, dim=-1).double()
    losses = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels, reduction="sum")
    (0.5 * weight.square().sum() + 0.5 * losses).backward()
    assert weight.grad.abs().max() < 5e-3 and bias.grad.abs().max() < 5e-3  # a minimum; the start has about 5
    assert probe.c == pytest.approx(0.5)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_logits_are_scikit_learns_probabilities(num_classes):
    features, labels = clusters(num_classes)
    probe = fit_linear_probe(features, labels, features, labels, coarse=[1.0], num_steps=0, normalize=False)
    model = sklearn.LogisticRegression(C=1.0, max_iter=1000).fit(features.double().numpy(), labels.numpy())
    expected = model.predict_proba(features.double().numpy())
    np.testing.assert_allclose(probe.logits(features).softmax(dim=-1).numpy(), expected, atol=1e-5)


def test_classes_without_examples_are_never_predicted(tmp_path):
    features, labels = clusters(4)
    keep = labels != 2
    names = ["cat", "dog", "owl", "yak"]
    probe = fit_linear_probe(features[keep], labels[keep], features, labels, class_names=names)
    assert probe.weight.shape == (4, 6) and not (probe.logits(features).argmax(dim=1) == 2).any()
    probe.save_pretrained(tmp_path)
    assert torch.equal(LinearProbe.from_pretrained(tmp_path).bias, probe.bias)


def test_save_and_load(tmp_path):
    features, labels = clusters()
    probe = fit_linear_probe(features, labels, *clusters(seed=5), class_names=["a b", "c", "d", "e"])
    probe.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["linear_probe.safetensors", "linear_probe_config.json"]
    loaded = LinearProbe.from_pretrained(tmp_path)
    assert torch.equal(loaded.logits(features), probe.logits(features))
    assert (loaded.class_names, loaded.c, loaded.normalize) == (probe.class_names, probe.c, True)
    assert loaded.search == probe.search and loaded.val_accuracy == probe.val_accuracy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["a"]}, "4 classes"),
        ({"normalize": 1}, "normalize"),
        ({"format_version": 9}, "format version 9"),
        (None, "not a usable linear probe"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    probe = fit_linear_probe(*clusters(), *clusters(seed=5), coarse=[1.0], num_steps=0)
    probe.save_pretrained(tmp_path)
    if change is None:
        (tmp_path / "linear_probe.safetensors").write_bytes(b"nonsense")
    else:
        path = tmp_path / "linear_probe_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        LinearProbe.from_pretrained(tmp_path)


def test_errors_say_what_is_wrong():
    features, labels = clusters()
    with pytest.raises(ValueError, match="NaN or infinity in row 1"):
        fit_linear_probe(torch.tensor([[1.0], [float("nan")]]), [0, 1], features, labels)
    with pytest.raises(ValueError, match="48 class indices"):
        fit_linear_probe(features, labels[:5], features, labels)
    with pytest.raises(ValueError, match="go from 0 to 1"):
        fit_linear_probe(features, labels, features, labels, class_names=["a", "b"])
    with pytest.raises(ValueError, match="at least two classes"):
        fit_linear_probe(features, 0 * labels, features, labels)
    with pytest.raises(ValueError, match="dimensions"):
        fit_linear_probe(features, labels, features[:, :2], labels)
    probe = fit_linear_probe(features, labels, features, labels, coarse=[1.0], num_steps=0)
    with pytest.raises(ValueError, match="fitted on 6"):
        probe.logits(torch.ones(1, 3))


def test_missing_scikit_learn(monkeypatch):
    def refuse(name, *args, real=builtins.__import__, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"coop_hf\[probe\]"):
        fit_linear_probe(*clusters(), *clusters())


def caltech_accuracy(shots):
    """Test accuracy with min(shots, 4) validation images a class, as in the paper."""
    data = np.load(FEATURES, allow_pickle=False)
    rng, labels = np.random.default_rng(1), data["val_labels"]
    rows = [rng.permutation(np.flatnonzero(labels == c))[: min(shots, 4)] for c in range(100)]
    rows = np.concatenate(rows)
    train = data[f"fewshot{shots}_features"], data[f"fewshot{shots}_labels"]
    probe = fit_linear_probe(*train, data["val_features"][rows], labels[rows])
    predictions = probe.logits(data["test_features"]).argmax(dim=1).numpy()
    return float((predictions == data["test_labels"]).mean())


@needs_features
def test_real_features_at_16_shots():
    assert caltech_accuracy(16) >= 0.92  # measured: 0.9379


@needs_features
@pytest.mark.slow
def test_real_features_curve():
    curve = [caltech_accuracy(shots) for shots in (1, 2, 4, 8, 16)]
    assert curve == pytest.approx([0.7765, 0.8515, 0.9043, 0.9205, 0.9379], abs=0.01)
