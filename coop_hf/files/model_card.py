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

import dataclasses
import json
import os
import platform
import re
import warnings

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..atomic import write_atomically
from ..config import CoOpConfig, PromptConfig
from ..hub import is_hub_id
from ..interpret import nearest_tokens
from ..version import __version__


__all__ = ["CARD_NAME", "code", "make_card", "write_card"]

CARD_NAME = "README.md"

MAX_CARD_BYTES = 4 * 2**20

MAX_METADATA_DEPTH = 100

MAX_CLASSES_SHOWN = 200

MAX_CONTEXTS_SHOWN = 5

# Of CoOp, and of every adapter class that says nothing else.
CARD_TITLE = "Context Optimization (CoOp)"

CARD_SUMMARY = "CoOp learns the vectors that stand round the name of the class."

CARD_KIND = "Learned prompts"

PAPER = "https://arxiv.org/abs/2109.01134"

CITATION = """@article{zhou2022coop,
  title   = {Learning to Prompt for Vision-Language Models},
  author  = {Zhou, Kaiyang and Yang, Jingkang and Loy, Chen Change and Liu, Ziwei},
  journal = {International Journal of Computer Vision},
  year    = {2022}
}"""

TRAINING_KEYS = (
    "dataset",
    "dataset_id",
    "split",
    "num_train",
    "num_eval",
    "shots",
    "seed",
    "license",
    "metrics",
    "zero_shot_metrics",
    "hyperparameters",
    "versions",
    "hardware",
    "seconds",
)

_METRIC_NAMES = {"accuracy": ("accuracy", "Accuracy"), "macro_f1": ("f1", "Macro-F1")}

_BEGIN, _END = "<!-- coop_hf: begin {} -->", "<!-- coop_hf: end {} -->"

_MARK = re.compile(r"^<!-- coop_hf: (begin|end) ([\w\- ]+) -->[ \t]*$", re.MULTILINE)

_ADAPTER_PARTS = ("learned", "results", "use", "training")

_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def write_card(
    folder: str | os.PathLike,
    model,
    name: str | None = None,
    training: dict | None = None,
    selected_adapters: list[str] | None = None,
) -> str:
    """Writes `README.md` into a folder that holds saved adapters, keeping what people wrote into it.

    A card that cannot be merged (no UTF-8, metadata that is no YAML) is left as it is, with a warning: nothing that a
    person wrote is lost, and no save fails because of its card.

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
        with write_atomically(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
    return path


def make_card(
    model,
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
            - `license` (`str`): an identifier such as `"mit"`;
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
    parts = {"summary": _summary(name, adapters)}
    for key, adapter in adapters.items():
        known = training if key == trained else {}
        heading = "" if list(adapters) == ["default"] else f": {code(key)}"
        parts[_part_name("learned", key)] = _learned(model, key, adapter, heading)
        parts[_part_name("results", key)] = _results(adapter, known, heading)
        parts[_part_name("use", key)] = _use(name, key, adapter, heading)
        parts[_part_name("training", key)] = _how_trained(known, heading)
    parts["citation"] = _citation(adapters)
    if existing is not None and existing.strip():
        return _merge(existing, name, metadata, parts, list(adapters), trained if training else None)
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


def _merge(existing: str, name: str, metadata: dict, parts: dict, adapters: list[str], trained: str | None) -> str:
    """The existing card with its marked parts written anew and its metadata brought up to date.

    Args:
        existing (`str`): the card.
        name (`str`): as for `make_card`.
        metadata, parts (`dict`): what would stand in a card of its own.
        adapters (`list[str]`): the adapters that `parts` tells of.
        trained (`str`, *optional*): the one of them whose training is told of, too.
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
    if marks:  # else what it says of results is not ours
        stale = {_entry_name(name, a) for a in adapters if not same(a)}
        old = theirs.get("model-index") if isinstance(theirs.get("model-index"), list) else []
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
        raise _NotMergeable(f"the metadata at its top is no YAML ({str(error)[:200]}): correct it.") from None
    if values is not None and not isinstance(values, dict):
        raise _NotMergeable("the metadata at its top is no list of `key: value` lines: correct it.")
    return values or {}


def _dump(values: dict) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000) if values else ""


# ------------------------------------------------------------------ what stands in it


def _checked(training: dict | None) -> dict:
    unknown = sorted(str(key) for key in training or {} if key not in TRAINING_KEYS)
    if unknown:
        warnings.warn(
            f"the card has no place for {', '.join(unknown[:10])} in `training`; it knows {', '.join(TRAINING_KEYS)}.",
            stacklevel=3,
        )
    return {key: value for key, value in (training or {}).items() if key in TRAINING_KEYS and value is not None}


def code(text) -> str:
    """Text from anywhere as a Markdown code span: nothing in it is read as HTML, link, image or emphasis.

    Also fit for table cells. White space of any kind becomes one space.
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split()) or " "
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def _link(name: str | None, kind: str = "") -> str:
    if name and is_hub_id(name) and "/" in name and not os.path.isdir(name):
        label = name.replace("_", "\\_")
        return f"[{label}](https://huggingface.co/{kind}{name})"
    if name and is_hub_id(name):
        return code(name)
    return code(os.path.basename(str(name).rstrip("/\\")) or name) + " (a local model)" if name else "not recorded"


def _is_hub_base(config: PromptConfig) -> bool:
    name = config.base_model_name_or_path
    return name is not None and is_hub_id(name) and not os.path.isdir(name)


def _metadata(name: str, adapters: dict, trained: str, training: dict) -> dict:
    bases = sorted({a.config.base_model_name_or_path for a in adapters.values() if _is_hub_base(a.config)})
    dataset_id, metrics = training.get("dataset_id"), _metrics(training, "metrics")
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=_slug(dataset_id or training.get("dataset") or "unknown"),
            dataset_name=str(training.get("dataset") or dataset_id or "unknown"),
            dataset_split=str(training["split"]) if training.get("split") else None,
            metric_type=_METRIC_NAMES[key][0],
            metric_name=_METRIC_NAMES[key][1],
            metric_value=round(value, 4),
        )
        for key, value in metrics.items()
    ]
    values = ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation="adapter" if bases else None,
        library_name="coop_hf",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", *sorted({a.config.method for a in adapters.values()}), "prompt-learning", "few-shot"],
        license=str(training["license"]) if training.get("license") else None,
        datasets=[str(dataset_id)] if dataset_id and is_hub_id(str(dataset_id)) else None,
        metrics=[_METRIC_NAMES[key][0] for key in metrics] or None,
        eval_results=results or None,
        model_name=_entry_name(name, trained),
    ).to_dict()
    if not results:
        values.pop("model_name", None)
    return values


def _entry_name(name: str, adapter_name: str) -> str:
    """What the results of an adapter are filed under."""
    title = name.rstrip("/").split("/")[-1] or "adapter"
    return title if adapter_name == "default" else f"{title} ({adapter_name})"


def _slug(name) -> str:
    """A data set's identifier: its Hub id, or its name in small letters and hyphens."""
    name = str(name)
    return name if is_hub_id(name) else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _metrics(training: dict, key: str) -> dict[str, float]:
    values = training.get(key) or {}
    return {name: float(values[name]) for name in _METRIC_NAMES if isinstance(values.get(name), (int, float))}


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _table(head: list[str], rows: list[list[str]], align_right: bool = False) -> str:
    rule = ["---"] + ["---:" if align_right else "---"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def _title(name: str) -> str:
    title = name.rstrip("/").split("/")[-1]
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&])", r"\\\1", " ".join(title.split())) or "Learned prompts"


def _fact(adapter, name: str):
    """What the adapter's class says of its method, CoOp's where it says nothing."""
    defaults = {"card_title": CARD_TITLE, "card_summary": CARD_SUMMARY, "paper": PAPER, "citation": CITATION}
    defaults["card_kind"] = CARD_KIND
    return getattr(type(adapter), name, None) or defaults[name]


def _summary(name: str, adapters: dict) -> str:
    adapter = next(iter(adapters.values()))
    config, kind, lead = adapter.config, _fact(adapter, "card_kind"), ""
    if kind == CARD_KIND:
        lead = (
            f"Where people write a prompt by hand, such as {code(config.template)}, prompt learning learns it from "
            "examples. "
        )
    return (
        f"# {_title(name)}\n\n"
        f"{kind} for {_link(config.base_model_name_or_path)}, made with "
        f"[{_fact(adapter, 'card_title')}]({_fact(adapter, 'paper')}). {lead}{_fact(adapter, 'card_summary')} Every "
        "weight of the model stays as it is. Only what was learned is here; the model itself is loaded from its own "
        "place."
    )


def _prompt(config) -> str:
    slots = [f"[V]{k + 1}" for k in range(config.n_ctx)]

    def some(part):
        return part if len(part) < 4 else [part[0], "…", part[-1]]

    first = {"end": config.n_ctx, "middle": config.n_ctx // 2, "front": 0}[config.class_token_position]
    return " ".join([*some(slots[:first]), "[CLASS]", *some(slots[first:]), "."])


def _learned(model, key: str, adapter, heading: str) -> str:
    config = adapter.config
    state = adapter.learned_state() if hasattr(adapter, "learned_state") else {"context": adapter.context.detach()}
    rows = [["Base model", _link(config.base_model_name_or_path)], ["Method", _fact(adapter, "card_title")]]
    if config.revision:
        rows.append(["Revision of the base", code(config.revision)])
    if isinstance(config, CoOpConfig):
        start = "random vectors" if config.ctx_init is None else f"the words {code(config.ctx_init)}"
        kind = "class-specific: each class has its own" if config.class_specific else "unified: one for all classes"
        where = {"end": "at the end", "middle": "in the middle", "front": "in front"}[config.class_token_position]
        rows += [
            ["Prompt", f"{code(_prompt(config))}, the class name {where}"],
            ["Context", f"{_plural(config.n_ctx, 'vector')}; {kind}"],
            ["Started from", start],
        ]
    shared = CoOpConfig if isinstance(config, CoOpConfig) else PromptConfig
    own = [f.name for f in dataclasses.fields(config) if f.name not in {g.name for g in dataclasses.fields(shared)}]
    rows += [[code(name), code(getattr(config, name))] for name in own]
    # Also tells one training from the next: what was said of another one does not stay.
    count = sum(value.numel() for value in state.values())
    mean = sum(value.sum(dtype=torch.float64).item() for value in state.values()) / max(1, count)
    norm = sum(value.norm(dtype=torch.float64).item() ** 2 for value in state.values()) ** 0.5
    rows.append(["Learned", f"{_plural(count, 'number')}, mean {mean:.4g}, norm {norm:.5g}"])
    sections = [f"## What was learned{heading}", _table(["", ""], rows)]
    names = config.class_names
    if names:
        shown = ", ".join(code(name) for name in names[:MAX_CLASSES_SHOWN])
        more = f" and {len(names) - MAX_CLASSES_SHOWN:,} more" if len(names) > MAX_CLASSES_SHOWN else ""
        sections.append(f"{len(names):,} class{'es' if len(names) > 1 else ''}: {shown}{more}.")
    if isinstance(config, CoOpConfig):
        sections.append(_nearest_words(model, key, config))
    return "\n\n".join(sections)


def _dataset(training: dict) -> str:
    dataset_id = training.get("dataset_id")
    if dataset_id and is_hub_id(str(dataset_id)):
        return _link(str(dataset_id), "datasets/")
    return code(training.get("dataset") or dataset_id)


def _nearest_words(model, key: str, config: CoOpConfig) -> str:
    """A table of the tokens next to each context vector."""
    found = nearest_tokens(model, top_k=3, adapter_name=key, max_classes=MAX_CONTEXTS_SHOWN)
    contexts = list(found.items()) if config.class_specific else [("", found)]
    rows = []
    for name, context in contexts:
        for slot, nearest in enumerate(context):
            label = f"{code(name)} {slot + 1}" if name else f"{slot + 1}"
            rows.append([label, ", ".join(f"{code(entry['token'])} ({entry['distance']:.2f})" for entry in nearest)])
    more = ""
    if config.class_specific and len(config.class_names) > MAX_CONTEXTS_SHOWN:
        more = f"\n\nThe first {MAX_CONTEXTS_SHOWN} of {len(config.class_names):,} classes are shown."
    return (
        "The words of the vocabulary nearest to each vector, with their distance. Learned vectors seldom spell "
        f"anything that people would write.\n\n{_table(['Vector', 'Nearest tokens'], rows)}{more}"
    )


def _results(adapter, training: dict, heading: str) -> str:
    learned, zero_shot = _metrics(training, "metrics"), _metrics(training, "zero_shot_metrics")
    if not learned:
        return ""
    where = [f"the {code(training['split'])} part of " if training.get("split") else ""]
    where.append(_dataset(training) if training.get("dataset") or training.get("dataset_id") else "its data set")
    if training.get("num_eval") is not None:
        where.append(f" ({_plural(int(training['num_eval']), 'image')})")
    template = adapter.config.template
    rows = []
    if zero_shot:
        cells = [f"{100 * zero_shot[key]:.1f}" if key in zero_shot else "" for key in learned]
        rows.append([f"Zero-shot, {code(template)}", *cells])
    rows.append(
        [
            "This prompt" if _fact(adapter, "card_kind") == CARD_KIND else "This head",
            *[f"**{100 * value:.1f}**" for value in learned.values()],
        ]
    )
    if zero_shot:
        rows.append(
            ["Difference"]
            + [f"{100 * (learned[key] - zero_shot[key]):+.1f}" if key in zero_shot else "" for key in learned]
        )
    table = _table(["", *[f"{_METRIC_NAMES[key][1]}, %" for key in learned]], rows, align_right=True)
    seed = ""
    if training.get("seed") is not None:
        seed = f" One training, seed {code(training['seed'])}: other seeds and other shots give other numbers."
    return f"## Results{heading}\n\nMeasured on {''.join(where)}.{seed}\n\n{table}"


def _use(name: str, key: str, adapter, heading: str) -> str:
    config = adapter.config
    arguments = [_quoted(name)]
    if key != "default":
        arguments.append(f"subfolder={_quoted(key)}")
    base = config.base_model_name_or_path
    comments = ""
    is_on_hub = is_hub_id(name) and "/" in name and not os.path.isdir(name)
    if not base or (is_on_hub and not _is_hub_base(config)):
        arguments.append('base_model="path/to/the/base/model"')
        comments = "  # a local model, not on the Hub"
    lines = [
        "from PIL import Image",
        "",
        "from coop_hf import CoOpModel",
        "",
        f"model = CoOpModel.from_pretrained({', '.join(arguments)}){comments}",
    ]
    if not config.class_names:
        lines.append('model.set_class_names(["cat", "dog", "sea lion"])')
    lines += [
        'image = Image.new("RGB", (224, 224), "white")  # yours: Image.open("image.jpg")',
        "for answer in model.predict(image, top_k=3):",
        """    print(f"{answer['score']:.3f}  {answer['label']}")""",
    ]
    text = f"## How to use it{heading}\n\n```python\n" + "\n".join(lines) + "\n```\n\n"
    text += (
        "The scores are probabilities over the classes of the list and add up to one: an image of something else "
        "gets one of these names too."
    )
    if not getattr(adapter, "is_class_bound", False):
        text += ' The prompt takes other classes as well: `model.set_class_names(["cat", "dog"])`.'
    if key != "default":
        name, key = _quoted(name), _quoted(key)
        text += f"\n\nBeside another adapter on the same base: `model.load_adapter({name}, {key}, subfolder={key})`."
    return text


def _how_trained(training: dict, heading: str) -> str:
    if not training:
        return ""
    rows = []
    if training.get("dataset") or training.get("dataset_id"):
        rows.append(["Learned on", _dataset(training)])
    if training.get("shots") is not None:
        rows.append(["Shots", f"{_plural(int(training['shots']), 'image')} of each class"])
    if training.get("seed") is not None:
        rows.append(["Seed", code(training["seed"])])
    if training.get("num_train") is not None:
        rows.append(["Images trained on", f"{int(training['num_train']):,}"])
    for key, value in (training.get("hyperparameters") or {}).items():
        rows.append([code(key), code(f"{value:g}" if isinstance(value, float) else value)])
    if training.get("hardware"):
        rows.append(["Hardware", code(training["hardware"])])
    if training.get("seconds") is not None:
        rows.append(["Time", _duration(float(training["seconds"]))])
    versions = training.get("versions") or _versions()
    rows.append(["Versions", ", ".join(code(f"{key} {value}") for key, value in versions.items())])
    return f"## How it was trained{heading}\n\n" + _table(["", ""], rows)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _versions() -> dict[str, str]:
    import transformers

    return {
        "coop_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


def _citation(adapters: dict) -> str:
    works = dict.fromkeys((_fact(a, "card_title"), _fact(a, "paper"), _fact(a, "citation")) for a in adapters.values())
    return "## Citation\n\n" + "\n\n".join(
        f"The method is [{title}]({paper}).\n\n```bibtex\n{citation.strip()}\n```" for title, paper, citation in works
    )
