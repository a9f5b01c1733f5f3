"""The model card: `README.md` beside an adapter, what a reader has to know before using it.

A card is metadata (YAML between two lines of dashes) and Markdown. coop_hf writes the parts between marks such as

    <!-- coop_hf: begin results -->
    ...
    <!-- coop_hf: end results -->

and each later save writes those parts anew. Everything else belongs to people and is kept: text before, between and
behind the parts; a part that was deleted with its marks stays deleted; a card that coop_hf did not write gets metadata
alone. In the metadata a value that a person changed, added or removed stays so. A hidden line remembers what was
written last, which tells the two apart. Each adapter has parts of its own, so several can share a repository.
"""

import hashlib
import json
import os
import platform
import re
import warnings

import torch
import yaml

from ..hub import is_hub_id
from ..version import __version__


__all__ = ["CARD_NAME", "make_card", "write_card"]

CARD_NAME = "README.md"

MAX_CARD_BYTES = 4 * 2**20

MAX_METADATA_DEPTH = 100

MAX_CLASSES_SHOWN = 200

MAX_CONTEXTS_SHOWN = 5

PAPER = "https://arxiv.org/abs/2109.01134"

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

_RECORD = re.compile(r"^<!-- coop_hf: record (\{[^\n]*\}) -->[ \t]*\n?", re.MULTILINE)

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
    from ..atomic import write_atomically

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
        parts[_part_name("learned", key)] = _learned(model, key, adapter, known, heading)
        parts[_part_name("results", key)] = _results(adapter, known, heading)
        parts[_part_name("use", key)] = _use(name, key, adapter.config, heading)
        parts[_part_name("training", key)] = _how_trained(known, heading)
    parts["citation"] = _citation()
    record = {
        "metadata": {key: _fingerprint(value) for key, value in metadata.items()},
        "parts": list(parts),
        "adapters": {key: _adapter_fingerprint(adapter) for key, adapter in adapters.items()},
    }
    if existing is not None and existing.strip():
        return _merge(existing, metadata, parts, record, trained if training else None)
    body = "\n\n".join(_part(key, text) for key, text in parts.items())
    note = (
        "<!-- Write what you like before, between and behind the parts that coop_hf marks: it is kept when the "
        "adapter is saved or pushed again. -->"
    )
    return f"---\n{_dump(metadata)}---\n\n{_record_line(record)}\n{note}\n\n{body}\n"


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


def _merge(existing: str, metadata: dict, parts: dict, record: dict, trained: str | None) -> str:
    """The existing card with its marked parts and our own metadata written anew.

    Args:
        existing (`str`): the card.
        metadata, parts, record (`dict`): what would stand in a card of its own.
        trained (`str`, *optional*): the adapter whose training is told of in `parts`. For the others, what was
            learned, results and training stay as the card has them while the adapter is the one they were written for.
    """
    front = _FRONT_MATTER.match(existing)
    theirs = _load(front[1]) if front else {}
    body = existing[front.end() :] if front else existing
    before = _read_record(body)
    if before is None:  # not written by coop_hf: its text is its own
        before = {"metadata": {}, "parts": list(parts), "adapters": {}}
        has_record = False
    else:
        has_record = True
    same = {key for key, value in record["adapters"].items() if before["adapters"].get(key) == value}
    other_adapters = set(before["adapters"]) - set(record["adapters"])

    # Parts: those that are there are written anew, new ones come before the citation, or at the end.
    marks = _paired_marks(body)
    for key, begin, end in reversed(marks):
        kind, _, adapter_name = key.partition(" ")
        adapter_name = adapter_name or "default"
        keeps = kind in ("learned", "results", "training") and adapter_name in same and adapter_name != trained
        if key in parts and not keeps and not (key == "summary" and other_adapters):
            body = body[:begin] + _part(key, parts[key]) + body[end:]
    new = [key for key in parts if key not in before["parts"]]
    if new:
        text = "\n\n".join(_part(key, parts[key]) for key in new)
        place = body.find(_BEGIN.format("citation"))
        body = f"{body.rstrip()}\n\n{text}\n" if place < 0 else f"{body[:place]}{text}\n\n{body[place:]}"

    # Metadata: what was written last and not touched since is ours to change.
    merged, written = dict(theirs), dict(before["metadata"])
    for key in {**before["metadata"], **metadata}:
        is_ours = key in written and key in theirs and _fingerprint(theirs[key]) == written[key]
        if key in metadata:
            value = metadata[key]
            if is_ours and key == "model-index":
                value = _other_entries(theirs[key], value, same - {trained}, other_adapters) + value
            if is_ours or (key not in written and key not in theirs):
                merged[key], written[key] = value, _fingerprint(value)
        elif is_ours and key in ("metrics", "model-index") and not same and not other_adapters:
            del merged[key], written[key]  # they were measured on another context
    if front and merged == theirs:
        head = existing[: front.end()]
    else:
        head = f"---\n{_dump(merged)}---\n" + ("" if front else "\n")
    line = _record_line(
        {
            "metadata": written,
            "parts": [*before["parts"], *new],
            "adapters": {**before["adapters"], **record["adapters"]},
        }
    )
    if has_record:
        return head + _RECORD.sub(lambda _: line + "\n", body, count=1)
    return head + ("" if body.startswith(("\n", "\r")) else "\n") + line + "\n" + body


def _other_entries(theirs: list, ours: list, same: set, other_adapters: set) -> list:
    """Entries of a model index that are of other adapters than those in `ours`."""
    names = {entry["name"] for entry in ours}
    kept = [entry for entry in theirs if entry.get("name") not in names]
    return kept if same or other_adapters else []


def _record_line(record: dict) -> str:
    # No "--" may stand in an HTML comment.
    return f"<!-- coop_hf: record {json.dumps(record, sort_keys=True).replace('--', '-' + chr(92) + 'u002d')} -->"


def _read_record(body: str) -> dict | None:
    match = _RECORD.search(body)
    if match is None:
        return None
    try:
        record = json.loads(match[1])
        kinds = {"metadata": dict, "parts": list, "adapters": dict}
        if all(isinstance(record[key], kind) for key, kind in kinds.items()):
            return record
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


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


def _fingerprint(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _adapter_fingerprint(adapter) -> str:
    config = {key: value for key, value in adapter.config.to_dict().items() if key != "coop_hf_version"}
    values = adapter.context.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return _fingerprint([config, hashlib.sha256(values).hexdigest()])


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


def _is_hub_base(name: str | None) -> bool:
    return bool(name) and is_hub_id(name) and not os.path.isdir(name)


def _metadata(name: str, adapters: dict, trained: str, training: dict) -> dict:
    bases = {adapter.config.base_model_name_or_path for adapter in adapters.values()}
    values = {}
    bases = sorted(base for base in bases if _is_hub_base(base))
    if bases:
        values["base_model"] = bases[0] if len(bases) == 1 else bases
        values["base_model_relation"] = "adapter"
    values["library_name"] = "coop_hf"
    values["pipeline_tag"] = "zero-shot-image-classification"
    values["tags"] = ["clip", "coop", "prompt-learning", "few-shot"]
    if training.get("license"):
        values["license"] = str(training["license"])
    dataset_id = training.get("dataset_id")
    if dataset_id and is_hub_id(str(dataset_id)):
        values["datasets"] = [str(dataset_id)]
    metrics = _metrics(training, "metrics")
    if metrics:
        values["metrics"] = [_METRIC_NAMES[key][0] for key in metrics]
        dataset = {
            "type": _slug(dataset_id or training.get("dataset") or "unknown"),
            "name": str(training.get("dataset") or dataset_id or "unknown"),
        }
        if training.get("split"):
            dataset["split"] = str(training["split"])
        result = {
            "task": {"type": "image-classification", "name": "Image Classification"},
            "dataset": dataset,
            "metrics": [
                {"type": _METRIC_NAMES[key][0], "value": round(value, 4), "name": _METRIC_NAMES[key][1]}
                for key, value in metrics.items()
            ],
        }
        title = name.rstrip("/").split("/")[-1] or "adapter"
        title += "" if trained == "default" else f" ({trained})"
        values["model-index"] = [{"name": title, "results": [result]}]
    return values


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


def _summary(name: str, adapters: dict) -> str:
    config = next(iter(adapters.values())).config
    return (
        f"# {_title(name)}\n\n"
        f"Learned prompts for {_link(config.base_model_name_or_path)}, made with "
        f"[Context Optimization (CoOp)]({PAPER}). Where people write a prompt by hand, such as "
        f"{code(config.template)}, CoOp learns the vectors that stand round the name of the class and leaves every "
        "weight of the model as it is. Only these vectors are here; the model itself is loaded from its own place."
    )


def _prompt(config) -> str:
    slots = [f"[V]{k + 1}" for k in range(config.n_ctx)]

    def some(part):
        return part if len(part) < 4 else [part[0], "…", part[-1]]

    first = {"end": config.n_ctx, "middle": config.n_ctx // 2, "front": 0}[config.class_token_position]
    return " ".join([*some(slots[:first]), "[CLASS]", *some(slots[first:]), "."])


def _learned(model, key: str, adapter, training: dict, heading: str) -> str:
    config = adapter.config
    start = "random vectors" if config.ctx_init is None else f"the words {code(config.ctx_init)}"
    kind = "class-specific: each class has its own" if config.class_specific else "unified: one for all classes"
    where = {"end": "at the end", "middle": "in the middle", "front": "in front"}[config.class_token_position]
    rows = [
        ["Base model", _link(config.base_model_name_or_path)],
        ["Prompt", f"{code(_prompt(config))}, the class name {where}"],
        ["Context", f"{_plural(config.n_ctx, 'vector')} of {adapter.context.shape[-1]} numbers; {kind}"],
        ["Started from", start],
    ]
    if config.revision:
        rows.insert(1, ["Revision of the base", code(config.revision)])
    if training.get("dataset") or training.get("dataset_id"):
        rows.append(["Learned on", _dataset(training)])
    if training.get("shots") is not None:
        rows.append(["Shots", f"{_plural(int(training['shots']), 'image')} of each class"])
    if training.get("seed") is not None:
        rows.append(["Seed", code(training["seed"])])
    sections = [f"## What was learned{heading}", _table(["", ""], rows)]
    names = config.class_names
    if names:
        shown = ", ".join(code(name) for name in names[:MAX_CLASSES_SHOWN])
        more = f" and {len(names) - MAX_CLASSES_SHOWN:,} more" if len(names) > MAX_CLASSES_SHOWN else ""
        sections.append(f"{len(names):,} class{'es' if len(names) > 1 else ''}: {shown}{more}.")
    words = _nearest_words(model, key, config)
    return "\n\n".join([*sections, words] if words else sections)


def _dataset(training: dict) -> str:
    dataset_id = training.get("dataset_id")
    if dataset_id and is_hub_id(str(dataset_id)):
        return _link(str(dataset_id), "datasets/")
    return code(training.get("dataset") or dataset_id)


def _nearest_words(model, key: str, config) -> str:
    """A table of the tokens next to each context vector, where `coop_hf.interpret` is there to find them."""
    try:
        from ..interpret import nearest_tokens
    except ImportError:
        return ""
    with torch.no_grad():
        found = nearest_tokens(model, top_k=3, adapter_name=key)
    contexts = list(found.items()) if config.class_specific else [("", found)]
    rows = []
    for name, context in contexts[:MAX_CONTEXTS_SHOWN]:
        for slot, nearest in enumerate(context):
            label = f"{code(name)} {slot + 1}" if name else f"{slot + 1}"
            rows.append([label, ", ".join(f"{code(entry['token'])} ({entry['distance']:.2f})" for entry in nearest)])
    if not rows:
        return ""
    more = ""
    if len(contexts) > MAX_CONTEXTS_SHOWN:
        more = f"\n\nThe first {MAX_CONTEXTS_SHOWN} of {len(contexts):,} classes are shown."
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
    rows.append(["This prompt", *[f"**{100 * value:.1f}**" for value in learned.values()]])
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


def _use(name: str, key: str, config, heading: str) -> str:
    arguments = [_quoted(name)]
    if key != "default":
        arguments.append(f"subfolder={_quoted(key)}")
    base = config.base_model_name_or_path
    comments = ""
    is_on_hub = is_hub_id(name) and "/" in name and not os.path.isdir(name)
    if not base or (is_on_hub and not _is_hub_base(base)):
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
    if not config.class_specific:
        text += ' The prompt takes other classes as well: `model.set_class_names(["cat", "dog"])`.'
    if key != "default":
        name, key = _quoted(name), _quoted(key)
        text += f"\n\nBeside another adapter on the same base: `model.load_adapter({name}, {key}, subfolder={key})`."
    return text


def _how_trained(training: dict, heading: str) -> str:
    if not training:
        return ""
    rows = []
    if training.get("num_train") is not None:
        rows.append(["Images trained on", f"{int(training['num_train']):,}"])
    for key, value in (training.get("hyperparameters") or {}).items():
        rows.append([code(key), code(f"{value:g}" if isinstance(value, float) else value)])
    if training.get("hardware"):
        rows.append(["Hardware", code(training["hardware"])])
    if training.get("seconds") is not None:
        rows.append(["Time", _duration(float(training["seconds"]))])
    versions = training.get("versions") or _versions()
    rows.append(["Versions", ", ".join(f"{key} {code(value)}" for key, value in versions.items())])
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


def _citation() -> str:
    return f"""## Citation

The method is Zhou, Yang, Loy and Liu, [Learning to Prompt for Vision-Language Models]({PAPER}), IJCV 2022.

```bibtex
@article{{zhou2022coop,
  title   = {{Learning to Prompt for Vision-Language Models}},
  author  = {{Zhou, Kaiyang and Yang, Jingkang and Loy, Chen Change and Liu, Ziwei}},
  journal = {{International Journal of Computer Vision}},
  year    = {{2022}}
}}
```"""
