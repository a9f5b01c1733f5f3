"""Names of adapters and of classes: what may name an adapter, and which classes something was learned for."""

from collections import Counter
from typing import Any

from torch import nn

from ..checks import clean_class_name


__all__ = ["check_new_name", "class_order"]


def check_new_name(name: str, adapters: nn.ModuleDict) -> None:
    """Raises `ValueError` unless `name` may name one more adapter, and a folder."""
    ok = isinstance(name, str) and 0 < len(name) <= 128
    if not ok or any(not (c.isalnum() or c in "-_ ") for c in name) or name != name.strip():
        raise ValueError(
            f"an adapter's name must be made of letters, digits, spaces, '-' and '_', as it names a folder; got "
            f"{name!r}."
        )
    if name in adapters:
        raise ValueError(f"there is an adapter named {name!r} already; take another name, or delete it first.")
    if hasattr(adapters, name):
        raise ValueError(f"{name!r} cannot name an adapter (it is an attribute of nn.ModuleDict); take another.")


def class_order(adapter: Any, class_names: list[str]) -> list[int]:
    """Where each of `class_names` stands among the classes that an adapter learned something for.

    Args:
        adapter (`Adapter`): bound to its classes.
        class_names (`list[str]`): the same names, in any order.

    Raises:
        ValueError: other names; says which ones differ and what to do.
    """
    own: dict[str, list[int]] = {}
    for index, name in enumerate(adapter.config.class_names):
        own.setdefault(clean_class_name(name), []).append(index)
    new = [clean_class_name(name) for name in class_names]
    have, wanted = Counter({name: len(places) for name, places in own.items()}), Counter(new)
    if have == wanted:
        places = {name: iter(indices) for name, indices in own.items()}
        return [next(places[name]) for name in new]
    is_context = bool(getattr(adapter.config, "class_specific", False))
    what, kept, remedy = (
        ("a class-specific context", "vectors", "Learn a unified context (class_specific=False) to change classes")
        if is_context
        else (
            f"a head of the method {adapter.method!r}",
            "weights",
            "Fit a head anew on images of the new classes (`coop_hf.training.heads.fit_head`), or learn a prompt, "
            "which takes any classes",
        )
    )
    missing, unknown = ([repr(name) for name in more] for more in (have - wanted, wanted - have))
    parts = [
        f"{what} {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}"
        for what, names in ((f"it has no {kept} for", unknown), ("the new list lacks", missing))
        if names
    ]
    raise ValueError(f"{what} holds {kept} for its own classes alone: {'; '.join(parts)}. {remedy}.")
