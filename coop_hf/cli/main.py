"""The entry of `coop-hf`: finds the command, reads its arguments, runs it."""

import difflib
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

from ..version import __version__
from .parsers import Parser, note


__all__ = ["COMMANDS", "complete_parser", "main"]

# Command -> the module of this room that holds `<command>_parser(prog)` and `run_<command>(options)`, and a line of
# help. Nothing is imported for a command that is not called.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "learn": {
        "train": ("train", "learn a prompt from labelled images, and compare it with a hand-written one"),
        "benchmark": ("more", "compare methods on data sets: learned prompts, heads, probes"),
    },
    "use": {
        "predict": ("use", "classify images: files, folders, patterns; as a table, JSON or CSV"),
        "evaluate": ("use", "accuracy of a learned prompt on labelled images, beside the hand-written one"),
        "show": ("use", "what an adapter is, and the words nearest to what it learned"),
        "demo": ("more", "try learned prompts on a page, learn new ones, or write a Space"),
    },
    "share": {
        "push": ("share", "put an adapter and its model card on the Hub"),
        "pull": ("share", "get an adapter from the Hub into a folder"),
        "export": ("share", "an ONNX file, a torch.export file, or a model for other libraries"),
        "import": ("share", "turn a checkpoint of the original CoOp code and its successors into an adapter"),
    },
    "the shell": {
        "completion": ("more", "print the completion script for bash, zsh or tcsh"),
    },
}

_MODULES = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}


def _help() -> str:
    lines = ["usage: coop-hf COMMAND ...", "", "Prompt learning for CLIP-like models.", ""]
    for title, group in COMMANDS.items():
        lines += [f"{title}:", *(f"  {name:<12}{text}" for name, (_, text) in group.items()), ""]
    lines += ["`coop-hf COMMAND --help` says more; `coop-hf --version` the version."]
    return "\n".join(lines)


def _command(name: str) -> tuple[Callable[[str], Any], Callable[[Any], None]]:
    """What makes the parser of a command, and what runs it."""
    module = importlib.import_module(f"{__package__}.{_MODULES[name]}")
    return getattr(module, f"{name}_parser"), getattr(module, f"run_{name}")


def complete_parser() -> Parser:
    """All commands in one parser, for what reads it: the completion of a shell."""
    parser = Parser(prog="coop-hf")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers()
    for group in COMMANDS.values():
        for name, (_, text) in group.items():
            own = _command(name)[0](f"coop-hf {name}")
            commands.add_parser(name, help=text, parents=[own], add_help=False, conflict_handler="resolve")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs one command.

    Args:
        arguments (`list[str]`, *optional*, defaults to those of the process): the command and its arguments.

    Raises:
        SystemExit: with 2 and a line of usage for arguments that are not understood, with 1 and one line for another
            mistake of the user's; both on stderr, without a traceback.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        print(_help())
        return
    name = given[0]
    if name in ("-V", "--version"):
        print(f"coop_hf {__version__}")
        return
    if name not in _MODULES:
        near = difflib.get_close_matches(name, _MODULES, 1)
        hint = f"do you mean {near[0]!r}?" if near else f"choose from {', '.join(_MODULES)}."
        print(f"coop-hf: there is no command {name!r}: {hint}", file=sys.stderr)
        raise SystemExit(2)
    make_parser, run = _command(name)
    try:
        options = make_parser(f"coop-hf {name}").parse_intermixed_args(given[1:])
    except (OSError, ValueError, TypeError, ImportError) as error:  # all that happens here is reading what was typed
        raise SystemExit(f"coop-hf {name}: {error}") from None
    from ..experiments.commands import run_command  # late: it loads torch, and `--help` shall not wait for that

    try:
        with warnings.catch_warnings():
            # without a place in code
            warnings.showwarning = lambda message, *_, **__: note(f"coop-hf {name}: {message}")
            run_command(lambda: run(options), f"coop-hf {name}")
    except KeyboardInterrupt:
        print(f"coop-hf {name}: stopped.", file=sys.stderr)
        raise SystemExit(130) from None
