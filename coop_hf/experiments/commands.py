"""What the commands under `examples/` have in common."""

import os
from dataclasses import dataclass, field

import datasets
import torch

from ..baselines import HAND_TEMPLATES, IMAGENET_7_TEMPLATES, read_prompts
from ..data.sources import load_images, read_coop_split
from ..demo.emoji import emoji_cupl_path, emoji_model_path, load_emoji
from ..modeling import CoOpModel
from .methods import EMOJI_TEMPLATES, METHODS, Method, Options, look_up
from .protocols import choose_template
from .tasks import Task, make_task


__all__ = ["ProtocolArguments", "load_splits", "prepare", "read_class_names"]


# ---------------------------------------------------------------------- commands


@dataclass
class ProtocolArguments:
    """What the commands under `examples/` have in common."""

    base_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a CLIP model. Default: the embedded emoji CLIP."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id or folder, see docs/datasets.md. Default: the embedded emoji."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    coop_split: str | None = field(default=None, metadata={"help": "A split_zhou_*.json of the CoOp benchmark."})
    image_root: str | None = field(default=None, metadata={"help": "Folder of the images of --coop_split."})
    class_names_file: str | None = field(
        default=None, metadata={"help": "Text file with a class name in each line, in the order of the labels."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    style: str = field(default="fluent-flat", metadata={"help": "Style of the embedded emoji to learn on."})
    template: str | None = field(
        default=None,
        metadata={"help": "Hand-written prompt. Default: CoOp's for the data set; emoji: the best on validation."},
    )
    cupl_file: str | None = field(
        default=None, metadata={"help": "JSON file of CuPL's sentences. The emoji have one."}
    )
    methods: list[str] | None = field(default=None, metadata={"help": f"Any of {', '.join(METHODS)}. Default: all."})
    shots: list[int] = field(default_factory=lambda: [16], metadata={"help": "Images of a class."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds."})
    recipe: str = field(default="fast", metadata={"help": "'fast' or 'paper', see CoOpTrainingArguments."})
    output_dir: str = field(default="results", metadata={"help": "Folder of the results."})
    overwrite: bool = field(default=False, metadata={"help": "Start afresh instead of going on."})

    @property
    def is_emoji(self) -> bool:
        """Whether the images are the embedded ones."""
        return self.dataset is None and self.coop_split is None


def load_splits(args: ProtocolArguments) -> dict:
    """The splits of the data set that the arguments name: "train", "validation", "test", as far as it has them."""
    if args.coop_split is not None:
        return read_coop_split(args.coop_split, args.image_root)
    if args.dataset is None:
        return load_emoji(args.style)
    splits = load_images(args.dataset, **({"name": args.dataset_config} if args.dataset_config else {}))
    if isinstance(splits, datasets.Dataset):
        return {"test": splits}
    splits = {("validation" if name in ("val", "valid") else name): split for name, split in splits.items()}
    if "test" not in splits and "validation" in splits:  # Food101, ImageNet: what is published is the test part
        splits["test"] = splits.pop("validation")
    return splits


def read_class_names(path) -> list[str]:
    """The class names in a text file, one in each line; empty lines don't count."""
    with open(path, encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def prepare(args: ProtocolArguments) -> tuple[CoOpModel, Task, Options, dict[str, Method]]:
    """Loads and embeds what a command needs.

    Returns:
        the model, on a GPU if there is one; the data set; options; the methods.
    """
    methods = {name: look_up(METHODS, name, "method") for name in args.methods or METHODS}
    model = CoOpModel.from_pretrained(args.base_model or emoji_model_path())
    if torch.cuda.is_available():
        model.to("cuda")
    names = None if args.class_names_file is None else read_class_names(args.class_names_file)
    name = args.style if args.is_emoji else _short_name(args)
    splits = load_splits(args)
    if "train" not in splits or "test" not in splits:
        raise ValueError(f"{name} has {', '.join(splits)}; a protocol needs train, and test or validation.")
    task = make_task(model, splits, name, args.image_column, args.label_column, names)
    if args.is_emoji:
        template, ensemble = args.template, EMOJI_TEMPLATES
        if template is None:
            template, scores = choose_template(model, task, EMOJI_TEMPLATES)
            shown = ", ".join(f'"{text}" {100 * score:.1f}' for text, score in scores.items())
            print(f"Hand-written template, chosen on validation (zero-shot accuracy in %): {shown}")
    else:
        template = args.template or HAND_TEMPLATES.get(name, "a photo of a {}.")
        ensemble = dict.fromkeys((*IMAGENET_7_TEMPLATES, template))  # as in CoOp's comparison
    cupl_file = emoji_cupl_path() if args.cupl_file is None and args.is_emoji else args.cupl_file
    cupl = None if cupl_file is None else read_prompts(cupl_file, task.class_names)
    print(f'Template: "{template}". Images: {", ".join(f"{k} {len(v[1])}" for k, v in task.parts.items())}.')
    return model, task, Options(template, tuple(ensemble), cupl, args.recipe), methods


def _short_name(args: ProtocolArguments) -> str:
    if args.coop_split is not None:
        return os.path.splitext(os.path.basename(args.coop_split))[0].removeprefix("split_zhou_")
    return os.path.basename(os.path.normpath(args.dataset))
