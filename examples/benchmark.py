"""Compare methods fairly: data sets × methods × shots × seeds, test labels out of every method's reach.

    python examples/benchmark.py
    python examples/benchmark.py --datasets fluent-flat emojione --methods zero_shot gda clap coop --shots 1 4 16
    python examples/benchmark.py --config examples/paper_benchmark.yaml --dry_run

Without arguments: the emoji images and the small emoji CLIP that come with the repository. Results go to
`--output_dir`: JSON, CSV, Markdown, and one HTML page. A second run goes on where the first one stopped.
"""

import shlex
import sys

import datasets
from transformers import HfArgumentParser

from coop_hf.experiments.benchmark import BenchmarkArguments, benchmark, read_config
from coop_hf.experiments.commands import run_command
from coop_hf.experiments.estimates import estimate
from coop_hf.experiments.report_files import write_report


def main() -> None:
    datasets.disable_progress_bars()
    parser = HfArgumentParser(BenchmarkArguments)
    config, data = parser.parse_known_args()[0].config, None
    if config is not None:
        values = read_config(config)
        data = values.pop("data", None)
        parser.set_defaults(**values)
    args = parser.parse_args_into_dataclasses()[0]
    print(estimate(args, data))
    if args.dry_run:
        return
    results = benchmark(args, data, command=f"python {shlex.join(sys.argv)}")
    print(write_report(results, args.output_dir))
    if results["failed"]:
        sys.exit(f"{len(results['failed'])} cells failed; the same command tries them again.")


if __name__ == "__main__":
    run_command(main)
