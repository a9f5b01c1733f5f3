r"""CoOp with other lengths, starts, class token positions and backbones (section 4.3 of the paper).

    python examples/ablations.py
    python examples/ablations.py --variants m4 m16 --shots 1 4 16
    python examples/ablations.py --dataset my_images \
        --backbones openai/clip-vit-base-patch32 openai/clip-vit-base-patch16 --variants m16

Without arguments: the emoji images and the small emoji CLIP that come with the repository, 16 shots.
"""

import os
import time
from dataclasses import dataclass, field, replace

from transformers import HfArgumentParser

from coop_hf import emoji_model_path
from coop_hf.experiments.commands import ProtocolArguments, prepare, run_command
from coop_hf.experiments.methods import ABLATIONS, METHODS, ablation_methods
from coop_hf.experiments.protocols import few_shot_curve
from coop_hf.experiments.tables import results_table, scores_by_method, show_table


@dataclass
class Arguments(ProtocolArguments):
    variants: list[str] | None = field(
        default=None, metadata={"help": f"Any of {', '.join(ABLATIONS)}. Default: all."}
    )
    backbones: list[str] | None = field(
        default=None, metadata={"help": "Hub ids or folders of CLIP models to compare. Default: --base_model alone."}
    )
    output_dir: str = field(default="results/ablations", metadata={"help": "Folder of the results."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    start = time.perf_counter()
    backbones = args.backbones or [args.base_model]
    names = [os.path.basename(os.path.normpath(name or emoji_model_path())) for name in backbones]
    if len(set(names)) < len(names):
        raise ValueError(f"Two of the backbones have the same name ({', '.join(names)}): their results would mix.")
    for backbone, name in zip(backbones, names, strict=True):
        folder = os.path.join(args.output_dir, name) if args.backbones else args.output_dir
        model, task, options, _ = prepare(replace(args, base_model=backbone))
        methods = {"zero_shot": METHODS["zero_shot"], **ablation_methods(options.template, args.variants)}
        path = os.path.join(folder, "ablations.json")
        results = few_shot_curve(model, task, path, options, methods, args.shots, args.seeds, args.overwrite)
        table = results_table(scores_by_method(results, methods, "shots"), args.shots, "shots of each class")
        show_table(table, path, f"{task.name} on {name}", args.seeds)
        print(f"Written: {path}\nTime so far: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run_command(main)
