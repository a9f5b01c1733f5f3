import builtins
import csv

import numpy as np
import PIL.Image
import pytest

from coop_hf.experiments.plotting import plot_confusion_matrix, plot_few_shot_curves, plot_gains, plot_predictions


pytest.importorskip("matplotlib", reason="matplotlib is not installed")

RESULTS = {"CoOp": {16: [0.7, 0.8, 0.75], 1: [0.5, 0.5]}, "linear probe": {1: 0.3, 16: 0.72}}


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def has_image(path):
    pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
    return min(pixels.shape[:2]) > 100 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize("spread", ["band", "bars", "none"])
def test_few_shot_curves(tmp_path, spread):
    png, table = plot_few_shot_curves(RESULTS, tmp_path / "new" / "curve.png", zero_shot=0.4, spread=spread)
    assert has_image(png)
    rows = rows_of(table)
    assert [(row["method"], int(row["shots"]), int(row["seeds"])) for row in rows] == [
        ("zero-shot CLIP", 0, 1), ("CoOp", 1, 2), ("CoOp", 16, 3), ("linear probe", 1, 1), ("linear probe", 16, 1)
    ]  # fmt: skip
    assert float(rows[2]["mean"]) == pytest.approx(0.75) and float(rows[2]["std"]) == pytest.approx(0.05)
    assert float(rows[3]["std"]) == 0.0


def test_gains_are_sorted(tmp_path):
    png, table = plot_gains({"Food101": -0.026, "EuroSAT": 0.46, "SUN397": 0.107}, tmp_path / "gains.png")
    assert has_image(png)
    assert [(row["name"], float(row["gain"])) for row in rows_of(table)] == [
        ("EuroSAT", 0.46), ("SUN397", 0.107), ("Food101", -0.026)
    ]  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False])
def test_confusion_matrix(tmp_path, normalize):
    names = ["cat", "dog", "owl"]
    png, table = plot_confusion_matrix([0, 1, 1, 2], [0, 0, 1, 2], names, tmp_path / "c.png", normalize=normalize)
    assert has_image(png)
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == names and rows[1:] == [
        ["cat", "1", "1", "0"],
        ["dog", "0", "1", "0"],
        ["owl", "0", "0", "1"],
    ]


def test_predictions(tmp_path):
    images = [PIL.Image.new("RGB", (20, 20), "red"), np.zeros((8, 8), dtype=np.uint8)]
    before = [[{"label": "dog", "score": 0.6}], [{"label": "owl", "score": 0.5}]]
    after = [[{"label": "cat", "score": 0.9}], [{"label": "owl", "score": 0.7}]]
    png, table = plot_predictions(images, before, after, ["cat", "owl"], tmp_path / "p.png")
    assert has_image(png)
    assert rows_of(table)[0] == {
        "index": "0", "label": "cat", "before": "dog", "before_score": "0.6", "after": "cat", "after_score": "0.9"
    }  # fmt: skip


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="divide percentages"):
        plot_few_shot_curves({"CoOp": {1: [55.0]}}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_few_shot_curves({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="must end in .png"):
        plot_gains({"a": 0.1}, tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="divide percentage points"):
        plot_gains({"a": 4.5}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="from 0 to 1"):
        plot_confusion_matrix([0, 2], [0, 1], ["a", "b"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="as many images"):
        plot_predictions([1], [], [], [], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib(monkeypatch, tmp_path):
    def refuse(name, *args, real=builtins.__import__, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"coop_hf\[plot\]"):
        plot_gains({"a": 0.1}, tmp_path / "a.png")
