"""Heads on published image features of OpenAI's ViT-B/32: accuracy and seconds, with the linear probe beside them.

    python benchmarks/heads.py --data ../shared/data --output heads.json

Class embeddings: for ImageNet those of the real text tower. For the other data sets, whose class embeddings are not
published, `stand_in` (see the data's README: it has been fitted on every second validation image, so validation takes
the others) and `means`, the normalised mean of the shots of each class, which knows nothing else. ImageNet has four
images a class: shots (1 and 3) are drawn from three, and the fourth is the test; each draw leaves out another one.

`--output` is written after every cell; a second run with the same file computes what it lacks.

Hyperparameters are the published ones, the same everywhere. A name with `+val` chooses from the method's published
grid on min(shots, 4) validation images of each class; so does the linear probe. Nothing is chosen on test images.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from common import machine
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, set_seed

from coop_hf import CoOpConfig, CoOpModel
from coop_hf.atomic import write_atomically
from coop_hf.config import CONFIGS
from coop_hf.training.heads import fit_head


HEADS = ["tip_adapter", "tip_adapter_f", "taskres", "clip_adapter", "zs_lp", "clap", "lp_plus_plus", "gda"]
METHODS = ["zero_shot", *HEADS, "tip_adapter+val", "tip_adapter_f+val", "gda+val", "linear_probe"]
KEYS = ("data", "text", "shots", "draw", "method")
DATA_SETS = ["caltech101", "dtd", "oxford_pets", "imagenet"]


def read(folder: Path, name: str) -> dict:
    """All arrays of a data set, features as normalised fp32."""
    file = (
        folder
        / "clip_vit_b32_features"
        / f"{name}_openai_clip_vitb32_{'4shot' if name == 'imagenet' else 'image'}.npz"
    )
    arrays = np.load(file, allow_pickle=False)
    return {
        key: F.normalize(torch.tensor(arrays[key]).float(), dim=-1)
        if key.endswith("features")
        else torch.tensor(arrays[key].astype(np.int64))
        if key.endswith("labels")
        else arrays[key]
        for key in arrays
    }


def take(features, labels, count: int, seed: int, allowed=None):
    """`count` images of each class at random."""
    rng, rows = np.random.default_rng(seed), []
    for c in range(int(labels.max()) + 1):
        own = torch.nonzero((labels == c) & (True if allowed is None else allowed))[:, 0].numpy()
        rows.append(rng.permutation(own)[:count])
    rows = np.concatenate(rows)
    return features[rows], labels[rows]


def rank_in_class(labels) -> torch.Tensor:
    """0 for the first image of a class, 1 for its second, ..."""
    rank = torch.zeros_like(labels)
    for c in range(int(labels.max()) + 1):
        rank[labels == c] = torch.arange(int((labels == c).sum()))
    return rank


def draws(name: str, data: dict, shots: int, seeds: int):
    """For each draw: training images, validation images (or `None`), test images, each with labels."""
    if name == "imagenet":
        rank = rank_in_class(data["labels"])
        for fold in (1, 2, 3, 0)[:seeds]:
            rest, test = rank != fold, rank == fold
            train = take(data["features"], data["labels"], shots, fold, rest)
            yield train, None, (data["features"][test], data["labels"][test])
        return
    unseen = rank_in_class(data["val_labels"]) % 2 == 1  # the stand-in's class embeddings know the others
    for seed in range(1, seeds + 1):
        if f"fewshot{shots}_features" in data:
            train = data[f"fewshot{shots}_features"], data[f"fewshot{shots}_labels"]
        else:
            train = take(data["train_features"], data["train_labels"], shots, seed)
        val = take(data["val_features"], data["val_labels"], min(shots, 4), seed, unseen)
        yield train, val, (data["test_features"], data["test_labels"])
        if f"fewshot{shots}_features" in data or shots == 16:
            return  # there is one draw


def run(method: str, base, tokenizer, names, t0, train, val, test, seed: int) -> dict:
    """Accuracy on test, and seconds and processor seconds to fit, of one method on one draw."""
    set_seed(seed)
    chosen, cpu, start = {}, time.process_time(), time.perf_counter()
    if method == "linear_probe":
        from coop_hf.baselines import fit_linear_probe

        probe = fit_linear_probe(*train, *val, class_names=names)
        chosen = {"c": probe.c}
    elif method != "zero_shot":
        head = method.removesuffix("+val")
        model = CoOpModel(base, CONFIGS[head](class_names=names), names, tokenizer)
        chosen = fit_head(model, *train, t0, *(val if method.endswith("+val") else ()), seed=seed)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if method == "linear_probe":
        scores = probe.logits(test[0])
    elif method == "zero_shot":
        scores = test[0] @ t0.T
    else:
        with torch.no_grad():
            scores = model(image_embeds=test[0]).logits
    accuracy = (scores.argmax(dim=1) == test[1]).double().mean().item()
    return {"method": method, "accuracy": accuracy, "fit_s": seconds, "fit_cpu_s": cpu, "chosen": chosen}


def summarise(cells: list[dict]) -> list[dict]:
    """Mean and standard deviation (of a sample) over draws, and the longest fits."""
    keys = ("data", "text", "method", "shots")
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    rows = []
    for group, own in groups.items():
        values = 100 * np.array([cell["accuracy"] for cell in own])
        std = float(values.std(ddof=1)) if len(own) > 1 else None
        times = {key: max(cell[key] for cell in own) for key in ("fit_s", "fit_cpu_s")}
        rows.append({**dict(zip(keys, group)), "mean": float(values.mean()), "std": std, "draws": len(own), **times})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--sets", nargs="+", default=DATA_SETS, choices=DATA_SETS)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--text", nargs="+", default=["stand_in"], choices=["stand_in", "means"])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()

    base = CLIPModel.from_pretrained(args.data / "student_clip", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(args.data / "clip_tokenizer")
    cells = []
    if args.output and args.output.exists():
        cells = json.loads(args.output.read_text(encoding="utf-8"))["cells"]
    done = {tuple(cell[key] for key in KEYS) for cell in cells}
    for name in args.sets:
        data = read(args.data, name)
        names = [str(n) for n in data["classnames"]] if name != "imagenet" else [f"class {i}" for i in range(1000)]
        for text in ["real"] if name == "imagenet" else args.text:
            if text == "real":
                t0 = data["text_features"]
            elif text == "stand_in":
                t0 = CoOpModel(base, CoOpConfig(), names, tokenizer).template_embeds()
            for shots in sorted({min(k, 3) for k in args.shots}) if name == "imagenet" else args.shots:
                for index, (train, val, test) in enumerate(draws(name, data, shots, args.draws)):
                    if text == "means":
                        t0 = F.normalize(
                            torch.stack([train[0][train[1] == c].mean(0) for c in range(len(names))]), dim=-1
                        )
                    for method in args.methods:
                        if val is None and (method.endswith("+val") or method == "linear_probe"):
                            continue
                        if (name, text, shots, index + 1, method) in done:
                            continue
                        cell = run(method, base, tokenizer, names, t0, train, val, test, index + 1)
                        cells.append({"data": name, "text": text, "shots": shots, "draw": index + 1, **cell})
                        print(json.dumps(cells[-1]), flush=True)
                        if args.output:
                            write(args.output, cells)
    print(json.dumps({"benchmark": "heads", "machine": machine(), "summary": summarise(cells)}, indent=2))


def write(path: Path, cells: list[dict]) -> None:
    """All that is known so far, as a whole file; a line for each cell."""
    result = {"benchmark": "heads", "machine": machine(), "summary": summarise(cells), "cells": cells}
    head = json.dumps({key: result[key] for key in ("benchmark", "machine", "summary")}, indent=1)
    lines = ",\n  ".join(json.dumps(cell) for cell in cells)
    with write_atomically(path) as temporary:
        Path(temporary).write_text(f'{head[:-2]},\n "cells": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
