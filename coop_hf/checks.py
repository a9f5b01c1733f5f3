"""Small checks and the shared wording of error messages: class names, text, whole numbers, strangers' files."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch


MAX_CLASSES = 1_000_000

MAX_TEXT_LENGTH = 10_000


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # all but tab and line feed

_HALF = re.compile(r"[\ud800-\udfff]")

_last_checked: list[str] = []  # the list is looked at by several on its way in: by the model, by each copy of a config

SPARSE_BYTES = 1 << 26  # from this size on it is looked at how much of a file is really on the disk


def check_not_sparse(path: str | os.PathLike, problem: str) -> None:
    """Refuses a file of a stranger that claims much and holds next to nothing: reading it would fill the memory."""
    stat = os.stat(path)
    on_disk = 512 * getattr(stat, "st_blocks", 0)  # 0: a file system that does not say
    if stat.st_size > SPARSE_BYTES and 0 < on_disk < stat.st_size // 4:
        raise ValueError(f"{problem}it says that it has {stat.st_size:,} bytes, and {on_disk:,} are on the disk.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. In pieces: `isfinite` makes several tensors of the size of its input."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.flatten().split(1 << 20))


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_counts(**values: Any) -> None:
    """Raises `ValueError` for an argument that is not a whole number of at least 1."""
    for name, value in values.items():
        if not is_int(value) or value < 1:
            raise ValueError(f"`{name}` must be a positive whole number, got {value!r}.")


def shown(value: Any) -> str:
    """A value in an error message, at a bounded length."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def some(items: Iterable[Any], limit: int = 5) -> str:
    """`items` as text for an error message, cut after `limit`."""
    items = list(items)
    text = ", ".join(repr(item) for item in items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


def check_text(name: str, value: Any, hint: str = "", optional: bool = True) -> None:
    if value is None and optional:
        return
    if not isinstance(value, str) or not value.strip():
        kind = "a non-empty string or None" if optional else "a non-empty string"
        raise ValueError(f"`{name}` must be {kind}, got {shown(value)}. {hint}")
    if len(value) > MAX_TEXT_LENGTH:
        raise ValueError(f"`{name}` has {len(value):,} characters; at most {MAX_TEXT_LENGTH:,} are accepted. {hint}")
    if _CONTROL.search(value):
        raise ValueError(f"`{name}` must not contain control characters, got {value[:80]!r}. {hint}")
    if _HALF.search(value):
        raise ValueError(f"`{name}` holds half a character, which no file can hold: {value[:80]!r}. {hint}")


def check_class_names(class_names: Iterable[str]) -> list[str]:
    """Returns the class names as a list of strings.

    A name may stand there more than once, as "missile" and "sunglasses" do in CLIP's list for ImageNet: classes are
    told apart by their index. Where they become prompts, a warning says which have the same one.

    Args:
        class_names (`Sequence[str]`): at least one name.

    Raises:
        ValueError: no names, an empty name, or something that is not a string; says which.
    """
    if isinstance(class_names, (str, bytes)):
        raise ValueError(f"`class_names` must be a list of strings, got the single string {class_names[:80]!r}.")
    if isinstance(class_names, (set, frozenset, dict)):
        raise ValueError(
            f"`class_names` must be a list of strings in the order of the labels, got a {type(class_names).__name__}."
        )
    try:
        names = list(class_names)
    except TypeError:
        raise ValueError(f"`class_names` must be a list of strings, got {type(class_names).__name__}.") from None
    if not names:
        raise ValueError("`class_names` is empty: pass at least one class name.")
    if len(names) > MAX_CLASSES:
        raise ValueError(f"`class_names` has {len(names):,} entries; at most {MAX_CLASSES:,} are accepted.")
    global _last_checked
    if names == _last_checked:
        return names
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"class name {index} must be a string, got {type(name).__name__}: {str(name)[:80]!r}.")
        if not clean_class_name(name):
            raise ValueError(f"class name {index} is empty ({shown(name)}): give every class a readable name.")
        if len(name) > MAX_TEXT_LENGTH or _CONTROL.search(name) or _HALF.search(name):
            check_text(f"class_names[{index}]", name, "Use the plain name of the class.", optional=False)
    _last_checked = list(names)
    return names


def clean_class_name(name: str) -> str:
    """The class name as it is put into a prompt: underscores become spaces, runs of white space one space."""
    return " ".join(name.replace("_", " ").split())


def unique_names(class_names: Sequence[str]) -> list[str]:
    """Names that are all different, as keys of a table need them: those of several classes get their class index."""
    counts = Counter(class_names)
    taken = {name for name, count in counts.items() if count == 1}
    names = []
    for index, name in enumerate(class_names):
        if counts[name] > 1:
            name = f"{name} (class {index})"
            while name in taken:
                name += "'"
            taken.add(name)
        names.append(name)
    return names
