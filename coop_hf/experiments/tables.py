"""Tables of results."""

import os
from typing import Any

import numpy as np

from .methods import Method


__all__ = ["results_table", "scores_by_method", "show_table"]


# ---------------------------------------------------------------------- tables


def scores_by_method(results: dict, methods: dict[str, Method], column: str) -> dict[str, dict]:
    """Scores of the seeds, by title of the method and by column.

    Args:
        results (`dict`): as a protocol returns it.
        methods (`dict[str, Method]`): gives titles and order.
        column (`str`): `"shots"` or another key of the cells, or `"scores"`: one column for each score.

    Returns:
        `dict[str, dict[key, list[float]]]`.
    """
    table: dict[str, dict[Any, list[float]]] = {method.title: {} for method in methods.values()}
    for entry in results["cells"]:
        by_column = table[methods[entry["cell"]["method"]].title]
        for name, value in entry["scores"].items():
            key = name if column == "scores" else entry["cell"].get(column)
            by_column.setdefault(key, []).append(value)
    return {title: by_column for title, by_column in table.items() if by_column}


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
    rows = [[corner, *(headers or map(str, columns))]]
    for title, by_column in scores.items():
        everywhere = by_column.get(0, by_column.get(None)) if len(by_column) == 1 else None
        rows.append([title, *(_mean_and_spread(by_column.get(key, everywhere)) for key in columns)])
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


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


def _mean_and_spread(values: list[float] | None) -> str:
    if not values:
        return ""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"
