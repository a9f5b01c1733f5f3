"""What a comparison would take, before it starts: cells, downloads, and time from rates measured on this machine.

The rates are those of a few passes through the towers: of the base if it is here, else of a CLIP of ViT-B/16's size
with random weights. They are multiplied by the steps and images of each method's recipe. What comes out is rough.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import CLIPConfig, CLIPModel

from ..core.class_prompts import ClassPrompts
from ..core.families import Family, get_family
from ..core.layout import PromptLayout
from ..demo.emoji import emoji_model_path
from ..training.arguments import RECIPES, get_recipe, paper_epochs
from .benchmark import BenchmarkArguments, Source, check_arguments, num_processes, read_sources
from .cells import make_cells
from .commands import load_base_model, protocol_splits
from .methods import Method
from .tables import table


__all__ = ["Rates", "cell_seconds", "estimate", "measure_rates"]

PROCESS_SECONDS = 2.0  # to start a cell's process and load a small base; a large one is mapped from its file

HEAD_STEP_SECONDS = 0.006  # a step of a trained head, 256 images and 100 classes, on one thread

_BASE_GB = {
    "openai/clip-vit-base-patch16": 0.6,
    "openai/clip-vit-base-patch32": 0.6,
    "openai/clip-vit-large-patch14": 1.7,
}


@dataclass
class Rates:
    """Seconds on this machine: of an image forward, of a class forward, of a class forward and backward."""

    image: float
    text: float
    text_step: float
    of: str


def _best(run: Callable[[], Any], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_rates(base: Any, of: str, threads: int = 1, num_classes: int = 20, num_images: int = 8) -> Rates:
    """Measures a base model's towers.

    Args:
        base (`PreTrainedModel`): the base.
        of (`str`): what it is called in the estimate.
        threads (`int`, *optional*, defaults to 1): of a cell's process.
        num_classes, num_images (`int`, *optional*, default to 20 and 8): in a pass.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        family: Family = get_family(base)
        size = base.config.vision_config.image_size
        pixels = torch.zeros(num_images, 3, size, size, device=family.device)
        row = [0, *range(-16, 0), 1, 2, 3]
        layout = PromptLayout([row] * num_classes, [2] * num_classes, 16, "end", 3)
        prompts = ClassPrompts(family, layout)
        context = torch.zeros(16, family.text_width, device=family.device, requires_grad=True)

        @torch.no_grad()
        def see() -> None:
            family.image_features(pixels, None)

        @torch.no_grad()
        def read() -> None:
            prompts.features({0: context})

        def learn() -> None:
            prompts.features({0: context}).sum().backward()

        image, text, step = _best(see) / num_images, _best(read) / num_classes, _best(learn) / num_classes
    finally:
        torch.set_num_threads(before)
    return Rates(image, text, step, of)


def cell_seconds(
    name: str, method: Method, rates: Rates, num_classes: int, shots: int, test_images: int, recipe: str
) -> float:
    """About how long one cell takes."""
    images, classes = num_classes * shots, num_classes
    text, step = classes * rates.text, classes * rates.text_step
    seconds = PROCESS_SECONDS + text
    if name == "tpt":
        return seconds + test_images * (64 * rates.image + step)
    if not method.learns:
        return seconds + {"ensemble": 8, "cupl": 30}.get(name, 1) * text
    if name == "linear_probe":
        return seconds + 8 * images / 1600
    if name == "autoprompt":
        return seconds + 32 * (32 * text + step)
    if not method.any_classes and name != "coop_csc":  # a head
        closed = name in ("tip_adapter", "gda", "lp_plus_plus")
        return seconds + (2 if closed else 300 * -(-images // 256) * HEAD_STEP_SECONDS * max(1, classes / 100))
    given = method.fit.keywords if isinstance(method.fit, functools.partial) else {}
    values = get_recipe(recipe, given.get("method", "coop"), given.get("objective") or "cross_entropy")
    batch = min(values["batch_size"], images)
    steps = values.get("max_steps") or (values["num_train_epochs"] or paper_epochs(shots, classes)) * -(
        -images // batch
    )
    if name == "clip_lora":
        steps = 500 * shots if recipe == "paper" else RECIPES["fast"]["max_steps"]
        return seconds + steps * (3 * 32 * rates.image + 9 * text) + test_images * rates.image
    if method.sees_images:
        return seconds + steps * (min(batch, 32) * 3 * rates.image + step) + test_images * rates.image
    passes = {"prograd": 2, "pet": 2, "cocoop": min(batch, 8)}.get(name, 1)
    views = steps * batch * rates.image if recipe == "paper" else 0.0
    return seconds + steps * passes * step + views + (test_images * text if name == "cocoop" else 0.0)


def _size(source: Source) -> dict[str, float]:
    """Classes, images and gigabytes of a data set, as far as they are known without a download."""
    args = source.args
    if not args.is_emoji and not os.path.exists(str(args.coop_split or args.dataset)):
        return dict(source.facts)
    splits = protocol_splits(args, report=lambda line: None)
    train, names = splits["train"], args.read_class_names()
    if names is None:
        feature = train.features.get(args.label_column)
        names = getattr(feature, "names", None) or sorted(set(map(str, train[args.label_column][:])))
    sizes = {"images": sum(map(len, splits.values())), "test_images": len(splits["test"]), "download_gb": 0}
    return {**sizes, "classes": len(names)}


def _base(name: str) -> tuple[Any, str, float | None]:
    """A model to measure, what it is called, and the gigabytes of the base, `None`: unknown."""
    if os.path.isdir(name) or isinstance(try_to_load_from_cache(name, "model.safetensors"), str):
        return load_base_model(name).get_base_model(), os.path.basename(os.path.normpath(name)), 0.0
    config = CLIPConfig(
        text_config={"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
        vision_config={"patch_size": 16},
    )
    model = CLIPModel(config).eval().requires_grad_(False)
    model = model.to("cuda") if torch.cuda.is_available() else model
    return model, "random weights of ViT-B/16's size, the base is not here", _BASE_GB.get(name)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _gb(values: list[float | None]) -> str:
    known, unknown = sum(v for v in values if v is not None), sum(v is None for v in values)
    parts = [f"{known:.1f} GB"] * bool(known) + [f"{unknown} of unknown size"] * bool(unknown)
    return " and ".join(parts) or "nothing"


def estimate(args: BenchmarkArguments, data: list[dict] | None = None) -> str:
    """What a comparison will take: a table of its data sets, and sums. Nothing is downloaded.

    Args:
        args ([`BenchmarkArguments`]): what is compared.
        data (`list[dict]`, *optional*): see `benchmark.read_sources`.

    Returns:
        `str`: lines to be printed.
    """
    methods, sources = check_arguments(args), read_sources(args, data)
    processes = num_processes(args)
    threads = max(1, (os.cpu_count() or 1) // processes)
    base = args.base_model or emoji_model_path()
    model, of, base_gb = _base(base)
    rates = measure_rates(model, of, threads)
    rows, total, number, unknown, embedding = [], 0.0, 0, [], 0.0
    by_method = dict.fromkeys(methods, 0.0)
    sizes = {id(s): _size(s) for source in sources for s in (source, *source.shifts)}
    for source in sources:
        facts = sizes[id(source)]
        shifted = [sizes[id(shift)] for shift in source.shifts]
        own_cells = make_cells(methods, args.shots, args.seeds)
        if "base_to_new" in args.protocols:
            more = {name: method for name, method in methods.items() if method.any_classes}
            extra = make_cells(more, [max(args.shots)], args.seeds)
            own_cells = extra + (own_cells if "few_shot" in args.protocols else [])
        number += len(own_cells)
        downloads = [facts.get("download_gb"), *(own.get("download_gb") for own in shifted)]
        shown = {key: f"{facts[key]:,.0f}" if key in facts else "?" for key in ("classes", "images")}
        seconds = None
        if {"classes", "images", "test_images"} <= set(facts):
            tests = int(facts["test_images"] + sum(own.get("test_images", 0) for own in shifted))
            embedded = facts["images"] + sum(own.get("images", own.get("test_images", 0)) for own in shifted)
            seconds = embedded * rates.image / processes  # with all cores
            embedding += seconds
            for cell in own_cells:
                name = cell["method"]
                took = cell_seconds(
                    name, methods[name], rates, int(facts["classes"]), cell["shots"], tests, args.recipe
                )
                by_method[name] += took / processes
                seconds += took / processes
            total += seconds
        else:
            unknown.append(source.name)
        rows.append(
            [source.name + "".join(f" + {shift.name}" for shift in source.shifts), shown["classes"], shown["images"],
             _gb(downloads), str(len(own_cells)), "?" if seconds is None else _time(seconds)]
        )  # fmt: skip
    gigabytes: list[float | None] = [own.get("download_gb") for own in sizes.values()]
    slowest = sorted(by_method, key=lambda name: -by_method[name])[:3]
    most = [f"{methods[name].title} ({_time(by_method[name])})" for name in slowest]
    lines = [table(["data set", "classes", "images", "download", "cells", "about"], rows)]
    lines.append(
        f"{number} cells, {processes} at a time: about {_time(total)} on this machine"
        + (f", without {', '.join(unknown)}, of which too little is known" if unknown else "")
        + f"; {_time(embedding)} to embed all images once, most of the rest for {', '.join(most)}."
    )
    lines.append(f"Download, unless it is in the cache: data {_gb(gigabytes)}, base {_gb([base_gb])}.")
    lines.append(
        f"Measured ({of}; {threads} thread{'s' if threads > 1 else ''}): {1000 * rates.image:.1f} ms an image, "
        f"{1000 * rates.text_step:.1f} ms a class in a training step. A rough estimate."
    )
    return "\n".join(lines)
