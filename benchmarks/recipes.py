"""The paper's recipe against the fast one on the embedded default: accuracy and time over shots and seeds.

    python benchmarks/recipes.py --output recipes.json --plot recipes.png
    python benchmarks/recipes.py --class_specific --n_ctx 4 --output recipes_class_specific.json

Both learn from the same images and are tested on the same ones. The paper's recipe sees a new augmented view of each
image in every epoch; embedding those views is timed too, since the fast recipe does without.
"""

import argparse
import json
import tempfile
import time

import numpy as np
import torch
from common import machine, quiet_trainer
from transformers import set_seed

from coop_hf import (
    CoOpConfig,
    CoOpModel,
    EmbeddedImages,
    LabelledImages,
    embed_images,
    emoji_model_path,
    load_emoji,
    sample_few_shot,
)
from coop_hf.experiments.plotting import plot_few_shot_curves
from coop_hf.training.arguments import paper_epochs


TEMPLATE = "a photo of a {}."


def summarise(cells: list[dict]) -> dict:
    """Accuracy as mean and standard deviation (of a sample) by shots, total times, and their ratios."""
    summary = {}
    for recipe in dict.fromkeys(cell["recipe"] for cell in cells):
        own = [cell for cell in cells if cell["recipe"] == recipe]
        accuracy = {}
        for shots in dict.fromkeys(cell["shots"] for cell in own):
            values = [cell["accuracy"] for cell in own if cell["shots"] == shots]
            accuracy[shots] = [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0]
        times = {key: sum(cell[key] for cell in own) for key in ("training_s", "embedding_s")}
        summary[recipe] = {"accuracy": accuracy, **times}
    if {"paper", "fast"} <= set(summary):
        paper, fast = summary["paper"], summary["fast"]
        summary["time_ratio_cached"] = paper["training_s"] / fast["training_s"]
        total = {name: times["training_s"] + times["embedding_s"] for name, times in (("p", paper), ("f", fast))}
        summary["time_ratio_first_run"] = total["p"] / total["f"]
    return summary


def plot(result: dict, path: str, title: str) -> None:
    """Both curves, and the hand-written prompt's accuracy as a star."""
    curves = {}
    for cell in result["cells"]:
        curves.setdefault(f"{cell['recipe']} recipe", {}).setdefault(cell["shots"], []).append(cell["accuracy"])
    star = {"hand-written prompt": result["zero_shot"]}
    plot_few_shot_curves(curves, path, star, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--style", default="fluent-flat")
    parser.add_argument("--part", default="test", choices=["validation", "test"])
    parser.add_argument("--n_ctx", type=int, default=16)
    parser.add_argument("--ctx_init", help="words to start from instead of --n_ctx random vectors")
    parser.add_argument("--class_specific", action="store_true")
    parser.add_argument("--recipes", nargs="+", default=["paper", "fast"], choices=["paper", "fast"])
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--plot", help="PNG file; needs matplotlib")
    args = parser.parse_args()

    data = load_emoji(args.style)
    names = data["train"].features["label"].names
    model = CoOpModel.from_pretrained(emoji_model_path(), CoOpConfig(template=TEMPLATE), class_names=names)
    context = {"ctx_init": args.ctx_init} if args.ctx_init else {"n_ctx": args.n_ctx}
    config = CoOpConfig(**context, class_specific=args.class_specific)
    pool = data["train"].add_column("row", list(range(len(data["train"]))))
    draws = {(k, seed): sample_few_shot(pool, k, seed=seed)["row"] for k in args.shots for seed in args.seeds}
    used = sorted(set().union(*draws.values()))  # views of the others would be made for nothing
    images = LabelledImages(pool.select(used), model.image_processor, class_names=names, augment=True)
    test = LabelledImages(data[args.part], model.image_processor, class_names=names)
    test_set = EmbeddedImages(embed_images(model, test, progress=False), test.labels)
    plain = embed_images(model, images, progress=False)
    with torch.no_grad(), model.disable_adapter():
        guess = model(image_embeds=test_set.image_embeds[0]).logits.argmax(dim=1)
    zero_shot = (guess == test_set.labels).float().mean().item()
    views = None
    if "paper" in args.recipes:
        views = embed_images(model, images, num_views=max(paper_epochs(k, len(names)) for k in args.shots))
    start = time.perf_counter()  # what one image costs, measured here because the above may come from the cache
    pixels = torch.stack([images.view(i % len(images), 0) for i in range(128)])
    with torch.no_grad():
        model.get_image_features(pixels)
    per_image = (time.perf_counter() - start) / 128

    cells, folder = [], tempfile.TemporaryDirectory()  # nothing is written there
    for shots in args.shots:
        for seed in args.seeds:
            rows = np.searchsorted(used, draws[shots, seed])
            labels = images.labels[rows]
            for recipe in args.recipes:
                set_seed(seed)
                fresh = CoOpModel(model.get_base_model(), config, names, model.processor)
                epochs = paper_epochs(shots, len(names))
                train = EmbeddedImages((views[:epochs] if recipe == "paper" else plain)[:, rows], labels)
                given = {"recipe": recipe, "seed": seed, "num_shots": shots}
                trainer = quiet_trainer(fresh, folder.name, train, test_set, **given)
                seconds = trainer.train().metrics["train_runtime"]
                embedding = per_image * len(rows) * (epochs if recipe == "paper" else 1)
                cells.append(
                    {
                        "recipe": recipe,
                        "shots": shots,
                        "seed": seed,
                        "accuracy": trainer.evaluate()["eval_accuracy"],
                        "steps": trainer.state.global_step,
                        "training_s": seconds,
                        "embedding_s": embedding,
                    }
                )
                print(json.dumps(cells[-1]), flush=True)
    result = {"benchmark": "recipes", "machine": machine(), "part": args.part, "zero_shot": zero_shot}
    result |= {**context, "class_specific": args.class_specific}
    result |= {"summary": summarise(cells), "cells": cells}
    print(json.dumps(result["summary"], indent=2))
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
    if args.plot:
        kind = "class-specific" if args.class_specific else "unified"
        what = f'from "{args.ctx_init}"' if args.ctx_init else f"M={args.n_ctx}"
        plot(result, args.plot, f"{kind} context, {what}, on the emoji")


if __name__ == "__main__":
    main()
