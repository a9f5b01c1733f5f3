"""Learn on one domain, test on others: how well does a learned prompt carry over?

    python examples/domain_generalization.py
    python examples/domain_generalization.py --dataset imagenet --targets imagenet_v2 imagenet_sketch
    python examples/domain_generalization.py --transfer --dataset imagenet --targets food101 dtd

Without arguments: learns on emoji in one artist's style, tests on five others. With `--transfer` the targets are other
data sets with their own classes.
"""

import json
import os
import time
from dataclasses import dataclass, field, replace

from transformers import HfArgumentParser

from coop_hf.demo.emoji import EMOJI_STYLES
from coop_hf.experiments.commands import ProtocolArguments, load_splits, prepare, read_class_names, run_command
from coop_hf.experiments.protocols import cross_dataset_transfer, domain_generalization
from coop_hf.experiments.tables import results_table, scores_by_method, show_table
from coop_hf.experiments.tasks import make_task


@dataclass
class Arguments(ProtocolArguments):
    targets: list[str] | None = field(
        default=None,
        metadata={"help": "Data sets to test on: Hub ids or folders; emoji: styles. Default: all styles."},
    )
    class_map_files: list[str] = field(
        default_factory=list, metadata={"help": "target=map.json, a JSON object {source class: target class}."}
    )
    target_names_files: list[str] = field(
        default_factory=list, metadata={"help": "target=names.txt, class names in the order of the target's labels."}
    )
    target_image_column: str | None = field(default=None, metadata={"help": "Default: the source's."})
    target_label_column: str | None = field(default=None, metadata={"help": "Default: the source's."})
    transfer: bool = field(default=False, metadata={"help": "The targets are scored on their own classes."})
    output_dir: str = field(default="results/domain_generalization", metadata={"help": "Folder of the results."})


def by_target(pairs: list[str]) -> dict[str, str]:
    """`{target: file}` of arguments `target=file`."""
    return {os.path.basename(pair.partition("=")[0]): pair.partition("=")[2] for pair in pairs}


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    start = time.perf_counter()
    model, source, options, methods = prepare(args)
    names = args.targets or ([style for style in EMOJI_STYLES if style != args.style] if args.is_emoji else [])
    if not names:
        raise ValueError("Pass the data sets to test on: --targets NAME NAME ...")
    class_names = {name: read_class_names(path) for name, path in by_target(args.target_names_files).items()}
    maps = {}
    for name, path in by_target(args.class_map_files).items():
        with open(path, encoding="utf-8") as file:
            maps[name] = json.load(file)
    columns = (args.target_image_column or args.image_column, args.target_label_column or args.label_column)
    targets = []
    for path in names:
        other = replace(args, style=path) if args.is_emoji else replace(args, dataset=path, coop_split=None)
        splits = load_splits(replace(other, train_split="train", eval_split=None))
        name = os.path.basename(path)
        test = {"test": splits.get("test", next(iter(splits.values())))}
        targets.append(make_task(model, test, name, *columns, class_names.get(name), original=args.recipe == "paper"))

    protocol = "cross_dataset_transfer" if args.transfer else "domain_generalization"
    path = os.path.join(args.output_dir, f"{protocol}.json")
    common = (model, source, targets, path, options, methods, args.shots[0], args.seeds)
    if args.transfer:
        results = cross_dataset_transfer(*common, overwrite=args.overwrite)
    else:
        results = domain_generalization(*common, class_maps=maps, overwrite=args.overwrite)
    columns = [source.name, *(target.name for target in targets)]
    table = results_table(scores_by_method(results, methods, "scores"), columns, f"learned on {source.name}")
    show_table(table, path, f"{args.shots[0]} shots", args.seeds)
    print(f"Written: {path}\nTime: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run_command(main)
