"""`coop-hf predict`, `evaluate` and `show`: what a learned prompt is used for, and what it is."""

import csv
import glob
import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from .parsers import Parser, add_screen_arguments, hide_weights_bar, note, print_json, print_table


__all__ = [
    "add_adapter_arguments",
    "add_class_arguments",
    "class_names_of",
    "evaluate_parser",
    "find_images",
    "load_adapter",
    "predict_parser",
    "run_evaluate",
    "run_predict",
    "run_show",
    "show_parser",
    "source_of",
]

FORMATS = ("table", "json", "csv")


# ---------------------------------------------------------------------- the adapter


def add_adapter_arguments(parser: Any) -> None:
    """Adds the adapter, and what is chosen when it is loaded."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id of a learned prompt")
    parser.add_argument("--base_model", help="base model instead of the one that the adapter names")
    parser.add_argument("--revision", help="revision of the adapter on the Hub")
    parser.add_argument("--subfolder", help="folder of the adapter in its repository")
    parser.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the base model")


def source_of(options: Namespace) -> dict[str, Any]:
    """What was given of an adapter's revision and subfolder."""
    return {key: getattr(options, key) for key in ("revision", "subfolder") if getattr(options, key)}


def add_class_arguments(parser: Any) -> None:
    """Adds class names instead of the adapter's own; [`class_names_of`] reads them."""
    parser.add_argument("--class_names", help="other classes than it was learned on: a,b,c")
    parser.add_argument("--class_names_file", help="the same from a file, a name in each line")


def class_names_of(options: Namespace) -> list[str] | None:
    """The class names that were given, or `None`."""
    from ..experiments.commands import DataArguments

    return DataArguments(class_names=options.class_names, class_names_file=options.class_names_file).read_class_names()


def load_adapter(options: Namespace, class_names: list[str] | None = None) -> Any:
    """The model that the arguments name, on its device.

    Raises:
        ValueError, OSError: it is no adapter, or it or its base cannot be loaded.
    """
    import torch

    from ..config import ADAPTER_CONFIG_NAME
    from ..hub import has_file
    from ..modeling import CoOpModel

    source = source_of(options)
    if not has_file(options.adapter, ADAPTER_CONFIG_NAME, **source):
        raise ValueError(
            f"{options.adapter!r} holds no {ADAPTER_CONFIG_NAME}, so it is no adapter: `coop-hf train` learns one, "
            "and --subfolder names one that lies in a folder of it."
        )
    hide_weights_bar()
    more = {"dtype": options.dtype} if options.dtype else {}
    model = CoOpModel.from_pretrained(
        options.adapter, class_names=class_names, base_model=options.base_model, **source, **more
    )
    device = options.device
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device!r} is not there: {str(error).splitlines()[0]}") from error
    note(f"Loaded {options.adapter}: {_what(model)}", options.quiet)
    return model.eval()


def _what(model: Any) -> str:
    config = model.config
    classes = f"{len(model.class_names)} classes" if model.class_names else "no class names"
    base = os.path.basename(os.path.normpath(config.base_model_name_or_path or "a base without a name"))
    return f"{config.method}, {classes}, on {base}"


# ---------------------------------------------------------------------- predict


def predict_parser(prog: str) -> Parser:
    """The parser of `coop-hf predict`."""
    parser = Parser(
        prog=prog, usage="%(prog)s ADAPTER IMAGE ... [options]", description="Classify images with a learned prompt."
    )
    add_adapter_arguments(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders (and all below), or patterns")
    parser.add_argument("--top_k", type=int, default=1, help="classes for each image, best first")
    add_class_arguments(parser)
    parser.add_argument("--format", choices=FORMATS, default="table", help="how to print")
    parser.add_argument("--output", help="write into this file instead")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time")
    parser.add_argument("--on_bad_image", choices=("raise", "skip"), default="raise", help="stop at one, or go on")
    add_screen_arguments(parser)
    return parser


def find_images(names: list[str]) -> list[str]:
    """The images that files, folders and patterns stand for, in order; of folders and patterns sorted by name.

    Raises:
        FileNotFoundError: nothing of that name, or a pattern of no image.
        ValueError: a folder without an image.
    """
    from ..data.inputs import image_files
    from ..data.sources import IMAGE_EXTENSIONS

    found: list[str] = []
    for name in names:
        if os.path.isdir(name):
            found += image_files(name)
        elif os.path.exists(name):
            found.append(name)
        elif glob.has_magic(name):
            own = [path for path in sorted(glob.glob(name, recursive=True)) if path.lower().endswith(IMAGE_EXTENSIONS)]
            if not own:
                raise FileNotFoundError(f"{name!r} holds no image ({', '.join(IMAGE_EXTENSIONS)}).")
            found += own
        else:
            raise FileNotFoundError(f"there is no file or folder {name!r}.")
    return list(dict.fromkeys(found))


def _answers(model: Any, paths: list[str], options: Namespace) -> Iterator[list[tuple[str, list[dict]]]]:
    """Paths and their classes, some at a time."""
    from tqdm.auto import tqdm

    from ..data.transforms import decode_image

    hidden = options.quiet or not sys.stderr.isatty() or (options.output is None and sys.stdout.isatty())
    with tqdm(total=len(paths), desc="Images", unit="image", leave=False, disable=hidden) as bar:
        for start in range(0, len(paths), options.batch_size):
            part = paths[start : start + options.batch_size]
            images: dict[str, Any] = {}
            for path in part:
                try:
                    images[path] = decode_image(path)
                except Exception as error:  # whatever PIL raises for files that it cannot read
                    if options.on_bad_image == "raise":
                        raise ValueError(f"{path!r} cannot be read: {error}. --on_bad_image skip goes on.") from error
                    note(f"skipped: {path!r} cannot be read: {error}")
            if images:
                best = model.predict(list(images.values()), top_k=options.top_k, batch_size=options.batch_size)
                yield list(zip(images, best))
            bar.update(len(part))


def run_predict(options: Namespace) -> None:
    """Prints or writes the classes of images."""
    from ..atomic import write_atomically

    form = "json" if options.json else options.format
    for name in ("top_k", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    paths = find_images(options.images)
    model = load_adapter(options, class_names_of(options))
    if options.output is not None:
        os.makedirs(os.path.dirname(os.path.abspath(options.output)), exist_ok=True)
    with nullcontext() if options.output is None else write_atomically(options.output) as temporary:
        with nullcontext(sys.stdout) if temporary is None else open(temporary, "w", encoding="utf-8") as file:
            count = _write(_answers(model, paths, options), file, form, max(map(len, paths)))
    if options.output is not None:
        note(f"{options.output}: {count} images", options.quiet)


def _write(answers: Iterator[list[tuple[str, list[dict]]]], file: Any, form: str, width: int) -> int:
    """Writes answers as they come; JSON, which is one value, at the end. Gives their number."""
    if form == "json":
        found = [{"image": path, "predictions": best} for part in answers for path, best in part]
        file.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return len(found)
    count = 0
    if form == "csv":
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("image", "rank", "label", "score"))
    for part in answers:
        for path, best in part:
            if form == "csv":
                rows.writerows((path, rank, one["label"], f"{one['score']:.6f}") for rank, one in enumerate(best, 1))
            else:
                shown = "   ".join(f"{one['label']} {one['score']:.1%}" for one in best)
                file.write(f"{path:<{width}}  {shown}\n")
        file.flush()
        count += len(part)
    return count


# ---------------------------------------------------------------------- evaluate


def evaluate_parser(prog: str) -> Parser:
    """The parser of `coop-hf evaluate`."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s ADAPTER [IMAGES] [options]",
        description="Accuracy of a learned prompt on labelled images.",
    )
    add_adapter_arguments(parser)
    parser.add_argument(
        "dataset", metavar="IMAGES", nargs="?", help="as for `coop-hf train`; without it the embedded emoji"
    )
    parser.add_argument("--split", help="split to test on (default: test, else all there is)")
    parser.add_argument("--class_names", help="names of the data set's classes, in the order of its labels: a,b,c")
    parser.add_argument("--class_names_file", help="the same from a file, a name in each line")
    parser.add_argument("--image_column", default="image", help="column of the images")
    parser.add_argument("--label_column", default="label", help="column of the labels")
    parser.add_argument("--leaf_folders", action="store_true", help="each folder that holds images is a class")
    parser.add_argument("--style", default="fluent-flat", help="whose drawings, of the embedded emoji")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time")
    parser.add_argument("--per_class", action="store_true", help="the accuracy of each class, too")
    parser.add_argument("--on_bad_image", choices=("raise", "skip"), default="raise", help="stop at one, or go on")
    add_screen_arguments(parser)
    return parser


def run_evaluate(options: Namespace) -> None:
    """Prints accuracy and macro-F1, of the learned prompt and of the hand-written one."""
    from ..experiments.commands import DataArguments, load_splits
    from ..training.arguments import CoOpTrainingArguments
    from ..training.metrics import make_compute_metrics
    from ..training.screen import TrainingScreen
    from ..training.trainer import CoOpTrainer

    data = DataArguments(
        dataset=options.dataset,
        style=options.style,
        leaf_folders=options.leaf_folders,
        eval_split=options.split,
        class_names=options.class_names,
        class_names_file=options.class_names_file,
    )
    splits = load_splits(data)
    split = "test" if "test" in splits else next(iter(splits))
    names = data.read_class_names()
    model = load_adapter(options, None)
    if names is not None:
        model.set_class_names(names)
    with tempfile.TemporaryDirectory(prefix="coop_hf_") as folder:
        args = CoOpTrainingArguments(
            folder,
            per_device_eval_batch_size=options.batch_size,
            image_column=options.image_column,
            label_column=options.label_column,
            on_bad_image=options.on_bad_image,
            use_cpu=str(options.device) == "cpu",
            disable_tqdm=options.quiet or not sys.stderr.isatty(),
        )
        trainer = CoOpTrainer(
            model=model,
            args=args,
            eval_dataset=splits[split],
            compute_metrics=make_compute_metrics(model.class_names, per_class=options.per_class),
        )
        if options.quiet:
            trainer.remove_callback(TrainingScreen)
        with model.disable_adapter():
            before = trainer.evaluate()
        after = trainer.evaluate()
    count, template = len(trainer.eval_dataset), model.config.template
    result: dict[str, Any] = {"num_eval": count, "num_classes": len(model.class_names), "template": template}
    for name, metrics in (("learned", after), ("hand_written", before)):
        result[name] = {key: metrics[f"eval_{key}"] for key in ("accuracy", "macro_f1", "loss")}
        if options.per_class:
            lead = "eval_accuracy_per_class/"
            result[name]["per_class"] = {k.removeprefix(lead): v for k, v in metrics.items() if k.startswith(lead)}
    if options.json:
        print_json(result)
        return
    print(f"\n{count} images, {len(model.class_names)} classes")
    rows = [(f'hand-written prompt "{template}"', before), ("learned prompt", after)]
    print_table(
        [(name, f"{m['eval_accuracy']:.1%}", f"{m['eval_macro_f1']:.1%}") for name, m in rows],
        ("", "accuracy", "macro-F1"),
    )
    if options.per_class:
        print("\nAccuracy of each class")
        ordered = sorted(result["learned"]["per_class"].items(), key=lambda pair: pair[1])
        print_table(
            [(name, f"{result['hand_written']['per_class'][name]:.1%}", f"{value:.1%}") for name, value in ordered],
            ("", "hand-written", "learned"),
        )


# ---------------------------------------------------------------------- show


def show_parser(prog: str) -> Parser:
    """The parser of `coop-hf show`."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s ADAPTER [options]",
        description="What an adapter is, and the words nearest to what it learned.",
    )
    add_adapter_arguments(parser)
    parser.add_argument("--nearest", type=int, default=3, help="nearest words to each vector; 0 loads no base model")
    parser.add_argument("--metric", choices=("euclidean", "cosine"), default="euclidean", help="of nearness")
    parser.add_argument("--max_classes", type=int, default=5, help="classes whose words are shown")
    add_screen_arguments(parser)
    return parser


def run_show(options: Namespace) -> None:
    """Prints what the files of an adapter say, and the words nearest to its vectors."""
    from ..files.adapter_files import read_adapter
    from ..interpret import format_nearest_tokens, nearest_tokens

    config, tensors = read_adapter(options.adapter, **source_of(options))
    values = config.to_dict()
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    result = {"adapter": options.adapter, "method": config.method, "config": values, "tensors": shapes}
    nearest, why = None, ""
    if options.nearest > 0 and "prompt_embeddings" in tensors:
        try:
            nearest = nearest_tokens(load_adapter(options), options.nearest, options.metric)
        except (OSError, ValueError) as error:  # its base may be far away; the rest is told all the same
            why = str(error)
    if options.json:
        print_json({**result, "nearest": nearest})
        return
    names = config.class_names or []
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    count = sum(tensor.numel() for tensor in tensors.values())
    common = {"class_names", "template", "base_model_name_or_path", "revision", "format_version", "coop_hf_version"}
    common |= {"method", "peft_type"}
    settings = {key: value for key, value in values.items() if key not in common and value is not None}
    rows = [
        ("method", config.method),
        ("settings", ", ".join(f"{key} {value}" for key, value in settings.items()) or "none"),
        ("base model", f"{config.base_model_name_or_path}" + (f" at {config.revision}" if config.revision else "")),
        ("classes", f"{len(names)}: {shown}" if names else "none: any may be set"),
        ("hand-written", f'"{config.template}"'),
        ("learned", f"{count:,} values, {4 * count / 1e3:,.1f} kB: "
         + ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())),
        ("written by", f"coop_hf {config.coop_hf_version}"),
    ]  # fmt: skip
    print(options.adapter)
    for name, text in rows:
        print(f"  {name:<13} {text}")
    if nearest is not None:
        print(f"\nNearest words to each vector ({options.metric} distance)")
        print(format_nearest_tokens(nearest, options.max_classes))
    elif why:
        note(f"\nNearest words need the base model: {why}")
