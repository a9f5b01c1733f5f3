"""Compare methods fairly: data sets × methods × shots × seeds, test labels out of every method's reach.

    python examples/benchmark.py
    python examples/benchmark.py --datasets fluent-flat emojione --methods zero_shot gda clap coop --shots 1 4 16
    python examples/benchmark.py --config examples/paper_benchmark.yaml --dry_run

Without arguments: the emoji images and the small emoji CLIP that come with the repository. Results go to
`--output_dir`: JSON, CSV, Markdown, and one HTML page. A second run goes on where the first one stopped. `coop-hf
benchmark` is the same command.
"""

from coop_hf.cli.more import benchmark_parser, run_benchmark
from coop_hf.experiments.commands import run_command


def main() -> None:
    run_benchmark(benchmark_parser().parse_intermixed_args())


if __name__ == "__main__":
    run_command(main)
