"""The results of a comparison as JSON, CSV, Markdown and one HTML page, all from the same numbers."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .benchmark import GROUPS
from .statistics import harmonic_means, mean_and_std, paired_difference
from .tables import percent, table


Table = tuple[list[str], list[list[str]]]  # header and rows

__all__ = ["MARKS", "compare", "headline", "markdown", "summarise"]

# What stands behind a method's name in tables.
MARKS = {
    "templates": "T",
    "sentences": "S",
    "unlabelled": "U",
    "test views": "V",
}

# What the protocols are called.
KINDS = {"few_shot": "all classes", "base_to_new": "base to new classes"}

LEGEND = (
    "T: further hand-written templates. S: sentences of a language model. U: training images without labels. "
    "V: augmented views of each test image, one image at a time. ᵛ: chooses on validation images."
)


def title(results: dict, name: str) -> str:
    """A method's name in tables, with marks of what it sees beside the shots."""
    method = results["methods"][name]
    marks = "".join(MARKS[key] for key in method["knowledge"])
    chooses = "ᵛ" if method["chooses"] and results["settings"]["validation"] == "few" else ""
    return f"{method['title']}{chooses}{f' [{marks}]' if marks else ''}"


def headline(test: str) -> str:
    """What a score is called in headings."""
    return {"accuracy": "all classes", "base": "base classes", "new": "new classes", "H": "harmonic mean"}.get(
        test, test
    )


def tests_of(cells: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(test for cell in cells for test in cell["scores"]))


def cells_of(results: dict, **wanted: Any) -> list[dict]:
    """The cells whose `cell` has these values."""
    return [
        entry for entry in results["cells"] if all(entry["cell"].get(key) == value for key, value in wanted.items())
    ]


def summarise(results: dict) -> list[dict]:
    """For each protocol, data set, test, method and number of shots the mean over draws and what it costs.

    Returns:
        `list[dict]`: `protocol`, `data`, `test`, `method`, `shots`, `draws`; `mean` and `std` of the accuracy; means
        of `macro_f1`, `ece`, `fit_seconds` and `image_ms`; the largest `peak_memory_bytes`; `learned_values`.
    """
    groups: dict[tuple, list[dict]] = {}
    for entry in results["cells"]:
        cell = entry["cell"]
        for test in entry["scores"]:
            group = (cell["protocol"], cell["data"], test, cell["method"], cell["shots"])
            groups.setdefault(group, []).append(entry)
    rows = []
    for (protocol, data, test, method, shots), own in groups.items():
        mean, std = mean_and_std([entry["scores"][test] for entry in own])
        details = [entry["details"][test] for entry in own if test in entry["details"]]
        row = {"protocol": protocol, "data": data, "test": test, "method": method, "shots": shots, "draws": len(own)}
        row |= {"mean": mean, "std": std}
        for key in ("macro_f1", "ece"):
            row[key] = float(np.mean([found[key] for found in details])) if details else None
        for key in ("fit_seconds", "image_ms"):
            row[key] = float(np.mean([entry["cost"][key] for entry in own]))
        row["peak_memory_bytes"] = max((entry["cost"]["peak_memory_bytes"] or 0 for entry in own), default=0) or None
        row["learned_values"] = own[0]["learned_values"]
        rows.append(row)
    return rows


def _scores(results: dict, protocol: str, test: str, method: str, shots: int) -> dict[str, dict[Any, float]]:
    """`{data: {seed: score}}`; of a method that does not learn `{data: {None: score}}`."""
    found: dict[str, dict[Any, float]] = {}
    for entry in cells_of(results, protocol=protocol, method=method):
        cell = entry["cell"]
        if test in entry["scores"] and cell["shots"] in (shots, 0):
            seed = cell["seed"] if cell["shots"] else None
            found.setdefault(cell["data"], {})[seed] = entry["scores"][test]
    return found


def compare(results: dict, protocol: str, test: str, shots: int) -> dict[str, dict]:
    """The paired difference of each method to the reference, see `statistics.paired_difference`."""
    reference = results["settings"]["reference"]
    theirs = _scores(results, protocol, test, reference, shots)
    found = {}
    for name in results["methods"]:
        difference = paired_difference(_scores(results, protocol, test, name, shots), theirs)
        if name != reference and difference is not None:
            found[name] = difference
    return found


# ---------------------------------------------------------------------- Markdown


def interval(difference: dict | None, which: str) -> str:
    """`-1.2 … 3.4`, in points."""
    ends = None if difference is None else difference[which]
    return "" if ends is None else f"{100 * ends[0]:+.1f} … {100 * ends[1]:+.1f}"


def by_group(results: dict, names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The methods of each group, in their order; groups that are empty are left out."""
    names = list(names)
    groups = [(group, [n for n in names if results["methods"][n]["group"] == group]) for group in GROUPS]
    return [(group, own) for group, own in groups if own]


def accuracy_rows(results: dict, protocol: str, data: str, test: str) -> tuple[list[int], dict[str, dict[int, dict]]]:
    """The numbers of shots of a test, and for each method its summary at each; one that learns nothing has 0 alone."""
    found: dict[str, dict[int, dict]] = {}
    for row in summarise(results):
        if (row["protocol"], row["data"], row["test"]) == (protocol, data, test):
            found.setdefault(row["method"], {})[row["shots"]] = row
    shots = sorted({k for by_shots in found.values() for k in by_shots if k})
    return shots or [0], {name: found[name] for name in results["methods"] if name in found}


def accuracy_table(results: dict, protocol: str, data: str, test: str) -> Table:
    """Accuracies over the number of shots, the methods in groups."""
    shots, found = accuracy_rows(results, protocol, data, test)
    rows = []
    for group, names in by_group(results, found):
        rows.append([f"*{group}*", *[""] * len(shots)])
        for name in names:
            own = [found[name].get(k) or found[name].get(0) for k in shots]
            rows.append([title(results, name), *(percent(r["mean"], r["std"]) if r else "" for r in own)])
    return [f"{data}, {headline(test)}", *map(count, shots)], rows


def cost_table(results: dict, protocol: str, data: str, test: str) -> Table:
    """Other measures, and costs, at the largest number of shots."""
    shots, found = accuracy_rows(results, protocol, data, test)
    rows = []
    for name in (name for _, names in by_group(results, found) for name in names):
        row = found[name].get(max(shots)) or found[name].get(0)
        if row is None:
            continue
        memory, values = row["peak_memory_bytes"], row["learned_values"]
        tower = cells_of(results, protocol=protocol, data=data, method=name)[0]["cost"]["with_image_tower"]
        scores = [percent(row["macro_f1"]), percent(row["ece"])]
        times = [f"{row['fit_seconds']:.2f}", f"{row['image_ms']:.2f}{'*' if tower else ''}"]
        sizes = [f"{memory / 2**20:.0f}" if memory else "", "" if values is None else f"{values:,}"]
        rows.append([title(results, name), *scores, *times, *sizes])
    measures = ["macro-F1, %", "ECE, %", "training, s", "an image, ms", "peak, MiB", "values"]
    return [f"{data}, {count(max(shots))}", *measures], rows


def difference_table(results: dict, protocol: str, test: str, shots: int) -> Table:
    """Paired differences to the reference, the largest first."""
    found = compare(results, protocol, test, shots)
    reference = results["methods"][results["settings"]["reference"]]["title"]
    rows = []
    for group, names in by_group(results, sorted(found, key=lambda name: -found[name]["mean"])):
        rows.append([f"*{group}*", "", "", "", ""])
        for name in names:
            d = found[name]
            points = [f"{100 * d['mean']:+.1f}", interval(d, "over_draws"), interval(d, "over_data")]
            rows.append([title(results, name), *points, str(d["pairs"])])
    measures = ["points", "95 % over draws", "95 % over data sets", "pairs"]
    return [f"minus {reference}, {headline(test)}, {count(shots)}", *measures], rows


def harmonic_table(results: dict) -> Table | None:
    """Both means of base-to-new, if it was run."""
    found = {}
    for name in results["methods"]:
        entries = cells_of(results, protocol="base_to_new", method=name)
        keys = [(entry["cell"]["data"], entry["cell"]["seed"]) for entry in entries]
        if entries:
            base, new = ({k: e["scores"][part] for k, e in zip(keys, entries)} for part in ("base", "new"))
            found[name] = harmonic_means(base, new)
    rows = [[title(results, name), percent(first), percent(second)] for name, (first, second) in found.items()]
    return (["base to new, all data sets and draws", "mean of H", "H of means"], rows) if rows else None


def pairs(results: dict) -> list[tuple[str, str]]:
    """Protocols and data sets that have cells, in order."""
    return list(dict.fromkeys((entry["cell"]["protocol"], entry["cell"]["data"]) for entry in results["cells"]))


def count(shots: int) -> str:
    """`1 shot`, `4 shots`."""
    return f"{shots} shot{'' if shots == 1 else 's'}"


def shots_of(results: dict, protocol: str) -> list[int]:
    """The numbers of shots of a protocol."""
    return sorted({entry["cell"]["shots"] for entry in cells_of(results, protocol=protocol)} - {0}) or [0]


def main_test(protocol: str) -> str:
    """The score by which methods are compared."""
    return "H" if protocol == "base_to_new" else "accuracy"


def conditions(results: dict) -> list[str]:
    """What holds for all figures, in sentences."""
    s, e = results["settings"], results["environment"]
    validation = "none" if s["validation"] == "none" else "min(shots, 4) images of each class, where ᵛ stands"
    return [
        f"Base: {s['base_model']} ({s['base_fingerprint']}); coop_hf {s['coop_hf']}, torch {e['torch']}, "
        f"transformers {e['transformers']}.",
        f"Seeds {', '.join(map(str, s['seeds']))}; recipe {s['recipe']}; validation: {validation}. One set of "
        "hyperparameters for a method, the last step counts; test images are scored once, out of the methods' reach.",
        f"{e['cpu_cores']} cores, {'GPU ' + e['gpu'] if e['gpu'] else 'no GPU'}; {e['processes']} "
        f"cell{'s' if e['processes'] > 1 else ''} at a time, {s['threads']} thread{'s' if s['threads'] > 1 else ''} "
        "each. Times are those of this machine; an image's time is without the image tower, with it where * stands.",
        f"± is the standard deviation over draws. {LEGEND}",
    ]


def markdown(results: dict) -> str:
    """All tables."""
    parts = ["# Comparison", *conditions(results)]
    for protocol, data in pairs(results):
        parts.append(f"## {data}, {KINDS[protocol]}")
        tests = tests_of(cells_of(results, protocol=protocol, data=data))
        parts += [table(*accuracy_table(results, protocol, data, test)) for test in tests]
        parts.append(table(*cost_table(results, protocol, data, tests[0])))
    for protocol in dict.fromkeys(protocol for protocol, _ in pairs(results)):
        sets = [data for own, data in pairs(results) if own == protocol]
        parts.append(f"## Differences, {KINDS[protocol]}, mean over {', '.join(sets)}")
        for shots in shots_of(results, protocol):
            parts.append(table(*difference_table(results, protocol, main_test(protocol), shots)))
    means = harmonic_table(results)
    if means:
        parts += ["## Harmonic means H, of base and new classes", table(*means)]
    if results["failed"]:
        parts.append(
            "## Failed\n\n" + "\n".join(f"- {f['data']}, {f['cell']}: {f['error']}" for f in results["failed"])
        )
    if results["command"]:
        parts.append(f"## Command\n\n```bash\n{results['command']}\n```")
    return "\n\n".join(parts) + "\n"
