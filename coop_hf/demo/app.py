"""`python -m coop_hf.demo my-prompt`: learned prompts on a page, or as a Hugging Face Space."""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from ..config import CoOpConfig
from ..modeling import CoOpModel
from .answers import load_shelf
from .emoji import emoji_model_path
from .examples import example_files
from .space import write_space


__all__ = ["launch", "main"]

MAX_UPLOAD = "512mb"


def launch(
    adapters: Sequence[str | os.PathLike] = (),
    base_model: str | os.PathLike | None = None,
    examples: str | os.PathLike | None = None,
    title: str | None = None,
    learning: bool = True,
    **kwargs: Any,
) -> Any:
    """Opens a page to try learned prompts, and to learn new ones on the first one's base.

    Args:
        adapters (`list[str]`, *optional*): folders or Hub ids. Those with one base share it. Without any, prompts can
            be learned on `base_model`.
        base_model (`str` or `os.PathLike`, *optional*): base to take instead of the one that the adapters name;
            without adapters, defaults to the embedded emoji CLIP.
        examples (`str` or `os.PathLike`, *optional*): folder of images to show as examples; with the embedded emoji
            CLIP, defaults to some emoji.
        title (`str`, *optional*): heading of the page.
        learning (`bool`, *optional*, defaults to `True`): whether the page has a tab to learn prompts.
        kwargs: for `gradio.Blocks.launch`: `server_name`, `server_port`, `prevent_thread_lock` ...

    Returns:
        what `gradio.Blocks.launch` returns: the app, its local address, its public one.

    Raises:
        ImportError: Gradio is not installed.
        ValueError, OSError: an adapter, a base or the examples are not found, or damaged.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the page needs Gradio: pip install coop_hf[demo]")
    if examples is not None:
        example_files(examples, [])  # before a large base is loaded
    shelf = load_shelf(adapters, base_model)
    base = next(iter(shelf.models.values()), None)
    if base is None:
        name = os.fspath(base_model or emoji_model_path())
        base = CoOpModel.from_pretrained(name, CoOpConfig(n_ctx=1)).eval()
    bases = [model.base_model.config._name_or_path for model in shelf.models.values() or [base]]
    from .page import CSS, HEAD, make_page, make_theme  # seconds, which a mistake in the arguments need not wait for

    heading = title or (next(iter(shelf.models)) if len(shelf.models) == 1 else "Learned prompts")
    page = make_page(shelf, base if learning else None, example_files(examples, bases), heading)
    page.queue(max_size=64)
    options = {"show_error": False, "footer_links": [], "ssr_mode": False, "max_file_size": MAX_UPLOAD}
    options |= {"theme": make_theme(), "css": CSS, "head": HEAD, "share": False, "mcp_server": False}
    return page.launch(**{**options, **kwargs})


def main(argv: Sequence[str] | None = None, prog: str = "python -m coop_hf.demo") -> None:
    """The command.

    Args:
        argv (`list[str]`, *optional*, defaults to those of the process): its arguments.
        prog (`str`, *optional*): its name, in the help.
    """
    parser = argparse.ArgumentParser(prog=prog, description="Try learned prompts on a page, and learn new ones.")
    parser.add_argument("adapters", nargs="*", help="folders or Hub ids of learned prompts")
    parser.add_argument("--base_model", help="base model to take instead of the one that the prompts name")
    parser.add_argument("--examples", help="folder of images to show as examples")
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument("--no_learning", action="store_true", help="leave out the tab that learns new prompts")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: every one of this machine")
    parser.add_argument("--port", type=int, help="port; by default the first free one from 7860 on")
    parser.add_argument("--space", metavar="YOU/NAME", help="write a Hugging Face Space instead of opening a page")
    parser.add_argument("--output", help="with --space: the folder to write, by default NAME")
    parser.add_argument("--package", help="with --space: requirement that installs coop_hf, instead of a copy of it")
    args = parser.parse_args(argv)
    shared: dict[str, Any] = {"base_model": args.base_model, "examples": args.examples, "title": args.title}
    shared["learning"] = not args.no_learning
    if args.space is not None:
        folder = write_space(args.adapters, args.space, args.output, package=args.package, **shared)
        print(
            f"The Space is in {folder}. To publish it:\n"
            f"  hf repos create {args.space} --type space --space-sdk gradio\n"
            f"  hf upload {args.space} {folder} . --type space"
        )
        return
    if args.output is not None or args.package is not None:
        parser.error("--output and --package go with --space")
    launch(args.adapters, **shared, server_name=args.host, server_port=args.port)
