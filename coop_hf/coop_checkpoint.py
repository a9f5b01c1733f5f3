"""Checkpoints of the original CoOp code, and of the prompt learners built on it, as adapters.

    python -m coop_hf.coop_checkpoint output/prompt_learner my-adapter --base_model openai/clip-vit-base-patch16

What the files hold, and how they are read without running anything in them: `coop_hf.files.coop_checkpoint`.
"""

import argparse
import contextlib
import os
import sys
from typing import Any

from .config import CLASS_TOKEN_POSITIONS
from .data.few_shot import read_class_names
from .files.coop_checkpoint import find_coop_checkpoint, read_coop_checkpoint
from .files.coop_conversion import checkpoint_to_adapter
from .modeling import CoOpModel


__all__ = ["checkpoint_to_adapter", "find_coop_checkpoint", "from_coop_checkpoint", "main", "read_coop_checkpoint"]


def from_coop_checkpoint(path: str | os.PathLike, base_model: Any, *args: Any, **kwargs: Any) -> CoOpModel:
    """`CoOpModel.from_coop_checkpoint`, under the name that it had first."""
    return CoOpModel.from_coop_checkpoint(path, base_model, *args, **kwargs)


DESCRIPTION = (
    "Turns a checkpoint of the public code of CoOp, CoCoOp, KgCoOp, ProGrad, MaPLe, VPT, IVLP, PromptSRC or TCP into "
    "an adapter of coop_hf."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("checkpoint", help="model.pth.tar-<epoch>, or the folder of the training's output")
    parser.add_argument("output", help="folder for the adapter")
    parser.add_argument("--base_model", required=True, help="the CLIP model it was learned on: Hub id or folder")
    parser.add_argument("--revision", help="revision of the base model")
    parser.add_argument("--class_names", help="file with the class names in order: one a line, or a .json list")
    parser.add_argument("--class_token_position", default="end", choices=CLASS_TOKEN_POSITIONS)
    parser.add_argument(
        "--template", help="hand-written prompt of the training; TCP's and VPT's class embeddings need it"
    )
    parser.add_argument("--epoch", type=int, help="take model.pth.tar-<epoch> of the folder")


def convert(options: argparse.Namespace) -> CoOpModel:
    """Reads the checkpoint that the arguments name, and saves the adapter.

    Raises:
        ValueError, OSError: the checkpoint is unusable, was learned on another base, or does not go with the names.
    """
    names = read_class_names(options.class_names) if options.class_names else None
    with contextlib.redirect_stdout(sys.stderr):
        model = from_coop_checkpoint(
            options.checkpoint,
            options.base_model,
            names,
            options.class_token_position,
            template=options.template,
            epoch=options.epoch,
            **({"revision": options.revision} if options.revision else {}),
        )
    model.save_pretrained(options.output)
    return model


def describe(model: CoOpModel) -> str:
    """What was in the checkpoint, in a line."""
    if model.config.method == "coop":
        kind = "class-specific" if model.config.class_specific else "unified"
        what = f"{kind} context, {model.config.n_ctx} vectors of {model.context.shape[-1]}"
    else:
        count = sum(value.numel() for value in model.adapter.learned_state().values())
        what = f"adapter of the method {model.config.method!r}, {count:,} values"
    return f"{what}, {f'{len(model.class_names)} classes' if model.class_names else 'no class names'}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m coop_hf.coop_checkpoint", description=DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        model = convert(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {describe(model)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
