"""CoOp with other lengths, starts and class token positions (section 4.3 of the paper).

    python examples/ablations.py
    python examples/ablations.py --variants m4 m16 --shots 1 4 16

Without arguments: the emoji pictures and the small emoji CLIP that come with the repository, 16 shots. For other
backbones, run it again with another --base_model and --output_dir.
"""

import os
import time
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from coop_hf.protocols import (
    ABLATIONS,
    METHODS,
    ProtocolArguments,
    ablation_methods,
    few_shot_curve,
    prepare,
    results_table,
    scores_by_method,
)


@dataclass
class Arguments(ProtocolArguments):
    variants: list[str] | None = field(
        default=None, metadata={"help": f"Any of {', '.join(ABLATIONS)}. Default: all."}
    )
    output_dir: str = field(default="results/ablations", metadata={"help": "Folder of the results."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    start = time.perf_counter()
    model, task, options, _ = prepare(args)
    methods = {"zero_shot": METHODS["zero_shot"], **ablation_methods(options.template, args.variants)}
    path = os.path.join(args.output_dir, "ablations.json")
    results = few_shot_curve(model, task, path, options, methods, args.shots, args.seeds, args.overwrite)
    table = results_table(scores_by_method(results, methods, "shots"), args.shots, "shots of each class")
    print(f"\n{task.name}; accuracy in %, mean ± standard deviation over {len(args.seeds)} seeds\n\n{table}\n")
    with open(os.path.join(args.output_dir, "ablations.md"), "w", encoding="utf-8") as file:
        file.write(table + "\n")
    print(f"Written: {path}\nTime: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
