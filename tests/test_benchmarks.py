"""Each benchmark runs, on a tiny tower, and what it measures beside time is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def run(name, *given):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COOP_HF_CACHE": os.environ.get("COOP_HF_CACHE", "")}
    command = [sys.executable, str(FOLDER / name), *map(str, given)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert report["machine"]["torch"]
    return report["results"]


def test_text_step():
    results = run("text_step.py", "--size", "tiny", "--classes", 12, "--repeats", 1)
    assert len(results) == 4
    for result in results:
        assert result["feature_error"] < 1e-5 and result["gradient_error"] < 1e-4
        assert result["peak_memory_bytes"] > result["memory_before_bytes"] > 0
    results = run("text_step.py", "--size", "tiny", "--classes", 3, "--repeats", 1, "--no_plain")
    assert len(results) == 4 and not any("plain_77" in result or "failed" in result for result in results)


def test_methods():
    given = ["--size", "tiny", "--repeats", 1, "--max_plain_classes", 6]
    results = run("methods.py", *given, "--classes", 6)
    assert [result["case"] for result in results] == "cocoop kgcoop prograd deep_text maple promptsrc tpt".split()
    for result in results:
        if result["case"] in ("kgcoop", "prograd"):
            assert result["ratio_to_coop"] > 0
        else:
            # One step of AdamW is lr · sign(gradient), so that rounding of a gradient of 0 shows in TPT's answer.
            assert result["output_error"] < (1e-2 if result["case"] == "tpt" else 1e-4)
            assert result["case"] == "tpt" or result["gradient_error"] < 1e-3
            assert result["speedup"] > 0
    (result,) = run("methods.py", *given, "--classes", 8, "--cases", "maple")  # in two groups
    assert result["speedup"] > 0 and "output_error" not in result


def test_processes_share_the_classes_exactly():
    result = run("processes.py", "--size", "tiny", "--classes", 11, "--steps", 1)
    assert result["loss_error"] < 1e-5 and result["gradient_error"] < 1e-5


def test_overhead():
    results = run("overhead.py", "--size", "tiny", "--steps", 5, "--batch_size", 2, "--repeats", 1, "--classes", 3)
    assert results["trainer"]["trainer_step_ms"] > 0 and results["inference"]["images_per_s"] > 0


def test_embedding():
    speed = run("embedding.py", "--only", "speed", "--size", "tiny", "--images", 20, "--repeats", 1)["speed"]
    assert speed["embed"]["images_per_s"] > 0 and speed["embed_over_bare_in_steps_of_64_cpu"] < 1.5


def test_growth_is_drawn_and_taken_up(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(FOLDER / "growth.py"), "--output", "growth.json", "--plot-dir", "images", "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def points(*only):
        done = subprocess.run(
            [*command, "--only", *only], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return len(done.stdout.splitlines()), json.loads((tmp_path / "growth.json").read_text())["points"]

    lines, first = points("name", "shots")
    assert lines == 2 and [(point["panel"], point["x"]) for point in first] == [("name", 2), ("shots", 1)]
    for point in first:
        assert point["seconds"] > 0 and point["limit_s"] > 0 and point["peak_memory_bytes"] > 2**20, point
    assert first[1]["detail"]["steps"] == 20  # of the fast recipe at one shot
    first[1]["failed"] = "stopped"  # what failed is measured again
    report = json.loads((tmp_path / "growth.json").read_text())
    (tmp_path / "growth.json").write_text(json.dumps({**report, "points": first}))
    lines, second = points("name", "shots")
    assert lines == 1 and second[0] == first[0] and "failed" not in second[1]
    assert 10_000 < (tmp_path / "images" / "growth.png").stat().st_size < 200_000


def test_training():
    results = run("training.py", "--size", "tiny", "--classes", 4, "--shots", 2, "--public_steps", 1)
    assert results["paper_steps"] == 0 or results["paper"]["extrapolated_from_steps"] > 0
    assert results["fast"]["steps"] == 32


def test_gpu_script_runs_without_one():
    results = run("gpu.py", "--device", "cpu", "--size", "tiny", "--dtypes", "float32")
    cases = ["text step", "Trainer", "ImageNet's schedule"]
    assert [result["case"] for result in results] == [*cases, *cases, "many classes"]
    assert not [result for result in results if "failed" in result], results
    eager, compiled = results[1], results[4]
    assert (eager["mode"], compiled["mode"]) == ("eager", "compiled")
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5)
    schedule = results[2]
    assert schedule["schedule_s"] == pytest.approx(schedule["before_s"] + 25 * schedule["step_ms"])


def test_recipes(tmp_path):
    command = [sys.executable, str(FOLDER / "recipes.py"), "--shots", "1", "--seeds", "1", "2", "--recipes", "fast"]
    command += ["--output", str(tmp_path / "recipes.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=True, timeout=300)
    report = json.loads((tmp_path / "recipes.json").read_text())
    cells = report["cells"]
    mean, spread = report["summary"]["fast"]["accuracy"]["1"]
    assert [cell["steps"] for cell in cells] == [20, 20]
    assert mean == pytest.approx((cells[0]["accuracy"] + cells[1]["accuracy"]) / 2)
    assert spread == pytest.approx(abs(cells[0]["accuracy"] - cells[1]["accuracy"]) / 2**0.5)
    assert mean > 0.15 and report["zero_shot"] > 0.15  # chance is 0.05
    assert os.listdir(tmp_path) == ["recipes.json"]


def test_hostile_files():
    results = run("fuzz.py", "--adapters", 300, "--checkpoints", 150)
    assert not results["code_ran"] and not results["other_files_written"]
    for kind, most in (("adapters", 10), ("checkpoints", 5)):
        found = results[kind]
        assert not [p for p in found["problems"] if p["outcome"].startswith("unclear")], found["problems"]
        assert found["worst"]["mebibytes"]["mebibytes"] < 1024 and found["worst"]["cpu_seconds"]["cpu_seconds"] < 5
        assert found["outcomes"]["loaded"] > most and found["different_reasons"] > most, found["outcomes"]


def test_savers_and_readers_in_processes():
    results = run("concurrency.py", "--rounds", 120, "--processes", 3)
    assert results["with_locks"]["readings"] == {"whole": 120}
    assert set(results["without_locks"]["readings"]) <= {"whole", "refused"}
    for found in (results["with_locks"], results["without_locks"]):
        assert found["at_rest"] == "whole" and len(found["files_left"]) == 2
