"""From the name of a method to its configuration: the fields that a command can set, and what they are without."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, get_args

from transformers.hf_argparser import string_to_bool

from ..adapters import ADAPTERS  # with it all methods register their configurations
from ..config import CONFIGS, PromptConfig
from ..core.layout import encode_words


__all__ = [
    "OFFICIAL_FIELDS",
    "add_field_arguments",
    "check_fields",
    "make_config",
    "settable_fields",
    "split_words",
]

# What the official code of a method, or of CoOp or IVLP with an objective, starts from other than the configuration's
# own defaults.
OFFICIAL_FIELDS: dict[tuple[str, str | None], dict[str, Any]] = {
    ("cocoop", None): {"n_ctx": 4, "ctx_init": "words"},
    ("coop", "kgcoop"): {"n_ctx": 4, "ctx_init": "words"},
    ("coop", "prograd"): {"n_ctx": 16, "ctx_init": "words"},
    ("ivlp", "promptsrc"): {"n_ctx": 4, "n_vision": 4, "depth": 9},
}

_NOT_SET = {field.name for field in dataclasses.fields(PromptConfig)} | {"stores_class_embeds", "num_keys"}


def settable_fields(method: str) -> dict[str, dataclasses.Field]:
    """The fields of a method's configuration that are a user's to choose, by name.

    Raises:
        ValueError: an unknown method; names the known ones.
    """
    if method not in ADAPTERS:
        raise ValueError(f"there is no method {method!r}; choose from {', '.join(ADAPTERS)}.")
    return {field.name: field for field in dataclasses.fields(CONFIGS[method]) if field.name not in _NOT_SET}


def check_fields(method: str, given: Iterable[str]) -> None:
    """Raises `ValueError` for an unknown method, or fields that it does not have; names those that it has."""
    known = settable_fields(method)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"the method {method!r} has no {', '.join(map(repr, unknown))}: what it has is "
            f"{', '.join(map(repr, known)) or 'nothing to set'}, and the template."
        )


def add_field_arguments(parser: argparse.ArgumentParser) -> list[str]:
    """Adds an argument for each field that any method has. `none` stands for `None`.

    Returns:
        `list[str]`: the names of the fields; those that are not given are missing from what the parser returns.
    """
    owners: dict[str, list[str]] = {}
    fields = {}
    for method in ADAPTERS:
        for name, field in settable_fields(method).items():
            owners.setdefault(name, []).append(method)
            fields[name] = field
    group = parser.add_argument_group("fields of the methods' configurations")
    for name, field in fields.items():
        kind: Any = next((kind for kind in get_args(field.type) if kind is not type(None)), field.type)
        more: dict[str, Any] = {"type": _or_none(string_to_bool if kind is bool else kind)}
        if kind is bool:
            more |= {"nargs": "?", "const": True}
        group.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            help=f"See the configuration of {', '.join(owners[name])}.",
            metavar=kind.__name__,
            **more,
        )
    return list(fields)


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        return None if text.lower() == "none" else read(text)

    value.__name__ = getattr(read, "__name__", "value")  # in argparse's message
    return value


def split_words(words: str, n_ctx: int, tokenizer: Any) -> tuple[str | None, str | None]:
    """As many of some words as `n_ctx` tokens hold, and the words behind them; `None` where there are none."""
    parts = words.split()
    count = len(parts)
    while count and len(encode_words(tokenizer, [" ".join(parts[:count])])[0]) > n_ctx:
        count -= 1
    return " ".join(parts[:count]) or None, " ".join(parts[count:]) or None


def make_config(
    method: str,
    objective: str | Callable | None,
    given: dict[str, Any],
    tokenizer: Any,
    num_layers: int,
    words: str = "a photo of a",
    **shared: Any,
) -> PromptConfig:
    """The configuration of a method: what is given, else as in the official code of the method with the objective.

    Args:
        method (`str`): the method.
        objective (`str` or `Callable`, *optional*): what it is trained with.
        given (`dict`): fields that are chosen.
        tokenizer (`PreTrainedTokenizerBase`): the base model's, which counts the words' tokens.
        num_layers (`int`): layers of the smaller of the base's towers that the method prompts.
        words (`str`, *optional*, defaults to `"a photo of a"`): words to start from, where the official code does.
            What `n_ctx` tokens do not hold of them stays in the prompt if the method has `fixed_words`.
        shared: fields of every configuration: `template`, `base_model_name_or_path` ...

    Raises:
        ValueError: an unknown method, or a field that it does not have; names those that it has.
    """
    check_fields(method, given)
    known = settable_fields(method)
    named = objective if isinstance(objective, str) else None
    official = OFFICIAL_FIELDS.get((method, None), {}) | OFFICIAL_FIELDS.get((method, named), {})
    if "depth" in official:
        official = official | {"depth": max(1, min(official["depth"], num_layers))}
    fields = official | given
    usual = official.get("ctx_init", known["ctx_init"].default) if "ctx_init" in known else None
    text = given.get("ctx_init", words if usual else None)
    n_ctx = fields.get("n_ctx", known["n_ctx"].default if "n_ctx" in known else None)
    if "ctx_init" in known and n_ctx is not None and ("ctx_init" not in given or "fixed_words" in known):
        first, rest = (None, None) if text is None else split_words(text, n_ctx, tokenizer)
        fields["ctx_init"] = first
        if "fixed_words" in known:
            fields.setdefault("fixed_words", rest)
    return CONFIGS[method](**fields, **shared)
