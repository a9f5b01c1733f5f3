"""The arguments of the commands: what works in one works in all, and a mistake ends in one line."""

import hashlib
import json
import random
import runpy
import sys
from pathlib import Path

import datasets
import pytest
from conftest import COLOUR_NAMES

from coop_hf.data.few_shot import coop_few_shot_rows
from coop_hf.data.sources import read_coop_split
from coop_hf.experiments import commands
from coop_hf.experiments.benchmark import BenchmarkArguments
from coop_hf.experiments.benchmark import benchmark as benchmark_over
from coop_hf.experiments.commands import DataArguments, ProtocolArguments, draw_train_and_test, load_splits, prepare
from coop_hf.experiments.tasks import draw_few_shot, select_classes


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(splits, tmp_path_factory):
    """Class folders `images/` without test/, and a split file in the form of the CoOp benchmark with an index file."""
    root = tmp_path_factory.mktemp("data")
    split: dict[str, list] = {}
    for part, name in {"train": "train", "val": "validation", "test": "test"}.items():
        split[part] = []
        for row, (image, label) in enumerate(zip(splits[name]["image"], splits[name]["label"])):
            path = f"{COLOUR_NAMES[label]}/{part}_{row}.png"
            (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / "images" / path)
            split[part].append([path, label, COLOUR_NAMES[label].replace(" ", "_")])
    (root / "split_zhou_Colours.json").write_text(json.dumps(split))
    (root / "names.txt").write_text("\n".join(f"{name} thing" for name in sorted(COLOUR_NAMES)))
    (root / "draws").mkdir()
    rows = {"train": [35, 3, 17], "val": [4]}
    data = {
        part: [{"impath": split[part][i][0], "label": split[part][i][1], "classname": split[part][i][2]} for i in own]
        for part, own in rows.items()
    }
    content = {part: {"indices": rows[part], "data": data[part]} for part in rows}
    (root / "draws" / "shot_1-seed_2.json").write_text(json.dumps(content))
    return root


def benchmark(folder, kind=DataArguments, **more):
    return kind(coop_split=str(folder / "split_zhou_Colours.json"), image_root=str(folder / "images"), **more)


def test_splits_get_one_name_and_can_be_chosen(splits, tmp_path):
    three = {"training": splits["train"], "val": splits["validation"], "test": splits["test"]}
    datasets.DatasetDict(three).save_to_disk(str(tmp_path / "three"))
    sizes = {"train": 36, "validation": 24, "test": 48}
    found = load_splits(DataArguments(str(tmp_path / "three"), train_split="training"))
    assert {name: len(split) for name, split in found.items()} == sizes
    found = load_splits(DataArguments(str(tmp_path / "three"), train_split="test", eval_split="val"))
    assert {name: len(split) for name, split in found.items()} == {"train": 48, "test": 24}
    two = {"train": splits["train"], "valid": splits["validation"]}  # published without its test part
    datasets.DatasetDict(two).save_to_disk(str(tmp_path / "two"))
    assert {n: len(s) for n, s in load_splits(DataArguments(str(tmp_path / "two"))).items()} == {
        "train": 36,
        "test": 24,
    }
    with pytest.raises(ValueError, match="no split 'dev2' in the data set; it has 'train', 'valid'"):
        load_splits(DataArguments(str(tmp_path / "two"), eval_split="dev2"))


def test_one_folder_without_a_test_part_does_for_training_and_for_protocols(
    folder, base_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path))
    given = {"dataset": str(folder / "images"), "class_names_file": str(folder / "names.txt")}
    train, test = draw_train_and_test(DataArguments(**given), 2, seed=1)
    assert len(train) == 12 and len(test) == 108 - 12
    paths = [{row["path"] for row in part.cast_column("image", datasets.Image(decode=False))["image"]}
             for part in (train, test)]  # fmt: skip
    assert not paths[0] & paths[1]
    model, task, options, _ = prepare(ProtocolArguments(base_model=str(base_folder), **given))
    assert task.class_names == [f"{name} thing" for name in sorted(COLOUR_NAMES)]
    # 18 images a class: 3 for the test, 3 of the other 15 for validation.
    assert {part: len(labels) for part, (_, labels) in task.parts.items()} == {
        "train": 72, "validation": 18, "test": 18
    }  # fmt: skip
    again = prepare(ProtocolArguments(base_model=str(base_folder), **given))[1]
    assert again.fingerprint == task.fingerprint


def test_class_names_are_given_once(folder):
    assert DataArguments(class_names="a, sea lion").read_class_names() == ["a", "sea lion"]
    with pytest.raises(ValueError, match="--class_names and --class_names_file"):
        DataArguments(class_names="a", class_names_file=str(folder / "names.txt")).read_class_names()


def test_columns_are_named_in_one_way(splits, tmp_path):
    renamed = splits["train"].rename_columns({"image": "photo", "label": "kind"})
    renamed.save_to_disk(str(tmp_path / "renamed"))
    train, test = draw_train_and_test(DataArguments(str(tmp_path / "renamed")), 1, "kind")
    assert len(train) == 6 and len(test) == 30 and train.column_names == ["photo", "kind"]
    with pytest.raises(ValueError, match="no column 'label'; it has 'photo', 'kind'"):
        draw_train_and_test(DataArguments(str(tmp_path / "renamed")), 1)


def test_index_files_and_the_public_draw_in_training(folder):
    split = read_coop_split(folder / "split_zhou_Colours.json", folder / "images")
    train, test = draw_train_and_test(benchmark(folder, few_shot_indices=str(folder / "draws")), 1, seed=2)
    assert train["label"][:] == [split["train"]["label"][i] for i in (35, 3, 17)] and len(test) == 48
    assert train.column_names == ["image", "label"]
    train, _ = draw_train_and_test(benchmark(folder, draw="coop"), 2, seed=5)
    rows = coop_few_shot_rows(2, 5, split["train"]["label"][:])[0]
    assert train[3]["image"].tobytes() == split["train"][rows[3]]["image"].tobytes() and len(train) == 12
    with pytest.raises(FileNotFoundError, match="shot_4-seed_2.json"):
        draw_train_and_test(benchmark(folder, few_shot_indices=str(folder / "draws")), 4, seed=2)


def test_index_files_and_the_public_draw_in_protocols(folder, base_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path))
    more = {"base_model": str(base_folder), "methods": ["zero_shot"]}
    given = benchmark(folder, ProtocolArguments, few_shot_indices=str(folder / "draws"), shots=[1], seeds=[2], **more)
    task = prepare(given)[1]
    few = draw_few_shot(task, 1, 2)
    assert few.rows == [35, 3, 17] and few.val_labels.tolist() == [task.parts["validation"][1][4]]
    coop = prepare(benchmark(folder, ProtocolArguments, draw="coop", shots=[1, 2], seeds=[2], **more))[1]
    assert len({coop.fingerprint, task.fingerprint, prepare(benchmark(folder, ProtocolArguments, **more))[1].fingerprint}) == 3  # fmt: skip  # noqa: E501
    labels = [coop.parts[part][1].tolist() for part in ("train", "validation")]
    train, val = coop_few_shot_rows(2, 2, *labels)
    few = draw_few_shot(coop, 2, 2)
    assert few.rows == train and few.val_labels.tolist() == [labels[1][row] for row in val]
    # Of some classes alone: drawn among all, as the public code does, and then taken out.
    half = draw_few_shot(select_classes(coop, [0, 1, 2]), 2, 2)
    assert half.rows == [row for row in train if labels[0][row] < 3]
    assert half.labels.tolist() == [labels[0][row] for row in half.rows]
    with pytest.raises(ValueError, match="one few-shot file is one draw"):
        file = str(folder / "draws" / "shot_1-seed_2.json")
        prepare(benchmark(folder, ProtocolArguments, few_shot_indices=file, shots=[1], seeds=[1, 2], **more))


def test_the_benchmark_reads_what_the_others_read(folder, base_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COOP_HF_CACHE", str(tmp_path))
    quiet = {"report": lambda line: None}
    more = {"base_model": str(base_folder), "methods": ["zero_shot", "gda"], "processes": 1, "seeds": [2]}
    more["output_dir"] = str(tmp_path / "out")
    data = [
        {"dataset": str(folder / "images"), "class_names_file": str(folder / "names.txt"), "data_title": "folder"},
        {"coop_split": str(folder / "split_zhou_Colours.json"), "image_root": str(folder / "images"), "draw": "coop"},
    ]
    results = benchmark_over(BenchmarkArguments(shots=[2], **more), data, **quiet)
    about = results["data"]["folder, few_shot"]
    assert about["images"] == {"train": 72, "test": 18, "validation": 18} and len(results["cells"]) == 4
    assert about["class_names"] == [f"{name} thing" for name in sorted(COLOUR_NAMES)]
    about, split = results["data"]["Colours, few_shot"], read_coop_split(**{"path": data[1]["coop_split"], "image_root": data[1]["image_root"]})  # fmt: skip  # noqa: E501
    drawn = coop_few_shot_rows(2, 2, split["train"]["label"][:], split["validation"]["label"][:])[0]
    assert results["draws"]["Colours, few_shot"] == {"shots 2, seed 2": drawn}
    file = folder / "split_zhou_Colours.json"
    assert about["split_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert about["draw"] == "CoOp's code, random.seed(seed)"
    (folder / "all_draws").mkdir()
    name = "shot_2-seed_2.json"
    entries = json.loads(file.read_text())["train"]
    written = [{"impath": entries[i][0], "label": entries[i][1], "classname": entries[i][2]} for i in drawn]
    (folder / "all_draws" / name).write_text(json.dumps({"train": {"indices": drawn, "data": written}}))
    data[1] |= {"draw": "nested", "few_shot_indices": str(folder / "all_draws"), "data_title": "indices"}
    again = benchmark_over(BenchmarkArguments(shots=[2], **more), data[1:], **quiet)
    scores = [[cell["scores"] for cell in found["cells"]][-2:] for found in (results, again)]
    assert scores[0] == scores[1] and list(again["data"]["indices, few_shot"]["indices_sha256"]) == [name]


@pytest.mark.parametrize("script", ["train.py", "few_shot_curve.py", "base_to_new.py", "label_noise.py",
                                    "ablations.py", "domain_generalization.py", "benchmark.py"])  # fmt: skip
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "nowhere/at/all"], "no file or folder"),
        (["--train_split", "nothing"], "no split 'nothing'"),
        (["--coop_split", "split.json"], "--image_root"),
        (["--class_names_file", "missing.txt"], "missing.txt"),
        (["--draw", "dassl"], "--draw must be nested or coop"),
    ],
)
def test_mistakes_end_in_one_line(script, arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert message in str(stop.value.code) and "\n" not in stop.value.code


def test_mistakes_of_ours_keep_their_traceback():
    def main():
        random.sample([1], 2)  # a ValueError, but not one of coop_hf's

    with pytest.raises(ValueError):
        commands.run_command(main)
