"""A Hugging Face Space that shows learned prompts: the folder to upload."""

import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from ..data.transforms import to_rgb
from ..files.adapter_files import base_of, read_adapter, write_adapter
from ..hub import is_hub_id
from .answers import read
from .emoji import emoji_model_path
from .examples import example_files


__all__ = ["write_space"]

GRADIO = "6.31.0"  # what the page was tested with

# What coop_hf needs to run; the Space installs the versions that are installed here.
REQUIREMENTS = (
    "torch transformers datasets accelerate safetensors huggingface_hub evaluate numpy pillow pyyaml tqdm"
).split()

EXAMPLE_SIZE = 512

_BASE_FILES = re.compile(r".*\.(json|txt|model|safetensors|jinja)")

_APP = '''"""{title}

Made by `coop_hf`. To change what is shown, change the arguments below.
"""

import os
from pathlib import Path

from coop_hf.demo.app import launch


os.chdir(Path(__file__).resolve().parent)  # adapters and base models that lie here are named from here
launch(
{arguments}
)
'''


def write_space(
    adapters: Sequence[str | os.PathLike],
    space: str,
    folder: str | os.PathLike | None = None,
    base_model: str | os.PathLike | None = None,
    examples: str | os.PathLike | None = None,
    title: str | None = None,
    learning: bool = True,
    package: str | None = None,
) -> str:
    """Writes a Space that shows adapters: `app.py`, `requirements.txt` and `README.md` with its header.

    Adapters and base models with a Hub id are named by it; those in a folder of this machine are copied in, and so are
    the examples, smaller and without what a camera wrote into them. No path of this machine is written.

    Args:
        adapters (`list[str]`): folders or Hub ids, as for [`~coop_hf.demo.app.launch`].
        space (`str`): Hub id of the Space, `"you/name"`.
        folder (`str` or `os.PathLike`, *optional*, defaults to the name in `space`): where to write; new, or empty.
        base_model, examples, title, learning: as for [`~coop_hf.demo.app.launch`].
        package (`str`, *optional*): line of `requirements.txt` that installs coop_hf, such as
            `"coop_hf[demo] @ git+https://..."`. By default a copy of coop_hf is put into the Space.

    Returns:
        `str`: the folder.

    Raises:
        ValueError: a bad Hub id, a damaged adapter, or a folder that is not empty; before anything is written.
        OSError: an adapter or a base is not found, or the disk is full.
    """
    if not is_hub_id(space) or space.count("/") != 1:
        raise ValueError(f"a Space is named 'you/name', with letters, digits, '-', '_' and '.'; got {space!r}.")
    target = Path(folder if folder is not None else space.split("/")[1])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{str(target)!r} is not empty: remove it, or name another folder (--output).")
    if base_model is None and not adapters:
        base_model = emoji_model_path()
    title = title or space.split("/")[1].replace("-", " ").replace("_", " ").strip().capitalize()

    names = [os.fspath(name) for name in adapters]
    local = {name: read_adapter(name) for name in names if os.path.isdir(name)}
    for name in names:
        if name not in local and not is_hub_id(name):
            raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub id.")
    bases = [] if base_model is None else [os.fspath(base_model)]
    if base_model is None:
        bases = list(dict.fromkeys(base_of(config, name) for name, (config, _) in local.items()))
    for base in bases:
        if not os.path.isdir(base) and not is_hub_id(base):
            raise FileNotFoundError(
                f"the base model {base!r} is neither a folder nor a Hub id: name it (--base_model)."
            )
    pictures = example_files(examples, bases if bases and len(local) == len(adapters) else [""])
    images = [to_rgb(read(file)) for file in pictures]

    target.mkdir(parents=True, exist_ok=True)
    base_here = {base: _copy_base(base, target, place) for base, place in _places(bases, "bases").items()}
    here = _places(list(local), "adapters")
    for name, (config, tensors) in local.items():
        if base_model is not None:
            config = replace(config, base_model_name_or_path=next(iter(base_here.values())), revision=None)
        elif config.base_model_name_or_path in base_here:
            config = replace(config, base_model_name_or_path=base_here[config.base_model_name_or_path])
        write_adapter(target / here[name], config, tensors)
    for number, image in enumerate(images):
        (target / "examples").mkdir(exist_ok=True)
        image.thumbnail((EXAMPLE_SIZE, EXAMPLE_SIZE))
        image.save(target / "examples" / f"{number + 1:02}.png", optimize=True)

    arguments = {
        "adapters": [here.get(name, name) for name in names],
        "base_model": None if base_model is None else next(iter(base_here.values())),
        "examples": "examples" if images else None,
        "title": title,
        "learning": learning,
    }
    lines = "\n".join(f"    {name}={value!r}," for name, value in arguments.items())
    shown = title.replace("\\", "").replace('"', "'")
    (target / "app.py").write_text(_APP.format(title=shown, arguments=lines), encoding="utf-8")
    (target / "requirements.txt").write_text(_requirements(package), encoding="utf-8")
    models = [name for name in [*names, *bases] if not os.path.isdir(name)]
    (target / "README.md").write_text(_readme(title, models), encoding="utf-8")
    if package is None:
        own_code = Path(__file__).resolve().parents[1]
        shutil.copytree(own_code, target / "coop_hf", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return str(target)


def _places(names: list[str], folder: str) -> dict[str, str]:
    """Where folders of this machine are copied to: their last part, numbered where several have it."""
    places: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.-]", "-", Path(name).resolve().name, flags=re.ASCII).strip(".") or "prompt"
        place, number = f"{folder}/{plain}", 2
        while place in places.values():
            place, number = f"{folder}/{plain}-{number}", number + 1
        places[name] = place
    return places


def _copy_base(base: str, target: Path, place: str) -> str:
    """Copies a base model of this machine; gives its name in the Space."""
    if not os.path.isdir(base):
        return base
    (target / place).mkdir(parents=True)
    for file in sorted(Path(base).iterdir()):
        if _BASE_FILES.fullmatch(file.name) and file.is_file():
            shutil.copyfile(file, target / place / file.name)
    return place


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(package: str | None) -> str:
    if package is not None:
        return package + "\n"
    pins = [f"{name}=={_version(name)}" for name in REQUIREMENTS]
    note = "# torch for the CPU; without this line it is the one for GPUs, several gigabytes."
    return "\n".join([note, "--extra-index-url https://download.pytorch.org/whl/cpu", *pins]) + "\n"


def _readme(title: str, models: list[str]) -> str:
    header = {
        "title": title,
        "emoji": "🏷️",
        "colorFrom": "indigo",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": _version("gradio") or GRADIO,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "pinned": False,
        "short_description": "Learned prompts beside hand-written ones",
        **({"models": models} if models else {}),
        "tags": ["coop_hf", "prompt-learning"],
    }
    text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)
    return (
        f"---\n{text}---\n\n# {title}\n\nGive it an image: it shows what a learned prompt says, beside a hand-written "
        "one. Made by coop_hf.\n"
    )
