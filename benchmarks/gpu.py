"""The figures of a GPU: text step, whole step, and step through the Trainer; eager and compiled.

    python benchmarks/gpu.py                         on a machine with a GPU
    python benchmarks/gpu.py --device cpu --size tiny --dtypes float32 --modes eager     to see that it runs

`reduce-overhead` is torch.compile with CUDA graphs: at a few thousand tokens a step consists of hundreds of small
kernels, and launching them one by one costs more than running them.
"""

import argparse
import tempfile
import time

import torch
from common import WordTokenizer, make_base, make_names, matmul_rate, report, synchronize, timed
from transformers import PrinterCallback

from coop_hf import CoOpConfig, CoOpModel, CoOpTrainer, CoOpTrainingArguments, EmbeddedImages


def model_step(base, classes: int, mode: str, device: str, batch_size: int, repeats: int) -> dict:
    """Forward and backward on `batch_size` cached features."""
    torch.manual_seed(0)
    model = CoOpModel(base, CoOpConfig(n_ctx=16), make_names(classes), WordTokenizer()).train()
    images = torch.randn(batch_size, base.config.projection_dim, device=device)
    labels = torch.arange(batch_size, device=device) % classes
    forward = model if mode == "eager" else torch.compile(model, mode=None if mode == "default" else mode)

    def step():
        model.zero_grad()
        forward(image_embeds=images, labels=labels).loss.backward()

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    result = timed(step, repeats, warmup=5, device=device)
    if device.startswith("cuda"):
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return result


def trainer_step(base, classes: int, device: str, steps: int, **given) -> dict:
    """A step through the Trainer, its overhead included."""
    torch.manual_seed(0)
    model = CoOpModel(base, CoOpConfig(n_ctx=16), make_names(classes), WordTokenizer())
    count = 16 * classes
    data = EmbeddedImages(torch.randn(count, base.config.projection_dim), torch.arange(count) % classes)
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        arguments = CoOpTrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, use_cpu=device == "cpu", **quiet, **given
        )
        trainer = CoOpTrainer(model=model, args=arguments, train_dataset=data)
        trainer.remove_callback(PrinterCallback)  # prints to where the JSON goes
        start = time.perf_counter()
        trainer.train()
        synchronize(device)
    return {"step_ms": 1e3 * (time.perf_counter() - start) / steps, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="b32", choices=["b32", "tiny"])
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--modes", nargs="+", default=["eager", "default", "reduce-overhead"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    results = []
    for dtype in args.dtypes:
        base = make_base(vision_layers=1, device=args.device, dtype=getattr(torch, dtype), size=args.size)
        rate = matmul_rate(args.device, getattr(torch, dtype))
        for classes in args.classes:
            for mode in args.modes:
                entry = {"dtype": dtype, "classes": classes, "mode": mode, "matmul_tflops": rate / 1e12}
                try:
                    entry["step"] = model_step(base, classes, mode, args.device, 32, args.repeats)
                except Exception as error:  # one mode that a machine cannot do must not cost the rest
                    entry["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
                torch.compiler.reset()
                results.append(entry)
            through = trainer_step(base, classes, args.device, args.steps)
            results.append({"dtype": dtype, "classes": classes, "mode": "Trainer", **through})
    report("gpu", results)


if __name__ == "__main__":
    main()
