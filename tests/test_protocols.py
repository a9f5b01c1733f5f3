import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from conftest import COLOUR_NAMES, COLOUR_OPTIONS, picture

from coop_hf import CoOpModel
from coop_hf.baselines import class_embeddings, fit_linear_probe, zero_shot_logits
from coop_hf.data.transforms import eval_transform
from coop_hf.experiments import protocols as p
from coop_hf.experiments import tables
from coop_hf.experiments.methods import METHODS, Method, Options
from coop_hf.experiments.tasks import Task, draw_few_shot, make_task, select_classes
from coop_hf.training.arguments import RECIPES


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_map_classes():
    logits = torch.tensor([[1.0, 5.0, 3.0, 9.0]])
    source, target = ["tabby", "siamese", "dog", "car"], ["cat", "dog"]
    mapped = p.map_classes(logits, source, target, {"tabby": "cat", "siamese": "cat"})
    assert mapped.tolist() == [[5.0, 3.0]]
    with pytest.raises(ValueError, match="no class of the source stands for 'cat'"):
        p.map_classes(logits, source, target)
    twice = ["missile", "dog", "missile"]  # as in ImageNet's list
    logits = torch.tensor([[1.0, 5.0, 3.0]])
    assert p.map_classes(logits, twice, twice).tolist() == [[1.0, 5.0, 3.0]]
    assert p.map_classes(logits, twice, ["dog", "missile"]).tolist() == [[5.0, 3.0]]
    logits = torch.tensor([[1.0, 5.0, 3.0, 9.0]])
    with pytest.raises(ValueError, match="neither list has: 'owl'"):
        p.map_classes(logits, source, target, {"owl": "cat"})


def test_few_shot_curve(model, task, tmp_path):
    path = tmp_path / "deep" / "curve.json"
    pytest.importorskip("sklearn")
    methods = {name: METHODS[name] for name in ("zero_shot", "cupl", "linear_probe", "coop")}
    lines = []
    results = p.few_shot_curve(model, task, path, COLOUR_OPTIONS, methods, [1, 2], [1, 2], report=lines.append)
    assert len(results["cells"]) == 1 + 4 + 4 == len(lines)  # no CuPL without sentences
    assert json.loads(path.read_text()) == results
    embeds, labels = task.parts["test"]
    logits = zero_shot_logits(model, class_embeddings(model, None, COLOUR_NAMES, "a {}."), image_embeds=embeds)
    assert results["cells"][0]["scores"]["accuracy"] == pytest.approx(
        (logits.argmax(1) == labels).float().mean().item()
    )
    few = draw_few_shot(task, 2, seed=1)
    probe = fit_linear_probe(few.image_embeds, few.labels, few.val_embeds, few.val_labels)
    (cell,) = [c for c in results["cells"] if c["cell"] == {"method": "linear_probe", "shots": 2, "seed": 1}]
    assert cell["scores"]["accuracy"] == pytest.approx(
        (probe.logits(embeds).argmax(1) == labels).float().mean().item()
    )
    assert results["draws"]["shots 2, seed 1"] == few.rows
    environment = results["environment"]
    assert environment["torch"] == torch.__version__ and environment["torch_threads"] and environment["time"]

    # What is there is kept, what is missing is computed.
    stored = json.loads(path.read_text())
    removed = stored["cells"].pop()
    for entry in stored["cells"]:
        entry["scores"]["accuracy"] = 0.125
    path.write_text(json.dumps(stored))
    again = p.few_shot_curve(model, task, path, COLOUR_OPTIONS, methods, [1, 2], [1, 2], report=lines.append)
    assert [c["scores"]["accuracy"] for c in again["cells"][:-1]] == [0.125] * 8
    assert again["cells"][-1]["scores"] == removed["scores"]  # the same seed gives the same result
    assert sum("kept" in line for line in lines) == 8
    with pytest.raises(ValueError, match="other settings .options differ"):
        p.few_shot_curve(model, task, path, Options("the {}.", ("a {}.",)), methods, report=lines.append)
    fresh = p.few_shot_curve(model, task, path, COLOUR_OPTIONS, methods, [1], [1], overwrite=True, report=lines.append)
    assert len(fresh["cells"]) == 3 and len(json.loads(path.read_text())["cells"]) == 3


def test_an_interrupted_run_keeps_its_cells(tmp_path):
    def compute(cell):
        if cell["seed"] == 2:
            raise KeyboardInterrupt
        return {"scores": {"accuracy": 0.5}}

    path = tmp_path / "results.json"
    cells = [{"method": "x", "seed": seed} for seed in (1, 2)]
    with pytest.raises(KeyboardInterrupt):
        p.run_cells(path, {}, cells, compute, report=lambda line: None)
    assert [c["cell"]["seed"] for c in json.loads(path.read_text())["cells"]] == [1]
    assert [f.name for f in tmp_path.iterdir()] == ["results.json"]
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not a results file"):
        p.run_cells(path, {}, cells, compute)


def test_base_to_new(model, task, tmp_path):
    methods = {"zero_shot": METHODS["zero_shot"], "linear_probe": METHODS["linear_probe"]}
    results = p.base_to_new(model, task, tmp_path / "b.json", COLOUR_OPTIONS, methods, report=lambda line: None)
    (cell,) = results["cells"]  # the linear probe knows no new classes
    embeds, labels = task.parts["test"]
    logits = zero_shot_logits(model, class_embeddings(model, None, COLOUR_NAMES, "a {}."), image_embeds=embeds)
    base = (logits[labels < 3][:, :3].argmax(1) == labels[labels < 3]).float().mean().item()
    new = (logits[labels >= 3][:, 3:].argmax(1) == labels[labels >= 3] - 3).float().mean().item()
    assert cell["scores"] == pytest.approx({"base": base, "new": new, "H": 2 * base * new / (base + new)})
    assert results["settings"]["class_names"] == {
        "colours, base classes": COLOUR_NAMES[:3],
        "colours, new classes": COLOUR_NAMES[3:],
    }


def test_methods_of_the_image_tower_in_the_protocols(model, task, tmp_path, monkeypatch):
    """New classes at once, and other data sets, are scored through the prompted image tower; heads are left out."""
    monkeypatch.setitem(RECIPES["fast"], "max_steps", 2)
    quiet = {"report": lambda line: None, "seeds": [1], "shots": 2}
    methods = {name: METHODS[name] for name in ("zero_shot", "maple", "gda")}
    results = p.base_to_new(model, task, tmp_path / "b.json", COLOUR_OPTIONS, methods, **quiet)
    assert [cell["cell"]["method"] for cell in results["cells"]] == ["zero_shot", "maple"]
    assert all(0 <= score <= 1 for cell in results["cells"] for score in cell["scores"].values())
    few = draw_few_shot(select_classes(task, [0, 1, 2]), 2, seed=1, with_images=True)
    predict = METHODS["maple"].fit(model, few, COLOUR_OPTIONS)
    new = select_classes(task, [3, 4, 5])
    logits = predict(new.views["test"], new.class_names)
    right = (logits.argmax(dim=1) == new.parts["test"][1]).float().mean().item()
    assert results["cells"][1]["scores"]["new"] == pytest.approx(right)
    other = select_classes(task, [1, 0, 2, 3, 4, 5], "other")
    found = p.domain_generalization(model, task, [other], tmp_path / "d.json", COLOUR_OPTIONS, methods, **quiet)
    for cell in found["cells"]:  # the same images under other numbers
        assert cell["scores"]["other"] == pytest.approx(cell["scores"]["colours"])


def test_domain_generalization_and_transfer(model, task, tmp_path):
    quiet = {"report": lambda line: None}
    methods = {"zero_shot": METHODS["zero_shot"]}
    other = select_classes(task, [1, 0], "others")
    results = p.domain_generalization(model, task, [other], tmp_path / "d.json", COLOUR_OPTIONS, methods, **quiet)
    scores = results["cells"][0]["scores"]
    embeds, labels = other.parts["test"]
    logits = zero_shot_logits(model, class_embeddings(model, None, ["dog", "cat"], "a {}."), image_embeds=embeds)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert list(scores) == ["colours", "others"] and scores["others"] == pytest.approx(accuracy)
    renamed = Task("animals", ["hound", "puss"], other.parts, "x")
    maps = {"animals": {"dog": "hound", "cat": "puss"}}
    mapped = p.domain_generalization(
        model, task, [renamed], tmp_path / "m.json", COLOUR_OPTIONS, methods, class_maps=maps, **quiet
    )
    assert mapped["cells"][0]["scores"]["animals"] == pytest.approx(accuracy)
    transfer = p.cross_dataset_transfer(model, task, [renamed], tmp_path / "t.json", COLOUR_OPTIONS, methods, **quiet)
    logits = zero_shot_logits(model, class_embeddings(model, None, ["hound", "puss"], "a {}."), image_embeds=embeds)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert transfer["cells"][0]["scores"]["animals"] == pytest.approx(accuracy)
    # CuPL has sentences for the classes that were learned on; where a target has others, it is left out.
    described = replace(COLOUR_OPTIONS, cupl={name: [f"a {name}"] for name in task.class_names})
    methods["cupl"] = METHODS["cupl"]
    for target, run in ((renamed, ["zero_shot"]), (other, ["zero_shot", "cupl"])):
        path = tmp_path / f"{target.name}.json"
        cells = p.cross_dataset_transfer(model, task, [target], path, described, methods, **quiet)["cells"]
        assert [cell["cell"]["method"] for cell in cells] == run


def test_label_noise_reaches_the_methods(model, task, tmp_path):
    seen = {}

    def fit(model, shots, options):
        seen[len(seen)] = (shots.labels, shots.val_labels)
        return lambda embeds, names: torch.zeros(len(embeds), len(names))

    results = p.label_noise(
        model,
        task,
        tmp_path / "n.json",
        COLOUR_OPTIONS,
        {"zero_shot": METHODS["zero_shot"], "x": Method("x", fit)},
        noise=[0.0, 0.5],
        shots=4,
        seeds=[1],
        report=lambda line: None,
    )
    clean, noisy = seen[0], seen[1]
    assert (clean[0] != noisy[0]).float().mean() == 0.5 and (clean[1] != noisy[1]).float().mean() == 0.5
    methods = {"zero_shot": METHODS["zero_shot"], "x": Method("x", fit)}
    table = tables.scores_by_method(results, methods, "noise")
    assert list(table["x"]) == [0.0, 0.5] and list(table["zero-shot CLIP"]) == [None]
    assert tables.results_table(table, [0.0, 0.5]).count("|") == 4 * 4


def test_the_paper_s_recipe_crops_as_the_public_code(model, monkeypatch, tmp_path):
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path))
    images = [picture(seed, (35, 29)) for seed in range(2)]  # resized to 19 x 16: a rest of 3
    test = datasets.Dataset.from_dict({"image": images, "label": ["cat", "dog"]})
    test = test.cast_column("image", datasets.Image())
    own, original = (
        make_task(model, {"test": test}, "x", progress=False, original=original).parts["test"][0]
        for original in (False, True)
    )
    with torch.no_grad():
        expected = model.get_image_features(
            torch.stack([eval_transform(model.image_processor, original=True)(image) for image in images])
        )
    torch.testing.assert_close(original, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(own, original, atol=1e-3)


def test_choose_template_looks_at_validation(model, task):
    best, scores = p.choose_template(model, task, ["a {}.", "{} of sea."])
    embeds, labels = task.parts["validation"]
    for template, score in scores.items():
        logits = zero_shot_logits(model, class_embeddings(model, None, COLOUR_NAMES, template), image_embeds=embeds)
        assert score == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert scores[best] == max(scores.values())


def test_table():
    scores = {"zero-shot": {0: [0.5]}, "learned": {1: [0.4, 0.6], 2: [0.7, 0.7]}}
    table = tables.results_table(scores, [1, 2], "shots")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["shots", "1", "2"] and rows[2] == ["zero-shot", "50.0", "50.0"]
    assert rows[3] == ["learned", "50.0 ± 14.1", "70.0 ± 0.0"]  # sd of a sample: 0.1 · √2
    assert re.fullmatch(r"\|(-+\|)+", table.splitlines()[1]) and len({len(line) for line in table.splitlines()}) == 1


@pytest.fixture(scope="module")
def colour_folder(splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "colours"
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def run_example(name, monkeypatch, tmp_path, base_folder, colour_folder, *arguments):
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path / "cache"))
    common = ["--base_model", base_folder, "--dataset", colour_folder, "--output_dir", tmp_path / "out", "--seeds", 1]
    monkeypatch.setattr(sys, "argv", [name, *map(str, [*common, *arguments])])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return tmp_path / "out"


def test_few_shot_command(monkeypatch, tmp_path, base_folder, colour_folder, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--methods", "zero_shot", "ensemble", "coop_m4", "--shots", 1, 2]
    out = run_example("few_shot_curve.py", monkeypatch, tmp_path, base_folder, colour_folder, *arguments)
    names = ["few_shot_curve.csv", "few_shot_curve.json", "few_shot_curve.md", "few_shot_curve.png"]
    assert sorted(f.name for f in out.iterdir()) == names
    printed = capsys.readouterr().out
    assert (out / "few_shot_curve.md").read_text() in printed and "colours, 6 classes, 48 test images" in printed
    results = json.loads((out / "few_shot_curve.json").read_text())
    assert results["settings"]["options"]["template"] == "a photo of a {}."
    assert len(results["settings"]["options"]["ensemble"]) == 8 and len(results["cells"]) == 4


def test_other_commands(monkeypatch, tmp_path, base_folder, colour_folder):
    places = (monkeypatch, tmp_path, base_folder, colour_folder)
    out = run_example("base_to_new.py", *places, "--methods", "zero_shot", "--shots", 1)
    table = (out / "base_to_new.md").read_text()
    assert "| harmonic mean |" in table and "zero-shot CLIP" in table
    noise = ["--methods", "zero_shot", "coop_m4", "--noise", 0, 0.25, "--shots", 4]
    assert "| 25 % " in (run_example("label_noise.py", *places, *noise) / "label_noise.md").read_text()
    out = run_example("ablations.py", *places, "--variants", "words", "--shots", 1)
    assert 'from "a photo of a", end' in (out / "ablations.md").read_text()


def test_domain_command(monkeypatch, tmp_path, base_folder, colour_folder, splits):
    target = tmp_path / "animals"
    labels = [min(label, 1) for label in splits["test"]["label"]]
    numbers = datasets.Dataset.from_dict({"webp": splits["test"]["image"][:], "cls": labels})
    numbers = numbers.cast_column("webp", datasets.Image())
    numbers.save_to_disk(str(target))
    (tmp_path / "names.txt").write_text("puss\nhound\n")
    maps = {"cat": "puss", **{name: "hound" for name in COLOUR_NAMES[1:]}}
    (tmp_path / "map.json").write_text(json.dumps(maps))
    arguments = ["--targets", target, "--target_image_column", "webp", "--target_label_column", "cls"]
    arguments += ["--target_names_files", f"animals={tmp_path / 'names.txt'}", "--methods", "zero_shot"]
    places = (monkeypatch, tmp_path, base_folder, colour_folder)
    mapped = ["--class_map_files", f"animals={tmp_path / 'map.json'}"]
    out = run_example("domain_generalization.py", *places, *arguments, *mapped)
    (cell,) = json.loads((out / "domain_generalization.json").read_text())["cells"]
    model = CoOpModel.from_pretrained(base_folder, class_names=COLOUR_NAMES)
    embeds, _ = make_task(model, {"test": splits["test"]}, "x", progress=False).parts["test"]
    logits = zero_shot_logits(
        model, class_embeddings(model, None, COLOUR_NAMES, "a photo of a {}."), image_embeds=embeds
    )
    right = (logits.argmax(1).clamp(max=1) == torch.tensor(labels)).float().mean().item()
    assert cell["scores"]["animals"] == pytest.approx(right)
    out = run_example("domain_generalization.py", *places, *arguments, "--transfer")
    assert "| animals" in (out / "cross_dataset_transfer.md").read_text()
