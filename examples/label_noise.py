"""Accuracy against the share of wrong labels: how much noise does a learned prompt bear, beside a linear probe?

    python examples/label_noise.py
    python examples/label_noise.py --noise 0 0.25 0.5 --methods coop coop_csc

Without arguments: the emoji images and the small emoji CLIP that come with the repository, 16 shots.
"""

import os
import time
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from coop_hf.experiments.commands import ProtocolArguments, prepare, run_command
from coop_hf.experiments.protocols import label_noise
from coop_hf.experiments.tables import results_table, scores_by_method, show_table


@dataclass
class Arguments(ProtocolArguments):
    noise: list[float] = field(default_factory=lambda: [0.0, 0.125, 0.25, 0.5], metadata={"help": "Wrong labels."})
    methods: list[str] | None = field(
        default_factory=lambda: ["zero_shot", "linear_probe", "coop"], metadata={"help": "Methods."}
    )
    output_dir: str = field(default="results/label_noise", metadata={"help": "Folder of the results."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    start = time.perf_counter()
    model, task, options, methods = prepare(args)
    path = os.path.join(args.output_dir, "label_noise.json")
    results = label_noise(
        model, task, path, options, methods, args.noise, args.shots[0], args.seeds, overwrite=args.overwrite
    )
    headers = [f"{100 * share:g} %" for share in args.noise]
    table = results_table(scores_by_method(results, methods, "noise"), args.noise, "wrong labels", headers)
    show_table(table, path, f"{args.shots[0]} shots", args.seeds)
    print(f"Written: {path}\nTime: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run_command(main)
