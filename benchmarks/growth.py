"""How cost grows: a step, its memory, a training, embedding and processes, each beside its limit, measured and drawn.

    python benchmarks/growth.py --output growth.json --plot-dir docs/images      about 20 minutes on two idle cores
    python benchmarks/growth.py --output quick.json --plot-dir . --quick         a tiny tower, to see that it runs

Each point runs in a process of its own, so that its peak memory is its own. Points that the output file holds are not
measured again (`--fresh` measures all), so that a run may be stopped and taken up.

The limit of a text step is the linear layers' work on the tokens that must be computed, at the rate of the machine's
own matrix product just then; of embedding, the bare image tower on prepared pixels.
"""

import argparse
import json
import os
import sys
import tempfile
import time

import torch
from common import (
    WordTokenizer,
    in_own_process,
    machine,
    make_base,
    make_names,
    matmul_rate,
    peak_memory_bytes,
    quiet_trainer,
)


# For each panel: what grows, and how far.
FULL = {
    "classes": [2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 21841],
    "context": [1, 2, 4, 8, 16, 32],
    "name": [1, 2, 4, 8],
    "shots": [1, 2, 4, 8, 16],
    "images": [32, 128, 256, 512, 1024],
    "processes": [1, 2],
}
QUICK = {"classes": [2, 20], "context": [1, 8], "name": [2], "shots": [1], "images": [4, 8], "processes": [1]}
TITLES = {
    "classes": ("a step over classes", "classes (above 2,000 in chunks of 1,024)", "seconds"),
    "memory": ("peak memory over classes", "classes (above 2,000 in chunks of 1,024)", "GiB"),
    "context": ("a step over context length, 100 classes", "context tokens", "seconds"),
    "name": ("a step over name length, 100 classes", "tokens of a name, mean", "seconds"),
    "shots": ("a training over shots, 20 classes, fast recipe", "shots", "seconds"),
    "images": ("embedding images, ViT-B/32", "images", "seconds"),
    "processes": ("a step over processes, 200 classes", "processes of one thread", "seconds"),
}


def text_point(panel: str, x: int, quick: bool) -> dict:
    """A text step: unified, at the end."""
    from text_step import measure

    given = {"classes": 20 if quick else 100, "n_ctx": 16, "name_tokens": 2.2, "chunk": None, "repeats": 5}
    given |= {"classes": {"classes": x}, "context": {"n_ctx": x}, "name": {"name_tokens": float(x)}}[panel]
    if given["classes"] > 200:
        given["repeats"] = 3
    if given["classes"] >= 2000:
        given |= {"repeats": 1, "warmup": 0, "chunk": 1024 if given["classes"] > 2000 else None}
    result = measure("end", False, plain=False, size="tiny" if quick else "b32", **given)
    seconds = result["shared"]["median_s"]
    return {"seconds": seconds, "limit_s": seconds * result["share_of_matmul_rate"], "detail": result}


def shots_point(shots: int, quick: bool) -> dict:
    """A whole training of the fast recipe from embedded images, as a user waits for it."""
    from text_step import distinct_tokens, layer_flops

    from coop_hf import CoOpConfig, CoOpModel, EmbeddedImages
    from coop_hf.core.shared_prefix import SharedPrefixPass

    classes = 5 if quick else 20
    base = make_base(vision_layers=1, size="tiny" if quick else "b32")
    model = CoOpModel(base, CoOpConfig(n_ctx=16), make_names(classes), WordTokenizer())
    labels = torch.arange(classes * shots) % classes
    data = EmbeddedImages(torch.randn(len(labels), base.config.projection_dim), labels)
    rate = matmul_rate()
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(model, folder, data)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    layout = model.adapter.class_prompts.layout
    tokens, steps = distinct_tokens(layout, SharedPrefixPass(base, layout)), trainer.state.global_step
    limit = steps * layer_flops(tokens, base) / max(rate, matmul_rate())
    return {"seconds": seconds, "limit_s": limit, "detail": {"classes": classes, "steps": steps}}


def images_point(count: int, quick: bool) -> dict:
    """Embedding JPEGs, decoding and the empty cache included."""
    from embedding import make_jpegs, make_model, spent

    from coop_hf import LabelledImages, embed_images
    from coop_hf.data.feature_cache import _CPU_BATCH

    model = make_model(10, "tiny" if quick else "b32")
    images, batch_size = LabelledImages(make_jpegs(count, 10), model.image_processor), _CPU_BATCH
    batch = torch.stack([images.view(i) for i in range(min(count, batch_size))])
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        tower = model.get_base_model()
        tower.get_image_features(batch)  # warm
        rounds = min(3, max(1, count // batch_size))
        bare = spent(lambda: [tower.get_image_features(batch) for _ in range(rounds)])[0] / (rounds * len(batch))
        seconds = spent(lambda: embed_images(model, images, cache_dir=folder, batch_size=batch_size, progress=False))[
            0
        ]
    return {"seconds": seconds, "limit_s": count * bare, "detail": {"images_per_s": count / seconds}}


def processes_point(processes: int, quick: bool) -> dict:
    """A training step of several processes that share the classes."""
    from processes import run
    from text_step import distinct_tokens, layer_flops

    from coop_hf.core.layout import make_layout
    from coop_hf.core.shared_prefix import SharedPrefixPass

    classes, size = (20, "tiny") if quick else (200, "b32")
    torch.set_num_threads(1)
    rate = matmul_rate()
    seconds = run(processes, classes, 5, size)["step_s"]
    base, layout = make_base(vision_layers=1, size=size), make_layout(WordTokenizer(), make_names(classes), 16)
    limit = layer_flops(distinct_tokens(layout, SharedPrefixPass(base, layout)), base) / max(rate, matmul_rate())
    return {"seconds": seconds, "limit_s": limit / processes, "detail": {"classes": classes}}


POINTS = {"shots": shots_point, "images": images_point, "processes": processes_point}


def one(panel: str, x: int, quick: bool) -> dict:
    start = time.perf_counter()
    result = POINTS[panel](x, quick) if panel in POINTS else text_point(panel, x, quick)
    return {
        "panel": panel, "x": x, "quick": quick, **result,
        "peak_memory_bytes": peak_memory_bytes(), "took_s": time.perf_counter() - start,
    }  # fmt: skip


def plot(points: list[dict], path: str) -> None:
    """What was measured as lines, the limits dashed, on log axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    figure = Figure(figsize=(15, 7), layout="constrained")
    for axes, (panel, (title, x_label, y_label)) in zip(figure.subplots(2, 4).flat, TITLES.items()):
        own = [p for p in points if p["panel"] == ("classes" if panel == "memory" else panel) and "failed" not in p]
        own.sort(key=lambda point: point["x"])
        axes.set_visible(bool(own))
        if not own:
            continue
        xs = [p["detail"]["mean_name_tokens"] if panel == "name" else p["x"] for p in own]
        if panel == "memory":
            lines = [[p["peak_memory_bytes"] / 2**30 for p in own]]
            lines.append([p["detail"]["memory_before_bytes"] / 2**30 for p in own])
        else:
            lines = [[p[key] for p in own] for key in ("seconds", "limit_s")]
        axes.plot(xs, lines[0], "o-", color="#0072B2", label="measured")
        axes.plot(xs, lines[1], "--", color="#D55E00", label="before the pass" if panel == "memory" else "limit")
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        axes.set_title(title, fontsize=10)
        if panel not in ("classes", "memory"):
            axes.set_xticks(xs, labels=[f"{x:.3g}" for x in xs], minor=False)
            axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.4)))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[-1].set_visible(False)  # eight places, seven panels
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=90)


def read(path: str, fresh: bool) -> list[dict]:
    """The points that a file holds.

    Raises:
        SystemExit: they were measured on another machine or with other versions.
    """
    if fresh or not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        kept = json.load(file)
    if kept["machine"] != machine():
        raise SystemExit(f"{path} was measured elsewhere ({kept['machine']}, here {machine()}): pass --fresh.")
    return kept["points"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="growth.json", help="JSON file; its points are kept")
    parser.add_argument("--plot-dir", help="where growth.png is drawn; needs matplotlib")
    parser.add_argument("--only", nargs="+", choices=list(FULL), default=list(FULL), help="panels to measure")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="measure again what the output file holds")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        json.dump(one(*json.loads(args.one)), sys.stdout)
        return
    points = read(args.output, args.fresh)
    for panel in args.only:
        for x in (QUICK if args.quick else FULL)[panel]:
            same = [p for p in points if (p["panel"], p["x"], p["quick"]) == (panel, x, args.quick)]
            if same and "failed" not in same[0]:
                continue
            about = {"panel": panel, "x": x, "quick": args.quick}
            point = in_own_process(__file__, [panel, x, args.quick], about)
            points = [p for p in points if p not in same] + [point]
            print({key: point[key] for key in point if key != "detail"}, flush=True)
            with open(f"{args.output}.part", "w", encoding="utf-8") as file:
                json.dump({"benchmark": "growth", "machine": machine(), "points": points}, file, indent=1)
            os.replace(f"{args.output}.part", args.output)
    if args.plot_dir:
        plot([p for p in points if p["quick"] == args.quick], os.path.join(args.plot_dir, "growth.png"))


if __name__ == "__main__":
    main()
