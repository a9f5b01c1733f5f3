"""A training step of one process against several that share the classes, each with one thread.

python benchmarks/processes.py --processes 2 --classes 200
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from common import WordTokenizer, make_base, make_names, report

from coop_hf import CoOpConfig, CoOpModel


def worker(classes: int, steps: int, size: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    base = make_base(vision_layers=1, size=size)
    torch.manual_seed(0)
    model = CoOpModel(base, CoOpConfig(n_ctx=16), make_names(classes), WordTokenizer()).train()
    model.text_parallel = True
    images, labels = torch.randn(32, base.config.projection_dim), torch.arange(32) % classes
    share = slice(dist.get_rank(), None, dist.get_world_size())  # the image axis: each process has its images
    seconds = []
    for step in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        model.zero_grad()
        loss = model(image_embeds=images[share], labels=labels[share]).loss
        loss.backward()
        dist.all_reduce(model.context.grad)
        model.context.grad /= dist.get_world_size()
        if step:
            seconds.append(time.perf_counter() - start)
    mean_loss = loss.detach().clone()
    dist.all_reduce(mean_loss)
    if dist.get_rank() == 0:
        values = {"loss": mean_loss.item() / dist.get_world_size(), "gradient": model.context.grad.tolist()}
        with open(output, "w") as file:
            json.dump({"step_s": sorted(seconds)[len(seconds) // 2], **values}, file)
    dist.destroy_process_group()


def run(processes: int, classes: int, steps: int, size: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "result.json")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        given = ["--classes", str(classes), "--steps", str(steps), "--size", size, "--output", output]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*launch, __file__, *given], check=True, env=environment, stdout=subprocess.DEVNULL)
        with open(output) as file:
            return json.load(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", default="b32", choices=["b32", "tiny"])
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.output:
        worker(args.classes, args.steps, args.size, args.output)
        return
    one = run(1, args.classes, args.steps, args.size)
    many = run(args.processes, args.classes, args.steps, args.size)
    a, b = torch.tensor(one["gradient"]), torch.tensor(many["gradient"])
    report(
        "processes",
        {
            "classes": args.classes,
            "threads_per_process": 1,
            "step_s": {1: one["step_s"], args.processes: many["step_s"]},
            "speedup": one["step_s"] / many["step_s"],
            "loss_error": abs(one["loss"] - many["loss"]) / one["loss"],
            "gradient_error": ((a - b).abs().max() / a.abs().max()).item(),
        },
    )


if __name__ == "__main__":
    main()
