"""The pages' Python is run as written, in the order of a reader, against a local Hub and folders of emoji.

Only names are replaced: OpenAI's model by the embedded one, and pictures that a reader would have by emoji.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from coop_hf import emoji_model_path, load_emoji


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


def write_pictures(folder: Path) -> None:
    """A folder of class folders, and the single pictures that the pages name."""
    emoji = load_emoji()["train"]
    names = emoji.features["label"].names
    for row in range(len(emoji)):
        place = folder / "my_pictures" / names[emoji[row]["label"]].replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        emoji[row]["image"].save(place / f"{row}.png")
    for row, name in enumerate(("cat.jpg", "a.jpg", "b.jpg", "picture.jpg")):
        emoji[row]["image"].convert("RGB").save(folder / name)


def run_pages(pages, folder, url="http://127.0.0.1:9", token=None, before=""):
    code = "\n\n".join(block for page in pages for block in blocks(page))
    code = code.replace('"openai/clip-vit-base-patch32"', "emoji_model_path()")
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
    write_pictures(tmp_path)
    run_pages(["README.md"], tmp_path)
    assert (tmp_path / "my-prompt" / "adapter_model.safetensors").stat().st_size < 40_000


def test_quick_start_and_training(tmp_path):
    write_pictures(tmp_path)
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


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
