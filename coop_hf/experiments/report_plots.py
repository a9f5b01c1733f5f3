"""The plots of a comparison, as SVG that stands in its page."""

import importlib.util
import io
import re
from typing import Any

import numpy as np

from . import report
from .plotting import tidy


__all__ = ["calibration", "curves", "differences", "gains", "has_matplotlib"]

BLUE, RED, GREY, PALE = "#0072B2", "#C4451C", "#8a8a8a", "#cfcfcf"

COLUMNS = 5  # small plots in a row


def has_matplotlib() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, and the same figure is the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "coop_hf", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", text, flags=re.S)


def _named_rows(results: dict, names: list[str], xlabel: str) -> tuple[Any, Any]:
    """A figure and its axes for methods below one another, the last on top."""
    figure = _figure(7.4, 0.6 + 0.235 * len(names))
    axes = figure.add_subplot()
    tidy(axes, "x", labelsize=8)
    axes.set_yticks(range(len(names)), [report.title(results, name) for name in names])
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlabel(xlabel, fontsize=9)
    return figure, axes


def _grid(count: int, height: float = 1.75) -> tuple[Any, list[Any]]:
    """Small plots in rows, and their axes; those that are left over are not drawn."""
    columns = min(COLUMNS, count)
    lines = -(-count // columns)
    figure = _figure(2.15 * columns + 0.3, height * lines + 0.45)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for rest in axes[count:]:
        rest.set_visible(False)
    for place in axes[:count]:
        tidy(place, labelsize=8)
    for place in axes[max(0, count - columns) : count]:
        place.tick_params(labelbottom=True)
    return figure, list(axes[:count])


def curves(results: dict, data: str) -> str:
    """Accuracy over the number of shots: a small plot for each method that learns, the others in grey behind it."""
    shots, found = report.accuracy_rows(results, "few_shot", data, "accuracy")
    learned = {name: own for name, own in found.items() if 0 not in own}
    if not learned or len(shots) == 1:
        return _dots(results, found, shots)
    flat = results["settings"]["reference"]
    figure, places = _grid(len(learned))
    for axes, (name, own) in zip(places, learned.items()):
        for other in learned.values():
            axes.plot(list(other), [100 * r["mean"] for r in other.values()], color=PALE, linewidth=0.8, zorder=1)
        mean = np.array([100 * row["mean"] for row in own.values()])
        std = np.array([100 * (row["std"] or 0) for row in own.values()])
        axes.fill_between(list(own), mean - std, mean + std, color=BLUE, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(list(own), mean, color=BLUE, marker="o", markersize=3.5, linewidth=1.6, zorder=3)
        if 0 in found.get(flat, {}):
            axes.axhline(100 * found[flat][0]["mean"], color="#333333", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.set_title(report.title(results, name), fontsize=8.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(k) for k in shots])
        axes.minorticks_off()
    figure.supxlabel("labelled images of each class", fontsize=9)
    figure.supylabel("accuracy, %", fontsize=9)
    return _svg(figure)


def _dots(results: dict, found: dict[str, dict[int, dict]], shots: list[int]) -> str:
    """One number of shots: the methods below one another, the best on top."""
    at_most = {name: own.get(max(shots)) or own.get(0) for name, own in found.items()}
    rows = sorted(((name, row) for name, row in at_most.items() if row), key=lambda item: item[1]["mean"])
    figure, axes = _named_rows(results, [name for name, _ in rows], "accuracy, % (grey: nothing learned)")
    for place, (_, row) in enumerate(rows):
        axes.errorbar(
            100 * row["mean"], place, xerr=100 * (row["std"] or 0), color=BLUE if row["shots"] else GREY, marker="o",
            markersize=4.5, capsize=2.5, linewidth=1.3,
        )  # fmt: skip
    return _svg(figure)


def gains(results: dict, protocol: str, data: str, shots: int) -> str:
    """Bars of the gains over the reference on one data set, the largest on top."""
    found = report.compare(results, protocol, report.main_test(protocol), shots)
    rows = sorted(((d["by_data"][data], name) for name, d in found.items() if data in d["by_data"]))
    if not rows:
        return ""
    score = "harmonic mean" if protocol == "base_to_new" else "accuracy"
    reference = results["methods"][results["settings"]["reference"]]["title"]
    figure, axes = _named_rows(results, [name for _, name in rows], f"gain over {reference}, {score}, points")
    values = [100 * value for value, _ in rows]
    bars = axes.barh(range(len(rows)), values, color=[BLUE if v >= 0 else RED for v in values], height=0.66)
    axes.bar_label(bars, labels=[f"{v:+.1f}".replace("-", "−") for v in values], padding=3, fontsize=8)
    axes.axvline(0, color="#333333", linewidth=0.9)
    axes.margins(x=0.12)
    return _svg(figure)


def differences(results: dict, protocol: str, test: str, shots: int) -> str:
    """Mean differences to the reference with both intervals, the largest on top."""
    found = sorted(report.compare(results, protocol, test, shots).items(), key=lambda item: item[1]["mean"])
    if not found:
        return ""
    ends = [100 * e for _, d in found for e in (*(d["over_draws"] or ()), d["mean"])]
    low, high = min(0, *ends), max(0, *ends)
    room = 0.35 * max(high - low, 1)
    xlabel = "difference, points (open: with knowledge from outside)"
    figure, axes = _named_rows(results, [name for name, _ in found], xlabel)
    for place, (name, difference) in enumerate(found):
        outside = results["methods"][name]["group"] == report.GROUPS[2]
        for which, width, colour in (("over_data", 1.0, GREY), ("over_draws", 3.2, BLUE)):
            if difference[which] is not None:
                axes.plot([100 * e for e in difference[which]], [place, place], color=colour, linewidth=width)
        fill = "white" if outside else BLUE
        axes.plot(100 * difference["mean"], place, "o", color=BLUE, markerfacecolor=fill, markersize=5, zorder=4)
    axes.set_xlim(low - room, high + room)  # what is wider than the plot runs out of it
    axes.axvline(0, color="#333333", linewidth=0.9)
    return _svg(figure)


def calibration(results: dict, data: str, shots: int) -> str:
    """Accuracy over confidence, a small plot for each method."""
    _, found = report.accuracy_rows(results, "few_shot", data, "accuracy")
    figure, places = _grid(len(found), 2.05)
    for axes, name in zip(places, found):
        cells = [
            entry["details"]["accuracy"]
            for entry in report.cells_of(results, protocol="few_shot", data=data, method=name)
            if entry["cell"]["shots"] in (shots, 0)
        ]
        axes.set_title(report.title(results, name), fontsize=8.5)
        if not cells:
            continue
        bins = np.array([cell["bins"] for cell in cells], dtype=float)  # (draws, bins, 3)
        counts = bins[:, :, 0].sum(axis=0)
        accuracy = (bins[:, :, 0] * bins[:, :, 2]).sum(axis=0) / np.maximum(counts, 1)
        number = len(counts)
        middles = (np.arange(number) + 0.5) / number
        colours = [BLUE if count >= 0.01 * counts.sum() else "#b9d7e8" for count in counts]
        axes.bar(middles, accuracy, width=0.92 / number, color=colours)
        axes.plot([0, 1], [0, 1], color="#333333", linewidth=0.8, linestyle=(0, (4, 3)))
        error = float(np.mean([cell["ece"] for cell in cells]))
        axes.text(
            0.04, 0.93, f"ECE {100 * error:.1f} %", transform=axes.transAxes, fontsize=8, va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
    figure.supxlabel("confidence", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    return _svg(figure)
