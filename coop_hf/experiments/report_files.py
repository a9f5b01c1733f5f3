"""The files of a comparison: JSON, CSV, Markdown, and one HTML page that holds all it needs."""

import csv
import html
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import write_text
from . import report, report_plots
from .tables import table


__all__ = ["page", "write_report"]

_STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- pieces of the page


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], best: bool = False) -> str:
    """An HTML table; a row with text in its first cell alone heads a group. `best`: in bold."""
    tops: list[float] = []
    if best:
        values = [[_number(row[i]) for row in rows] for i in range(1, len(header))]
        tops = [max((v for v in own if v is not None), default=float("inf")) for own in values]
    lines: list[str] = []
    for row in rows:
        if len(row) > 1 and not any(row[1:]) and row[0].startswith("*"):
            lines.append(f'<tr class="group"><td colspan="{len(header)}">{html.escape(row[0].strip("*"))}</td></tr>')
            continue
        cells = [f"<td>{html.escape(row[0])}</td>"]
        for i, cell in enumerate(row[1:]):
            top = ' class="best"' if best and _number(cell) is not None and _number(cell) == tops[i] else ""
            cells.append(f"<td{top}>{html.escape(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _number(text: str) -> float | None:
    try:
        return float(text.split()[0]) if text else None
    except ValueError:
        return None


def _heat(results: dict, protocol: str, data: str, test: str, class_names: Sequence[str]) -> str:
    """Per-class accuracies in %, means over draws, at the largest number of shots."""
    shots, found = report.accuracy_rows(results, protocol, data, test)
    columns: dict[str, list[float | None]] = {}
    for name in found:
        own = [
            entry["details"][test]["per_class"]
            for entry in report.cells_of(results, protocol=protocol, data=data, method=name)
            if entry["cell"]["shots"] in (max(shots), 0)
        ]
        if own:
            columns[name] = [None if column[0] is None else float(np.mean(column)) for column in zip(*own)]
    head = "".join(f"<th>{html.escape(report.title(results, name))}</th>" for name in columns)
    lines = []
    for index, class_name in enumerate(class_names):
        cells = []
        for values in columns.values():
            value = values[index]
            colour = "#eee" if value is None else f"rgba(0, 114, 178, {0.08 + 0.72 * value:.2f})"
            ink = "#fff" if value is not None and value > 0.7 else "#1c1c1c"
            shown = "" if value is None else f"{100 * value:.0f}"
            cells.append(f'<td style="background:{colour};color:{ink}">{shown}</td>')
        lines.append(f"<tr><td>{html.escape(class_name)}</td>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="heat"><thead><tr><th>class</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" if svg else ""


def _details(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _data_section(results: dict, protocol: str, data: str, plots: bool) -> list[str]:
    about = results["data"][f"{data}, {protocol}"]
    tests = report.tests_of(report.cells_of(results, protocol=protocol, data=data))
    shots = report.shots_of(results, protocol)
    sizes = ", ".join(f"{count} {part}" for part, count in about["images"].items())
    kind = report.KINDS[protocol]
    parts = [
        f'<h2 id="{html.escape(f"{data}-{protocol}")}">{html.escape(data)}, {kind}</h2>',
        f'<p class="note">{len(about["class_names"])} classes; images: {sizes}; template "'
        f'{html.escape(about["template"])}"; from {html.escape(str(about["source"]))}, '
        f"draw: {html.escape(about['draw'])}; hash {about['fingerprint']}.</p>",
    ]
    for test in tests:
        parts.append(_table(*report.accuracy_table(results, protocol, data, test), best=True))
    if plots:
        if protocol == "few_shot":
            caption = (
                "Test accuracy over the number of shots, mean and standard deviation over draws; grey: the others."
            )
            if len(shots) == 1:
                caption = f"Test accuracy at {report.count(shots[0])}, mean and standard deviation over draws."
            parts.append(_figure(report_plots.curves(results, data), caption))
        reference = results["methods"][results["settings"]["reference"]]["title"]
        parts.append(
            _figure(
                report_plots.gains(results, protocol, data, max(shots)),
                f"Gain over {reference} at {report.count(max(shots))}, in points, mean over draws.",
            )
        )
        if protocol == "few_shot":
            parts.append(
                _figure(
                    report_plots.calibration(results, data, max(shots)),
                    f"Calibration at {report.count(max(shots))}, all draws together: accuracy of the images in each "
                    "bin of confidence (bars as wide as their bin; pale where under 1 % of the images lie), and the "
                    "expected calibration error. On the diagonal, confidence is right.",
                )
            )
    first = "accuracy" if "accuracy" in tests else tests[0]
    parts.append("<h3>Other measures and costs</h3>")
    parts.append(_table(*report.cost_table(results, protocol, data, first)))
    names = about["class_names"]
    for test in ("accuracy", "base", "new"):
        if test in tests:
            half = (len(names) + 1) // 2
            own = {"accuracy": names, "base": names[:half], "new": names[half:]}[test]
            heading = f"Accuracy of each class in %, {report.headline(test)}, {report.count(max(shots))}"
            parts.append(_details(heading, _heat(results, protocol, data, test, own)))
    return parts


def _difference_section(results: dict, protocol: str, plots: bool) -> list[str]:
    sets = [data for own, data in report.pairs(results) if own == protocol]
    main, reference = report.main_test(protocol), results["methods"][results["settings"]["reference"]]["title"]
    parts = [f'<h2 id="differences-{protocol}">Differences to {html.escape(reference)}, {report.KINDS[protocol]}</h2>']
    parts.append(
        f'<p class="note">Mean over {html.escape(", ".join(sets))}. Pairs are the same data set and the same draw. '
        "Thick: 95 % over draws, for these data sets (t, degrees of freedom by Welch and Satterthwaite). Thin: 95 % "
        "over data sets (t of their mean differences), which with few data sets is wide. Neither holds the noise of a "
        "small test set.</p>"
    )
    for shots in sorted(report.shots_of(results, protocol), reverse=True):
        shown = _figure(report_plots.differences(results, protocol, main, shots), "") if plots else ""
        shown += _table(*report.difference_table(results, protocol, main, shots))
        is_first = shots == max(report.shots_of(results, protocol))
        parts.append(f"<h3>{report.count(shots)}</h3>{shown}" if is_first else _details(report.count(shots), shown))
    return parts


def _repeat_section(results: dict) -> list[str]:
    allowed: dict[str, list[str]] = {}
    for entry in results["cells"]:
        allowed.setdefault(entry["cell"]["method"], entry["allowed"])
    rows = [[report.title(results, name), "; ".join(seen)] for name, seen in allowed.items()]
    data = {key: {k: v for k, v in about.items() if k != "class_names"} for key, about in results["data"].items()}
    parts = ['<h2 id="repeat">To repeat it</h2>']
    if results["command"]:
        parts.append(f"<pre>{html.escape(results['command'])}</pre>")
    if results.get("config"):
        parts.append(_details("The file of --config", f"<pre>{html.escape(results['config'])}</pre>"))
    sees = _table(["method", "what it was allowed to see (first cell)"], rows).replace(
        "<table>", '<table class="left">'
    )
    parts.append(f"<style>table.left td, table.left th {{ text-align: left; white-space: normal; }}</style>{sees}")
    for name, value in (
        ("Settings", results["settings"]),
        ("Versions and machine", results["environment"]),
        ("Data sets: sizes, sources, hashes", data),
        ("Rows drawn, by data set, shots and seed", results["draws"]),
    ):
        text = json.dumps(value, indent=1, ensure_ascii=False)
        if name.startswith("Rows"):
            text = json.dumps(value, ensure_ascii=False)
        parts.append(_details(name, f"<pre>{html.escape(text)}</pre>"))
    return parts


def page(results: dict) -> str:
    """The page: one HTML file without scripts, fonts or images from elsewhere.

    Args:
        results (`dict`): as `benchmark` returns it. Without matplotlib (`pip install coop_hf[plot]`) it has no plots,
            and says so.
    """
    plots = report_plots.has_matplotlib()
    sections = report.pairs(results)
    protocols = list(dict.fromkeys(protocol for protocol, _ in sections))
    links = [(f"differences-{protocol}", f"differences, {report.KINDS[protocol]}") for protocol in protocols]
    links += [(f"{data}-{protocol}", f"{data}, {report.KINDS[protocol]}") for protocol, data in sections]
    links.append(("repeat", "to repeat it"))
    parts = ["<h1>Comparison of methods</h1>", "<nav>"]
    parts += [f'<a href="#{html.escape(anchor)}">{html.escape(text)}</a>' for anchor, text in links] + ["</nav>"]
    parts += [f'<p class="note">{html.escape(line)}</p>' for line in report.conditions(results)]
    if not plots:
        parts.append('<p class="failed">There are no plots: matplotlib is not installed (coop_hf[plot]).</p>')
    if results["failed"]:
        failed = [f"<li>{html.escape(str(f['cell']))}: {html.escape(f['error'])}</li>" for f in results["failed"]]
        parts.append(f'<div class="failed">{len(failed)} cells failed:<ul>{"".join(failed)}</ul></div>')
    for protocol in protocols:
        parts += _difference_section(results, protocol, plots)
    means = report.harmonic_table(results)
    if means:
        parts.append("<h3>Harmonic means H of base and new classes</h3>")
        parts.append(_table(*means, best=True))
    for protocol, data in sections:
        parts += _data_section(results, protocol, data, plots)
    parts += _repeat_section(results)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison of methods</title>'
        f'<meta name="viewport" content="width=device-width"><style>\n{_STYLE}</style></head>\n<body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


# ---------------------------------------------------------------------- files


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def scores_csv(results: dict) -> str:
    """One row for each cell and test, nothing in it that another run of the same cells would change."""
    header = ["protocol", "data", "test", "method", "shots", "seed", "accuracy", "macro_f1", "ece"]
    rows = []
    for entry in results["cells"]:
        cell = entry["cell"]
        for test, accuracy in entry["scores"].items():
            found = entry["details"].get(test, {})
            key = [cell["protocol"], cell["data"], test, cell["method"], cell["shots"], cell["seed"]]
            rows.append([*key, round(accuracy, 6), found.get("macro_f1", ""), found.get("ece", "")])
    return _csv(header, rows)


def costs_csv(results: dict) -> str:
    """One row for each cell: time and memory."""
    keys = ["fit_seconds", "cpu_seconds", "image_ms", "with_image_tower", "peak_memory_bytes", "peak_gpu_memory_bytes"]
    names = ["protocol", "data", "method", "shots", "seed"]
    rows = [
        [*(entry["cell"][name] for name in names), *(entry["cost"][key] for key in keys), entry["learned_values"]]
        for entry in results["cells"]
    ]
    return _csv([*names, *keys, "learned_values"], rows)


def write_report(results: dict, folder: str) -> str:
    """Writes all files of a comparison.

    Args:
        results (`dict`): as `benchmark` returns it.
        folder (`str`): where; made if missing.

    Returns:
        `str`: what to tell the user: the tables of accuracies, and the files.
    """
    os.makedirs(folder, exist_ok=True)
    texts: dict[str, Callable[[], str]] = {
        "benchmark.json": lambda: json.dumps(results, indent=1, ensure_ascii=False) + "\n",
        "scores.csv": lambda: scores_csv(results),
        "costs.csv": lambda: costs_csv(results),
        "benchmark.md": lambda: report.markdown(results),
        "benchmark.html": lambda: page(results),
    }
    for name, text in texts.items():
        write_text(os.path.join(folder, name), text())
    shown = [
        table(*report.accuracy_table(results, protocol, data, report.main_test(protocol)))
        for protocol, data in report.pairs(results)
    ]
    return "\n" + "\n\n".join(shown) + f"\n\nWritten to {folder}: {', '.join(texts)}"
