"""`coop-hf push`, `pull`, `export` and `import`: adapters to and from other places."""

import json
import os
from argparse import Namespace
from dataclasses import replace
from typing import Any

from .parsers import Parser, add_screen_arguments, note, print_json
from .use import add_adapter_arguments, add_class_arguments, class_names_of, load_adapter, source_of


__all__ = [
    "export_parser",
    "import_parser",
    "pull_parser",
    "push_parser",
    "run_export",
    "run_import",
    "run_pull",
    "run_push",
]


def _size(path: str) -> str:
    files = [os.path.join(root, file) for root, _, names in os.walk(path) for file in names] or [path]
    return f"{sum(map(os.path.getsize, files)) / 1e6:.1f} MB"


# ---------------------------------------------------------------------- the Hub


def push_parser(prog: str) -> Parser:
    """The parser of `coop-hf push`."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s ADAPTER YOU/NAME [options]",
        description="Put an adapter and its model card on the Hub, never its base model. Run `hf auth login` once, or "
        "set HF_TOKEN.",
    )
    add_adapter_arguments(parser)
    parser.add_argument("repo_id", metavar="YOU/NAME", help="the repository; made if it is missing")
    parser.add_argument("--base_id", help="Hub id of the base model, where it was loaded from a folder")
    parser.add_argument("--private", action="store_true", help="a new repository that only you can see")
    parser.add_argument("--branch", help="branch to commit to; made if it is missing")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--commit_message", help="what the commit is called")
    add_screen_arguments(parser)
    return parser


def run_push(options: Namespace) -> None:
    """Pushes; the card tells what the training's folder knows of it."""
    from ..files.model_card import CARD_NAME, make_card
    from ..hub import has_file

    model = load_adapter(options)
    if options.base_id is not None:
        model.config.base_model_name_or_path, model.config.revision = options.base_id, None
    folder = os.path.join(options.adapter, options.subfolder or "")
    card, training = None, _training(os.path.join(folder, "all_results.json"))
    try:
        is_there = has_file(options.repo_id, CARD_NAME, revision=options.branch)
    except OSError:  # no such repository yet; what else is wrong, the push itself tells
        is_there = False
    local = os.path.join(folder, CARD_NAME)
    if not is_there and os.path.isfile(local):  # with what a person wrote into it
        with open(local, encoding="utf-8") as file:
            card = make_card(model, options.repo_id, file.read(), training)
    info = model.push_to_hub(
        options.repo_id,
        private=True if options.private else None,
        revision=options.branch,
        commit_message=options.commit_message,
        create_pr=options.create_pr,
        card=card,
        training=None if card else training,
    )
    url = info.pr_url or info.commit_url
    if options.json:
        print_json({"repo_id": options.repo_id, "url": url})
    else:
        print(f'{url}\nFor everyone else: CoOpModel.from_pretrained("{options.repo_id}")')


def _training(path: str) -> dict | None:
    """What `coop-hf train` kept for the model card."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file).get("training")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def pull_parser(prog: str) -> Parser:
    """The parser of `coop-hf pull`."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s YOU/NAME FOLDER [options]",
        description="Get an adapter from the Hub into a folder, checked. Its base model is not fetched.",
    )
    parser.add_argument("repo_id", metavar="YOU/NAME", help="the repository, or a folder")
    parser.add_argument("folder", metavar="FOLDER", help="where to put it")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--subfolder", help="folder of the adapter in its repository")
    parser.add_argument("--base_model", help="base model that the copy shall name instead of its own")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is in the folder")
    add_screen_arguments(parser)
    return parser


def run_pull(options: Namespace) -> None:
    """Copies the two files of an adapter, and its card."""
    import shutil

    from ..atomic import write_atomically
    from ..config import ADAPTER_CONFIG_NAME
    from ..files.adapter_files import read_adapter, write_adapter
    from ..files.model_card import CARD_NAME
    from ..hub import find_file, has_file, is_hub_id

    if os.path.exists(os.path.join(options.folder, ADAPTER_CONFIG_NAME)) and not options.overwrite:
        raise ValueError(f"there is an adapter in {options.folder!r}: name another folder, or pass --overwrite.")
    source = source_of(options)
    config, tensors = read_adapter(options.repo_id, **source)
    base = config.base_model_name_or_path
    if options.base_model is not None:
        config = replace(config, base_model_name_or_path=options.base_model, revision=None)
    elif base is not None and not os.path.isdir(options.repo_id) and not is_hub_id(base):
        # A stranger's adapter never chooses among the folders of this machine, by way of a copy neither.
        config = replace(config, base_model_name_or_path=None, revision=None)
        note(f"It names {base!r}, a folder of its author's, as its base model: the copy names none. Use --base_model.")
    write_adapter(options.folder, config, tensors)
    if has_file(options.repo_id, CARD_NAME, **source):
        with write_atomically(os.path.join(options.folder, CARD_NAME)) as temporary:
            shutil.copyfile(find_file(options.repo_id, CARD_NAME, **source), temporary)
    result = {"folder": options.folder, "method": config.method, "base_model": config.base_model_name_or_path}
    if options.json:
        print_json(result)
    else:
        names = f"{len(config.class_names)} classes" if config.class_names else "no class names"
        print(f"{options.folder}: {config.method}, {names}, for {config.base_model_name_or_path or 'a base to name'}")


# ---------------------------------------------------------------------- other libraries

TARGETS = {
    "onnx": "an ONNX file (extra onnx)",
    "torch": "a torch.export file, .pt2",
    "clip": "a folder with a stock model and processor for transformers",
    "peft": "a folder with a unified context as PEFT's own adapter (extra peft)",
}


def export_parser(prog: str) -> Parser:
    """The parser of `coop-hf export`."""
    kinds = "; ".join(f"{name}: {text}" for name, text in TARGETS.items())
    parser = Parser(
        prog=prog,
        usage="%(prog)s ADAPTER OUTPUT [--to ...] [options]",
        description=f"An adapter for other libraries. {kinds}.",
    )
    add_adapter_arguments(parser)
    parser.add_argument("output", metavar="OUTPUT", help="file or folder to write")
    parser.add_argument("--to", choices=TARGETS, help="what to write (default: by the ending .onnx or .pt2)")
    add_class_arguments(parser)
    add_screen_arguments(parser)
    return parser


def run_export(options: Namespace) -> None:
    """Writes the file or folder."""
    ending = os.path.splitext(options.output)[1]
    to = options.to or {".onnx": "onnx", ".pt2": "torch"}.get(ending)
    if to is None:
        raise ValueError(f"--to says what to write ({', '.join(TARGETS)}); {options.output!r} does not tell.")
    parent = os.path.dirname(os.path.abspath(options.output))
    if not os.path.isdir(parent):
        raise FileNotFoundError(f"there is no folder {parent!r} to write {os.path.basename(options.output)!r} into.")
    if to in ("onnx", "torch") and os.path.isdir(options.output):
        raise ValueError(f"{options.output!r} is a folder; --to {to} writes a file.")
    model = load_adapter(options, class_names_of(options))
    if to == "onnx":
        from ..deploy.export import export_onnx

        export_onnx(model.as_image_classifier(), options.output)
    elif to == "torch":
        _export_torch(model, options.output)
    elif to == "peft":
        from ..deploy.peft_export import export_peft

        export_peft(model, options.output)
    else:
        clip, processor = model.merge_and_unload()
        clip.save_pretrained(options.output)
        processor.save_pretrained(options.output)
    if options.json:
        print_json({"output": options.output, "to": to, "class_names": model.class_names})
    else:
        print(f"{options.output}: {to}, {_size(options.output)}, {len(model.class_names or [])} classes")


def _export_torch(model: Any, path: str) -> None:
    """Images `(batch, 3, size, size)` to logits, with the class names beside it in the file."""
    import torch

    classifier = model.as_image_classifier()
    vision = classifier.vision_model.config
    pixel_values = torch.zeros(2, vision.num_channels, vision.image_size, vision.image_size, device=model.device)
    program = torch.export.export(
        classifier, (pixel_values,), dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}}
    )
    extra = {"class_names.json": json.dumps(classifier.class_names, ensure_ascii=False)}
    torch.export.save(program, path, extra_files=extra)


# ---------------------------------------------------------------------- original checkpoints


def import_parser(prog: str) -> Parser:
    """The parser of `coop-hf import`."""
    from ..coop_checkpoint import DESCRIPTION, add_arguments

    parser = Parser(
        prog=prog, usage="%(prog)s CHECKPOINT OUTPUT --base_model MODEL [options]", description=DESCRIPTION
    )
    add_arguments(parser)
    add_screen_arguments(parser)
    return parser


def run_import(options: Namespace) -> None:
    """Converts a checkpoint."""
    from ..coop_checkpoint import convert, describe

    model = convert(options)
    if options.json:
        print_json({"output": options.output, "method": model.config.method, "class_names": model.class_names})
    else:
        print(f"{options.output}: {describe(model)}")
