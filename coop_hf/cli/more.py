"""`coop-hf benchmark`, `demo` and `completion`."""

import shlex
import sys
from argparse import REMAINDER, Namespace
from typing import Any

from .parsers import HelpFormatter, Parser


__all__ = ["benchmark_parser", "completion_parser", "demo_parser", "run_benchmark", "run_completion", "run_demo"]

SHELLS = ("bash", "zsh", "tcsh")


# ---------------------------------------------------------------------- benchmark


def benchmark_parser(prog: str | None = None) -> Any:
    """The parser of `coop-hf benchmark`, whose defaults a `--config` file sets."""
    from transformers import HfArgumentParser

    from ..experiments.benchmark import BenchmarkArguments, read_config

    class BenchmarkParser(HfArgumentParser):
        def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Namespace:
            args = sys.argv[1:] if args is None else args
            config, data = self.parse_known_args(args)[0].config, None
            if config is not None:
                values = read_config(config)
                data = values.pop("data", None)
                self.set_defaults(**values)
            given, rest = self.parse_args_into_dataclasses(
                args, return_remaining_strings=True, look_for_args_file=False
            )
            if rest:
                self.error(f"not understood: {' '.join(rest)}")
            return Namespace(given=given, data=data, command=shlex.join([*self.prog.split(), *args]))

    return BenchmarkParser(
        BenchmarkArguments,
        prog=prog or f"python {sys.argv[0]}",
        usage="%(prog)s [--datasets ...] [--methods ...] [--shots ...] [--config FILE] ...",
        description="Compare methods on data sets, test labels out of every method's reach; without arguments on the "
        "embedded emoji.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def run_benchmark(options: Namespace) -> None:
    """Says how long it takes, runs the cells that are missing, and writes the report."""
    import datasets

    from ..experiments.benchmark import benchmark
    from ..experiments.estimates import estimate
    from ..experiments.report_files import write_report

    datasets.disable_progress_bars()
    print(estimate(options.given, options.data))
    if options.given.dry_run:
        return
    results = benchmark(options.given, options.data, command=options.command)
    print(write_report(results, options.given.output_dir))
    if results["failed"]:
        sys.exit(f"{len(results['failed'])} cells failed; the same command tries them again.")


# ---------------------------------------------------------------------- demo


class _Rest(Parser):
    """Hands all arguments on to a command that reads them itself."""

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        return Namespace(prog=self.prog, rest=list(args or []))


def demo_parser(prog: str) -> Parser:
    """What stands for the parser of `coop-hf demo`, which is in `coop_hf.demo.app`."""
    parser = _Rest(prog=prog)
    parser.add_argument("rest", nargs=REMAINDER)
    return parser


def run_demo(options: Namespace) -> None:
    """Opens the page, or writes the Space."""
    from ..demo.app import main

    main(options.rest, options.prog)


# ---------------------------------------------------------------------- completion


def completion_parser(prog: str) -> Parser:
    """The parser of `coop-hf completion`."""
    parser = Parser(
        prog=prog,
        description="Print the completion script of a shell, for example: coop-hf completion bash > "
        "~/.local/share/bash-completion/completions/coop-hf. Needs `pip install coop_hf[completion]`.",
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    return parser


def run_completion(options: Namespace) -> None:
    """Prints the script."""
    try:
        import shtab
    except ImportError:
        raise ImportError("completion scripts need the package shtab: `pip install coop_hf[completion]`.") from None
    from .main import complete_parser

    print(shtab.complete(complete_parser(), options.shell))
