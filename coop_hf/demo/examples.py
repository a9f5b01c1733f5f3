"""The images that a page shows to try."""

import os
import tempfile
from pathlib import Path

from ..data.sources import IMAGE_EXTENSIONS
from .emoji import emoji_model_path, load_emoji


__all__ = ["example_files", "is_emoji_clip"]

MAX_EXAMPLES = 12

_FOLDERS: list[tempfile.TemporaryDirectory] = []  # kept until the process ends


def example_files(examples: str | os.PathLike | None, bases: list[str]) -> list[str]:
    """Files of images to try.

    Args:
        examples (`str` or `os.PathLike`, *optional*): a folder of images, of which the first are taken.
        bases (`list[str]`): names of the base models; with the embedded emoji CLIP alone, some emoji of the test part
            are taken where no folder is given.

    Raises:
        ValueError: the folder holds no image.
    """
    if examples is None:
        return _emoji_files() if all(is_emoji_clip(base) for base in bases) else []
    files = sorted(path for path in Path(examples).rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS)
    if not files:
        raise ValueError(
            f"there is no image ({', '.join(IMAGE_EXTENSIONS)}) in {os.fspath(examples)!r}: name a folder of examples."
        )
    return [str(path) for path in files[:MAX_EXAMPLES]]


def is_emoji_clip(base: str) -> bool:
    """Whether a name is that of the embedded emoji CLIP's folder."""
    try:
        return os.path.realpath(base) == os.path.realpath(emoji_model_path())
    except FileNotFoundError:  # an installation from a wheel
        return False


def _emoji_files() -> list[str]:
    test = load_emoji()["test"]
    rows = {label: row for row, label in reversed(list(enumerate(test["label"])))}  # the first of each class
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="coop_hf-"))
    files = []
    for label, row in sorted(rows.items())[:MAX_EXAMPLES]:
        name = test.features["label"].names[label].replace(" ", "-")
        files.append(os.path.join(_FOLDERS[-1].name, f"{name}.png"))
        test[row]["image"].save(files[-1])
    return files
