"""What the commands have in common: how arguments are read and shown, and how results are printed."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any


__all__ = ["HelpFormatter", "Parser", "add_screen_arguments", "hide_weights_bar", "note", "print_json", "print_table"]


class HelpFormatter(argparse.HelpFormatter):
    """Each option once, `--num_shots N`, though `--num-shots` works as well; defaults where they say something."""

    def __init__(self, prog: str, **kwargs: Any):
        width = min(shutil.get_terminal_size((100, 24)).columns, 110) - 2
        super().__init__(prog, **{"max_help_position": 32, "width": width, **kwargs})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = max(action.option_strings[:2], key=lambda n: n.startswith("--"))
        kind = getattr(action.type, "__name__", "")
        if action.nargs == 0 or kind in ("bool", "string_to_bool"):  # `--bf16`, though `--bf16 False` is read as well
            return name
        if action.choices is not None:
            return f"{name} {{{','.join(map(str, action.choices))}}}"
        usual = {"int": "N", "float": "X"}.get(kind, "TEXT")
        own = action.metavar if isinstance(action.metavar, str) and action.metavar.isupper() else usual
        return f"{name} {own}{' ...' if action.nargs in ('+', '*') else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        says_nothing = action.default in (None, False, argparse.SUPPRESS, "", -1, 0.0) or action.default == []
        if action.option_strings and not says_nothing and action.nargs != 0 and "default" not in text.lower():
            text += " (default: %(default)s)"
        return text


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose options are also read with hyphens, `--top-k` for `--top_k`."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **kwargs})

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """As of `ArgumentParser`."""
        hyphened = [name.replace("_", "-") for name in names if name.startswith("--") and "_" in name]
        return super().add_argument(*names, *hyphened, **kwargs)


def add_screen_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--quiet` and `--json`."""
    parser.add_argument("--quiet", action="store_true", help="print the result alone")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def note(text: str, quiet: bool = False) -> None:
    """A line for the person at the screen; results alone go to stdout."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def hide_weights_bar() -> None:
    """No progress bar where weights are read, which takes a moment; of downloads it stays."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    enable_progress_bars()


def print_json(value: Any) -> None:
    """A result for a program to read."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> None:
    """Names, and values right under each other, indented below a title."""
    lines = [tuple(head), *rows] if head else list(rows)
    widths = [max(len(row[place]) for row in lines) for place in range(len(lines[0]))]
    for name, *values in lines:
        cells = [f"{value:>{max(width, 12)}}" for value, width in zip(values, widths[1:])]
        print("  ".join([f"  {name:<{widths[0]}}", *cells]).rstrip())
