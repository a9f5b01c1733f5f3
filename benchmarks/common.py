"""What the benchmarks share: a CLIP of ViT-B/32's size, class names, timing, and what machine it ran on."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import transformers
from transformers import CLIPConfig, CLIPModel, PrinterCallback

from coop_hf import CoOpModel, CoOpTrainer, CoOpTrainingArguments, __version__


_SYLLABLES = [a + b for a in "bcdfghjklmnpqrstvwxz" for b in "aeiou"]


class WordTokenizer:
    """Stands in for CLIP's tokenizer, which needs a download: one token a syllable, CLIP's special ids."""

    all_special_ids = [49406, 49407]

    def __call__(self, texts, add_special_tokens=True):
        many = [texts] if isinstance(texts, str) else texts
        ids = []
        for text in many:
            words = text.replace(".", " . ").split()
            tokens = [
                hash_id(word[i : i + 2] if word != "." else word) for word in words for i in range(0, len(word), 2)
            ]
            ids.append([49406, *tokens, 49407] if add_special_tokens else tokens)
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}

    def convert_ids_to_tokens(self, index):
        return str(index)

    def decode(self, ids):
        return " ".join(map(str, ids))


def hash_id(text: str) -> int:
    return int.from_bytes(text.encode(), "big") % 40000


def make_names(count: int, tokens: float = 2.2, seed: int = 0) -> list[str]:
    """Made-up class names, all different, of `tokens` tokens on average (ImageNet's names have 2.2, Cars' 8.5)."""
    generator = torch.Generator().manual_seed(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        length = 1 + int(torch.poisson(torch.tensor(max(0.0, tokens - 1)), generator=generator))
        picks = [_SYLLABLES[i] for i in torch.randint(len(_SYLLABLES), (length,), generator=generator)]
        names[" ".join("".join(picks[i : i + 2]) for i in range(0, length, 2))] = None
    return list(names)


def make_base(vision_layers: int = 12, device: str = "cpu", dtype=torch.float32, size: str = "b32") -> CLIPModel:
    """A CLIP of ViT-B/32's (`size="b32"`) or ViT-B/16's size with random weights: the same work as the real one."""
    torch.manual_seed(0)
    text = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
    if size == "tiny":
        text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        vision = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    else:
        vision = {"num_hidden_layers": vision_layers, "patch_size": 16 if size == "b16" else 32}
    config = CLIPConfig(text_config=text, vision_config=vision)
    return CLIPModel(config).eval().requires_grad_(False).to(device, dtype)


def synchronize(device: str) -> None:
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


def timed(function, repeats: int = 5, warmup: int = 1, device: str = "cpu") -> dict:
    """Seconds of a call: the median, least and most of `repeats` after `warmup` uncounted ones."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def matmul_rate(device: str = "cpu", dtype=torch.float32, rows: int = 4096, seconds: float = 1.0) -> float:
    """FLOP/s of the machine's own matrix product of the text tower's largest shape, now."""
    x, w = torch.randn(rows, 512, device=device, dtype=dtype), torch.randn(2048, 512, device=device, dtype=dtype)
    best, stop = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            x @ w.T
        synchronize(device)
        best = max(best, 5 * 2 * rows * 512 * 2048 / (time.perf_counter() - start))
    return best


def quiet_trainer(
    model: CoOpModel, folder: str, train_dataset: Any, eval_dataset: Any = None, callbacks: Any = None, **arguments
) -> CoOpTrainer:
    """A Trainer that saves nothing and prints nothing to where the JSON goes."""
    args = CoOpTrainingArguments(
        folder, save_strategy="no", logging_strategy="no", disable_tqdm=True, report_to="none", **arguments
    )
    trainer = CoOpTrainer(model, args, train_dataset, eval_dataset, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def in_own_process(script: str, given: Any, about: dict) -> dict:
    """What `script --one GIVEN` prints, in a process whose peak memory is its own; if it fails, `about` and why."""
    command = [sys.executable, script, "--one", json.dumps(given)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        why = process.stderr.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        return {**about, "failed": why[0]}
    return json.loads(process.stdout)


def peak_memory_bytes() -> int:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> dict:
    """What a figure is worth nothing without."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "coop_hf": __version__,
    }


def report(name: str, results) -> None:
    """Prints one JSON object."""
    json.dump({"benchmark": name, "machine": machine(), "results": results}, sys.stdout, indent=2)
    print()
