"""`coop-hf train`: learn a prompt from a few labelled images, and compare it with a hand-written one.

    coop-hf train
    coop-hf train my_images --base_model openai/clip-vit-base-patch32 --num_shots 4
    coop-hf train my_images --method maple --recipe paper
    coop-hf train --method maple --objective kgcoop --n_ctx 4 --depth 2

Without arguments: CoOp on the small emoji CLIP and the emoji images that come with the repository, 16 shots. Each
method starts as in its official code, and every field of its configuration can be set; see docs/methods/README.md.
`accelerate launch examples/train.py` is the same command, on several devices.
"""

import json
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import HfArgumentParser, set_seed

from ..adapters import ADAPTERS
from ..adapters.heads import Head
from ..config import CONFIGS
from ..data.feature_cache import embed_images
from ..data.labelled_images import LabelledImages
from ..demo.emoji import emoji_model_path
from ..experiments.commands import DataArguments, draw_train_and_test
from ..experiments.configs import add_field_arguments, check_fields, make_config, settable_fields
from ..modeling import CoOpModel
from ..training.arguments import CoOpTrainingArguments
from ..training.screen import TrainingScreen
from ..training.trainer import CoOpTrainer
from .parsers import HelpFormatter, add_screen_arguments, hide_weights_bar, note, print_json, print_table


__all__ = ["TrainParser", "main", "run_train", "train_parser"]

# CoOp's context for the embedded default, chosen on its validation part.
EMOJI_CONTEXT = {"class_specific": True, "n_ctx": 4}

# What `--help` shows, each group on a screen; `--help-all` shows all.
GROUPS = {
    "what learns": ["method", "base_model", "base_model_revision", "dtype", "template", "objective"],
    "images": "dataset num_shots train_split eval_split class_names class_names_file image_column label_column "
    "leaf_folders style on_bad_image seed".split(),
    "training": "recipe num_train_epochs max_steps learning_rate per_device_train_batch_size weight_decay optim bf16 "
    "use_cpu eval_strategy save_strategy resume_from_checkpoint report_to".split(),
    "results": "output_dir push_to_hub hub_model_id hub_private_repo quiet json help help-all".split(),
}

# In a line, for the arguments that come from elsewhere with more words, or none.
_HELP = {
    "objective": "cross_entropy, kgcoop, prograd, promptsrc, sigmoid",
    "dataset": "the same as IMAGES",
    "num_shots": "images of each class to learn from; 0: all",
    "train_split": "split that the shots are drawn from",
    "image_column": "column of the images",
    "label_column": "column of the labels",
    "eval_split": "split to test on (default: test, validation, or the rest)",
    "class_names": "names of the classes in the order of the labels: a,b,c",
    "class_names_file": "the same from a file, a name in each line",
    "leaf_folders": "each folder that holds images is a class, at any depth",
    "style": "whose drawings, of the embedded emoji",
    "on_bad_image": "'raise' or 'skip'",
    "seed": "of the draw, the start and the order",
    "recipe": "'fast' (20 to 360 steps on all images) or 'paper' (as published)",
    "num_train_epochs": "passes over the images (default: the recipe's)",
    "max_steps": "steps, instead of epochs (default: the recipe's)",
    "learning_rate": "default: the recipe's",
    "per_device_train_batch_size": "default: the recipe's batch",
    "weight_decay": "default: the recipe's",
    "optim": "default: the recipe's",
    "bf16": "bfloat16 mixed precision",
    "use_cpu": "leave a GPU alone",
    "eval_strategy": "when to test on the way",
    "save_strategy": "when to write a checkpoint",
    "resume_from_checkpoint": "go on from a checkpoint, or True: from the newest",
    "report_to": "tensorboard, wandb, ...",
    "output_dir": "folder for what is learned (default: coop_output)",
    "push_to_hub": "put it on the Hub at the end",
    "hub_model_id": "under this name, you/name",
    "hub_private_repo": "in a private repository",
}

_FIELD_HELP = {
    "n_ctx": "number of context vectors",
    "class_token_position": "where the class name stands: end, middle or front",
    "class_specific": "vectors of its own for each class",
    "ctx_init": "words to start from, or none",
    "merge_full_stop": "tokens of names as in the public code, in front of the full stop",
}

_USAGE = "%(prog)s [IMAGES] [--method METHOD] [--base_model MODEL] ..."


@dataclass
class ModelArguments:
    """Which base model, and which method."""

    method: str = field(default="coop", metadata={"help": "what is learned, see below (default: coop)"})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a CLIP-like model (default: the emoji CLIP)"}
    )
    base_model_revision: str | None = field(default=None, metadata={"help": "revision of it on the Hub"})
    dtype: str = field(default="float32", metadata={"help": "of the frozen base: float32, bfloat16, float16"})
    template: str | None = field(
        default=None, metadata={"help": 'hand-written prompt to compare with (default: "a photo of a {}.")'}
    )


class TrainParser(HfArgumentParser):
    """Reads the arguments of the training into `model`, `data`, `training` and `fields`."""

    def __init__(self, prog: str | None = None):
        kinds = (ModelArguments, DataArguments, CoOpTrainingArguments)
        super().__init__(
            kinds,
            prog=prog,
            usage=_USAGE,
            description="Learn a prompt from a few labelled images, and compare it with a hand-written one.",
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.field_names = add_field_arguments(self)
        for name, text in _HELP.items():
            self._option_string_actions[f"--{name}"].help = text
        add_screen_arguments(self)
        self.add_argument("--help", "-h", action="store_true", help="what is used most; with --method, its settings")
        self.add_argument("--help-all", action="store_true", help="every argument")
        self.set_defaults(num_shots=16, output_dir="coop_output", seed=1, save_strategy="no")
        if not sys.stderr.isatty():
            self.set_defaults(disable_tqdm=True)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Namespace:
        """The arguments, as `Namespace(model=, data=, training=, fields=, quiet=, json=)`; a mistake ends the process
        with a line."""
        args = sys.argv[1:] if args is None else args
        if {"--help", "-h", "--help-all"} & set(args):
            chosen = self.parse_known_args([arg for arg in args if arg not in ("--help", "-h", "--help-all")])[0]
            print(self.format_help(chosen.method, "--help-all" in args), end="")
            self.exit()
        chosen = self.parse_known_args(args)[0]
        kind: Any = ADAPTERS.get(chosen.method)
        is_head = kind is not None and issubclass(kind, Head)
        if is_head:  # the recipe of the head, instead of one for prompts
            self.set_defaults(**{"num_views": 0, **kind.arguments(chosen.num_shots)})
        with mistakes():
            model, data, training, *more, rest = self.parse_args_into_dataclasses(
                args, return_remaining_strings=True, look_for_args_file=False
            )
        if rest and not rest[0].startswith("-") and data.dataset is None:
            data.dataset = rest.pop(0)
        if rest:
            self.error(f"not understood: {' '.join(rest)}")
        given = vars(more[0])
        own = {name: given.pop(name) for name in self.field_names if name in given}
        check_fields(model.method, own)
        if is_head and training.objective not in (None, "cross_entropy"):
            raise ValueError(
                f"{model.method!r} is a head on image features and has its own objective: leave --objective out."
            )
        return Namespace(
            model=model, data=data, training=training, fields=own, quiet=given["quiet"], json=given["json"]
        )

    def format_help(self, method: str = "coop", everything: bool = False) -> str:
        """What is used most, with the fields of a method, or every argument."""
        own = list(settable_fields(method)) if method in ADAPTERS else []
        groups = dict(GROUPS)
        if own:
            groups = {"what learns": GROUPS["what learns"], f"settings of the method {method!r}": own, **groups}
        if everything:
            shown = {name for group in groups.values() for name in group}
            rest = [name for name in self.field_names if name not in shown]
            groups |= {"settings of other methods": rest}
            for title, kind in (("more about images", DataArguments), ("more about training", CoOpTrainingArguments)):
                groups[title] = [part.name for part in fields(kind) if part.init and part.name not in shown]
        for name in self.field_names:
            action = self._option_string_actions[f"--{name}"]
            action.help = _FIELD_HELP.get(name) or _meaning(name, method if name in own else None)
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.add_text(
            "IMAGES: a folder with a folder of images for each class (or train/ and test/ of such), a data set on the "
            f"Hub, or parquet files; without it the embedded emoji. Methods: {', '.join(ADAPTERS)}."
        )
        for title, names in groups.items():
            formatter.start_section(title)
            formatter.add_arguments([self._option_string_actions[f"--{name}"] for name in names])
            formatter.end_section()
        return formatter.format_help()


def _meaning(name: str, method: str | None) -> str:
    """The first sentence on a field in the docstring of the method's configuration, or of the first that has it."""
    for kind in [CONFIGS[method], *CONFIGS.values()] if method else CONFIGS.values():
        found = re.search(rf"^ +{name}(?:, \w+)* \(`[^)]*\):\s*(.+?[.:])(?:\s|\Z)", kind.__doc__ or "", re.M | re.S)
        if found:
            return " ".join(found[1].split()).rstrip(".:")
    return ""


@contextmanager
def mistakes() -> Iterator[None]:
    """Within it, what transformers raises for arguments counts as a mistake of the user's, not as a fault."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def train_parser(prog: str | None = None) -> TrainParser:
    """The parser of `coop-hf train`."""
    return TrainParser(prog)


def make_model(args: ModelArguments, data: DataArguments, objective: str | None, own: dict, names: Any) -> CoOpModel:
    """The base model with a fresh adapter of the method."""
    plain = args.method == "coop" and objective in (None, "cross_entropy")
    if data.is_emoji and plain and not own.keys() & {"n_ctx", "class_specific", "ctx_init"}:
        own = own | EMOJI_CONTEXT
    name, revision = args.base_model or emoji_model_path(), args.base_model_revision
    base = CoOpModel.from_pretrained(name, revision=revision, dtype=args.dtype)
    num_layers = min(len(base.family.text_layers), len(base.family.vision_layers))
    shared = {"base_model_name_or_path": name, "revision": revision, "class_names": names}
    shared |= {"template": args.template} if args.template is not None else {}
    config = make_config(args.method, objective, own, base.tokenizer, num_layers, **shared)
    return CoOpModel(base.get_base_model(), config, processor=base.processor)


def fit_head(model: CoOpModel, train: Any, args: CoOpTrainingArguments) -> None:
    """What a head takes from the shots before it learns."""
    images = LabelledImages(train, model.image_processor, args.image_column, args.label_column, model.class_names)
    image_embeds = embed_images(model, images, cache_dir=args.feature_cache_dir, progress=False)[0]
    head: Any = model.adapter
    head.fit(image_embeds, images.labels, model.template_embeds())


def run_train(options: Namespace) -> None:
    """Trains, saves, and prints the table."""
    data, args, start = options.data, options.training, time.perf_counter()
    train, test = draw_train_and_test(data, args.num_shots, args.label_column, args.seed)
    set_seed(args.seed)
    names = data.read_class_names()
    if names is None and hasattr(train.features.get(args.label_column), "names"):
        names = train.features[args.label_column].names
    hide_weights_bar()
    model = make_model(options.model, data, args.objective, options.fields, names)
    learns = True
    if isinstance(model.adapter, Head):
        fit_head(model, train, args)
        learns = bool(model.adapter.arguments(args.num_shots))
    with mistakes():
        trainer = CoOpTrainer(model=model, args=args, train_dataset=train if learns else None, eval_dataset=test)
    is_first = trainer.is_world_process_zero()
    if options.quiet:
        trainer.remove_callback(TrainingScreen)
        args.disable_tqdm = True
    note(loaded(model, len(train), len(test)), options.quiet or not is_first)
    source = data.dataset or data.coop_split
    trainer.about = {"dataset": source or f"the embedded emoji images, style {data.style}"}
    if data.dataset is not None and not os.path.exists(data.dataset):
        trainer.about["dataset_id"] = data.dataset

    with model.disable_adapter():
        zero_shot = trainer.evaluate(metric_key_prefix="zero_shot")
    measured = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics if learns else {}
    learned = trainer.evaluate()
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
    if not is_first:
        return
    results = {
        **zero_shot,
        **measured,
        **learned,
        "num_shots": args.num_shots,
        "num_train": len(train),
        "num_eval": len(test),
        "seed": args.seed,
        "training": trainer.summary(),  # what `coop-hf push` tells the model card
        "total_runtime": time.perf_counter() - start,
    }
    with open(os.path.join(args.output_dir, "all_results.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2, sort_keys=True)
    if options.json:
        print_json({**results, "output_dir": args.output_dir})
    else:
        show(model, args, results)


def loaded(model: CoOpModel, num_train: int, num_test: int) -> str:
    """What stands ready to be trained, in a line."""
    base = os.path.basename(os.path.normpath(model.config.base_model_name_or_path))
    size = sum(parameter.numel() for parameter in model.base_model.parameters()) / 1e6
    return (
        f"Loaded {base} ({size:.1f} M parameters): {len(model.class_names or [])} classes, {num_train} images to "
        f"learn from, {num_test} to test on"
    )


def describe(model: CoOpModel) -> str:
    """What was learned, in a few words."""
    config = model.config
    if config.method == "coop":
        return f"{config.n_ctx} vectors" + (" for each class" if config.class_specific else "")
    return f"{config.method}, {sum(tensor.numel() for tensor in model.adapter.learned_state().values()):,} values"


def show(model: CoOpModel, args: CoOpTrainingArguments, results: dict) -> None:
    """The table at the end."""
    before, after = results["zero_shot_accuracy"], results["eval_accuracy"]
    what = "head" if isinstance(model.adapter, Head) else "prompt"
    print(f"\nAccuracy on {results['num_eval']} test images, {len(model.class_names or [])} classes, seed {args.seed}")
    print_table(
        [
            (f'hand-written prompt "{model.config.template}"', f"{before:.1%}"),
            (f"learned {what} ({describe(model)}, {results['num_train']} images)", f"{after:.1%}"),
            ("gain", f"{100 * (after - before):+.1f} points"),
            ("time to train", f"{results.get('train_runtime', 0.0):.1f} s"),
            ("time in all", f"{results['total_runtime']:.1f} s"),
        ]
    )
    print(f"The learned {what} is in {args.output_dir}: CoOpModel.from_pretrained({args.output_dir!r})")


def main() -> None:
    """What `examples/train.py` runs."""
    run_train(train_parser().parse_intermixed_args())
