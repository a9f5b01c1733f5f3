"""Images of results, in the paper's style: few-shot curves, gains, confusion matrices, predictions before and after.

Each function returns the figure, which a notebook shows. With a `path` it writes a PNG and, beside it, a CSV file with
the same data.
"""

import csv
import functools
import io
import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_counts


__all__ = ["plot_confusion_matrix", "plot_few_shot_curves", "plot_gains", "plot_predictions"]

# Colours that stay apart for colour-blind readers (Okabe and Ito), the first for what the library is about.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")

_DPI = 150

_MAX_MATRIX = 26.0  # inches

_NO_TEXT_FONTS = ("Emoji", "Last Resort")  # colours, which cannot be drawn; boxes for every character


@functools.cache
def _figure_class() -> Any:
    """matplotlib's `Figure`, which shows itself in a notebook. Made late: matplotlib is an extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: `pip install coop_hf[plot]`.") from error

    class Plot(Figure):
        written: tuple[str, str] | None = None  # PNG and CSV file

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

        def __iter__(self) -> Any:
            warnings.warn(
                "plots return the figure, and the paths of PNG and CSV file, as before, only until coop_hf 0.5: take "
                "the path that you gave.",
                FutureWarning,
                stacklevel=2,
            )
            return iter(self.written or ())

    return Plot


def _new_figure(width: float, height: float) -> Any:
    """A figure without pyplot: no global state, no window, any thread."""
    figure = _figure_class()(figsize=(width, height), dpi=_DPI, layout="constrained")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    return figure


def _check_path(path: str | os.PathLike | None) -> Path | None:
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"`path` must end in .png (the CSV file gets the same name), got {str(path)!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _finish(figure: Any, path: Path | None, header: list[str], rows: list) -> Any:
    """The figure, in fonts that have its characters, and written if there is a path."""
    _choose_fonts(figure)
    if path is not None:
        csv_path = path.with_suffix(".csv")
        figure.savefig(path)
        with open(csv_path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)
        figure.written = (str(path), str(csv_path))
    return figure


def _choose_fonts(figure: Any) -> None:
    """Adds installed fonts for characters that the usual one has not, and says what to do where there is none."""
    from matplotlib import get_cachedir, rcParams
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
    from matplotlib.text import Text

    def characters(file: str) -> set[int]:
        return set(get_font(file).get_charmap())

    for axes in figure.axes:  # which makes the labels of ticks
        axes.get_xticklabels(), axes.get_yticklabels()
    texts = figure.findobj(Text)
    needed = {ord(character) for text in texts for character in text.get_text() if not character.isspace()}
    missing = needed - characters(findfont(FontProperties()))
    fallbacks: list[str] = []
    # Fonts for East Asia first: others that have a few of their characters look odd beside them.
    for entry in sorted(fontManager.ttflist, key=lambda font: ("CJK" not in font.name, font.name)):
        if not missing:
            break
        if entry.name in fallbacks or entry.style != "normal" or any(word in entry.name for word in _NO_TEXT_FONTS):
            continue
        try:
            found = missing & characters(entry.fname)
        except (OSError, RuntimeError):  # a file that went away or that FreeType cannot read
            continue
        if found:
            fallbacks.append(entry.name)
            missing -= found
    if fallbacks:
        for text in texts:
            text.set_fontfamily([*rcParams["font.family"], *fallbacks])
    if missing:
        shown = "".join(map(chr, sorted(missing)[:10]))
        warnings.warn(
            f"no installed font has the characters {shown!r}{' and more' if len(missing) > 10 else ''}, which become "
            "boxes: install one that has (for Chinese, Japanese and Korean on Debian and Ubuntu: `apt install "
            f"fonts-noto-cjk`), and remove the list of fonts that matplotlib keeps in {get_cachedir()}.",
            stacklevel=4,
        )


def tidy(axes: Any, grid: str = "both", labelsize: float | None = None) -> None:
    """Axes without a frame, on a grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    if labelsize is not None:
        axes.tick_params(labelsize=labelsize)


def plot_few_shot_curves(
    results: dict,
    path: str | os.PathLike | None = None,
    zero_shot: dict[str, float] | float | None = None,
    title: str | None = None,
    spread: str = "band",
) -> Any:
    """Accuracy over the number of shots, one curve for each method (figure 3 of https://arxiv.org/abs/2109.01134).

    Args:
        results (`dict[str, dict[int, list[float]]]`): `{method: {shots: [accuracy of each seed, ...]}}`, accuracies
            as fractions; a single number stands for one seed.
        path (`str` or `os.PathLike`, *optional*): PNG file; its folder is made if missing. `None`: nothing is written.
        zero_shot (`float` or `dict[str, float]`, *optional*): accuracy without training, a star at 0 shots; several by
            name.
        title (`str`, *optional*): stands over the plot, for example the data set.
        spread (`str`, *optional*, defaults to `"band"`): how the standard deviation over seeds is shown: `"band"`,
            `"bars"` or `"none"`. It is that of a sample (n - 1), and 0 for one seed.

    Returns:
        `matplotlib.figure.Figure`. The CSV file has the columns method, shots, mean, std, seeds.

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
    tidy(axes)
    axes.legend(frameon=False, fontsize=9, **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if many else {}))
    return _finish(figure, path, ["method", "shots", "mean", "std", "seeds"], rows)


def _fraction(value: Any, where: str) -> float:
    value = float(value)
    if not 0 <= value <= 1:
        raise ValueError(f"accuracies are fractions from 0 to 1, got {value} ({where}): divide percentages by 100.")
    return value


def plot_gains(
    gains: dict, path: str | os.PathLike | None = None, title: str | None = None, baseline: str = "zero-shot CLIP"
) -> Any:
    """Gains per data set as horizontal bars, largest on top (figure 4 of https://arxiv.org/abs/2109.01134).

    Args:
        gains (`dict[str, float]`): `{data set: accuracy - accuracy of the baseline}`, fractions; may be negative.
        path (`str` or `os.PathLike`, *optional*): PNG file; its folder is made if missing. `None`: nothing is written.
        title (`str`, *optional*): stands over the plot.
        baseline (`str`, *optional*, defaults to `"zero-shot CLIP"`): what the gains are over, for the axis.

    Returns:
        `matplotlib.figure.Figure`. The CSV file has the columns name, gain.
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
    tidy(axes, grid="x")
    axes.spines["left"].set_visible(False)
    return _finish(figure, path, ["name", "gain"], rows)


def plot_confusion_matrix(
    *positional: Any,
    references: Sequence[int] | None = None,
    predictions: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    path: str | os.PathLike | None = None,
    normalize: bool = True,
    title: str | None = None,
) -> Any:
    """Which classes are taken for which.

    All arguments go by name: libraries disagree on which of truth and prediction comes first.

    Args:
        references, predictions (`np.ndarray` or `list[int]`): `(num_examples,)`, true and predicted class indices.
        class_names (`list[str]`): the classes. Where there is no room for all of them, every second, third ... is
            written.
        path (`str` or `os.PathLike`, *optional*): PNG file; its folder is made if missing. `None`: nothing is written.
        normalize (`bool`, *optional*, defaults to `True`): shares of each true class, else counts. Colours always show
            shares.
        title (`str`, *optional*): stands over the plot.

    Returns:
        `matplotlib.figure.Figure`. The CSV file has counts, one row for each true class, one column for each predicted
        one.
    """
    if positional:
        warnings.warn(
            "plot_confusion_matrix takes its arguments by name, `references=` (the truth), `predictions=`, "
            "`class_names=` and `path=`; by position (predictions first) only until coop_hf 0.5.",
            FutureWarning,
            stacklevel=2,
        )
        given: tuple[Any, ...] = (predictions, references, class_names, path, normalize, title)
        predictions, references, class_names, path, normalize, title = (*positional, *given[len(positional) :])
    if references is None or predictions is None or class_names is None:
        raise TypeError("plot_confusion_matrix needs `references=` (the truth), `predictions=` and `class_names=`.")
    file = _check_path(path)
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

    pitch = min(0.36 if number <= 30 else 0.22, _MAX_MATRIX / number)  # inches of a class
    names = [str(name) for name in class_names]
    longest = max(map(len, names))
    font = min(9.0, max(5.0, 50 * pitch))
    margin = 1.0 + min(longest, 40) * font / 120
    figure = _new_figure(max(4.8, pitch * number * 1.08 + margin + 1.2), max(3.8, pitch * number + margin))
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest" if number <= 300 else None)
    every = -(-font * 1.2 // (72 * pitch))  # classes that one line of text covers
    ticks = np.arange(0, number, int(every))
    labels = [textwrap.shorten(names[tick], 40, placeholder="…") for tick in ticks]
    flat = number <= 6 and longest * font / 120 < pitch * 1.5
    axes.set_xticks(ticks, labels, rotation=0 if flat else 90, fontsize=font)
    axes.set_yticks(ticks, labels, fontsize=font)
    axes.tick_params(length=0)
    if number > 30:  # eyes need a line to follow
        lines = np.arange(-0.5, number, 5 if number <= 200 else 50)
        axes.set_xticks(lines, minor=True)
        axes.set_yticks(lines, minor=True)
        axes.grid(which="minor", color="#CCCCCC", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    has_numbers = number <= 120
    for row, column in np.argwhere(counts) if has_numbers else ():
        share = shares[row, column]
        text = f"{100 * share:.0f}" if normalize else str(counts[row, column])
        colour = "white" if share > 0.55 else "#222222"
        size = min(font * 0.85, 72 * pitch / max(2, len(text)) * 1.1)
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    large = 10 + 0.4 * pitch * number  # what stands outside grows with the figure
    height = min(1.0, 8 / (pitch * number))
    bar = figure.colorbar(image, ax=axes, fraction=0.045 * height, pad=0.02, shrink=height, anchor=(0, 1))
    bar.set_label("share of the true class" + (" (numbers: %)" if normalize and has_numbers else ""))
    bar.outline.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    accuracy = np.trace(counts) / counts.sum()
    axes.set_title(f"{title + ': ' if title else ''}{100 * accuracy:.1f} % correct", fontsize=large)
    axes.set_xlabel("predicted", fontsize=large)
    axes.set_ylabel("true", fontsize=large)
    rows = [[name, *row] for name, row in zip(class_names, counts.tolist())]
    return _finish(figure, file, ["true \\ predicted", *class_names], rows)


def plot_predictions(
    images: Sequence[Any],
    before: list,
    after: list,
    labels: list[str],
    path: str | os.PathLike | None = None,
    columns: int = 4,
    titles: tuple[str, str] = ("zero-shot", "CoOp"),
) -> Any:
    """Images with what was predicted before and after.

    Args:
        images (`list`): images: PIL images, or arrays `(height, width[, 3])`.
        before, after (`list[list[dict]]`): what `CoOpModel.predict` returns for them, with the adapter disabled and
            with it; only the best guess is shown.
        labels (`list[str]`): names of the true classes.
        path (`str` or `os.PathLike`, *optional*): PNG file; its folder is made if missing. `None`: nothing is written.
        columns (`int`, *optional*, defaults to 4): images in a row.
        titles (`tuple[str, str]`, *optional*, defaults to `("zero-shot", "CoOp")`): names of before and after.

    Returns:
        `matplotlib.figure.Figure`. The CSV file has the columns index, label, before, before_score, after,
        after_score.

    Example:

    ```python
    >>> with model.disable_adapter():
    ...     before = model.predict(images)
    >>> plot_predictions(images, before, model.predict(images), labels, "predictions.png")
    ```
    """
    path = _check_path(path)
    check_counts(columns=columns)
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
    return _finish(figure, path, header, rows)
