"""The text step (all class embeddings, forward and backward): shared pass against the plain full-length pass.

    python benchmarks/text_step.py                         100 classes, all variants
    python benchmarks/text_step.py --classes 10 100 1000   (the plain pass of 1,000 classes needs more than 24 GiB)

Cost against classes, context length and name length: growth.py.

Each measurement runs in a process of its own, so that its peak memory is its own. Plain and shared pass are timed in
turn within one run, with the machine's matrix product before each, and the ratio is of medians.
"""

import argparse
import json
import sys

import torch
from common import WordTokenizer, in_own_process, make_base, make_names, matmul_rate, peak_memory_bytes, report, timed

from coop_hf.core.layout import make_layout
from coop_hf.core.plain import plain_text_features
from coop_hf.core.shared_prefix import SharedPrefixPass


VARIANTS = [("end", False), ("middle", False), ("front", False), ("end", True)]


def layer_flops(tokens: int, base) -> float:
    """Forward and backward through the linear layers (the weights are frozen: backward costs what forward does)."""
    text = base.config.text_config
    per_token = 4 * text.hidden_size**2 + 2 * text.hidden_size * text.intermediate_size
    return 2 * 2 * tokens * per_token * text.num_hidden_layers


def distinct_tokens(layout, shared: SharedPrefixPass) -> int:
    """Tokens that must be computed: what the prompts share counts once, and what no context precedes not at all."""
    tokens = sum(len(row) for row in layout.tokens) - (layout.num_classes - 1) * shared.num_shared
    return tokens - (sum(layout.name_lengths) if layout.class_token_position == "front" else 0)


def measure(position, class_specific, classes, n_ctx, name_tokens, chunk, plain, repeats, size, warmup=1) -> dict:
    base = make_base(vision_layers=1, size=size)
    layout = make_layout(WordTokenizer(), make_names(classes, name_tokens), n_ctx, position)
    dim = base.config.text_config.hidden_size
    shape = (*((classes,) if class_specific else ()), n_ctx, dim)
    context = (torch.randn(shape) * 0.02).requires_grad_()
    weights = torch.randn(classes, base.config.projection_dim)
    shared = SharedPrefixPass(base, layout, class_specific)

    def step(features):
        context.grad = None
        (features * weights).sum().backward()

    before = peak_memory_bytes()
    rate = matmul_rate()
    fast = timed(lambda: step(shared(context, chunk)), repeats, warmup)
    rate = max(rate, matmul_rate())
    distinct = distinct_tokens(layout, shared)
    result = {
        "position": position,
        "class_specific": class_specific,
        "classes": classes,
        "n_ctx": n_ctx,
        "mean_prompt_tokens": sum(map(len, layout.tokens)) / classes,
        "mean_name_tokens": sum(layout.name_lengths) / classes,
        "text_chunk_size": chunk,
        "shared": fast,
        "distinct_tokens": distinct,
        "matmul_gflops": rate / 1e9,
        "share_of_matmul_rate": layer_flops(distinct, base) / fast["median_s"] / rate,
        "memory_before_bytes": before,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if plain:
        own_gradient = context.grad.clone()

        def in_full():  # all classes at once: nothing is computed twice, as in the public code
            return plain_text_features(base, layout, context, 77, chunk_size=classes)

        with torch.no_grad():
            features, plain_features = shared(context), in_full()
        slow = timed(lambda: step(in_full()), max(1, repeats // 3), warmup=0)
        result |= {
            "plain_77": slow,
            "speedup": slow["median_s"] / fast["median_s"],
            "feature_error": ((features - plain_features).abs().max() / plain_features.abs().max()).item(),
            "gradient_error": ((own_gradient - context.grad).abs().max() / context.grad.abs().max()).item(),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[100])
    parser.add_argument("--n_ctx", type=int, default=16)
    parser.add_argument("--name_tokens", type=float, default=2.2)
    parser.add_argument("--text_chunk_size", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no_plain", action="store_true")
    parser.add_argument("--max_plain_classes", type=int, default=200, help="above it the plain pass is left out")
    parser.add_argument("--size", default="b32", choices=["b32", "tiny"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        json.dump(measure(**json.loads(args.one)), sys.stdout)
        return
    common = {"n_ctx": args.n_ctx, "name_tokens": args.name_tokens, "chunk": args.text_chunk_size}
    common |= {"repeats": args.repeats, "size": args.size}
    todo = []
    for classes in args.classes:
        plain = not args.no_plain and classes <= args.max_plain_classes
        for position, class_specific in VARIANTS:
            given = {"position": position, "class_specific": class_specific, "classes": classes, "plain": plain}
            todo.append({**common, **given})
    report("text_step", [in_own_process(__file__, given, given) for given in todo])


if __name__ == "__main__":
    main()
