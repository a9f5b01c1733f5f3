"""What stands in a model card: its metadata and its parts, as text."""

import dataclasses
import json
import os
import platform
import re
import warnings
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from ..config import CoOpConfig, PromptConfig
from ..core.layout import split_context
from ..hub import is_hub_id
from ..interpret import nearest_tokens
from ..version import __version__


MAX_CLASSES_SHOWN = 200

MAX_CONTEXTS_SHOWN = 5

CARD_KIND = "Learned prompts"

# Title, summary, formula, paper and BibTeX entry of each method and objective.
with open(os.path.join(os.path.dirname(__file__), "methods.json"), encoding="utf-8") as _file:
    _FACTS = json.load(_file)

TRAINING_KEYS = (
    "dataset",
    "dataset_id",
    "split",
    "num_train",
    "num_eval",
    "shots",
    "seed",
    "license",
    "language",
    "tags",
    "metrics",
    "zero_shot_metrics",
    "hyperparameters",
    "versions",
    "hardware",
    "seconds",
)

# What stands in the metadata alone, and says nothing of one training.
METADATA_KEYS = ("license", "language", "tags")

# Names that transformers' Trainer has for some of them.
_ALIASES = {"dataset_name": "dataset", "dataset_tags": "dataset_id"}

_METRIC_NAMES = {"accuracy": ("accuracy", "Accuracy"), "macro_f1": ("f1", "Macro-F1")}


def _checked(training: dict | None) -> dict:
    training = {_ALIASES.get(key, key): value for key, value in (training or {}).items()}
    unknown = sorted(str(key) for key in training if key not in TRAINING_KEYS)
    if unknown:
        warnings.warn(
            f"the card has no place for {', '.join(unknown[:10])} in `training`; it knows {', '.join(TRAINING_KEYS)}.",
            stacklevel=3,
        )
    known = {key: value for key, value in training.items() if key in TRAINING_KEYS and value is not None}
    for key in ("dataset", "dataset_id"):  # transformers takes a list as well, and a card tells of one data set
        if isinstance(known.get(key), (list, tuple)):
            known[key] = ", ".join(map(str, known[key]))
    return known


def _words(value: Any) -> list[str]:
    """One string or several, as a list."""
    return [str(part) for part in ([value] if isinstance(value, str) else value or [])]


def code(text: Any) -> str:
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


def is_hub_base(config: PromptConfig) -> bool:
    """Whether the base model is named by a Hub id, and no folder of that name is here."""
    name = config.base_model_name_or_path
    return name is not None and is_hub_id(name) and not os.path.isdir(name)


def _metadata(name: str, adapters: dict, trained: str, training: dict) -> dict:
    bases = sorted({a.config.base_model_name_or_path for a in adapters.values() if is_hub_base(a.config)})
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
        tags=list(dict.fromkeys([*_tags(adapters), *_words(training.get("tags"))])),
        license=str(training["license"]) if training.get("license") else None,
        language=_words(training.get("language")) or None,
        datasets=[str(dataset_id)] if dataset_id and is_hub_id(str(dataset_id)) else None,
        metrics=[_METRIC_NAMES[key][0] for key in metrics] or None,
        eval_results=results or None,
        model_name=_entry_name(name, trained),
    ).to_dict()
    if not results:
        values.pop("model_name", None)
    return values


def _tags(adapters: dict) -> list[str]:
    return ["clip", *sorted({a.config.method for a in adapters.values()}), "prompt-learning", "few-shot"]


def _entry_name(name: str, adapter_name: str) -> str:
    """What the results of an adapter are filed under."""
    title = name.rstrip("/").split("/")[-1] or "adapter"
    return title if adapter_name == "default" else f"{title} ({adapter_name})"


def _slug(name: Any) -> str:
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


def _fact(adapter: Any, name: str) -> str:
    """A fact of the adapter's method: what its class says, as an attribute `card_title`, `card_summary`,
    `card_formula`, `paper` or `citation`, else what is known here. Nothing is claimed of a silent one."""
    known = _FACTS["methods"].get(adapter.config.method, {"title": type(adapter).__name__})
    return getattr(type(adapter), name, None) or known.get(name.removeprefix("card_"), "")


def _method(adapter: Any) -> str:
    """The method's name, with a link to its paper."""
    title, paper = _fact(adapter, "card_title"), _fact(adapter, "paper")
    return f"[{title}]({paper})" if paper else title


def _summary(name: str, adapters: dict) -> str:
    adapter = next(iter(adapters.values()))
    config, kind, lead = adapter.config, _fact(adapter, "card_kind") or CARD_KIND, ""
    if kind == CARD_KIND:
        lead = (
            f"Where people write a prompt by hand, such as {code(config.template)}, prompt learning learns it from "
            "examples. "
        )
    summary = f"{_fact(adapter, 'card_summary')} ".lstrip()
    return (
        f"# {_title(name)}\n\n"
        f"{kind} for {_link(config.base_model_name_or_path)}, made with {_method(adapter)}. {lead}{summary}Every "
        "weight of the model stays as it is. Only what was learned is here; the model itself is loaded from its own "
        "place."
    )


def _prompt(config: CoOpConfig) -> str:
    number = config.n_ctx or 0
    slots = [f"[V]{k + 1}" for k in range(number)]

    def some(part: list[str]) -> list[str]:
        return part if len(part) < 4 else [part[0], "…", part[-1]]

    first = split_context(config.class_token_position, number)
    return " ".join([*some(slots[:first]), "[CLASS]", *some(slots[first:]), "."])


def _learned(model: Any, key: str, adapter: Any, heading: str) -> str:
    config = adapter.config
    state = adapter.learned_state() if hasattr(adapter, "learned_state") else {"context": adapter.context.detach()}
    rows = [["Base model", _link(config.base_model_name_or_path)], ["Method", _fact(adapter, "card_title")]]
    if _fact(adapter, "card_formula"):
        rows.append(["Formula", code(_fact(adapter, "card_formula"))])
    if config.revision:
        rows.append(["Revision of the base", code(config.revision)])
    if isinstance(config, CoOpConfig):
        start = "random vectors" if config.ctx_init is None else f"the words {code(config.ctx_init)}"
        kind = "class-specific: each class has its own" if config.class_specific else "unified: one for all classes"
        where = {"end": "at the end", "middle": "in the middle", "front": "in front"}[config.class_token_position]
        rows += [
            ["Prompt", f"{code(_prompt(config))}, the class name {where}"],
            ["Context", f"{_plural(config.n_ctx or 0, 'vector')}; {kind}"],
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
    if isinstance(config, CoOpConfig) and hasattr(model.adapters[key], "context"):
        sections.append(_nearest_words(model, key, config))
    return "\n\n".join(sections)


def _dataset(training: dict) -> str:
    dataset_id = training.get("dataset_id")
    if dataset_id and is_hub_id(str(dataset_id)):
        return _link(str(dataset_id), "datasets/")
    return code(training.get("dataset") or dataset_id)


def _nearest_words(model: Any, key: str, config: CoOpConfig) -> str:
    """A table of the tokens next to each context vector."""
    found = nearest_tokens(model, top_k=3, adapter_name=key, max_classes=MAX_CONTEXTS_SHOWN)
    contexts = list(found.items()) if config.class_specific else [("", found)]
    rows = []
    for name, context in contexts:
        for slot, nearest in enumerate(context):
            label = f"{code(name)} {slot + 1}" if name else f"{slot + 1}"
            rows.append([label, ", ".join(f"{code(entry['token'])} ({entry['distance']:.2f})" for entry in nearest)])
    more, number = "", len(config.class_names or [])
    if config.class_specific and number > MAX_CONTEXTS_SHOWN:
        more = f"\n\nThe first {MAX_CONTEXTS_SHOWN} of {number:,} classes are shown."
    return (
        "The words of the vocabulary nearest to each vector, with their distance. Learned vectors seldom spell "
        f"anything that people would write.\n\n{_table(['Vector', 'Nearest tokens'], rows)}{more}"
    )


def _results(adapter: Any, training: dict, heading: str) -> str:
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
    what = "This prompt" if (_fact(adapter, "card_kind") or CARD_KIND) == CARD_KIND else "This head"
    rows.append([what, *[f"**{100 * value:.1f}**" for value in learned.values()]])
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


def _use(name: str, key: str, adapter: Any, heading: str, is_sigmoid: bool = False) -> str:
    config = adapter.config
    arguments = [_quoted(name)]
    if key != "default":
        arguments.append(f"subfolder={_quoted(key)}")
    base = config.base_model_name_or_path
    comments = ""
    is_on_hub = is_hub_id(name) and "/" in name and not os.path.isdir(name)
    if not base or (is_on_hub and not is_hub_base(config)):
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
        "The scores are independent probabilities, one for each class of the list."
        if is_sigmoid
        else "The scores are probabilities over the classes of the list and add up to one: an image of something else "
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


def _citation(adapters: dict, objective: str | None = None) -> str:
    works = dict.fromkeys((_method(a), _fact(a, "citation")) for a in adapters.values())
    texts = [
        f"The method is {method}." + (f"\n\n```bibtex\n{work.strip()}\n```" if work else "") for method, work in works
    ]
    facts = _FACTS["objectives"].get(objective)
    if facts:
        texts.append(
            f"It was trained with the objective of [{facts['title']}]({facts['paper']}), {code(facts['formula'])}.\n\n"
            f"```bibtex\n{facts['citation']}\n```"
        )
    return "## Citation\n\n" + "\n\n".join(texts)
