"""What the Trainer adds to a step, and what scoring adds to the bare image tower.

python benchmarks/overhead.py
"""

import argparse
import tempfile
import time

import torch
from common import WordTokenizer, make_base, make_names, report, timed
from transformers import PrinterCallback

from coop_hf import CoOpConfig, CoOpModel, CoOpTrainer, CoOpTrainingArguments, EmbeddedImages


def trainer_overhead(steps: int) -> dict:
    """A tiny tower, so that the Trainer's own work shows: the same steps through the Trainer and written out."""
    base = make_base(size="tiny")
    names = make_names(10)
    data = EmbeddedImages(torch.randn(320, base.config.projection_dim), torch.arange(320) % 10)

    def fresh():
        torch.manual_seed(0)
        return CoOpModel(base, CoOpConfig(n_ctx=4), names, WordTokenizer())

    with tempfile.TemporaryDirectory() as folder:
        arguments = CoOpTrainingArguments(
            folder, max_steps=steps, save_strategy="no", logging_strategy="no", disable_tqdm=True, report_to="none"
        )
        trainer = CoOpTrainer(model=fresh(), args=arguments, train_dataset=data)
        trainer.remove_callback(PrinterCallback)  # prints to where the JSON goes
        start = time.perf_counter()
        trainer.train()
        through_trainer = (time.perf_counter() - start) / steps
    model = fresh().train()
    optimizer = torch.optim.AdamW([model.context], lr=1e-2, weight_decay=0.0)
    start = time.perf_counter()
    for _ in range(steps):
        model(image_embeds=data.image_embeds[0], labels=data.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    bare = (time.perf_counter() - start) / steps
    return {"trainer_step_ms": 1e3 * through_trainer, "bare_step_ms": 1e3 * bare,
            "overhead_ms": 1e3 * (through_trainer - bare)}  # fmt: skip


@torch.no_grad()
def inference(batch_size: int, classes: int, repeats: int, size: str) -> dict:
    base = make_base(size=size)
    model = CoOpModel(base, CoOpConfig(n_ctx=16), make_names(classes), WordTokenizer()).eval()
    pixels = torch.randn(batch_size, 3, 224, 224)
    model(pixel_values=pixels)  # encodes the classes, once
    ratios = []
    for _ in range(repeats):  # in turn, so that a drifting machine hits both
        bare = timed(lambda: base.get_image_features(pixel_values=pixels), 1, warmup=0)["median_s"]
        ours = timed(lambda: model(pixel_values=pixels), 1, warmup=0)["median_s"]
        ratios.append(ours / bare)
    return {"batch_size": batch_size, "classes": classes, "images_per_s": batch_size / ours,
            "time_over_bare_image_tower": sorted(ratios)[len(ratios) // 2]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--size", default="b32", choices=["b32", "tiny"])
    args = parser.parse_args()
    results = {"trainer": trainer_overhead(args.steps)}
    results["inference"] = inference(args.batch_size, args.classes, args.repeats, args.size)
    report("overhead", results)


if __name__ == "__main__":
    main()
