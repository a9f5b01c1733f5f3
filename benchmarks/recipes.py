"""The paper's recipe against the fast one on the embedded default: accuracy and time over shots and seeds.

    python benchmarks/recipes.py --output recipes.json --plot recipes.png

Both learn from the same cached embeddings and are tested on the same images. The paper's recipe sees a new augmented
view of each image in every epoch; embedding those views is timed too, since the fast recipe does without.
"""

import argparse
import json
import tempfile
import time

import numpy as np
import torch
from common import machine
from transformers import PrinterCallback, set_seed

from coop_hf import (
    CoOpConfig,
    CoOpModel,
    CoOpTrainer,
    CoOpTrainingArguments,
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


def plot(result: dict, path: str) -> None:
    """Both curves, and the hand-written prompt's accuracy as a star."""
    curves = {}
    for cell in result["cells"]:
        curves.setdefault(f"{cell['recipe']} recipe", {}).setdefault(cell["shots"], []).append(cell["accuracy"])
    star = {"hand-written prompt": result["zero_shot"]}
    plot_few_shot_curves(curves, path, star, "unified context, M=16, on the emoji")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--style", default="fluent-flat")
    parser.add_argument("--part", default="test", choices=["validation", "test"])
    parser.add_argument("--recipes", nargs="+", default=["paper", "fast"], choices=["paper", "fast"])
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--plot", help="PNG file; needs matplotlib")
    args = parser.parse_args()

    data = load_emoji(args.style)
    names = data["train"].features["label"].names
    model = CoOpModel.from_pretrained(emoji_model_path(), CoOpConfig(template=TEMPLATE), class_names=names)
    pool = data["train"].add_column("row", list(range(len(data["train"]))))
    images = LabelledImages(pool, model.image_processor, class_names=names, augment=True)
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
            rows = sample_few_shot(pool, shots, seed=seed)["row"]
            labels = images.labels[rows]
            for recipe in args.recipes:
                set_seed(seed)
                fresh = CoOpModel(model.get_base_model(), CoOpConfig(), names, model.processor)
                epochs = paper_epochs(shots, len(names))
                train = EmbeddedImages((views[:epochs] if recipe == "paper" else plain)[:, rows], labels)
                arguments = CoOpTrainingArguments(
                    folder.name,
                    recipe=recipe,
                    seed=seed,
                    num_shots=shots,
                    save_strategy="no",
                    logging_strategy="no",
                    disable_tqdm=True,
                )
                trainer = CoOpTrainer(model=fresh, args=arguments, train_dataset=train, eval_dataset=test_set)
                trainer.remove_callback(PrinterCallback)  # prints to where the JSON goes
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
    result |= {"summary": summarise(cells), "cells": cells}
    print(json.dumps(result["summary"], indent=2))
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
