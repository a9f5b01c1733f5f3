"""The commands under `examples/`, as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coop_hf import CoOpModel, emoji_model_path, load_emoji


ROOT = Path(__file__).resolve().parents[1]


def run(folder, *given, launcher=(sys.executable,), script="train.py", code=0):
    environment = {**os.environ, "COOP_HF_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [*launcher, str(ROOT / "examples" / script), *map(str, given)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == code, result.stderr[-4000:]
    return result


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    return folder, run(folder).stdout


def test_the_learned_prompt_beats_the_hand_written_one(default_run):
    folder, output = default_run
    results = json.loads((folder / "coop_output" / "all_results.json").read_text())
    assert (results["num_shots"], results["seed"]) == (16, 1)
    assert results["eval_accuracy"] >= results["zero_shot_accuracy"] + 0.1
    for value in (results["zero_shot_accuracy"], results["eval_accuracy"]):
        assert f"{value:.1%}" in output
    assert "hand-written prompt" in output and "gain" in output


def test_what_it_writes_is_an_adapter(default_run):
    folder, _ = default_run
    results = json.loads((folder / "coop_output" / "all_results.json").read_text())
    test = load_emoji()["test"]
    model = CoOpModel.from_pretrained(folder / "coop_output")
    names = test.features["label"].names
    best = [answer[0]["label"] for answer in model.predict(test["image"][:], top_k=1)]
    accuracy = sum(name == names[label] for name, label in zip(best, test["label"])) / len(test)
    assert accuracy == pytest.approx(results["eval_accuracy"], abs=0.004)
    card = (folder / "coop_output" / "README.md").read_text(encoding="utf-8")
    assert "library_name: coop_hf" in card and f"{100 * results['eval_accuracy']:.1f}" in card


def test_two_runs_give_the_same_bits(default_run, tmp_path):
    folder, _ = default_run
    run(tmp_path)
    name = "coop_output/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_accelerate_launch_with_two_processes(default_run, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run(tmp_path, "--use_cpu", launcher=launcher)
    one = json.loads((default_run[0] / "coop_output" / "all_results.json").read_text())
    two = json.loads((tmp_path / "coop_output" / "all_results.json").read_text())
    assert two["zero_shot_accuracy"] == one["zero_shot_accuracy"]
    # 200 steps magnify rounding: the context differs by 1e-3 or so, a few images may change sides.
    assert two["eval_accuracy"] == pytest.approx(one["eval_accuracy"], abs=0.02)


def test_ones_own_images(tmp_path):
    emoji = load_emoji()["train"]
    names = emoji.features["label"].names
    labels = emoji["label"]
    for row in range(len(emoji)):
        if labels[row] < 4:
            place = tmp_path / "images" / names[labels[row]]
            place.mkdir(parents=True, exist_ok=True)
            emoji[row]["image"].save(place / f"{row}.png")
    given = ["--dataset", "images", "--base_model", emoji_model_path(), "--num_shots", 4, "--seed", 3]
    given += [
        "--n_ctx",
        6,
        "--class_specific",
        "True",
        "--class_token_position",
        "middle",
        "--ctx_init",
        "a photo of a",
    ]
    output = run(tmp_path, *given, "--max_steps", 20, "--output_dir", "mine").stdout
    model = CoOpModel.from_pretrained(tmp_path / "mine")
    assert model.config.class_specific and model.config.class_token_position == "middle"
    assert sorted(model.class_names) == sorted(names[:4])
    drawn, rest = 16, sum(label < 4 for label in labels) - 16
    assert f"{drawn} images" in output and f"{rest} test images" in output


def test_a_split_of_the_coop_benchmark(tmp_path):
    emoji = load_emoji()
    parts = {"train": "train", "val": "validation", "test": "test"}
    split = {}
    for part, name in parts.items():
        split[part] = []
        for row, label in enumerate(emoji[name]["label"]):
            if label < 3:
                path = f"{name}_{row}.png"
                emoji[name][row]["image"].save(tmp_path / path)
                split[part].append([path, label, emoji[name].features["label"].names[label].replace(" ", "_")])
    (tmp_path / "split.json").write_text(json.dumps(split))
    run(tmp_path, "--coop_split", "split.json", "--image_root", ".", "--num_shots", 2, "--max_steps", 5)
    results = json.loads((tmp_path / "coop_output" / "all_results.json").read_text())
    assert results["num_shots"] == 2


def test_mistakes_are_explained(tmp_path):
    assert "no split 'nothing'" in run(tmp_path, "--train_split", "nothing", code=1).stderr
    assert "neither a folder" in run(tmp_path, "--base_model", "../nothing/here", code=1).stderr
    assert "n_ctx" in run(tmp_path, "--n_ctx", "500", code=1).stderr


@pytest.mark.parametrize(
    "given, expected",
    [
        (
            ["--method", "maple", "--objective", "kgcoop", "--n_ctx", 3],
            {"n_ctx": 3, "fixed_words": "of a", "depth": 3},
        ),
        (["--method", "ivlp", "--class_specific", "--depth", 2], {"class_specific": True, "depth": 2, "n_vision": 2}),
        (["--method", "vpt", "--n_vision", 5], {"n_vision": 5, "depth": 5}),
        (["--method", "cocoop", "--ctx_init", "none", "--n_ctx", 2], {"n_ctx": 2, "ctx_init": None}),
        (["--objective", "prograd"], {"n_ctx": 16, "ctx_init": "a photo of a", "class_specific": False}),
        (["--method", "taskres", "--alpha", 0.25], {"alpha": 0.25, "stores_class_embeds": True}),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_methods_and_their_fields(tmp_path, given, expected):
    run(tmp_path, *given, "--num_shots", 1, "--max_steps", 2)
    config = CoOpModel.from_pretrained(tmp_path / "coop_output").config
    assert config.method == (given[1] if given[0] == "--method" else "coop")
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_paper_s_recipe_of_a_method(tmp_path):
    given = ["--method", "maple", "--objective", "kgcoop", "--recipe", "paper", "--learning_rate", 0.001]
    output = run(tmp_path, *given, "--num_shots", 1).stdout
    results = json.loads((tmp_path / "coop_output" / "all_results.json").read_text())
    assert results["epoch"] == 5 and "maple" in output  # 20 images in batches of 4
    card = (tmp_path / "coop_output" / "README.md").read_text(encoding="utf-8")
    assert "0.001" in card and "25" in card


def test_a_head_learns_by_its_own_recipe(tmp_path):
    output = run(tmp_path, "--method", "gda", "--num_shots", 4).stdout
    assert "learned head (gda" in output
    results = json.loads((tmp_path / "coop_output" / "all_results.json").read_text())
    assert results["eval_accuracy"] != results["zero_shot_accuracy"] and "train_loss" not in results
    model = CoOpModel.from_pretrained(tmp_path / "coop_output")
    test = load_emoji()["test"]
    best = [answer[0]["label"] for answer in model.predict(test["image"][:], top_k=1)]
    accuracy = sum(name == test.features["label"].names[k] for name, k in zip(best, test["label"])) / len(test)
    assert accuracy == pytest.approx(results["eval_accuracy"], abs=0.004)


def test_mistakes_with_methods_are_explained(tmp_path):
    error = run(tmp_path, "--method", "vpt", "--n_ctx", 4, code=1).stderr
    assert (
        error == "train.py: the method 'vpt' has no 'n_ctx': what it has is 'n_vision', 'depth', and the template.\n"
    )
    assert "no method 'mapel'; choose from coop," in run(tmp_path, "--method", "mapel", code=1).stderr
    error = run(tmp_path, "--method", "gda", "--objective", "kgcoop", code=1).stderr
    assert error.startswith("train.py: 'gda' is a head") and "Traceback" not in error
    assert "the image tower has 5 layers" in run(tmp_path, "--method", "vpt", "--depth", 9, code=1).stderr


def test_ablations_over_backbones(tmp_path):
    (tmp_path / "twin").symlink_to(emoji_model_path(), target_is_directory=True)
    given = ["--backbones", emoji_model_path(), "twin", "--variants", "m4", "--shots", 1, "--seeds", 1]
    output = run(tmp_path, *given, script="ablations.py").stdout
    files = [tmp_path / "results" / "ablations" / name / "ablations.json" for name in ("emoji-clip", "twin")]
    first, second = (json.loads(file.read_text(encoding="utf-8"))["cells"] for file in files)
    assert [cell["scores"] for cell in first] == [cell["scores"] for cell in second] and len(first) == 2
    assert "on emoji-clip" in output and "on twin" in output
    again = run(tmp_path, "--backbones", emoji_model_path(), emoji_model_path(), script="ablations.py", code=1)
    assert "the same name" in again.stderr
