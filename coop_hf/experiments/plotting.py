"""Images of results, in the paper's style: few-shot curves, gains, confusion matrices, predictions before and after.

Each function writes a PNG and, beside it, a CSV file with the same data.
"""

import csv
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


__all__ = ["plot_confusion_matrix", "plot_few_shot_curves", "plot_gains", "plot_predictions"]

# Colours that stay apart for colour-blind readers (Okabe and Ito), the first for what the library is about.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")

_DPI = 150


def _new_figure(width: float, height: float) -> Any:
    """A figure without pyplot: no global state, no window, any thread."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: `pip install coop_hf[plot]`.") from error
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _check_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"`path` must end in .png (the CSV file gets the same name), got {str(path)!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write(figure: Any, path: Path, header: list[str], rows: list) -> tuple[str, str]:
    csv_path = path.with_suffix(".csv")
    figure.savefig(path)
    with open(csv_path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return str(path), str(csv_path)


def _tidy(axes: Any, grid: str = "both") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_few_shot_curves(
    results: dict,
    path: str | os.PathLike,
    zero_shot: dict[str, float] | float | None = None,
    title: str | None = None,
    spread: str = "band",
) -> tuple[str, str]:
    """Accuracy over the number of shots, one curve for each method (figure 3 of https://arxiv.org/abs/2109.01134).

    Args:
        results (`dict[str, dict[int, list[float]]]`): `{method: {shots: [accuracy of each seed, ...]}}`, accuracies
            as fractions; a single number stands for one seed.
        path (`str` or `os.PathLike`): PNG file; its folder is made if missing.
        zero_shot (`float` or `dict[str, float]`, *optional*): accuracy without training, a star at 0 shots; several by
            name.
        title (`str`, *optional*): stands over the plot, for example the data set.
        spread (`str`, *optional*, defaults to `"band"`): how the standard deviation over seeds is shown: `"band"`,
            `"bars"` or `"none"`. It is that of a sample (n - 1), and 0 for one seed.

    Returns:
        paths of the PNG and of the CSV file with the columns method, shots, mean, std, seeds.

    Raises:
        ImportError: matplotlib is missing (`pip install coop_hf[plot]`).
        ValueError: no results, accuracies that are not fractions, or an unknown `spread`.
    """
    path = _check_path(path)
    if spread not in ("band", "bars", "none"):
        raise ValueError(f"`spread` must be 'band', 'bars' or 'none', got {spread!r}.")
    stars = zero_shot if isinstance(zero_shot, dict) else {} if zero_shot is None else {"zero-shot CLIP": zero_shot}
    if not results and not stars:
        raise ValueError("there is nothing to plot: `results` is empty.")
    rows: list[list[Any]] = []
    curves: dict[str, np.ndarray] = {}
    for name, accuracy in stars.items():
        rows.append([name, 0, _fraction(accuracy, name), 0.0, 1])
    for method, by_shots in results.items():
        points = []
        for shots in sorted(by_shots, key=int):
            values = [_fraction(value, f"{method}, {shots} shots") for value in np.atleast_1d(by_shots[shots])]
            if not values:
                raise ValueError(f"{method} has no accuracies at {shots} shots.")
            std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            points.append((int(shots), float(np.mean(values)), std))
            rows.append([method, int(shots), points[-1][1], std, len(values)])
        curves[method] = np.array(points, dtype=float).reshape(-1, 3)

    many = len(curves) + len(stars) > 4  # their legend has no room between the curves
    figure = _new_figure(7.8 if many else 5.6, 4.2)
    axes = figure.add_subplot()
    for index, (method, curve) in enumerate(curves.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        shot_counts, mean = curve[:, 0], 100 * curve[:, 1]
        spreads = 100 * curve[:, 2]
        axes.plot(shot_counts, mean, color=colour, marker=marker, markersize=5, linewidth=1.8, label=method, zorder=3)
        if spread == "band":
            axes.fill_between(shot_counts, mean - spreads, mean + spreads, color=colour, alpha=0.15, linewidth=0)
        elif spread == "bars":
            axes.errorbar(shot_counts, mean, spreads, color=colour, linestyle="none", capsize=3, linewidth=1.2)
    for index, (name, accuracy) in enumerate(stars.items()):
        colour = ("#000000", "#777777", "#AA7700", "#6A3D9A")[index % 4]
        axes.plot([0], [100 * accuracy], "*", color=colour, markersize=13, label=name, clip_on=False, zorder=4)
    ticks = sorted({int(row[1]) for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(left=min(0, ticks[0]) - 0.02 * max(ticks[-1], 1))
    axes.set_xlabel("labelled training examples per class")
    axes.set_ylabel("accuracy (%)")
    if title:
        axes.set_title(title)
    _tidy(axes)
    axes.legend(frameon=False, fontsize=9, **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if many else {}))
    return _write(figure, path, ["method", "shots", "mean", "std", "seeds"], rows)


def _fraction(value: Any, where: str) -> float:
    value = float(value)
    if not 0 <= value <= 1:
        raise ValueError(f"accuracies are fractions from 0 to 1, got {value} ({where}): divide percentages by 100.")
    return value


def plot_gains(
    gains: dict, path: str | os.PathLike, title: str | None = None, baseline: str = "zero-shot CLIP"
) -> tuple[str, str]:
    """Gains per data set as horizontal bars, largest on top (figure 4 of https://arxiv.org/abs/2109.01134).

    Args:
        gains (`dict[str, float]`): `{data set: accuracy - accuracy of the baseline}`, fractions; may be negative.
        path (`str` or `os.PathLike`): PNG file; its folder is made if missing.
        title (`str`, *optional*): stands over the plot.
        baseline (`str`, *optional*, defaults to `"zero-shot CLIP"`): what the gains are over, for the axis.

    Returns:
        paths of the PNG and of the CSV file with the columns name, gain.
    """
    path = _check_path(path)
    if not gains:
        raise ValueError("there is nothing to plot: `gains` is empty.")
    rows = sorted(((str(name), float(gain)) for name, gain in gains.items()), key=lambda row: -row[1])
    if max(abs(gain) for _, gain in rows) > 1:
        raise ValueError("gains are differences of fractions, from -1 to 1: divide percentage points by 100.")
    figure = _new_figure(5.6, 1.1 + 0.34 * len(rows))
    axes = figure.add_subplot()
    values = [100 * gain for _, gain in rows]
    colours = [COLOURS[0] if value >= 0 else COLOURS[1] for value in values]
    bars = axes.barh(range(len(rows)), values, color=colours, height=0.68)
    axes.bar_label(bars, labels=[f"{value:+.1f}".replace("-", "−") for value in values], padding=4, fontsize=9)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="#333333", linewidth=1)
    axes.margins(x=0.16)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0), max(high, 0))
    axes.set_xlabel(f"gain over {baseline} (percentage points)")
    axes.tick_params(axis="y", length=0)
    if title:
        axes.set_title(title)
    _tidy(axes, grid="x")
    axes.spines["left"].set_visible(False)
    return _write(figure, path, ["name", "gain"], rows)


def plot_confusion_matrix(
    predictions: Sequence[int],
    references: Sequence[int],
    class_names: list[str],
    path: str | os.PathLike,
    normalize: bool = True,
    title: str | None = None,
) -> tuple[str, str]:
    """Which classes are taken for which.

    Args:
        predictions, references (`np.ndarray` or `list[int]`): `(num_examples,)`, predicted and true class indices.
        class_names (`list[str]`): the classes.
        path (`str` or `os.PathLike`): PNG file; its folder is made if missing.
        normalize (`bool`, *optional*, defaults to `True`): shares of each true class, else counts. Colours always show
            shares.
        title (`str`, *optional*): stands over the plot.

    Returns:
        paths of the PNG and of the CSV file: counts, one row for each true class, one column for each predicted one.
    """
    path = _check_path(path)
    guesses, truths = np.asarray(predictions), np.asarray(references)
    number = len(class_names)
    if guesses.shape != truths.shape or guesses.ndim != 1 or len(guesses) == 0:
        raise ValueError(
            f"expected as many predictions as references, at least one, got {guesses.shape} and {truths.shape}."
        )
    for what, values in (("predictions", guesses), ("references", truths)):
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= number:
            raise ValueError(
                f"`{what}` must be class indices from 0 to {number - 1}, got {values.min()} to {values.max()}."
            )
    counts = np.zeros((number, number), dtype=np.int64)
    np.add.at(counts, (truths, guesses), 1)
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)

    side = min(max(4.2, 1.8 + 0.36 * number), 24)
    figure = _new_figure(side + 0.6, side)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    font = 9 if number <= 20 else max(3, 180 / number)
    axes.set_xticks(range(number), class_names, rotation=90 if number > 6 else 0, fontsize=font)
    axes.set_yticks(range(number), class_names, fontsize=font)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if number <= 30:
        for row, column in np.argwhere(counts):
            share = shares[row, column]
            text = f"{100 * share:.0f}" if normalize else str(counts[row, column])
            colour = "white" if share > 0.55 else "#222222"
            axes.text(column, row, text, ha="center", va="center", fontsize=font * 0.85, color=colour)
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)
    bar.set_label("share of the true class" + (" (numbers: %)" if normalize and number <= 30 else ""))
    bar.outline.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    accuracy = np.trace(counts) / counts.sum()
    axes.set_title(f"{title + ': ' if title else ''}{100 * accuracy:.1f} % correct")
    rows = [[name, *row] for name, row in zip(class_names, counts.tolist())]
    return _write(figure, path, ["true \\ predicted", *class_names], rows)


def plot_predictions(
    images: Sequence[Any],
    before: list,
    after: list,
    labels: list[str],
    path: str | os.PathLike,
    columns: int = 4,
    titles: tuple[str, str] = ("zero-shot", "CoOp"),
) -> tuple[str, str]:
    """Images with what was predicted before and after.

    Args:
        images (`list`): images: PIL images, or arrays `(height, width[, 3])`.
        before, after (`list[list[dict]]`): what `CoOpModel.predict` returns for them, with the adapter disabled and
            with it; only the best guess is shown.
        labels (`list[str]`): names of the true classes.
        path (`str` or `os.PathLike`): PNG file; its folder is made if missing.
        columns (`int`, *optional*, defaults to 4): images in a row.
        titles (`tuple[str, str]`, *optional*, defaults to `("zero-shot", "CoOp")`): names of before and after.

    Returns:
        paths of the PNG and of the CSV file with the columns index, label, before, before_score, after, after_score.

    Example:

    ```python
    >>> with model.disable_adapter():
    ...     before = model.predict(images)
    >>> plot_predictions(images, before, model.predict(images), labels, "predictions.png")
    ```
    """
    path = _check_path(path)
    if not isinstance(columns, int) or columns < 1:
        raise ValueError(f"`columns` must be a positive whole number, got {columns!r}.")
    if len(images) == 0 or not len(images) == len(before) == len(after) == len(labels):
        raise ValueError(
            "there must be as many images, predictions before and after, and labels, at least one; got "
            f"{len(images)}, {len(before)}, {len(after)} and {len(labels)}."
        )
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    width, height = 2.3 * columns, 2.75 * lines
    figure = _new_figure(width, height)
    # Places by hand, in inches: the guesses stand outside the axes, and long ones must not push columns apart.
    figure.set_layout_engine(None)
    figure.subplots_adjust(
        left=0.2 / width,
        right=1 - 0.2 / width,
        top=1 - 0.3 / height,
        bottom=0.5 / height,
        wspace=0.4 / 1.9,
        hspace=0.85 / 1.9,
    )
    rows = []
    for index, (image, first, second, label) in enumerate(zip(images, before, after, labels)):
        axes = figure.add_subplot(lines, columns, index + 1)
        pixels = np.asarray(image)
        axes.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("#BBBBBB")
        axes.set_title(textwrap.shorten(label, 26, placeholder="…"), fontsize=10, fontweight="bold")
        for place, (name, guess) in enumerate(zip(titles, (first[0], second[0]))):
            right = guess["label"] == label
            axes.text(
                0.5,
                -0.06 - 0.12 * place,
                f"{'✓' if right else '✗'} {name}: {textwrap.shorten(guess['label'], 18, placeholder='…')} "
                f"{100 * guess['score']:.0f} %",
                transform=axes.transAxes,
                ha="center",
                va="top",
                fontsize=8,
                color=COLOURS[2] if right else COLOURS[1],
            )
        rows.append([index, label, first[0]["label"], first[0]["score"], second[0]["label"], second[0]["score"]])
    header = ["index", "label", "before", "before_score", "after", "after_score"]
    return _write(figure, path, header, rows)
