"""Tables of results."""

import os
from collections.abc import Sequence
from typing import Any

from .methods import Method
from .statistics import mean_and_std


__all__ = ["percent", "results_table", "scores_by_method", "show_table", "table"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], to_the_right: bool = True) -> str:
    """A Markdown table; all columns but the first stand to the right, or to the left too."""
    widths = [max(4, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    right = [to_the_right and i > 0 for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        fitted = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(cells, widths, right)]
        return "| " + " | ".join(fitted) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def percent(mean: float | None, std: float | None = None) -> str:
    """`12.3 ± 0.4`."""
    if mean is None:
        return ""
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def scores_by_method(results: dict, methods: dict[str, Method], column: str) -> dict[str, dict]:
    """Scores of the seeds, by title of the method and by column.

    Args:
        results (`dict`): as a protocol returns it.
        methods (`dict[str, Method]`): gives titles and order.
        column (`str`): `"shots"` or another key of the cells, or `"scores"`: one column for each score.

    Returns:
        `dict[str, dict[key, list[float]]]`.
    """
    found: dict[str, dict[Any, list[float]]] = {method.title: {} for method in methods.values()}
    for entry in results["cells"]:
        by_column = found[methods[entry["cell"]["method"]].title]
        for name, value in entry["scores"].items():
            key = name if column == "scores" else entry["cell"].get(column)
            by_column.setdefault(key, []).append(value)
    return {title: by_column for title, by_column in found.items() if by_column}


def results_table(scores: dict[str, dict], columns: list, corner: str = "", headers: list[str] | None = None) -> str:
    """Means in percent ± the standard deviation over seeds (of a sample), as a table that is Markdown too.

    Args:
        scores (`dict[str, dict[key, list[float]]]`): as [`scores_by_method`] gives them. A method that does not
            learn has one score, in every column if it stands under 0 or `None`.
        columns (`list`): keys, in order.
        corner (`str`, *optional*): heading of the first column.
        headers (`list[str]`, *optional*, defaults to the keys): headings of the others.

    Returns:
        `str`.
    """
    rows = []
    for title, by_column in scores.items():
        everywhere = by_column.get(0, by_column.get(None)) if len(by_column) == 1 else None
        own = [by_column.get(key, everywhere) for key in columns]
        rows.append([title, *(percent(*mean_and_std(values)) if values else "" for values in own)])
    return table([corner, *(headers or map(str, columns))], rows, to_the_right=False)


def show_table(table: str, path: str | os.PathLike, heading: str, seeds: list[int]) -> None:
    """Prints a table under a line that says what it is, and writes it as Markdown.

    Args:
        table (`str`): as [`results_table`] gives it.
        path (`str` or `os.PathLike`): the results file; the table goes beside it, as `.md`.
        heading (`str`): what the table is about.
        seeds (`list[int]`): the seeds that it is a mean over.
    """
    print(f"\n{heading}; accuracy in %, mean ± standard deviation over {len(seeds)} seeds\n\n{table}\n")
    with open(os.path.splitext(path)[0] + ".md", "w", encoding="utf-8") as file:
        file.write(table + "\n")
