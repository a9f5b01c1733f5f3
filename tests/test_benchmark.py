"""The comparison of methods: what a method can see, what is measured, and that a second run completes the first."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import COLOUR_NAMES, COLOUR_OPTIONS

from coop_hf import CoOpModel
from coop_hf.baselines import HAND_TEMPLATES
from coop_hf.data import few_shot
from coop_hf.experiments import benchmark as b
from coop_hf.experiments import commands, estimates, processes, report, report_files, scoring, statistics
from coop_hf.experiments.cells import CellError
from coop_hf.experiments.methods import METHODS
from coop_hf.experiments.tasks import draw_few_shot
from coop_hf.training.arguments import get_recipe


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Methods of a user's own. `cheat` looks for the labels of the images that it is asked for: in the frames that called
# it, in their variables' attributes and closures, and in all objects that the garbage collector and modules know.
OWN_METHODS = '''
import gc
import os
import sys
import types

import numpy as np
import torch

from coop_hf.experiments.methods import METHODS as KNOWN
from coop_hf.experiments.methods import Method

LOG = []


def whole(value):
    """Class indices, if the value is a list of such."""
    try:
        array = np.asarray(value)
    except Exception:
        return None
    return array.astype(int) if array.ndim == 1 and array.dtype.kind in "iu" and len(array) else None


def search(count, num_classes):
    frame, seen = sys._getframe(1), []
    while frame is not None:
        local = list(frame.f_locals.values())
        closures = [c.cell_contents for f in local if isinstance(f, types.FunctionType) for c in f.__closure__ or ()]
        seen.append(local + closures)
        frame = frame.f_back
    for values in seen:  # what scores has the order beside the labels
        labels = [o.labels for o in values if hasattr(o, "labels") and hasattr(o, "order")]
        rows = [v for v in map(whole, values) if v is not None and len(v) == count]
        if labels and rows:
            return torch.as_tensor(labels[0])[rows[0]]
    objects = gc.get_objects()
    objects += [value for module in list(sys.modules.values()) for value in list(vars(module).values())]
    for value in objects:
        if isinstance(value, (torch.Tensor, np.ndarray, list)) and len(getattr(value, "shape", [0])) == 1:
            found = whole(value)
            if found is not None and len(found) == 48 and set(found) == set(range(num_classes)):
                return torch.as_tensor(found)[:count]
    return None


def fit_cheat(model, shots, options):
    if search(48, len(shots.class_names)) is not None:
        raise RuntimeError("the labels are here before the test")

    def predict(images, names):
        labels = search(len(images), len(names))
        found = torch.zeros(len(images), len(names))
        if labels is not None:
            found[torch.arange(len(images)), labels] = 1.0
        return found

    return predict


def fit_greedy(model, shots, options):
    LOG.append([len(shots.val_labels), len(shots.unlabelled_embeds), len(options.ensemble), options.cupl is None])
    scores = torch.tensor(LOG[-1] + [shots.images is None, 0]).float()
    return lambda images, names: scores.repeat(len(images), 1)


def fit_pixels(model, shots, options):
    """Mean colours, and what else an item tells."""
    def predict(images, names):
        assert all(images[i]["labels"] == 0 for i in range(len(images)))
        return torch.stack([images[i]["pixel_values"].mean((1, 2)).repeat(2) for i in range(len(images))])

    predict.sees_images = True
    return predict


def fail(model, shots, options):
    raise KeyError("nothing learned")


METHODS = {
    "cheat": Method("cheat", fit_cheat),
    "greedy": Method("greedy", fit_greedy, chooses=True, any_classes=False),
    "pixels": Method("pixels", fit_pixels, sees_images=True),
    "fails": Method("fails", fail),
    "dies": Method("dies", lambda *_: os._exit(9)),
}
'''


@pytest.fixture(scope="module")
def methods_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own_methods.py"
    path.write_text(OWN_METHODS)
    return str(path)


@pytest.fixture(scope="module")
def colour_folder(splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "colours"
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return str(folder)


@pytest.fixture
def place(base_folder, methods_file):
    return processes.Place(str(base_folder), methods_file)


def arguments(base_folder, colour_folder, folder, **more):
    given = {"base_model": str(base_folder), "datasets": [colour_folder], "output_dir": str(folder), "processes": 2}
    given |= {"methods": ["zero_shot", "gda"], "shots": [1, 2], "seeds": [1, 2]}
    return b.BenchmarkArguments(**{**given, **more})


# ---------------------------------------------------------------------- what a method can see


def test_a_method_that_looks_for_the_test_labels_fails(model, task, place):
    cheat = processes.read_methods(place.methods_file)["cheat"]
    few, exams = draw_few_shot(task, 2, seed=1), [scoring.make_exam(task, "accuracy")]
    # In one process with what scores it, it finds them: the search is a real one.
    late_cheat = replace(cheat, fit=lambda *_: late(cheat))
    with scoring.answer_here(late_cheat, model, few, COLOUR_OPTIONS) as (_, ask):
        assert scoring.score(ask, exams)[0]["accuracy"]["accuracy"] == 1.0
    with processes.answer_elsewhere(place, "cheat", few, COLOUR_OPTIONS) as (_, ask):
        found = scoring.score(ask, exams)[0]["accuracy"]["accuracy"]
    assert found == pytest.approx(1 / 6)  # it guesses: the first of equals, and classes are equally large


def late(cheat):
    """What the cheat answers with, without its search while learning, which succeeds here too."""
    search = cheat.fit.__globals__["search"]

    def predict(images, names):
        return torch.nn.functional.one_hot(search(len(images), len(names)).long(), len(names)).float()

    return predict


def test_a_method_gets_what_it_names_and_no_more(task, place):
    few = draw_few_shot(task, 2, seed=1, with_images=True)
    options = replace(COLOUR_OPTIONS, cupl={name: ["a thing"] for name in COLOUR_NAMES})
    exams = [scoring.make_exam(task)]
    greedy = processes.describe_methods(place.methods_file)["greedy"]

    def seen(method, options, few=few):
        few, options, words = scoring.allowed(method, few, options)
        with processes.answer_elsewhere(place, "greedy", few, options) as (_, ask):
            return ask(exams[0], np.arange(1))[0].tolist()[:4], words

    assert seen(greedy, replace(options, validation="none")) == (
        [0, 0, 1, 1], ["class names", "the template", "2 labelled images of each class"]
    )  # fmt: skip
    assert seen(greedy, replace(options, validation="few"))[0] == [12, 0, 1, 1]
    everything = replace(greedy, knowledge=("templates", "sentences", "unlabelled"))
    found, words = seen(everything, replace(options, validation="few"))
    assert found == [12, 24, 2, 0] and words[2:] == [
        "further hand-written templates", "sentences of a language model", "2 labelled images of each class",
        "2 validation images of each class", "the other training images, without labels",
    ]  # fmt: skip


def test_images_go_without_labels_paths_and_other_rows(task, splits, place):
    few = draw_few_shot(task, 2, seed=1, with_images=True)
    packed = processes._pack(few)
    table = packed["images"].data.table
    assert table.num_rows == 12 and packed["images"]._indices is None
    assert packed["images"]["label"][:] == few.images["label"][:]
    assert all(row["path"] is None for row in table.column("image").to_pylist())
    exam = scoring.make_exam(task)
    with processes.answer_elsewhere(place, "pixels", few, COLOUR_OPTIONS) as (facts, ask):
        assert facts["sees_images"]
        rows = exam.order()
        found = ask(exam, rows)
    own = torch.stack([exam.views[row]["pixel_values"].mean((1, 2)).repeat(2) for row in rows.tolist()])
    torch.testing.assert_close(found, own)
    assert facts["peak_memory_bytes"] > 1e7


def test_the_order_of_the_test_images_tells_nothing(task):
    exam = scoring.make_exam(task)
    order = exam.order()
    assert sorted(order.tolist()) == list(range(48)) and (order != np.arange(48)).mean() > 0.8
    assert np.array_equal(order, exam.order())
    other = replace(exam, labels=exam.labels.flip(0))
    assert not np.array_equal(order, other.order())


def test_the_process_gives_what_the_method_gives_here(model, task, place):
    few, exams = draw_few_shot(task, 2, seed=1), [scoring.make_exam(task)]
    with scoring.answer_here(METHODS["gda"], model, few, COLOUR_OPTIONS) as (facts, ask):
        expected = scoring.score(ask, exams)[0]
    with processes.answer_elsewhere(place, "gda", few, COLOUR_OPTIONS) as (other, ask):
        assert scoring.score(ask, exams)[0] == expected
    assert other["learned_values"] == facts["learned_values"] > 0


def test_failures_are_told(task, place):
    few = draw_few_shot(task, 1, seed=1)
    with pytest.raises(CellError, match="KeyError: 'nothing learned'.*own_methods.py"):
        with processes.answer_elsewhere(place, "fails", few, COLOUR_OPTIONS):
            pass
    with pytest.raises(CellError, match="'dies' ended with exit code 9"):
        with processes.answer_elsewhere(place, "dies", few, COLOUR_OPTIONS):
            pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes end otherwise on Windows")
def test_a_cell_ends_with_who_started_it(tmp_path):
    methods = tmp_path / "methods.py"
    methods.write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(90)\n"
    )
    script = tmp_path / "start.py"
    script.write_text(
        "from coop_hf.experiments import processes as p\n"
        "if __name__ == '__main__':\n"
        f"    place = p.Place('none', {str(methods)!r})\n"
        "    process, pipe = p._start(p._context(), p._serve, place, 'none', None, None)\n"
        "    process.join()\n"
    )
    with subprocess.Popen([sys.executable, str(script)]) as starter:
        until = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < until and starter.poll() is None
            time.sleep(0.1)
        cell = int((tmp_path / "pid").read_text())
        os.kill(cell, 0)  # it is there
        starter.kill()
    until = time.monotonic() + 20
    while is_running(cell):
        assert time.monotonic() < until
        time.sleep(0.1)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---------------------------------------------------------------------- what is measured


def test_measures_against_their_definitions():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]])
    labels = np.array([0, 1, 1, 0])
    error, bins = scoring.calibration(probabilities, labels, 10)
    # One image in each of four bins: |1 - 0.9|, |0 - 0.8|, |1 - 0.7|, |0 - 0.55|.
    assert error == pytest.approx((0.1 + 0.8 + 0.3 + 0.55) / 4)
    assert [b[0] for b in bins] == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    found = scoring.measure(torch.tensor(probabilities).log(), torch.tensor(labels), ["same", "same"])
    assert found["accuracy"] == 0.5 and found["macro_f1"] == 0.5 and found["per_class"] == [0.5, 0.5]
    assert found["ece"] == pytest.approx(scoring.calibration(probabilities, labels)[0], abs=1e-6)
    with pytest.raises(ValueError, match="4 images over 3 classes"):
        scoring.measure(torch.zeros(4, 2), torch.tensor(labels), ["a", "b", "c"])


def test_student_s_quantiles():
    for probability, degrees, value in [(0.975, 2, 4.30265), (0.975, 1, 12.7062), (0.95, 10, 1.81246)]:  # a table's
        assert statistics.t_quantile(probability, degrees) == pytest.approx(value, rel=1e-5)
    scipy = pytest.importorskip("scipy.stats")
    for probability in (0.5, 0.6, 0.9, 0.975, 0.999):
        for degrees in (1, 2.5, 7, 120):
            expected = scipy.t.ppf(probability, degrees)
            assert statistics.t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_paired_differences():
    ours = {"a": {1: 0.5, 2: 0.6, 3: 0.7}, "b": {1: 0.9, 2: 0.9, 3: 0.9}, "c": {1: 1.0}}
    theirs = {"a": {1: 0.4, 2: 0.6, 3: 0.5}, "b": {None: 0.8}}
    found = statistics.paired_difference(ours, theirs)
    assert found["by_data"] == pytest.approx({"a": 0.1, "b": 0.1}) and found["pairs"] == 6
    assert found["mean"] == pytest.approx(0.1)
    # Of "a" alone the draws differ: 0.1, 0.0, 0.2, whose mean has the error 0.1/√3; halved, as one of two data sets.
    half = 4.30265 * 0.1 / 3**0.5 / 2
    assert found["over_draws"] == pytest.approx((0.1 - half, 0.1 + half), abs=1e-5)
    assert found["over_data"] == pytest.approx((0.1, 0.1))
    one = statistics.paired_difference({"a": {1: 0.5}}, {"a": {1: 0.4}})
    assert one["over_draws"] is None and one["over_data"] is None
    assert statistics.paired_difference({"a": {1: 0.5}}, {"b": {1: 0.5}}) is None
    scipy = pytest.importorskip("scipy.stats")
    values = [0.1, 0.25, 0.3, 0.02]
    expected = scipy.t.interval(0.95, 3, np.mean(values), scipy.sem(values))
    assert statistics.t_interval(values) == pytest.approx(expected)


def test_both_harmonic_means():
    first, second = statistics.harmonic_means({1: 0.8, 2: 0.4}, {1: 0.4, 2: 0.8})
    assert first == pytest.approx(2 * 0.8 * 0.4 / 1.2) and second == pytest.approx(0.6)


# ---------------------------------------------------------------------- the comparison


def test_an_interrupted_run_is_completed_to_the_same_file(
    base_folder, colour_folder, methods_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path / "cache"))
    more = {"protocols": ["few_shot", "base_to_new"], "methods_file": methods_file}
    more["methods"] = ["zero_shot", "gda", "greedy", "cupl", "fails"]
    lines = []
    whole = b.benchmark(arguments(base_folder, colour_folder, tmp_path / "whole", **more), report=lines.append)
    report_files.write_report(whole, str(tmp_path / "whole"))
    assert "Validation: none, for all methods." in lines[0]

    def interrupt(line):
        if line.startswith("[4/"):
            raise KeyboardInterrupt

    args = arguments(base_folder, colour_folder, tmp_path / "parts", **more)
    with pytest.raises(KeyboardInterrupt):
        b.benchmark(args, report=interrupt)
    again = []
    results = b.benchmark(args, report=again.append)
    assert 0 < sum("kept from an earlier run" in line for line in again) < len(results["cells"])
    report_files.write_report(results, str(tmp_path / "parts"))
    files = [(tmp_path / name / "scores.csv").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1] and len(files[0].splitlines()) == 1 + 9 + 3

    def lasting(results):
        volatile = ("cost", "seconds", "date")
        cells = [{k: v for k, v in cell.items() if k not in volatile} for cell in results["cells"]]
        return {**results, "cells": cells, "environment": None}

    assert lasting(whole) == lasting(results)
    # No CuPL without sentences; what failed is told, and tried again.
    assert {cell["cell"]["method"] for cell in whole["cells"]} == {"zero_shot", "gda", "greedy"}
    assert {(f["cell"]["method"], f["protocol"]) for f in whole["failed"]} == {
        ("fails", "few_shot"), ("fails", "base_to_new")
    }  # fmt: skip
    assert not any(cell["cell"]["method"] == "gda" for cell in whole["cells"] if "H" in cell["scores"])
    text = (tmp_path / "whole" / "benchmark.md").read_text()
    assert "KeyError: 'nothing learned'" in text and "H of means" in text
    (cell,) = report.cells_of(whole, protocol="few_shot", method="gda", shots=2, seed=1)
    mean = np.mean([e["scores"]["accuracy"] for e in report.cells_of(whole, method="gda", shots=2)])
    assert re.search(rf"\| GDA +\|.* {100 * mean:.1f} ± ", text) and cell["allowed"][-1].startswith("2 labelled")
    assert whole["data"]["colours, few_shot"]["images"] == {"train": 36, "validation": 24, "test": 48}


def test_the_page_holds_all_and_needs_nothing_else(base_folder, colour_folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path / "cache"))
    more = {"methods": ["zero_shot", "ensemble", "gda"], "protocols": ["few_shot", "base_to_new"]}
    args = arguments(base_folder, colour_folder, tmp_path / "out", **more)
    results = b.benchmark(args, report=lambda line: None, command="python examples/benchmark.py --shots 1 2")
    printed = report_files.write_report(results, str(tmp_path / "out"))
    page = (tmp_path / "out" / "benchmark.html").read_text(encoding="utf-8")
    assert "benchmark.html" in printed and page == report_files.page(results)
    # Curves, gains, calibration, differences of all classes at two numbers of shots; gains and differences of H.
    assert page.count("<svg") == 3 + 2 + 2
    links = set(re.findall(r'(?:href|src)="([^"]+)"', page)) - set(re.findall(r'href="(#[^"]+)"', page))
    assert not links and "<script" not in page
    anchors = re.findall(r'<a href="#([^"]+)"', page)
    assert len(anchors) == 5 and all(f'id="{anchor}"' in page for anchor in anchors)

    class Reader(HTMLParser):
        depth, cells = [], []

        def handle_starttag(self, tag, attrs):
            if tag != "meta":
                self.depth.append(tag)

        def handle_endtag(self, tag):
            assert self.depth.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_data(self, data):
            if self.depth and self.depth[-1] in ("td", "pre"):
                self.cells.append(data)

    reader = Reader()
    reader.feed(page)
    assert not reader.depth
    mean, std = statistics.mean_and_std(
        [c["scores"]["accuracy"] for c in report.cells_of(results, method="gda", shots=2)]
    )
    assert report.percent(mean, std) in reader.cells
    (gda,) = [d for name, d in report.compare(results, "few_shot", "accuracy", 2).items() if name == "gda"]
    assert report.interval(gda, "over_draws") in reader.cells
    assert all(name in reader.cells for name in COLOUR_NAMES) and results["command"] in reader.cells
    assert str(results["data"]["colours, few_shot"]["fingerprint"]) in page
    per_class = np.mean(
        [c["details"]["accuracy"]["per_class"] for c in report.cells_of(results, method="gda", shots=2)], 0
    )
    place = reader.cells.index(COLOUR_NAMES[0], reader.cells.index(COLOUR_NAMES[0]))
    assert reader.cells[place + 3] == f"{100 * per_class[0]:.0f}"
    monkeypatch.setattr(report_files.report_plots, "has_matplotlib", lambda: False)
    assert "There are no plots" in report_files.page(results)


def test_arguments_come_from_yaml_and_the_command_line(tmp_path, monkeypatch, colour_folder):
    monkeypatch.setenv("DATA", "/data")
    path = tmp_path / "c.yaml"
    data = [
        {"dataset": "ethz/food101", "data_title": "Food101", "classes": 101, "class_names": ["a", "b"]},
        {"coop_split": "$DATA/split_zhou_DTD.json", "image_root": "$DATA/dtd", "shifts": [{"dataset": "x/y"}]},
    ]
    path.write_text(yaml.safe_dump({"shots": [4], "data": data}))
    values = b.read_config(str(path))
    found = b.read_sources(b.BenchmarkArguments(shots=values["shots"]), values["data"])
    assert [source.name for source in found] == ["Food101", "DTD"] and found[0].facts == {"classes": 101}
    assert found[1].args.coop_split == "/data/split_zhou_DTD.json" and found[1].shifts[0].name == "y"
    assert found[0].args.read_class_names() == ["a", "b"] and found[1].args.shots == [4]
    names = [
        s.name for s in b.read_sources(b.BenchmarkArguments(datasets=["noto", colour_folder, "a/split_zhou_X.json"]))
    ]
    assert names == ["noto", "colours", "X"]
    path.write_text("shoots: [4]")
    with pytest.raises(ValueError, match="holds 'shoots': expected any of data, "):
        b.read_config(str(path))
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        b.read_config(str(path))
    with pytest.raises(ValueError, match="a data set is a mapping.*got .'colour'"):
        b.read_sources(b.BenchmarkArguments(), [{"colour": 1}])
    with pytest.raises(ValueError, match="two data sets are called x"):
        b.read_sources(b.BenchmarkArguments(datasets=["a/x", "b/x"]))


@pytest.mark.parametrize(
    "given, message",
    [
        (["--methods", "magic"], "there is no method 'magic'"),
        (["--methods", "gda"], "--reference 'zero_shot' is not among the methods: gda"),
        (["--protocols", "luck"], "--protocols must be of few_shot, base_to_new, got luck"),
        (["--validation", "test"], "--validation must be none or few"),
        (["--shots", "0"], "--shots must be whole numbers from 1"),
        (["--methods_file", "none.py"], "none.py"),
        (["--config", "none.yaml"], "none.yaml"),
    ],
)
def test_mistakes_end_in_one_line(given, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "benchmark.py"), *given])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / "benchmark.py"), run_name="__main__")
    assert message in str(stop.value.code) and "\n" not in stop.value.code


def test_an_estimate_fetches_nothing(base_folder, colour_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "_base", lambda name: (base_of(base_folder), "tiny", None))
    args = arguments(base_folder, colour_folder, tmp_path / "out", protocols=["few_shot", "base_to_new"])
    text = estimates.estimate(args)
    assert re.search(r"\| colours +\| +6 \| +108 \| +nothing \| +6 \|", text)  # 1 + 4, and zero-shot in two halves
    assert "6 cells, 2 at a time" in text and not (tmp_path / "out").exists()
    data = [
        {"dataset": "some/where", "classes": 10, "images": 100, "test_images": 50, "download_gb": 2.5},
        {"dataset": "no/facts", "shifts": [{"dataset": "other/one", "images": 5, "download_gb": 1}]},
    ]
    text = estimates.estimate(replace(args, datasets=None), data)
    assert "2.5 GB" in text and "without facts, of which too little is known" in text
    assert "data 3.5 GB and 1 of unknown size, base 1 of unknown size" in text
    rates = estimates.Rates(image=0.01, text=0.001, text_step=0.004, of="x")
    coop, vpt = (
        estimates.cell_seconds(name, METHODS[name], rates, 10, 4, 100, "fast") - estimates.PROCESS_SECONDS
        for name in ("coop", "vpt")
    )
    assert coop == pytest.approx(0.01 + get_recipe("fast", "coop")["max_steps"] * 0.04)
    assert vpt == pytest.approx(0.01 + get_recipe("fast", "vpt")["max_steps"] * (32 * 0.03 + 0.04) + 1.0)


def test_groups_of_methods():
    def chosen(*names):
        return list(b.check_arguments(b.BenchmarkArguments(methods=list(names))))

    assert chosen("all") == list(METHODS)
    image_tower = {"tpt", "vpt", "ivlp", "maple", "promptsrc", "clip_lora"}
    assert set(METHODS) - set(chosen("cached")) == image_tower
    assert chosen("gda", "zero_shot", "gda") == ["gda", "zero_shot"]
    assert set(chosen("cached", "vpt")) == set(chosen("cached")) | {"vpt"}


def base_of(folder):
    return CoOpModel.from_pretrained(folder).get_base_model()


@pytest.mark.parametrize("name", ["paper_benchmark.yaml", "paper_benchmark_hub.yaml"])
def test_the_paper_s_data_sets_are_described(name, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    values = b.read_config(str(EXAMPLES / name))
    data = values.pop("data")
    args = b.BenchmarkArguments(**values)
    sources = b.read_sources(args, data)
    b.check_arguments(args)
    assert len(sources) == 11 and [len(source.shifts) for source in sources] == 10 * [0] + [4]
    assert {s.name for s in sources} | {s.name for s in sources[-1].shifts} == set(HAND_TEMPLATES)
    for source in (*sources, *sources[-1].shifts):
        assert set(source.facts) == {"classes", "images", "test_images", "download_gb"}
        given = (source.args.dataset is not None) + (source.args.coop_split is not None)
        assert given == 1 and (source.args.coop_split or "/data").startswith("/data")


def test_a_file_of_names_on_the_hub(monkeypatch, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n")
    asked = []

    def download(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        return str(tmp_path / "names.txt")

    monkeypatch.setattr(few_shot, "hf_hub_download", download)
    assert commands.read_class_names("hf://datasets/own/er/deep/names.txt") == ["a", "b"]
    assert asked == [("own/er", "deep/names.txt", "dataset")]
    with pytest.raises(ValueError, match="hf://datasets/OWNER/NAME/FILE"):
        commands.read_class_names("hf://datasets/own/er")


def test_duplicate_names_are_two_classes(base_folder, splits, tmp_path, monkeypatch):
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path / "cache"))
    numbers = {part: own.cast_column("label", datasets.Value("int64")) for part, own in splits.items()}
    datasets.DatasetDict(numbers).save_to_disk(str(tmp_path / "twice"))
    names = ["cat", "dog", "sea", "photo", "cat", "of"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    args = arguments(
        base_folder, str(tmp_path / "twice"), tmp_path / "out", class_names_file=str(tmp_path / "names.txt")
    )
    (tmp_path / "own.yaml").write_text("recipe: fast  # as it is")
    args = replace(args, shots=[2], seeds=[1], config=str(tmp_path / "own.yaml"))
    results = b.benchmark(args, report=lambda line: None)
    assert "recipe: fast  # as it is</pre>" in report_files.page(results)
    assert not results["failed"] and results["data"]["twice, few_shot"]["class_names"] == names
    assert [len(cell["details"]["accuracy"]["per_class"]) for cell in results["cells"]] == [6, 6]
    json.dumps(results)
