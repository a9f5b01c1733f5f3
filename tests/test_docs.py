"""The pages' Python is run as written, in the order of a reader, against a local Hub and folders of emoji.

Only names are replaced: OpenAI's model by the embedded one, and images that a reader would have by emoji.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from test_coop_checkpoint import write_checkpoint
from transformers import CLIPModel, CLIPTokenizer

from coop_hf import CoOpModel, emoji_model_path, load_emoji


ROOT = Path(__file__).resolve().parents[1]

PREPARE = """
import sys
sys.path.insert(0, {tests!r})
from coop_hf import emoji_model_path
import torch, transformers
transformers.set_seed(0)
"""


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


def write_images(folder: Path) -> None:
    """A folder of class folders, and the single images that the pages name."""
    emoji = load_emoji()["train"]
    names = emoji.features["label"].names
    for row in range(len(emoji)):
        place = folder / "my_images" / names[emoji[row]["label"]].replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        emoji[row]["image"].save(place / f"{row}.png")
    for row, name in enumerate(("cat.jpg", "a.jpg", "b.jpg", "image.jpg")):
        emoji[row]["image"].convert("RGB").save(folder / name)


def run_pages(pages, folder, url="http://127.0.0.1:9", token=None, before="", skip=None):
    code = "\n\n".join(block for page in pages for block in blocks(page) if skip is None or skip not in block)
    code = re.sub(r'"openai/clip-vit-base-patch\d+"', "emoji_model_path()", code)
    script = folder / "page.py"
    script.write_text(PREPARE.format(tests=str(ROOT / "tests")) + before + "\n\n" + code, encoding="utf-8")
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment = {
        **keep,
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **({"HF_TOKEN": token} if token else {}),
    }
    result = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_readme(tmp_path):
    write_images(tmp_path)
    run_pages(["README.md"], tmp_path)
    assert (tmp_path / "my-prompt" / "adapter_model.safetensors").stat().st_size < 40_000


def test_quick_start_and_training(tmp_path):
    write_images(tmp_path)
    before = "from coop_hf import CoOpTrainer\n"
    run_pages(["docs/quickstart.md"], tmp_path, before=before)
    emoji_model_path()


def test_share_then_use(tmp_path):
    with HubServer() as hub:
        output = run_pages(["docs/share.md", "docs/use.md"], tmp_path, hub.url, hub.add_user("you"))
    assert hub.url in output and "you/emoji-prompt" in output


def test_deploy(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (the onnx extra)")
    run_pages(["docs/deploy.md"], tmp_path)
    assert (tmp_path / "classifier.onnx").is_file() and (tmp_path / "merged" / "model.safetensors").is_file()


def test_move_from_the_original(tmp_path):
    """A checkpoint in the original's format, in the folder that the page names: its command, then its Python."""
    tokenizer, base = CLIPTokenizer.from_pretrained(emoji_model_path()), CLIPModel.from_pretrained(emoji_model_path())
    names = ["tench", "goldfish", "great white shark"]
    output = "output/imagenet/CoOp/vit_b16_16shots/nctx16_cscFalse_ctpend/seed1"
    path = tmp_path / output / "prompt_learner" / "model.pth.tar-50"
    context = write_checkpoint(path, tokenizer, base, names, n_ctx=16)
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (command,) = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/move_from_coop.md").read_text("utf-8"), re.M | re.S)
    assert output in command
    command = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    command = command.replace("openai/clip-vit-base-patch16", shlex.quote(emoji_model_path()))
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    by_command = CoOpModel.from_pretrained(tmp_path / "my-prompt")
    assert torch.equal(by_command.context.detach(), context) and by_command.class_names == names
    shutil.rmtree(tmp_path / "my-prompt")
    run_pages(["docs/move_from_coop.md"], tmp_path)
    by_python = CoOpModel.from_pretrained(tmp_path / "my-prompt")
    assert torch.equal(by_python.context.detach(), context) and by_python.class_names == names


def printed(page: str) -> str:
    """What a page says that its Python prints: the fenced blocks without a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join(body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if not language)


BASELINES = ["zero_shot", "cupl", "linear_probe", "pet", "autoprompt", "interpret", "heads"]
LEARNERS = ["cocoop", "kgcoop", "prograd", "tcp", "deep_prompts", "maple", "promptsrc", "tpt"]


@pytest.mark.parametrize("name", [*BASELINES, *LEARNERS])
def test_the_pages_of_the_methods(tmp_path, name):
    for module in {"linear_probe": ["sklearn"], "interpret": ["matplotlib"]}.get(name, []):
        pytest.importorskip(module, reason=f"{module} is not installed")
    page = f"docs/methods/{name}.md"
    output = run_pages([page], tmp_path, skip="# needs the Hub")
    number = r"-?\d+\.?\d*(?:e-?\d+)?"
    if name in ("zero_shot", "cupl", "interpret"):  # nothing is trained: the same on any machine, up to an image
        expected = printed(page)
        assert re.sub(number, "#", output).split() == re.sub(number, "#", expected).split()
        for found, said in zip(re.findall(number, output), re.findall(number, expected), strict=True):
            assert float(found) == pytest.approx(float(said), abs=1.1)
    else:
        assert len(output.splitlines()) >= len(printed(page).splitlines())


def test_write_your_own_method(tmp_path):
    output = run_pages(["docs/write_your_own_method.md"], tmp_path)
    assert "30.0 shared" in output
    config = json.loads((tmp_path / "my-low-rank" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["method"] == "low_rank" and config["rank"] == 2
    # Where the module is not imported, the error says which method is missing.
    with pytest.raises(ValueError, match="of the method 'low_rank', and coop_hf .* knows"):
        CoOpModel.from_pretrained(tmp_path / "my-low-rank", base_model=emoji_model_path())


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
