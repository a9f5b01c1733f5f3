"""Accuracy over the number of shots, for CoOp and everything it is compared with.

    python examples/few_shot_curve.py
    python examples/few_shot_curve.py --base_model openai/clip-vit-base-patch32 --dataset my_images

Without arguments: the emoji images and the small emoji CLIP that come with the repository, 1, 2, 4, 8 and 16 shots,
three seeds. Results go to `results/`: JSON, table, image and CSV. A second run goes on where the first one stopped.
"""

import os
import time
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from coop_hf.experiments.commands import ProtocolArguments, prepare, run_command
from coop_hf.experiments.methods import METHODS, USUAL_METHODS
from coop_hf.experiments.plotting import plot_few_shot_curves
from coop_hf.experiments.protocols import few_shot_curve
from coop_hf.experiments.tables import results_table, scores_by_method, show_table


@dataclass
class Arguments(ProtocolArguments):
    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "Images of a class."})
    methods: list[str] | None = field(
        default_factory=lambda: [name for name in USUAL_METHODS if name != "coop_m4"],
        metadata={"help": f"Any of {', '.join(METHODS)}, or all. Default: the usual ones but coop_m4."},
    )
    output_dir: str = field(default="results/few_shot_curve", metadata={"help": "Folder of the results."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    start = time.perf_counter()
    model, task, options, methods = prepare(args)
    path = os.path.join(args.output_dir, "few_shot_curve.json")
    results = few_shot_curve(model, task, path, options, methods, args.shots, args.seeds, args.overwrite)

    scores = scores_by_method(results, methods, "shots")
    table = results_table(scores, args.shots, "shots of each class")
    title = f"{task.name}, {len(task.class_names)} classes, {len(task.parts['test'][1])} test images"
    show_table(table, path, title, args.seeds)
    try:
        image = os.path.join(args.output_dir, "few_shot_curve.png")
        plot_few_shot_curves(
            {name: by_shots for name, by_shots in scores.items() if 0 not in by_shots},
            image,
            {name: by_shots[0][0] for name, by_shots in scores.items() if 0 in by_shots},
            title,
        )
        print(f"Written: {path}, {image}, {image[:-4]}.csv")
    except ImportError as error:
        print(f"Written: {path}. No image: {error}")
    print(f"Time: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run_command(main)
