"""The embedded default: the small emoji CLIP and the emoji few-shot task that come with the repository.

Both lie in `examples/emoji/` of a clone; the wheel does not carry them. Nothing here touches the network or writes a
file.
"""

from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from datasets.table import InMemoryTable


__all__ = ["EMOJI_SPLITS", "EMOJI_STYLES", "emoji_cupl_path", "emoji_model_path", "load_emoji"]

EMOJI_STYLES = ("fluent-flat", "fluent", "fluent-hc", "emojione", "noto", "twemoji")

EMOJI_SPLITS = ("train", "validation", "test")

_FOLDER = Path(__file__).resolve().parents[2] / "examples" / "emoji"


def _part(relative: str | Path) -> Path:
    """The path of a file or folder of the embedded default.

    Raises:
        FileNotFoundError: If it is not there, as in an installation from a wheel.
    """
    path = _FOLDER / relative
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}: the emoji images and model come with a clone of the repository, not with the "
            "wheel. Clone the repository and install it from there with `pip install -e .`, or name your own: "
            "`coop-hf train IMAGES --base_model MODEL`."
        )
    return path


def load_emoji(style: str = "fluent-flat") -> DatasetDict:
    """Load the emoji few-shot task: 20 classes of images that one artist drew.

    The splits are disjoint by emoji name, and the names of one split are the same in every style: an emoji of the test
    part of one style is in no other style's training part. The model of [`emoji_model_path`] has seen no emoji of the
    validation and test parts in any style, and no image at all of the first four styles.

    Args:
        style (`str`, *optional*, defaults to `"fluent-flat"`):
            Whose drawings to load, one of `EMOJI_STYLES`. `"noto"` and `"twemoji"` are styles of the pre-training.

    Returns:
        `datasets.DatasetDict`: Splits `"train"`, `"validation"` and `"test"` with the columns `image`
        (`datasets.Image`, 64 × 64 RGB), `label` (`datasets.ClassLabel`), `name` (the emoji's own name) and `style`.

    Raises:
        ValueError: If there is no such style.
        FileNotFoundError: If the images are not there, as in an installation from a wheel.

    Example:

    ```python
    >>> from coop_hf.embedded import load_emoji

    >>> emoji = load_emoji()
    >>> emoji["train"].features["label"].names[:3]
    ['smiley face', 'heart', 'hand']
    ```
    """
    if style not in EMOJI_STYLES:
        raise ValueError(f"There is no emoji style {style!r}: choose one of {', '.join(map(repr, EMOJI_STYLES))}.")
    files = {split: _part(Path("data") / f"{style}-{split}.parquet") for split in EMOJI_SPLITS}
    # Straight into memory: `load_dataset` would write a copy into the cache. The files describe their own features.
    return DatasetDict(
        {split: Dataset(InMemoryTable(pq.read_table(file)), split=split) for split, file in files.items()}
    )


def emoji_model_path() -> str:
    """The folder of the small emoji CLIP, to be given to `from_pretrained`.

    Returns:
        `str`: A folder that `CLIPModel`, `CLIPProcessor` and their `Auto` classes load.

    Raises:
        FileNotFoundError: If the model is not there, as in an installation from a wheel.

    Example:

    ```python
    >>> from transformers import CLIPModel
    >>> from coop_hf.embedded import emoji_model_path

    >>> model = CLIPModel.from_pretrained(emoji_model_path())
    ```
    """
    return str(_part("emoji-clip"))


def emoji_cupl_path() -> str:
    """The file of CuPL sentences for the emoji classes, to be given to `coop_hf.baselines.read_prompts`.

    A language model wrote them once, eight for each class, asked what emoji of the class look like.

    Returns:
        `str`: A JSON file `{class name: [sentence, ...]}`.

    Raises:
        FileNotFoundError: If it is not there, as in an installation from a wheel.
    """
    return str(_part("cupl_prompts.json"))
