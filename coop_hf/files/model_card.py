"""The model card: `README.md` beside an adapter, what a reader has to know before using it.

A card is metadata (YAML between two lines of dashes) and Markdown. coop_hf writes the parts between marks such as

    <!-- coop_hf: begin results -->
    ...
    <!-- coop_hf: end results -->

and each later save writes those parts anew. Everything else belongs to people and is kept: text before, between and
behind the parts, and every value of the metadata but the base model and the measured results. A part that was deleted
with its marks stays deleted; a card without any mark gets metadata alone. What the card says about the training of an
adapter stays while its part "What was learned" comes out the same. Each adapter has parts of its own, so several can
share a repository.

A method tells its facts as attributes of its adapter class: `card_title` and `paper` (its name and its link),
`card_summary` (one sentence: what it learns), `citation` (BibTeX); `card_kind` (what it is) unless it is a prompt.
"""

import os
import re
import warnings
from typing import Any

import yaml

from ..atomic import write_text
from .card_text import (
    METADATA_KEYS,
    _checked,
    _citation,
    _entry_name,
    _how_trained,
    _learned,
    _metadata,
    _results,
    _summary,
    _use,
    _words,
    code,
)


__all__ = ["CARD_NAME", "code", "make_card", "write_card"]

CARD_NAME = "README.md"

MAX_CARD_BYTES = 4 * 2**20

MAX_METADATA_DEPTH = 100

_BEGIN, _END = "<!-- coop_hf: begin {} -->", "<!-- coop_hf: end {} -->"

_MARK = re.compile(r"^<!-- coop_hf: (begin|end) ([\w\- ]+) -->[ \t]*$", re.MULTILINE)

_ADAPTER_PARTS = ("learned", "results", "use", "training")

_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def write_card(
    folder: str | os.PathLike,
    model: Any,
    name: str | None = None,
    training: dict | None = None,
    selected_adapters: list[str] | None = None,
) -> str:
    """Writes `README.md` into a folder that holds saved adapters, keeping what people wrote into it.

    A card that cannot be merged (not UTF-8, metadata that is not YAML) is left as it is, with a warning: nothing that
    a person wrote is lost, and no save fails because of its card.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        model (`CoOpModel`): the model that was saved there.
        name (`str`, *optional*, defaults to `folder`): what the reader gives to `from_pretrained`: a Hub id or a path.
        training (`dict`, *optional*), selected_adapters (`list[str]`, *optional*): as for `make_card`.

    Returns:
        `str`: the path of the card.
    """
    path = os.path.join(folder, CARD_NAME)
    try:
        existing = _read(path)
        text = make_card(
            model, name or os.fspath(folder), existing, training=training, selected_adapters=selected_adapters
        )
    except _NotMergeable as error:
        warnings.warn(f"{path} is left as it is: {error}", stacklevel=2)
        return path
    if text != existing:
        write_text(path, text)
    return path


def make_card(
    model: Any,
    name: str | None = None,
    existing: str | None = None,
    training: dict | None = None,
    selected_adapters: list[str] | None = None,
) -> str:
    """The text of a model card.

    Args:
        model (`CoOpModel`): the model.
        name (`str`, *optional*): what the reader gives to `from_pretrained`: a Hub id, or a folder.
        existing (`str`, *optional*): the card that is there already, see above for what is kept of it.
        training (`dict`, *optional*): what is known about the training, every key optional:

            - `dataset` (`str`): its name; `dataset_id` (`str`): its Hub id; `split` (`str`): what was evaluated on;
            - `num_train`, `num_eval` (`int`): images trained and evaluated on; `shots`, `seed` (`int`);
            - `license` (`str`): an identifier such as `"mit"`; `language` (`str` or `list[str]`), `tags`
              (`list[str]`): more of the metadata;
            - `metrics`, `zero_shot_metrics` (`dict[str, float]`): fractions, such as `{"accuracy": 0.61}`, of the
              learned prompt and of the hand-written template, on the same images;
            - `hyperparameters` (`dict`): name to value; `versions` (`dict[str, str]`): of libraries, defaults to those
              installed; `hardware` (`str`); `seconds` (`float`): how long it took.

            Without it, what an existing card says about results and training is kept.
        selected_adapters (`list[str]`, *optional*, defaults to all): which adapters the card describes.

    Returns:
        `str`: Markdown with metadata.

    Raises:
        ValueError: `existing` has metadata that cannot be read; says why.
    """
    training = _checked(training)
    chosen = list(model.adapters) if selected_adapters is None else list(selected_adapters)
    if not chosen:
        raise ValueError("`selected_adapters` is empty: name at least one adapter, or leave it out for all.")
    adapters = {key: model.adapters[key] for key in sorted(chosen, key=lambda key: key != "default")}
    name = name or "path/to/this/folder"
    trained = model.active_adapter if model.active_adapter in adapters else next(iter(adapters))
    metadata = _metadata(name, adapters, trained, training)
    told = {key: value for key, value in training.items() if key not in METADATA_KEYS}
    parts = {"summary": _summary(name, adapters)}
    is_sigmoid = getattr(getattr(model, "family", None), "is_sigmoid", False)
    for key, adapter in adapters.items():
        known = told if key == trained else {}
        heading = "" if list(adapters) == ["default"] else f": {code(key)}"
        parts[_part_name("learned", key)] = _learned(model, key, adapter, heading)
        parts[_part_name("results", key)] = _results(adapter, known, heading)
        parts[_part_name("use", key)] = _use(name, key, adapter, heading, is_sigmoid)
        parts[_part_name("training", key)] = _how_trained(known, heading)
    parts["citation"] = _citation(adapters, (training.get("hyperparameters") or {}).get("objective"))
    if existing is not None and existing.strip():
        return _merge(
            existing, name, metadata, parts, list(adapters), trained if told else None, _words(training.get("tags"))
        )
    body = "\n\n".join(_part(key, text) for key, text in parts.items())
    note = (
        "<!-- Write what you like before, between and behind the parts that coop_hf marks: it is kept when the "
        "adapter is saved or pushed again. -->"
    )
    return f"---\n{_dump(metadata)}---\n\n{note}\n\n{body}\n"


# ------------------------------------------------------------------ merging with what people wrote


class _NotMergeable(ValueError):
    pass


def _read(path: str) -> str | None:
    if not os.path.isfile(path):
        return None
    if os.path.getsize(path) > MAX_CARD_BYTES:
        raise _NotMergeable(f"it has {os.path.getsize(path):,} bytes; a card has at most {MAX_CARD_BYTES:,}.")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise _NotMergeable(f"it is not UTF-8 ({error}).") from None


def _part(key: str, text: str) -> str:
    # Blank lines, because some renderers take a comment beside a table or a paragraph for a part of it.
    return (f"{_BEGIN.format(key)}\n\n{text}\n\n" if text else f"{_BEGIN.format(key)}\n") + _END.format(key)


def _part_name(part: str, adapter_name: str) -> str:
    return part if adapter_name == "default" else f"{part} {adapter_name}"


def _merge(
    existing: str,
    name: str,
    metadata: dict,
    parts: dict,
    adapters: list[str],
    trained: str | None,
    tags: list[str],
) -> str:
    """The existing card with its marked parts written anew and its metadata brought up to date.

    Args:
        existing (`str`): the card.
        name (`str`): as for `make_card`.
        metadata, parts (`dict`): what would stand in a card of its own.
        adapters (`list[str]`): the adapters that `parts` tells of.
        trained (`str`, *optional*): the one of them whose training is told of, too.
        tags (`list[str]`): tags that somebody asks for; they join those that are there.
    """
    front = _FRONT_MATTER.match(existing)
    theirs = _load(front[1]) if front else {}
    body = existing[front.end() :] if front else existing
    marks = _paired_marks(body)
    there = {key: body[begin:end] for key, begin, end in marks}

    def same(adapter: str) -> bool:
        key = _part_name("learned", adapter)
        return adapter != trained and there.get(key) == _part(key, parts[key])

    others = {key for key in there if key.startswith("learned")} - {_part_name("learned", a) for a in adapters}
    kept = {_part_name(part, a) for a in adapters if same(a) for part in ("results", "training")}
    kept |= {"summary"} if others else set()
    for key, begin, end in reversed(marks):
        if key in parts and key not in kept:
            body = body[:begin] + _part(key, parts[key]) + body[end:]
    if marks:  # adapters that the card does not tell of yet, before the citation or at the end
        told = {key.partition(" ")[2] or "default" for key in there if key not in ("summary", "citation")}
        new = [_part_name(part, a) for a in adapters if a not in told for part in _ADAPTER_PARTS]
        text = "\n\n".join(_part(key, parts[key]) for key in new)
        place = body.find(_BEGIN.format("citation"))
        if new:
            body = f"{body.rstrip()}\n\n{text}\n" if place < 0 else f"{body[:place]}{text}\n\n{body[place:]}"

    merged = {**theirs, **{key: value for key, value in metadata.items() if key not in theirs}}
    merged.update((key, metadata[key]) for key in ("base_model", "metrics") if key in metadata)
    if isinstance(theirs.get("datasets"), list):
        merged["datasets"] = list(dict.fromkeys([*theirs["datasets"], *metadata.get("datasets", [])]))
    if tags and isinstance(merged.get("tags"), list):
        merged["tags"] = list(dict.fromkeys([*merged["tags"], *tags]))
    if marks:  # else what it says of results is not ours
        stale = {_entry_name(name, a) for a in adapters if not same(a)}
        theirs_index = theirs.get("model-index")
        old = theirs_index if isinstance(theirs_index, list) else []
        merged["model-index"] = [
            entry for entry in old if not isinstance(entry, dict) or entry.get("name") not in stale
        ]
        merged["model-index"] += metadata.get("model-index", [])
        if not merged["model-index"]:
            del merged["model-index"]
            if old:
                merged.pop("metrics", None)  # they were measured on another context
    if front and merged == theirs:
        return existing[: front.end()] + body
    return f"---\n{_dump(merged)}---\n" + ("" if front else "\n") + body


def _paired_marks(body: str) -> list[tuple[str, int, int]]:
    """(part, first character, end) of each part whose marks stand in order; a mark without its partner is text."""
    result, open_mark = [], None
    for match in _MARK.finditer(body):
        if match[1] == "begin":
            open_mark = match
        elif open_mark is not None and open_mark[2] == match[2]:
            result.append((match[2], open_mark.start(), match.end()))
            open_mark = None
    return result


def _load(text: str) -> dict:
    try:
        depth = 0
        for token in yaml.scan(text):  # deep nesting and aliases take PyYAML minutes and gigabytes
            depth += type(token).__name__.endswith(("SequenceStartToken", "MappingStartToken"))
            depth -= type(token).__name__.endswith(("SequenceEndToken", "MappingEndToken", "BlockEndToken"))
            if depth > MAX_METADATA_DEPTH:
                raise _NotMergeable(f"its metadata nests more than {MAX_METADATA_DEPTH} deep.")
            if isinstance(token, yaml.AliasToken):
                raise _NotMergeable("its metadata uses YAML aliases (*name), which are not followed: write them out.")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, _NotMergeable):
            raise
        raise _NotMergeable(f"the metadata at its top is not YAML ({str(error)[:200]}): correct it.") from None
    if values is not None and not isinstance(values, dict):
        raise _NotMergeable("the metadata at its top is not a list of `key: value` lines: correct it.")
    return values or {}


def _dump(values: dict) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000) if values else ""
