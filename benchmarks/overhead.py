"""What the Trainer adds to a step, and what scoring adds to the bare image tower.

python benchmarks/overhead.py
"""

import argparse
import tempfile
import time

import torch
from common import WordTokenizer, make_base, make_names, quiet_trainer, report, timed
from transformers import TrainerCallback

from coop_hf import CoOpConfig, CoOpModel, EmbeddedImages


class _Clock(TrainerCallback):
    """Wall and processor seconds from a step on: what is done once, at the start, is no cost of a step."""

    def __init__(self, first: int):
        self.first, self.start, self.end = first, (0.0, 0.0), (0.0, 0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            self.start = (time.perf_counter(), time.process_time())

    def on_train_end(self, args, state, control, **kwargs):
        self.end = (time.perf_counter(), time.process_time())


def trainer_overhead(steps: int, images: int) -> dict:
    """A tiny tower, so that the Trainer's own work shows: the same steps through the Trainer and written out.

    On a busy machine look at the processor's time.
    """
    base = make_base(size="tiny")
    names = make_names(10)
    data = EmbeddedImages(torch.randn(images, base.config.projection_dim), torch.arange(images) % 10)
    first = max(1, steps // 5)

    def fresh():
        torch.manual_seed(0)
        return CoOpModel(base, CoOpConfig(n_ctx=4), names, WordTokenizer())

    clock = _Clock(first)
    with tempfile.TemporaryDirectory() as folder:
        quiet_trainer(fresh(), folder, data, callbacks=[clock], max_steps=steps).train()
    through = [1e3 * (b - a) / (steps - first) for a, b in zip(clock.start, clock.end)]
    model = fresh().train()
    optimizer = torch.optim.AdamW([model.context], lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        if step == first:
            start = (time.perf_counter(), time.process_time())
        model(image_embeds=data.image_embeds[0], labels=data.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    bare = [1e3 * (b - a) / (steps - first) for a, b in zip(start, (time.perf_counter(), time.process_time()))]
    return {
        "images_a_step": images,
        "trainer_step_ms": through[0], "bare_step_ms": bare[0], "overhead_ms": through[0] - bare[0],
        "trainer_step_cpu_ms": through[1], "bare_step_cpu_ms": bare[1], "overhead_cpu_ms": through[1] - bare[1],
    }  # fmt: skip


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
    parser.add_argument("--images", type=int, default=320, help="of a training step")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--size", default="b32", choices=["b32", "tiny"])
    args = parser.parse_args()
    results = {"trainer": trainer_overhead(args.steps, args.images)}
    results["inference"] = inference(args.batch_size, args.classes, args.repeats, args.size)
    report("overhead", results)


if __name__ == "__main__":
    main()
