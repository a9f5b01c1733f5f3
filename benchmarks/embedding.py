"""Embedding images: speed against the bare image tower, how a large cache opens, how soon a second run learns.

python benchmarks/embedding.py              # all three, on random towers of ViT-B/32's size and made images
python benchmarks/embedding.py --only open --rows 1300000
"""

import argparse
import functools
import hashlib
import io
import json
import os
import resource
import statistics
import tempfile
import time

import datasets
import numpy as np
import PIL.Image
import torch
from common import WordTokenizer, in_own_process, make_base, make_names, quiet_trainer, report
from transformers import CLIPImageProcessor, TrainerCallback

from coop_hf import CoOpConfig, CoOpModel, LabelledImages, embed_images
from coop_hf.data.feature_cache import _CPU_BATCH, _ID_BYTES, FeatureCache, _tower_key


class Processor:
    """Stands in for CLIP's processor, whose tokenizer needs a download."""

    def __init__(self):
        self.tokenizer, self.image_processor = WordTokenizer(), CLIPImageProcessor()

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)


def make_model(classes: int, size: str = "b32", device: str = "cpu") -> CoOpModel:
    return CoOpModel(make_base(size=size, device=device), CoOpConfig(n_ctx=16), make_names(classes), Processor())


def make_jpegs(count: int, classes: int) -> datasets.Dataset:
    """Photos of 640 x 480 as far as decoding goes: smooth areas, edges and grain, about 60 kB each."""
    rng, files = np.random.default_rng(0), []
    for _ in range(min(count, 64)):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        pixels = np.asarray(coarse).astype(np.float32) + rng.normal(0, 8, (480, 640, 1))
        file = io.BytesIO()
        PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    # A comment behind the image makes each file another one to the cache.
    images = [{"bytes": files[i % 64] + i.to_bytes(8, "big"), "path": None} for i in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=make_names(classes))})
    return datasets.Dataset.from_dict({"image": images, "label": [i % classes for i in range(count)]}, features)


def cpu_seconds() -> float:
    """Of this process and the workers that have ended."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def spent(function) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    function()
    return time.perf_counter() - wall, cpu_seconds() - cpu


@torch.no_grad()
def speed(count: int, batch_size: int, repeats: int, size: str, device: str) -> dict:
    """In turn, so that a drifting machine hits all; the ratio of processor seconds also holds on a busy one."""
    model, data = make_model(10, size, device), make_jpegs(count, 10)
    images = LabelledImages(data, model.image_processor)
    batch = torch.stack([images.view(i) for i in range(min(batch_size, count))])

    def bare(step):  # the base model's own forward
        for start in range(0, count, step):
            model.get_base_model().get_image_features(batch[: min(step, count - start)].to(device))

    def embed(workers=None):
        with tempfile.TemporaryDirectory() as folder:
            embed_images(model, images, cache_dir=folder, batch_size=batch_size, num_workers=workers, progress=False)

    steps = sorted({batch_size, _CPU_BATCH})  # the latter is what embed_images takes on a CPU, where it is faster
    bares = {f"bare_in_steps_of_{step}": functools.partial(bare, step) for step in steps}
    kinds = {**bares, "embed": embed, "embed_without_workers": lambda: embed(0)}
    bare(batch_size)  # warm
    rounds = [{kind: spent(kinds[kind]) for kind in kinds} for _ in range(repeats)]
    result = {
        "images": count,
        "decode_and_preprocess_ms": 1e3 * spent(lambda: [images.view(i) for i in range(count)])[1] / count,
    }
    for kind in kinds:
        walls = [run[kind][0] for run in rounds]
        result[kind] = {"images_per_s": count / statistics.median(walls), "seconds": walls}
    for kind in bares:
        for i, clock in enumerate(("wall", "cpu")):
            ratios = [run[kind][i] / run["embed"][i] for run in rounds]
            result[f"embed_over_{kind}_{clock}"] = statistics.median(ratios)
    return result


def memory() -> dict:
    """Megabytes that this process holds: its own, and of mapped files, which are the system's to take back."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {kind: int(fields[f"Rss{kind.capitalize()}"].split()[0]) / 1024 for kind in ("anon", "file")}


def write_rows(folder: str, rows: int, classes: int) -> None:
    """A data set of as many rows, and embeddings of it in the cache, as if an image tower had made them."""
    images = [{"bytes": i.to_bytes(8, "big"), "path": None} for i in range(rows)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=make_names(classes))})
    data = datasets.Dataset.from_dict({"image": images, "label": [i % classes for i in range(rows)]}, features)
    data.save_to_disk(f"{folder}/data")
    model = make_model(2)
    labelled = LabelledImages(datasets.load_from_disk(f"{folder}/data"), model.image_processor)
    cache_folder = f"{folder}/features/{_tower_key(model, labelled)}"
    cache = FeatureCache(cache_folder, 512, [])
    generator = torch.Generator().manual_seed(0)
    ids = [os.urandom(_ID_BYTES) for _ in range(rows)]
    for start in range(0, rows, 4096):
        cache.add(ids[start : start + 4096], torch.randn(len(ids[start : start + 4096]), 512, generator=generator))
    assert cache.put_together(f"{cache_folder}/set-{labelled.set_key()}.safetensors", ids) is not None


class _First(TrainerCallback):
    """Notes when the first step begins and ends."""

    def __init__(self, note):
        self.note = note

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.note("to_first_step")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.note("first_step")


def second_run(folder: str, classes: int) -> dict:
    """In a process of its own: what lies between imports and first step. The base model is there already."""
    model = make_model(classes)
    model.get_image_features(torch.zeros(1, 3, 224, 224))  # thread pools and the like
    marks: dict[str, tuple[float, float]] = {}

    def note(name: str) -> None:
        marks[name] = (time.perf_counter(), cpu_seconds())

    before = memory()
    note("start")
    data = datasets.load_from_disk(f"{folder}/data")
    note("load_data_set")
    given = {"feature_cache_dir": folder, "max_steps": 2, "per_device_train_batch_size": 32}
    trainer = quiet_trainer(model, f"{folder}/out", data, callbacks=[_First(note)], **given)
    note("make_trainer")
    get, growth = trainer._embed, {}

    def embed(*given):
        note("to_embeddings")
        result = get(*given)
        note("open_embeddings")
        growth.update({kind: value - before[kind] for kind, value in memory().items()})
        return result

    trainer._embed = embed
    trainer.train()
    after = {kind: value - before[kind] for kind, value in memory().items()}
    names = list(marks)
    seconds = {
        name: {"wall_s": marks[name][0] - marks[last][0], "cpu_s": marks[name][1] - marks[last][1]}
        for last, name in zip(names, names[1:])
    }
    whole = {key: sum(seconds[name][key] for name in names[1:-1]) for key in ("wall_s", "cpu_s")}
    return {
        "from_imports_to_first_step": whole, "of_which": seconds,
        "growth_when_open_mb": growth, "growth_after_two_steps_mb": after,
    }  # fmt: skip


def few_shot(classes: int, shots: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        make_jpegs(classes * shots, classes).save_to_disk(f"{folder}/data")
        model = make_model(classes)
        labelled = LabelledImages(datasets.load_from_disk(f"{folder}/data"), model.image_processor)
        cache = FeatureCache(f"{folder}/features/{_tower_key(model, labelled)}", 512, [])
        ids = [hashlib.blake2b(key + b"plain", digest_size=_ID_BYTES).digest() for key in labelled.content_keys()]
        cache.add(ids, torch.randn(len(ids), 512))
        return {"images": len(ids), **in_own_process(__file__, [folder, classes], {})}


def large(rows: int, classes: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        write_rows(folder, rows, classes)
        size = sum(
            os.path.getsize(os.path.join(root, name))
            for root, _, names in os.walk(f"{folder}/features")
            for name in names
        )
        return {"rows": rows, "file_mb": size / 2**20, **in_own_process(__file__, [folder, classes], {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "open", "second"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="b32", choices=["b32", "b16", "tiny"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1_300_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(second_run(*json.loads(args.one))))
    results = {}
    if args.only in (None, "speed"):
        results["speed"] = speed(args.images, args.batch_size, args.repeats, args.size, args.device)
    if args.only in (None, "second"):
        results["second_run_of_few_shot"] = few_shot(args.classes, 16)
    if args.only in (None, "open"):
        results["open"] = large(args.rows, args.classes)
    report("embedding", results)


if __name__ == "__main__":
    main()
