"""Learn on the first half of the classes, test on both halves: does a learned prompt work for new classes?

    python examples/base_to_new.py
    python examples/base_to_new.py --base_model openai/clip-vit-base-patch16 --dataset ethz/food101

Without arguments: the emoji images and the small emoji CLIP that come with the repository.
"""

import os
import time
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from coop_hf.experiments.commands import ProtocolArguments, prepare, run_command
from coop_hf.experiments.protocols import base_to_new
from coop_hf.experiments.tables import results_table, scores_by_method, show_table


@dataclass
class Arguments(ProtocolArguments):
    output_dir: str = field(default="results/base_to_new", metadata={"help": "Folder of the results."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    start = time.perf_counter()
    model, task, options, methods = prepare(args)
    path = os.path.join(args.output_dir, "base_to_new.json")
    results = base_to_new(model, task, path, options, methods, args.shots[0], args.seeds, args.overwrite)
    scores = scores_by_method(results, methods, "scores")
    table = results_table(scores, ["base", "new", "H"], task.name, ["base classes", "new classes", "harmonic mean"])
    show_table(table, path, f"{args.shots[0]} shots", args.seeds)
    print(f"Written: {path}\nTime: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run_command(main)
