import builtins
import csv
import io
import warnings

import numpy as np
import PIL.Image
import pytest

from coop_hf.experiments.plotting import (
    _figure_class,
    plot_confusion_matrix,
    plot_few_shot_curves,
    plot_gains,
    plot_predictions,
)


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
    png = tmp_path / "new" / "curve.png"
    plot_few_shot_curves(RESULTS, png, zero_shot=0.4, spread=spread)
    assert has_image(png)
    rows = rows_of(png.with_suffix(".csv"))
    assert [(row["method"], int(row["shots"]), int(row["seeds"])) for row in rows] == [
        ("zero-shot CLIP", 0, 1), ("CoOp", 1, 2), ("CoOp", 16, 3), ("linear probe", 1, 1), ("linear probe", 16, 1)
    ]  # fmt: skip
    assert float(rows[2]["mean"]) == pytest.approx(0.75) and float(rows[2]["std"]) == pytest.approx(0.05)
    assert float(rows[3]["std"]) == 0.0


def test_gains_are_sorted(tmp_path):
    plot_gains({"Food101": -0.026, "EuroSAT": 0.46, "SUN397": 0.107}, tmp_path / "gains.png")
    assert has_image(tmp_path / "gains.png")
    assert [(row["name"], float(row["gain"])) for row in rows_of(tmp_path / "gains.csv")] == [
        ("EuroSAT", 0.46), ("SUN397", 0.107), ("Food101", -0.026)
    ]  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False])
def test_confusion_matrix(tmp_path, normalize):
    names = ["cat", "dog", "owl"]
    given = {"references": [0, 0, 1, 2], "predictions": [0, 1, 1, 2], "class_names": names}
    figure = plot_confusion_matrix(**given, path=tmp_path / "c.png", normalize=normalize)
    assert has_image(tmp_path / "c.png")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == ({"50", "100"} if normalize else {"1"})
    content = (tmp_path / "c.csv").read_bytes()
    with open(tmp_path / "c.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == names and rows[1:] == [
        ["cat", "1", "1", "0"],
        ["dog", "0", "1", "0"],
        ["owl", "0", "0", "1"],
    ]
    with pytest.warns(FutureWarning, match="by name.*until coop_hf 0.5"):  # predictions first, as it was
        plot_confusion_matrix([0, 1, 1, 2], [0, 0, 1, 2], names, tmp_path / "old.png", normalize=normalize)
    assert (tmp_path / "old.csv").read_bytes() == content
    with pytest.raises(TypeError, match="needs `references="):
        plot_confusion_matrix(predictions=[0], class_names=names)


def test_a_confusion_matrix_of_many_classes_can_be_read():
    for number, written in ((100, 100), (400, 200)):
        names = [f"class number {i}" for i in range(number)]
        figure = plot_confusion_matrix(references=range(number), predictions=range(number), class_names=names)
        figure.draw_without_rendering()
        labels = figure.axes[0].get_yticklabels()
        assert written * 0.6 < len(labels) <= written and labels[-1].get_text() in names
        boxes = [label.get_window_extent() for label in labels]
        assert all(upper.y0 >= lower.y1 - 1 for upper, lower in zip(boxes, boxes[1:]))  # none covers another
        assert min(label.get_fontsize() for label in labels) >= 5 and boxes[0].x0 > 0
        label = figure.axes[0].yaxis.label.get_window_extent()
        assert label.x0 > 0 and label.x1 < min(box.x0 for box in boxes)


def test_figures_are_for_notebooks_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figure = plot_gains({"a": 0.1})
    assert PIL.Image.open(io.BytesIO(figure._repr_png_())).size == tuple(figure.canvas.get_width_height())
    assert not list(tmp_path.iterdir())
    with pytest.warns(FutureWarning, match="return the figure"):
        png, table = plot_gains({"a": 0.1}, tmp_path / "a.png")
    assert has_image(png) and rows_of(table)[0]["gain"] == "0.1"


def test_fonts_for_other_scripts(monkeypatch):
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    default = set(get_font(findfont(FontProperties())).get_charmap())
    installed = [font for font in fontManager.ttflist if font.name.startswith(("DejaVu", "STIX", "cmr10"))]
    monkeypatch.setattr(fontManager, "ttflist", installed)
    other = next(font for font in installed if font.name == "STIXGeneral" and font.style == "normal")
    character = chr(min(set(get_font(other.fname).get_charmap()) - default))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_gains({f"name {character}": 0.1})
        figure._repr_png_()  # matplotlib warns here of what it cannot draw
    labels = figure.axes[0].get_yticklabels()
    assert labels[0].get_fontfamily()[-1].startswith("STIX") and labels[0].get_text().endswith(character)
    with pytest.warns(UserWarning, match="no installed font has the characters '犬猫'.*apt install fonts-noto-cjk"):
        plot_gains({"猫": 0.1, "犬": 0.2})


def test_predictions(tmp_path):
    images = [PIL.Image.new("RGB", (20, 20), "red"), np.zeros((8, 8), dtype=np.uint8)]
    before = [[{"label": "dog", "score": 0.6}], [{"label": "owl", "score": 0.5}]]
    after = [[{"label": "cat", "score": 0.9}], [{"label": "owl", "score": 0.7}]]
    plot_predictions(images, before, after, ["cat", "owl"], tmp_path / "p.png")
    assert has_image(tmp_path / "p.png")
    assert rows_of(tmp_path / "p.csv")[0] == {
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
        plot_confusion_matrix(predictions=[0, 2], references=[0, 1], class_names=["a", "b"])
    with pytest.raises(ValueError, match="as many images"):
        plot_predictions([1], [], [], [], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib(monkeypatch, tmp_path):
    def refuse(name, *args, real=builtins.__import__, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    _figure_class.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"coop_hf\[plot\]"):
        plot_gains({"a": 0.1}, tmp_path / "a.png")
