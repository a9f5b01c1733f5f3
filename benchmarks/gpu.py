"""The figures of a GPU: text step, step through the Trainer, ImageNet's schedule, many classes, attention of the tree.

    python benchmarks/gpu.py                         on a machine with a GPU
    python benchmarks/gpu.py --full                  and the 25,000 steps to their end
    python benchmarks/gpu.py --device cpu --size tiny --dtypes float32      to see that it runs

"compiled" is what `CoOpTrainingArguments(torch_compile=True)` does: on a GPU torch.compile with CUDA graphs
(`reduce-overhead`). At a few thousand tokens a step consists of hundreds of small kernels, and launching them one by
one costs more than running them. Each entry fails by itself.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import torch
from common import WordTokenizer, make_base, make_names, matmul_rate, quiet_trainer, report, synchronize, timed
from torch.nn import functional as F
from transformers import TrainerCallback

from coop_hf import CoOpConfig, CoOpModel, EmbeddedImages
from coop_hf.core.layout import make_layout
from coop_hf.core.packing import pack_tokens
from coop_hf.core.shared_prefix import SharedPrefixPass


def make_model(base, classes: int) -> CoOpModel:
    torch.manual_seed(0)
    return CoOpModel(base, CoOpConfig(n_ctx=16), make_names(classes), WordTokenizer())


def with_peak(device: str, function: Callable[[], dict]) -> dict:
    """What a function measures, and the most memory of the device that it took."""
    if not device.startswith("cuda"):
        return function()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return {**function(), "peak_memory_bytes": torch.cuda.max_memory_allocated()}


def text_step(base, classes: int, mode: str, device: str, repeats: int, backend: str) -> dict:
    """Forward and backward on 32 cached features, without the Trainer."""
    model = make_model(base, classes).train()
    images = torch.randn(32, base.config.projection_dim, device=device)
    labels = torch.arange(32, device=device) % classes
    options = {"mode": "reduce-overhead"} if backend == "inductor" else {}
    forward = model if mode == "eager" else torch.compile(model, backend=backend, **options)

    def step():
        model.zero_grad()
        forward(image_embeds=images, labels=labels).loss.backward()

    return with_peak(device, lambda: timed(step, repeats, warmup=5, device=device))


class _Clock(TrainerCallback):
    """Seconds from a step on: compiling and what is done once is no cost of a step, and is told apart."""

    def __init__(self, first: int, device: str):
        self.first, self.device = first, device

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            synchronize(self.device)
            self.start = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.end = time.perf_counter()


def trainer_step(base, classes: int, device: str, steps: int, first: int, shots: int = 16, **given) -> dict:
    """A step through the Trainer, its own work included, from cached embeddings."""
    count = shots * classes
    data = EmbeddedImages(torch.randn(count, base.config.projection_dim), torch.arange(count) % classes)
    clock = _Clock(first, device)
    with tempfile.TemporaryDirectory() as folder:
        given = {"per_device_train_batch_size": 32, "use_cpu": device == "cpu", "max_steps": first + steps, **given}
        trainer = quiet_trainer(make_model(base, classes), folder, data, callbacks=[clock], **given)
        measured = with_peak(device, lambda: {"loss": trainer.train().training_loss})
    step_s = (clock.end - clock.start) / steps
    return {**measured, "steps": steps, "step_ms": 1e3 * step_s, "before_s": clock.start - clock.begin}


def imagenet(base, device: str, classes: int, steps: int, full: bool, **given) -> dict:
    """The paper's schedule on ImageNet: 16 shots of 1,000 classes, 50 epochs of 500 steps; 500 steps extrapolated."""
    total = 25_000
    result = trainer_step(base, classes, device, total if full else steps, 0 if full else min(50, steps), **given)
    seconds = result["before_s"] + total * result["step_ms"] / 1e3
    return {**result, "schedule_s": seconds, "extrapolated_from_steps": None if full else steps}


def tree_attention(device: str, dtype: torch.dtype, classes: int, block_size: int, kind: str, repeats: int) -> dict:
    """Attention of the live tokens, 8 heads of 64, forward and backward: SDPA with the mask, or flex attention."""
    layout = make_layout(WordTokenizer(), make_names(classes), 16)
    shared = SharedPrefixPass(make_base(vision_layers=1, size="tiny"), layout)
    part = pack_tokens(layout, range(classes), shared.num_prefix, shared.live_starts, block_size).to(device)
    keys = part.mask.shape[-1]
    shape = (part.num_blocks, 8, part.width, 64), (part.num_blocks, 8, keys, 64)
    query, key, value = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in (*shape, shape[1]))
    if kind == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = part.mask[:, 0]
        seen = create_block_mask(
            lambda b, h, q, k: mask[b, q, k], part.num_blocks, None, part.width, keys, device=device
        )
        compiled = torch.compile(flex_attention)

        def attend():
            return compiled(query, key, value, block_mask=seen)
    else:

        def attend():
            return F.scaled_dot_product_attention(query, key, value, attn_mask=part.mask)

    return {"blocks": part.num_blocks, **timed(lambda: attend().sum().backward(), repeats, warmup=3, device=device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="b32", choices=["b32", "tiny"])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--steps", type=int, default=500, help="of a training that are timed")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--most_classes", type=int, default=21841)
    parser.add_argument("--full", action="store_true", help="run ImageNet's 25,000 steps to their end")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    if not on_gpu:  # to see that it runs
        args.classes, args.steps, args.repeats, args.most_classes = [5], 10, 1, 100
    backend = "inductor" if on_gpu else "aot_eager"
    results = []

    def add(about: dict, function: Callable[..., dict], *given, **options) -> None:
        entry = dict(about)
        try:
            entry |= function(*given, **options)
        except Exception as error:  # what a machine cannot do must not cost the rest
            entry["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        torch.compiler.reset()
        results.append(entry)

    device, steps = args.device, args.steps
    for name in args.dtypes:
        dtype = getattr(torch, name)
        base = make_base(vision_layers=1, device=device, dtype=dtype, size=args.size)
        rate = matmul_rate(device, dtype)
        for mode in args.modes:
            given = {"torch_compile": mode == "compiled"}
            if mode == "compiled" and not on_gpu:
                given["torch_compile_backend"] = backend
            for n in args.classes:
                about = {"dtype": name, "mode": mode, "matmul_tflops": rate / 1e12, "classes": n}
                add({"case": "text step", **about}, text_step, base, n, mode, device, args.repeats, backend)
                add({"case": "Trainer", **about}, trainer_step, base, n, device, steps, min(50, steps), **given)
            schedule = {"case": "ImageNet's schedule", **about}
            add(schedule, imagenet, base, device, n, steps, args.full and on_gpu, **given)
        n = args.most_classes
        many = {"text_chunk_size": min(n, 4096), "shots": 1, "torch_compile": False}
        about = {"case": "many classes", "dtype": name, "mode": "eager", "classes": n}
        add(about, trainer_step, base, n, device, min(10, steps), 1, **many)
        for n in args.classes if on_gpu else ():
            for block_size in (32, 64, 128):
                for kind in ("sdpa", "flex"):
                    about = {"case": "attention", "dtype": name, "mode": kind, "classes": n, "block_size": block_size}
                    add(about, tree_attention, device, dtype, n, block_size, kind, args.repeats)
    report("gpu", results)


if __name__ == "__main__":
    main()
