"""The pages' Python and commands are run as written, in a reader's order, against a local Hub and folders of emoji.

Only names are replaced: OpenAI's models by the embedded one, a language model by a tiny one; a training by a command
takes a few steps. Commands on data that is not here are parsed: the script and every option exist, every value is one.
"""

import ast
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from page_runner import PageRunner
from test_coop_checkpoint import write_checkpoint
from test_cupl import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPModel, CLIPTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from coop_hf import CoOpModel, emoji_model_path, load_emoji


ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if "results" not in path.parts),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")),
    "examples/emoji/README.md",
]

# Pages that go on where another one ends.
CHAINS = [["docs/share.md", "docs/use.md"]]

# What `run` takes from a page's command line, beside what is written there, so that it takes seconds.
FEW_STEPS = "--max_steps 2 --save_strategy no"


def blocks(page):
    """`(language, text)` of every fenced block of a page; a block without a language is what something printed.

    Of a notebook, its cells of code.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        return [("python", "".join(c["source"])) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.M | re.S)


def commands(text):
    """The commands of a block of shell, without their environment, comments and the shell's own words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.split(" > ")[0], comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words[:2] == ["accelerate", "launch"]:
            words = ["python", *words[next(k for k, word in enumerate(words) if word.endswith(".py")) :]]
        if words and words[0] in ("python", "coop-hf", "make", "pip"):
            yield words


def runs(words):
    """Whether a command runs here, as written but for the base and the number of steps."""
    on_our_data = "--dataset" not in words or words[words.index("--dataset") + 1] == "my_images"
    return words[:2] == ["python", "examples/train.py"] and on_our_data and "paper" not in words


def steps(page):
    """What a page does, in its order; of its trainings by a command the first is run, the others are parsed."""
    has_run = False
    for language, text in blocks(page):
        if language == "python":
            text = re.sub(r'"openai/clip-vit-\w+-patch\d+"', repr(emoji_model_path()), text)
            yield "python", text.replace('"Qwen/Qwen2.5-1.5B-Instruct"', '"language_model"')
        elif language == "bash":
            for words in commands(text):
                if words[0] in ("python", "coop-hf"):
                    kind = "command" if runs(words) and not has_run else "parse"
                    has_run = has_run or kind == "command"
                    line = shlex.join(words)
                    if kind == "command":
                        line = re.sub(r"openai/clip-vit-\w+-patch\d+", emoji_model_path(), line) + " " + FEW_STEPS
                    yield kind, line


RUNNING = [page for page in PAGES if any(True for _ in steps(page))]
CHAINED = [page for chain in CHAINS for page in chain]
GROUPS = [*CHAINS, *([page] for page in RUNNING if page not in CHAINED)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of class folders, and the single images that the pages name."""
    folder = tmp_path_factory.mktemp("images")
    emoji = load_emoji()["train"]
    names = emoji.features["label"].names
    for row in range(len(emoji)):
        place = folder / "my_images" / names[emoji[row]["label"]].replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        emoji[row]["image"].save(place / f"{row}.png")
    for row, name in enumerate(("cat.jpg", "a.jpg", "b.jpg", "image.jpg")):
        emoji[row]["image"].convert("RGB").save(folder / name)
    (folder / "examples").mkdir()
    for file in (ROOT / "examples").glob("*.yaml"):  # named from the root of a clone
        shutil.copy(file, folder / "examples")
    return folder


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with HubServer() as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.add_user("you"),
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "COOP_HF_CACHE": str(home / "embeddings"),  # one for all pages: most look at the same images
        }
        with PageRunner(environment) as runner:
            runner.hub = hub
            yield runner


def write_language_model(folder):
    """A tiny one that writes words at random."""
    vocab = {word: index for index, word in enumerate(["<eos>", "<unk>", ".", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = {"vocab_size": len(vocab), "n_positions": 256, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


CHECKPOINT = "output/imagenet/CoOp/vit_b16_16shots/nctx16_cscFalse_ctpend/seed1"
CHECKPOINT_NAMES = ["tench", "goldfish", "great white shark"]


def write_original(folder):
    """A checkpoint in the original's format, in the folder that the page names."""
    tokenizer, base = CLIPTokenizer.from_pretrained(emoji_model_path()), CLIPModel.from_pretrained(emoji_model_path())
    path = folder / CHECKPOINT / "prompt_learner" / "model.pth.tar-50"
    (folder / "names.txt").write_text("\n".join(CHECKPOINT_NAMES) + "\n", encoding="utf-8")
    return write_checkpoint(path, tokenizer, base, CHECKPOINT_NAMES, n_ctx=16)


def write_draw(folder):
    """A split file, and a draw as the paper's code pickles it, under the names of that code's class."""
    names, parts = ["accordion", "anchor"], {}
    for part in ("train", "val", "test"):
        parts[part] = [
            [f"{name}/image_{row}.jpg", label, name] for label, name in enumerate(names) for row in range(3)
        ]
    (folder / "split_zhou_Caltech101.json").write_text(json.dumps(parts), encoding="utf-8")
    module = types.ModuleType("dassl.data.datasets.base_dataset")
    module.Datum = type("Datum", (), {"__module__": module.__name__})
    drawn = {}
    for part, rows in (("train", (1, 4)), ("val", (0, 5))):
        drawn[part] = []
        for row in rows:
            path, label, name = parts[part][row]
            drawn[part].append(module.Datum())
            vars(drawn[part][-1]).update(_impath=f"/home/me/data/{path}", _label=label, _domain=0, _classname=name)
    packages = ["dassl", "dassl.data", "dassl.data.datasets", module.__name__]
    sys.modules.update({name: module for name in packages})
    try:
        (folder / "shot_16-seed_1.pkl").write_bytes(pickle.dumps(drawn))
    finally:
        for name in packages:
            del sys.modules[name]


# What stands in a reader's folder when the page is opened.
PREPARE = {
    "docs/datasets.md": write_draw,
    "docs/methods/cupl.md": lambda folder: write_language_model(folder / "language_model"),
    "docs/move_from_coop.md": write_original,
}

NEEDS = {
    "docs/demo.md": ["gradio"],
    "docs/deploy.md": ["onnx", "onnxscript", "onnxruntime"],
    "docs/methods/interpret.md": ["matplotlib"],
    "docs/notebooks/2_your_own_data.ipynb": ["matplotlib"],
    "docs/methods/linear_probe.md": ["sklearn"],
}


def printed(page):
    """What a page says that its Python prints."""
    return "\n".join(body for language, body in blocks(page) if not language)


def check_same_numbers(output, page):
    """Nothing is trained: the same on any machine, up to an image."""
    number, expected = r"-?\d+\.?\d*(?:e-?\d+)?", printed(page)
    assert re.sub(number, "#", output).split() == re.sub(number, "#", expected).split()
    for found, said in zip(re.findall(number, output), re.findall(number, expected), strict=True):
        assert float(found) == pytest.approx(float(said), abs=1.1)


def check_draw(folder):
    draw = json.loads((folder / "shot_16-seed_1.json").read_text(encoding="utf-8"))
    assert {part: draw[part]["indices"] for part in draw} == {"train": [1, 4], "val": [0, 5]}


def check_low_rank(folder):
    config = json.loads((folder / "my-low-rank" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["method"] == "low_rank" and config["rank"] == 2
    assert "30.0 shared" in (folder / "stdout.txt").read_text(encoding="utf-8")
    # Where the module is not imported, the error says which method is missing.
    with pytest.raises(ValueError, match="of the method 'low_rank', and coop_hf .* knows"):
        CoOpModel.from_pretrained(folder / "my-low-rank", base_model=emoji_model_path())


def check_original(folder):
    model = CoOpModel.from_pretrained(folder / "my-prompt")
    stored = torch.load(folder / CHECKPOINT / "prompt_learner" / "model.pth.tar-50", weights_only=False)
    assert torch.equal(model.context.detach(), stored["state_dict"]["ctx"].float())
    assert model.class_names == CHECKPOINT_NAMES


# What has come of a page, beside that no block failed.
CHECK = {
    "README.md": lambda folder: (folder / "my-prompt" / "adapter_model.safetensors").stat().st_size < 40_000,
    "docs/datasets.md": check_draw,
    "docs/deploy.md": lambda folder: (folder / "classifier.onnx").is_file() and (folder / "merged").is_dir(),
    "docs/methods/cupl.md": lambda folder: len(json.loads((folder / "pets.json").read_text())) == 2,
    "docs/move_from_coop.md": check_original,
    "docs/write_your_own_method.md": check_low_rank,
}


@pytest.mark.parametrize("pages", GROUPS, ids=lambda pages: "-".join(Path(page).stem for page in pages))
def test_a_page_runs(pages, runner, images, tmp_path):
    for page in pages:
        for module in NEEDS.get(page, []):
            pytest.importorskip(module, reason=f"{module} is not installed")
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    for page in pages:
        if page in PREPARE:
            PREPARE[page](tmp_path)
    seed = ("python", "import transformers; transformers.set_seed(0)")
    output = runner.run(tmp_path, [seed, *(step for page in pages for step in steps(page))])
    for page in pages:
        if page in CHECK:
            assert CHECK[page](tmp_path) in (None, True)
        if page in ("docs/methods/zero_shot.md", "docs/methods/interpret.md"):
            check_same_numbers(output, page)
    if "docs/share.md" in pages:
        assert runner.hub.url in output and "you/emoji-prompt" in output


def test_the_command_for_original_checkpoints(tmp_path):
    """The page's command beside its Python: the same adapter."""
    context = write_original(tmp_path)
    (command,) = [text for language, text in blocks("docs/move_from_coop.md") if language == "bash"]
    assert CHECKPOINT in command
    command = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    command = command.replace("openai/clip-vit-base-patch16", shlex.quote(emoji_model_path()))
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert torch.equal(CoOpModel.from_pretrained(tmp_path / "my-prompt").context.detach(), context)


def test_commands_beside_python_exist():
    """`make` and `pip` of the pages: the target and the extra are there."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    extras = re.findall(
        r"^(\w+) ?=", (ROOT / "setup.cfg").read_text(encoding="utf-8").split("extras_require]")[1], re.M
    )
    for page in PAGES:
        for words in (words for language, text in blocks(page) if language == "bash" for words in commands(text)):
            if words[0] == "make":
                assert words[1] in targets, f"{page}: {' '.join(words)}"
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(words) if words[0] == "pip" else ""):
                assert set(extra.split(",")) <= set(extras), f"{page}: {' '.join(words)}"


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_the_site_is_built(tmp_path):
    """`make docs`, offline: every warning is an error, and the reference holds every public name."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (the docs extra)")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    import coop_hf

    reference = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "reference").rglob("*.html"))
    for name in coop_hf.__all__:
        if not name.startswith("_"):
            module = getattr(coop_hf, name).__module__
            assert f'id="{module}.{name}"' in reference, name
    for page in tmp_path.rglob("*.html"):  # nothing of a page comes from elsewhere
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//[^"]*"', text), page
        assert not re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(?:https?:)?//', text), page


def test_errors_of_the_page_are_those_of_the_library():
    """What "the error says" stands so in the code: a message that changes takes the page with it."""
    texts = set()
    for path in (ROOT / "coop_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.add("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    everything = "\n".join(texts)
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| the error says \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.M)
    said = [row.split("|")[1].strip() for rows in tables for row in rows.splitlines()]
    assert len(said) > 30 and not [words for words in said if words not in everything]
