import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EvalPrediction

from coop_hf.training.metrics import ClassificationAccuracy, classification_scores, make_compute_metrics


NAMES = ["cat", "dog", "owl", "yak"]


def test_closed_form():
    scores = classification_scores([0, 0, 1, 2], [0, 1, 1, 1], class_names=NAMES)
    # F1 of cat: 2·1 / (2 predicted + 1 true); of dog: 2·1 / (1 + 3); of owl, predicted once, never true: 0; no yak
    assert scores["accuracy"] == 0.5
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert scores["per_class_accuracy"] == {"cat": 1.0, "dog": pytest.approx(1 / 3), "owl": None, "yak": None}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60))
def test_agrees_with_sklearn(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions, references = np.array(pairs).T
    scores = classification_scores(predictions, references, num_classes=6)
    assert scores["accuracy"] == pytest.approx(sklearn.accuracy_score(references, predictions))
    f1 = sklearn.f1_score(references, predictions, average="macro", zero_division=0)
    assert scores["macro_f1"] == pytest.approx(f1)
    present = np.unique(references)
    recall = sklearn.recall_score(references, predictions, labels=present, average=None, zero_division=0)
    per_class = scores["per_class_accuracy"]
    assert [per_class[str(label)] for label in present] == pytest.approx(list(recall))
    assert all((per_class[str(label)] is None) == (label not in present) for label in range(6))


def test_metric_needs_no_hub_and_adds_batches(tmp_path):
    metric = ClassificationAccuracy(cache_dir=str(tmp_path))
    expected = classification_scores([0, 1, 1, 3], [0, 1, 2, 3], class_names=NAMES)
    assert metric.compute(predictions=np.array([0, 1, 1, 3]), references=[0, 1, 2, 3], class_names=NAMES) == expected
    for prediction, reference in ((0, 0), (1, 1), (1, 2), (3, 3)):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute(class_names=NAMES) == expected
    on_disk = ClassificationAccuracy(cache_dir=str(tmp_path), keep_in_memory=False)
    assert on_disk.compute(predictions=[0, 1, 1, 3], references=[0, 1, 2, 3], class_names=NAMES) == expected


def test_trainer_function_takes_logits_tuples_and_ids():
    logits = np.eye(4)[[0, 1, 1, 3]]
    references = np.array([0, 1, 2, 3])
    function = pickle.loads(pickle.dumps(make_compute_metrics(NAMES)))
    expected = {"accuracy": 0.75, "macro_f1": pytest.approx((1 + 2 / 3 + 0 + 1) / 4)}
    for predictions in (logits, (logits, np.zeros((4, 8))), np.array([0, 1, 1, 3])):
        assert function(EvalPrediction(predictions=predictions, label_ids=references)) == expected
    scores = make_compute_metrics(NAMES, per_class=True)(EvalPrediction(logits, np.array([0, 0, 1, 1])))
    assert scores["accuracy_per_class/cat"] == 0.5 and "accuracy_per_class/yak" not in scores
    assert all(type(value) is float for value in scores.values())


@pytest.mark.parametrize(
    "predictions, references, options, message",
    [
        ([0, 1], [0], {}, "as many predictions as references, at least one, got 2 and 1"),
        ([], [], {}, "got 0 and 0"),
        ([0, 4], [0, 1], {"class_names": NAMES}, "`predictions` has 4 at position 1, but there are 4 classes"),
        ([0, 1], [-100, 1], {"num_classes": 2}, "`references` has -100 at position 0"),
        ([0.5], [0], {}, "must be class indices"),
        ([[0]], [0], {}, r"shape \(1, 1\)"),
        ([0], [0], {"class_names": NAMES, "num_classes": 3}, "`num_classes` is 3, but there are 4 `class_names`"),
    ],
)
def test_bad_scores(predictions, references, options, message):
    with pytest.raises(ValueError, match=message):
        classification_scores(predictions, references, **options)


def test_bad_logits():
    logits = np.zeros((2, 4))
    logits[1, 2] = np.nan
    with pytest.raises(ValueError, match="example 1 hold NaN"):
        make_compute_metrics(NAMES)(EvalPrediction(logits, np.array([0, 1])))
    with pytest.raises(ValueError, match="3 columns, but there are 4 class names"):
        make_compute_metrics(NAMES)(EvalPrediction(np.zeros((2, 3)), np.array([0, 1])))
