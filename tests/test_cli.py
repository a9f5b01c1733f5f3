"""`coop-hf`, as a person types it, on a small base and six colours."""

import contextlib
import csv
import fcntl
import importlib.util
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from argparse import Namespace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import COLOUR_NAMES
from hub_server import HubServer
from test_coop_checkpoint import write_checkpoint
from test_hub import set_endpoint

import coop_hf
from coop_hf import CoOpConfig, CoOpModel, nearest_tokens
from coop_hf.cli.main import COMMANDS, main
from coop_hf.cli.more import benchmark_parser
from coop_hf.cli.train import TrainParser
from coop_hf.files.adapter_files import read_adapter
from coop_hf.training import processes


ROOT = Path(coop_hf.__file__).parents[1]


def call(*arguments):
    """What a command prints on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main([str(argument) for argument in arguments])
    return out.getvalue(), err.getvalue()


def fails(*arguments, code=1):
    """The line that a mistake ends in."""
    err = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(err):
        main([str(argument) for argument in arguments])
    if code == 1:
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
        return stop.value.code
    assert stop.value.code == code
    return err.getvalue()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COOP_HF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def images(splits, tmp_path_factory):
    """Class folders in train/ and test/."""
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "test"):
        for row, (image, label) in enumerate(zip(splits[part]["image"], splits[part]["label"])):
            place = root / part / COLOUR_NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{row}.png")
    (root / "test" / ".hidden.png").write_bytes(b"")
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def learned(images, base_folder, tmp_path_factory):
    """A folder that `coop-hf train` wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("learned") / "prompt"
    given = ["--base_model", base_folder, "--num-shots", 4, "--n_ctx", 2, "--max_steps", 30, "--use_cpu"]
    return folder, *call("train", images, *given, "--output_dir", folder)


# ---------------------------------------------------------------------- help


def test_help_of_every_command_fits_on_a_screen():
    out, _ = call()
    for name in (name for group in COMMANDS.values() for name in group):
        assert re.search(rf"^  {name} +\w", out, re.M)
    assert len(out.splitlines()) <= 30
    assert call("--version")[0] == f"coop_hf {coop_hf.__version__}\n"


@pytest.mark.parametrize("method", ["coop", "maple", "gda"])
def test_help_of_the_training_shows_what_is_used_most(method, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = TrainParser("coop-hf train").format_help(method)
    groups = re.split(r"\n(?=\S[^\n]*:\n)", text)
    assert len(groups) == 6 and all(len(group.splitlines()) <= 24 for group in groups)
    assert ("--n_ctx" in text) == (method != "gda") and ("--depth" in text) == (method == "maple")
    everything = TrainParser("coop-hf train").format_help(method, everything=True)
    parser = TrainParser("coop-hf train")
    for action in parser._actions:
        shown = f"  {action.option_strings[0]}"
        negation = action.option_strings[0].startswith("--no_")  # the other side of a switch that is shown
        assert negation or shown in everything, shown
    assert "--adam_beta1" in everything and "--adam_beta1" not in text


def test_help_does_not_load_torch():
    code = "import sys; from coop_hf.cli.main import main\n"
    code += "try: main(['predict', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--top_k N" in result.stdout and "--top-k" not in result.stdout


# ---------------------------------------------------------------------- train


def test_training_prints_lines_and_a_table(learned):
    folder, out, err = learned
    results = json.loads((folder / "all_results.json").read_text())
    first, *steps = err.strip().splitlines()
    assert re.fullmatch(
        r"Loaded tiny-clip \(0\.\d M parameters\): 6 classes, 24 images to learn from, 48 to test on", first
    )
    assert [re.fullmatch(r"step (\d+) of 30: loss [\d.]+", line)[1] for line in steps] == [
        str(step) for step in range(3, 31, 3)
    ]
    assert "{'" not in out + err and f"{results['eval_accuracy']:.1%}" in out and "48 test images, 6 classes" in out
    assert CoOpModel.from_pretrained(folder).class_names == sorted(COLOUR_NAMES)
    assert results["training"]["hyperparameters"]["steps"] == 30 and results["num_train"] == 24


def test_epochs_are_told_where_they_are_more_than_a_step(images, base_folder, tmp_path):
    given = ["--base_model", base_folder, "--num_shots", 4, "--num_train_epochs", 2, "--output_dir", tmp_path / "out"]
    given += ["--per_device_train_batch_size", 6, "--logging_steps", 2, "--use_cpu", "--eval_strategy", "epoch"]
    out, err = call("train", "--dataset", images, *given, "--json")
    lines = err.splitlines()[1:]
    steps = [line.split(", loss")[0] for line in lines if "epoch" in line]
    assert steps == [f"step {step} of 8: epoch {epoch} of 2" for step, epoch in ((2, 1), (4, 1), (6, 2), (8, 2))]
    assert sum("eval accuracy" in line for line in lines) == 2
    assert json.loads(out)["output_dir"] == str(tmp_path / "out")


def test_quiet_prints_the_table_alone(images, base_folder, tmp_path):
    given = ["--base_model", base_folder, "--num_shots", 1, "--max_steps", 2, "--output_dir", tmp_path, "--use_cpu"]
    out, err = call("train", images, *given, "--quiet")
    assert err == "" and out.startswith("\nAccuracy on 48 test images")


def test_on_a_terminal_there_is_one_bar_with_the_loss(images, base_folder, tmp_path):
    given = ["--base_model", base_folder, "--num_shots", 4, "--max_steps", 40, "--output_dir", tmp_path, "--use_cpu"]
    given += ["--feature_cache_dir", tmp_path / "cache"]
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(writer, "w") as terminal, contextlib.redirect_stderr(terminal):
        main(["train", str(images), *map(str, given)])
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
        while piece := os.read(reader, 65536):
            shown += piece
    os.close(reader)
    lines = [line.split("\r")[-1] for line in shown.decode().replace("\r\n", "\n").split("\n")]
    assert lines[0].startswith("Loaded tiny-clip")
    (bar,) = [line for line in lines if "%|" in line]  # what stays: the bars of the embedding have been taken away
    assert re.match(r"Training: 100%\|.*\| 40/40 \[.*loss [\d.]+\]", bar)
    assert "Embedding images" in shown.decode() and "{'" not in shown.decode()


# ---------------------------------------------------------------------- predict, evaluate, show


def test_files_folders_and_patterns(learned, images, tmp_path):
    folder = learned[0]
    files = sorted(str(path) for path in (images / "test").rglob("[!.]*.png"))
    best = CoOpModel.from_pretrained(folder).predict(files, top_k=2)
    found = json.loads(call("predict", folder, images / "test", "--top_k", 2, "--json")[0])
    assert [one["image"] for one in sorted(found, key=lambda one: one["image"])] == files
    for one in found:
        expected = best[files.index(one["image"])]
        assert [p["label"] for p in one["predictions"]] == [p["label"] for p in expected]
        assert [p["score"] for p in one["predictions"]] == pytest.approx([p["score"] for p in expected], abs=1e-5)
    out, err = call(
        "predict", folder, f"{images}/test/**/*.png", "--format", "csv", "--output", tmp_path / "a" / "b.csv"
    )
    rows = list(csv.DictReader((tmp_path / "a" / "b.csv").open()))
    assert out == "" and "48 images" in err and [row["image"] for row in rows] == files
    assert [row["label"] for row in rows] == [answer[0]["label"] for answer in best]
    out, _ = call("predict", folder, files[0], "--batch_size", 1, files[1], "--quiet")
    lines = [line.split("  ", 1) for line in out.splitlines()]
    assert [line[0].strip() for line in lines] == files[:2]
    assert lines[0][1] == f"{best[0][0]['label']} {best[0][0]['score']:.1%}"


def test_a_broken_image_is_named_or_skipped(learned, images, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    good = next((images / "test").rglob("*/*.png"))
    error = fails("predict", learned[0], good, tmp_path / "broken.png")
    assert "broken.png' cannot be read" in error and error.startswith("coop-hf predict: ")
    out, err = call("predict", learned[0], good, tmp_path, "--on_bad_image", "skip", "--json")
    assert [one["image"] for one in json.loads(out)] == [str(good)] and "skipped: " in err


def test_other_classes(learned, images):
    found = json.loads(call("predict", learned[0], images / "test", "--class_names", "sea lion,fox", "--json")[0])
    assert {p["label"] for one in found for p in one["predictions"]} <= {"sea lion", "fox"}


def test_accuracy_is_that_of_the_training(learned, images):
    folder = learned[0]
    results = json.loads((folder / "all_results.json").read_text())
    found = json.loads(call("evaluate", folder, images, "--json", "--per_class")[0])
    assert found["learned"]["accuracy"] == results["eval_accuracy"]
    assert found["hand_written"]["accuracy"] == results["zero_shot_accuracy"]
    assert found["num_eval"] == 48
    counts = {"accuracy": sum(found["learned"]["per_class"].values()) / 6}  # 8 images in each class
    assert counts["accuracy"] == pytest.approx(found["learned"]["accuracy"])
    out, _ = call("evaluate", folder, images, "--per_class")
    assert f"{results['eval_accuracy']:.1%}" in out and all(name in out for name in COLOUR_NAMES)


def test_show(learned):
    folder = learned[0]
    out, _ = call("show", folder, "--nearest", 2)
    assert re.search(r"prompt_embeddings 2 x 32$", out, re.M) and "6: " in out and "n_ctx 2" in out
    nearest = nearest_tokens(CoOpModel.from_pretrained(folder), 2)
    assert f"{nearest[0][0]['token']} {nearest[0][0]['distance']:.4f}" in out
    found = json.loads(call("show", folder, "--nearest", 2, "--json")[0])
    assert found["nearest"] == nearest and found["tensors"] == {"prompt_embeddings": [2, 32]}


def test_show_without_the_base(learned, tmp_path):
    config, tensors = read_adapter(learned[0])
    config.base_model_name_or_path = str(tmp_path / "gone")
    coop_hf.files.adapter_files.write_adapter(tmp_path / "lone", config, tensors)
    out, err = call("show", tmp_path / "lone")
    assert "method        coop" in out and "Nearest words need the base model" in err and "gone" in err


# ---------------------------------------------------------------------- share


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        set_endpoint(monkeypatch, server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", server.add_user("ada"))
        yield server


def test_push_then_pull(hub, learned, base_folder, tmp_path):
    folder = learned[0]
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\nWritten by hand.\n", encoding="utf-8")
    out, err = call("push", folder, "ada/colours", "--base_id", "ada/tiny-clip")
    assert "coop-hf push: " not in err and out.startswith(f"{hub.url}/ada/colours/commit/")
    call("pull", "ada/colours", tmp_path / "copy")
    assert read_adapter(tmp_path / "copy")[0].base_model_name_or_path == "ada/tiny-clip"
    text = (tmp_path / "copy" / "README.md").read_text(encoding="utf-8")
    results = json.loads((folder / "all_results.json").read_text())
    assert "Written by hand." in text and f"{100 * results['eval_accuracy']:.1f}" in text
    assert "there is an adapter in" in fails("pull", "ada/colours", tmp_path / "copy")
    call("pull", "ada/colours", tmp_path / "copy", "--overwrite", "--base_model", base_folder)
    first, again = (CoOpModel.from_pretrained(place) for place in (folder, tmp_path / "copy"))
    assert torch.equal(first.context, again.context) and first.class_names == again.class_names
    # A second push keeps what was written on the Hub, and knows the results.
    card.unlink()
    _, err = call("push", folder, "ada/colours", "--commit_message", "again")
    assert "coop-hf push: the base model is a folder on this machine" in err and "UserWarning" not in err
    call("pull", "ada/colours", tmp_path / "third", "--json")
    text = (tmp_path / "third" / "README.md").read_text(encoding="utf-8")
    assert "Written by hand." in text and f"{100 * results['eval_accuracy']:.1f}" in text


def test_a_stranger_s_adapter_names_no_folder_of_this_machine(hub, learned, base_folder, tmp_path):
    config, tensors = read_adapter(learned[0])
    assert config.base_model_name_or_path == str(base_folder)
    huggingface_hub.HfApi().create_repo("ada/path")
    huggingface_hub.HfApi().upload_folder(
        repo_id="ada/path", folder_path=learned[0], allow_patterns=["adapter_*"], commit_message="By hand"
    )
    _, err = call("pull", "ada/path", tmp_path / "copy")
    assert "the copy names none" in err and read_adapter(tmp_path / "copy")[0].base_model_name_or_path is None


def test_export(learned, images, tmp_path):
    folder, path = learned[0], next((images / "test").rglob("*/*.png"))
    model = CoOpModel.from_pretrained(folder)
    expected = {answer["label"]: answer["score"] for answer in model.predict(str(path), top_k=None)}
    call("export", folder, tmp_path / "prompt.pt2")
    extra = {"class_names.json": ""}
    program = torch.export.load(tmp_path / "prompt.pt2", extra_files=extra).module()
    pixels = model.image_processor(coop_hf.data.transforms.decode_image(str(path)), return_tensors="pt")[
        "pixel_values"
    ]
    scores = program(pixels).softmax(dim=-1)[0].tolist()
    assert dict(zip(json.loads(extra["class_names.json"]), scores)) == pytest.approx(expected, abs=1e-5)
    out, _ = call("export", folder, tmp_path / "merged", "--to", "clip")
    clip = transformers.CLIPModel.from_pretrained(tmp_path / "merged")
    assert clip.config.coop_hf["class_names"] == model.class_names and "6 classes" in out
    if importlib.util.find_spec("peft") is not None:
        call("export", folder, tmp_path / "peft", "--to", "peft")
        assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "TRAINABLE_TOKENS"
    assert "does not tell" in fails("export", folder, tmp_path / "prompt")
    assert "there is no folder" in fails("export", folder, tmp_path / "no" / "prompt.onnx")
    assert "is a folder" in fails("export", folder, tmp_path / "merged", "--to", "torch")


def test_import_is_the_command_of_before(tokenizer, base, base_folder, tmp_path):
    path = tmp_path / "output" / "prompt_learner" / "model.pth.tar-50"
    context = write_checkpoint(path, tokenizer, base, COLOUR_NAMES, n_ctx=3)
    (tmp_path / "names.txt").write_text("\n".join(COLOUR_NAMES))
    given = [tmp_path / "output", tmp_path / "adapter", "--base_model", base_folder]
    out, _ = call("import", *given, "--class-names", tmp_path / "names.txt")
    assert out == f"{tmp_path / 'adapter'}: unified context, 3 vectors of 32, 6 classes\n"
    assert torch.equal(CoOpModel.from_pretrained(tmp_path / "adapter").context.detach(), context)
    assert "--base_model" in fails("import", tmp_path, tmp_path / "x", code=2)


def test_completion_knows_the_commands():
    shtab = pytest.importorskip("shtab", reason="shtab is not installed (the completion extra)")
    out, _ = call("completion", "bash")
    assert shtab.__version__ and "--num_shots" in out and "predict" in out
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)


# ---------------------------------------------------------------------- mistakes


def test_mistakes_of_usage_end_in_two_lines():
    assert fails("predikt", code=2) == "coop-hf: there is no command 'predikt': do you mean 'predict'?\n"
    usage, error = fails("predict", "x", code=2).splitlines()
    assert usage.startswith("usage: coop-hf predict ADAPTER IMAGE ...") and "IMAGE" in error
    assert "not understood: --nonsense 3" in fails("train", "--nonsense", 3, code=2)
    assert "not understood: b" in fails("train", "a", "b", code=2)
    assert "invalid int value: 'many'" in fails("train", "--num_shots", "many", code=2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "vpt", "--n_ctx", "4"], "coop-hf train: the method 'vpt' has no 'n_ctx'"),
        (["--method", "mapel"], "no method 'mapel'; choose from coop,"),
        (["--method", "gda", "--objective", "kgcoop"], "'gda' is a head"),
        (["--lr_scheduler_type", "foo"], "foo is not a valid SchedulerType"),  # transformers' own words
        (
            ["--load_best_model_at_end", "--eval_strategy", "steps"],
            "--load_best_model_at_end requires the save and eval strategy to match",
        ),
        (["--optim", "foo"], "foo is not a valid OptimizerNames"),
        (["--report_to", "foo"], "foo is not supported"),
        (["--base_model", "../nothing/here"], "'../nothing/here' is neither a folder"),
        (["--n_ctx", "500"], "n_ctx"),
        (["--resume_from_checkpoint", "nothing"], "nothing"),
    ],
)
def test_mistakes_of_training_end_in_a_line(arguments, message, images, base_folder, tmp_path):
    base = [] if "--base_model" in arguments else ["--base_model", base_folder]
    given = ["--num_shots", 4, "--use_cpu", "--max_steps", 1, "--output_dir", tmp_path / "out"]
    error = fails("train", images, *given, *base, *arguments)
    assert error.startswith("coop-hf train: ") and message in error


def test_mistakes_of_use_end_in_a_line(learned, base_folder, images, tmp_path):
    assert "it is no adapter: `coop-hf train` learns one" in fails("predict", base_folder, images)
    assert "no file or folder" in fails("predict", learned[0], images / "nothing.png")
    assert "holds no image" in fails("predict", learned[0], images / "*.txt")
    assert "--top_k must be at least 1" in fails("predict", learned[0], images, "--top_k", 0)
    assert "--device 'nowhere'" in fails("predict", learned[0], images, "--device", "nowhere")
    assert "there is no split 'dev'" in fails("evaluate", learned[0], images, "--split", "dev")
    specific = CoOpModel.from_pretrained(base_folder, CoOpConfig(n_ctx=1, class_specific=True), ["a", "b"])
    specific.save_pretrained(tmp_path / "specific")
    assert "it has no vectors for 'c'" in fails("predict", tmp_path / "specific", images, "--class_names", "a,c")


# ---------------------------------------------------------------------- what is elsewhere


def test_benchmark_and_demo_are_those_of_their_rooms(tmp_path):
    (tmp_path / "own.yaml").write_text("shots: [2, 4]\nseeds: [5]\n")
    options = benchmark_parser("coop-hf benchmark").parse_intermixed_args(
        ["--config", str(tmp_path / "own.yaml"), "--seeds", "7", "8"]
    )
    assert options.given.shots == [2, 4] and options.given.seeds == [7, 8]
    assert options.command == f"coop-hf benchmark --config {tmp_path}/own.yaml --seeds 7 8"
    assert "not understood: --nonsense" in fails("benchmark", "--nonsense", code=2)
    assert "--space" in fails("demo", "--output", tmp_path, code=2)


# ---------------------------------------------------------------------- several processes on a CPU

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}  # by `accelerate launch --num_processes 2`


@pytest.mark.parametrize(
    "given, has_gpu, uses_cpu, warns",
    [
        ({}, False, False, False),
        (LAUNCHED, False, False, True),
        (LAUNCHED, True, False, False),
        ({**LAUNCHED, "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, False, True, False),
        ({**LAUNCHED, "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, True, False, False),
        ({**LAUNCHED, "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, False, False, False),
    ],
)
def test_processes_on_a_cpu_work_together_or_are_missed(given, has_gpu, uses_cpu, warns, monkeypatch):
    for name in (*LAUNCHED, "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    said = []
    monkeypatch.setattr(processes.logger, "warning", said.append)
    args = Namespace(use_cpu=False)
    processes.prepare_processes(args)
    assert args.use_cpu == uses_cpu and bool(said) == warns
    assert not warns or "--multi_gpu" in said[0]
