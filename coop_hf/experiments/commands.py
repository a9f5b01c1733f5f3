"""What the commands under `examples/` have in common: their arguments, and the one reading of a user's data."""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch

from ..baselines import HAND_TEMPLATES, IMAGENET_7_TEMPLATES, read_prompts
from ..data.few_shot import (
    DRAWS,
    _check_column,
    coop_few_shot_rows,
    read_class_names,
    resolve_labels,
    sample_few_shot,
)
from ..data.sources import SPLIT_NAMES, load_images, read_coop_split, read_few_shot_indices
from ..demo.emoji import emoji_cupl_path, emoji_model_path, load_emoji
from ..modeling import CoOpModel
from .methods import EMOJI_TEMPLATES, METHODS, USUAL_METHODS, Method, Options, look_up
from .protocols import choose_template
from .tasks import Task, a_fifth, make_task, with_draws


__all__ = [
    "DataArguments",
    "ProtocolArguments",
    "draw_train_and_test",
    "load_base_model",
    "load_splits",
    "make_options",
    "prepare",
    "prepare_task",
    "protocol_splits",
    "read_class_names",
    "run_command",
]

_PACKAGE = str(Path(__file__).resolve().parents[1])


def run_command(main: Callable[[], None], name: str | None = None) -> None:
    """Runs a command; a user's mistake ends it with one line on stderr and no traceback.

    A mistake is an `OSError`, such as a file that is missing, or an error that coop_hf itself raises. Whatever else
    goes wrong keeps its traceback.

    Args:
        main (`Callable`): the command.
        name (`str`, *optional*, defaults to the script's): what the line starts with.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, TypeError, ImportError, FloatingPointError) as error:
        raised_in = os.path.realpath(traceback.extract_tb(error.__traceback__)[-1].filename)
        own = (_PACKAGE, os.path.realpath(sys.argv[0]))
        if not isinstance(error, OSError) and not raised_in.startswith(own):
            raise
        sys.exit(f"{name or os.path.basename(sys.argv[0])}: {error}")


# ---------------------------------------------------------------------- data


@dataclass
class DataArguments:
    """Which images, and which of them are learned from."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder of class folders (or of train/ and test/), saved data set, or parquet files, see "
            "docs/datasets.md. Default: the embedded emoji images."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    leaf_folders: bool = field(
        default=False, metadata={"help": "Class folders lie at any depth: each folder that holds images is a class."}
    )
    style: str = field(default="fluent-flat", metadata={"help": "Style of the embedded emoji to learn on."})
    train_split: str = field(default="train", metadata={"help": "Split that the shots are drawn from."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to test on. Default: test or validation; without any, images that are held out."},
    )
    class_names: str | None = field(
        default=None, metadata={"help": "Names of the classes in the order of the labels, separated by commas."}
    )
    class_names_file: str | None = field(
        default=None, metadata={"help": "Text file with a class name in each line, in the order of the labels."}
    )
    coop_split: str | None = field(default=None, metadata={"help": "A split_zhou_*.json of the CoOp benchmark."})
    image_root: str | None = field(default=None, metadata={"help": "Folder of the images of --coop_split."})
    few_shot_indices: str | None = field(
        default=None,
        metadata={"help": "A few-shot file of the CoOp benchmark, or a folder of them, shot_{K}-seed_{S}.json."},
    )
    draw: str = field(
        default="nested", metadata={"help": "'nested', or 'coop': the draw of CoOp's code without such files."}
    )
    data_title: str | None = field(default=None, metadata={"help": "Name of the data set in tables, Caltech101 ..."})

    @property
    def is_emoji(self) -> bool:
        """Whether the images are the embedded ones."""
        return self.dataset is None and self.coop_split is None

    @property
    def data_name(self) -> str:
        """A short name of the data set."""
        if self.data_title is not None:
            return self.data_title
        if self.coop_split is not None:
            return os.path.splitext(os.path.basename(self.coop_split))[0].removeprefix("split_zhou_")
        return self.style if self.dataset is None else os.path.basename(os.path.normpath(self.dataset))

    def read_class_names(self) -> list[str] | None:
        """The class names given on the command line, or in a file."""
        if self.class_names is not None and self.class_names_file is not None:
            raise ValueError("--class_names and --class_names_file say the same thing: give one of them.")
        if self.class_names is not None:
            return [name.strip() for name in self.class_names.split(",")]
        return None if self.class_names_file is None else read_class_names(self.class_names_file)


def load_splits(args: DataArguments) -> dict[str, datasets.Dataset]:
    """The splits of the data set that the arguments name: `"train"`, `"validation"`, `"test"`, as far as it has them.

    What is published of some data sets (Food101, ImageNet) is a validation part alone, which is then the test part. A
    data set without splits is `"train"`.

    Raises:
        ValueError: arguments that exclude each other, or a split that is not there; names those that are.
    """
    if args.draw not in DRAWS:
        raise ValueError(f"--draw must be {' or '.join(DRAWS)}, got {args.draw!r}.")
    if args.coop_split is not None:
        if args.dataset is not None or args.image_root is None:
            raise ValueError("--coop_split goes with --image_root, the folder of its images, and without --dataset.")
        found = read_coop_split(args.coop_split, args.image_root)
    elif args.dataset is None:
        found = load_emoji(args.style)
    else:
        found = load_images(
            args.dataset,
            leaf_folders=args.leaf_folders,
            **({"name": args.dataset_config} if args.dataset_config else {}),
        )
    parts: Any = {args.train_split: found} if isinstance(found, datasets.Dataset) else found
    splits: dict[Any, Any] = {}
    for name, split in parts.items():
        splits.setdefault(SPLIT_NAMES.get(name, name), split)
    asked = {"train": args.train_split} | ({} if args.eval_split is None else {"test": args.eval_split})
    if asked != {"train": "train"}:
        known = splits | parts
        for name in asked.values():
            if name not in known:
                raise ValueError(f"there is no split {name!r} in the data set; it has {', '.join(map(repr, parts))}.")
        used = {SPLIT_NAMES.get(name, name) for name in asked.values()}
        splits = {name: split for name, split in splits.items() if name not in used}
        splits |= {role: known[name] for role, name in asked.items()}
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _index_rows(path: str, splits: dict, num_shots: int, seed: int) -> tuple[list[int], list[int] | None]:
    """Rows of the training and of the validation part that a few-shot file names."""
    if os.path.isdir(path):
        path = os.path.join(path, f"shot_{num_shots}-seed_{seed}.json")
    numbered = {key: part.add_column("_row", list(range(len(part)))) for key, part in splits.items()}
    drawn = {key: part["_row"][:] for key, part in read_few_shot_indices(path, numbered).items()}
    return drawn["train"], drawn.get("validation")


def draw_train_and_test(
    args: DataArguments, num_shots: int, label_column: str = "label", seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The images to learn from and those to test on.

    Args:
        args ([`DataArguments`]): which data set.
        num_shots (`int`): images of each class that are learned from; 0: all.
        label_column (`str`, *optional*, defaults to `"label"`): column of the labels.
        seed (`int`, *optional*, defaults to 0): of the draw.

    Returns:
        `tuple(datasets.Dataset, datasets.Dataset)`: without a part to test on, what is not drawn is tested on.
    """
    splits, names = load_splits(args), args.read_class_names()
    if "train" not in splits:
        raise ValueError(f"there is no split 'train' in the data set; it has {', '.join(splits)}: pass --train_split.")
    pool = splits["train"]
    if args.few_shot_indices is not None:
        rows = _index_rows(args.few_shot_indices, splits, num_shots, seed)[0]
    elif num_shots == 0:
        rows = list(range(len(pool)))
    else:
        _check_column(pool, label_column, "label_column")
        numbered = pool.select_columns([label_column]).add_column("_row", list(range(len(pool))))
        rows = sample_few_shot(numbered, num_shots, label_column, seed, names, draw=args.draw)["_row"][:]
    if "test" in splits:
        return pool.select(rows), splits["test"]
    rest = sorted(set(range(len(pool))) - set(rows))
    if not rest:
        raise ValueError("With all images for training none is left to test on: pass --eval_split or --num_shots.")
    return pool.select(rows), pool.select(rest)


# ---------------------------------------------------------------------- protocols


@dataclass
class ProtocolArguments(DataArguments):
    """What the commands that compare methods have in common."""

    base_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a CLIP model. Default: the embedded emoji CLIP."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    template: str | None = field(
        default=None,
        metadata={"help": "Hand-written prompt. Default: CoOp's for the data set; emoji: the best on validation."},
    )
    cupl_file: str | None = field(
        default=None, metadata={"help": "JSON file of CuPL's sentences. The emoji have one."}
    )
    methods: list[str] | None = field(
        default_factory=lambda: list(USUAL_METHODS),
        metadata={"help": f"Any of {', '.join(METHODS)}, or all. Default: {', '.join(USUAL_METHODS)}."},
    )
    shots: list[int] = field(default_factory=lambda: [16], metadata={"help": "Images of a class."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds."})
    recipe: str = field(default="fast", metadata={"help": "'fast' or 'paper', see CoOpTrainingArguments."})
    output_dir: str = field(default="results", metadata={"help": "Folder of the results."})
    overwrite: bool = field(default=False, metadata={"help": "Start afresh instead of going on."})


def load_base_model(name: str | None) -> CoOpModel:
    """The model that methods start from, the embedded one without a name; on a GPU if there is one."""
    model = CoOpModel.from_pretrained(name or emoji_model_path())
    return model.to("cuda") if torch.cuda.is_available() else model


def protocol_splits(args: ProtocolArguments, report: Callable[[str], None] = print) -> dict[str, datasets.Dataset]:
    """The splits of a data set for a protocol, which needs `"train"` and `"test"`.

    Without a part to test on a fifth of each class is held out for it (seed 0), the same in every run.
    """
    splits, names = load_splits(args), args.read_class_names()
    if "train" not in splits:
        raise ValueError(f"{args.data_name} has {', '.join(splits)}; a protocol needs train: pass --train_split.")
    if "test" not in splits:
        held_out = a_fifth(resolve_labels(splits["train"], args.label_column, names)[1])
        parts = {part: [i for i, out in enumerate(held_out) if out == (part == "test")] for part in ("train", "test")}
        splits = {part: splits["train"].select(rows) for part, rows in parts.items()}
        report(f"{args.data_name} has no part to test on: {len(parts['test'])} images, a fifth, are held out for it.")
    return splits


def prepare_task(args: ProtocolArguments, model: CoOpModel, splits: dict[str, datasets.Dataset]) -> Task:
    """Embeds a data set, with the draws that the arguments name."""
    columns, original = (args.image_column, args.label_column), args.recipe == "paper"
    task = make_task(model, splits, args.data_name, *columns, args.read_class_names(), original=original)
    pairs = [(shots, seed) for shots in args.shots for seed in args.seeds]
    if args.few_shot_indices is not None:
        if "validation" not in splits:
            raise ValueError("--few_shot_indices needs a data set with a training and a validation part.")
        if len(pairs) > 1 and not os.path.isdir(args.few_shot_indices):
            raise ValueError("one few-shot file is one draw: pass the folder of them, or one of --shots and --seeds.")
        task = with_draws(task, {pair: _index_rows(args.few_shot_indices, splits, *pair) for pair in pairs})
    elif args.draw == "coop":
        labels = [task.parts[part][1].tolist() for part in ("train", "validation")]
        rows = {pair: coop_few_shot_rows(*pair, *labels) for pair in pairs}
        task = with_draws(task, {pair: (own[0], own[1]) for pair, own in rows.items()})
    return task


def make_options(args: ProtocolArguments, task: Task) -> Options:
    """Templates and sentences of a data set, the same for all methods.

    Args:
        args ([`ProtocolArguments`]): template (without one, CoOp's for a data set of this name), recipe.
        task (`Task`): the data set, whose classes need sentences.
    """
    template = args.template or HAND_TEMPLATES.get(task.name, "a photo of a {}.")
    ensemble = EMOJI_TEMPLATES
    if not args.is_emoji:
        ensemble = tuple(dict.fromkeys((*IMAGENET_7_TEMPLATES, template)))  # as in CoOp's comparison
    cupl_file = emoji_cupl_path() if args.cupl_file is None and args.is_emoji else args.cupl_file
    cupl = None if cupl_file is None else read_prompts(cupl_file, task.class_names)
    options = Options(template, ensemble, cupl, args.recipe)
    # Contexts for the emoji start from the template that validation chose.
    return replace(options, words=template.split("{}")[0].strip()) if args.is_emoji else options


def prepare(args: ProtocolArguments) -> tuple[CoOpModel, Task, Options, dict[str, Method]]:
    """Loads and embeds what a command needs.

    Returns:
        the model, on a GPU if there is one; the data set; options; the methods.
    """
    chosen = list(METHODS) if args.methods in (None, ["all"]) else args.methods
    methods = {name: look_up(METHODS, name, "method") for name in chosen}
    splits = protocol_splits(args)
    model = load_base_model(args.base_model)
    task = prepare_task(args, model, splits)
    if args.is_emoji and args.template is None:
        template, scores = choose_template(model, task, EMOJI_TEMPLATES)
        shown = ", ".join(f'"{text}" {100 * score:.1f}' for text, score in scores.items())
        print(f"Hand-written template, chosen on validation (zero-shot accuracy in %): {shown}")
        args = replace(args, template=template)
    options = make_options(args, task)
    print(f'Template: "{options.template}". Images: {", ".join(f"{k} {len(v[1])}" for k, v in task.parts.items())}.')
    return model, task, options, methods
