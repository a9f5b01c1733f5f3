"""What a learned context says: the vocabulary entries nearest to its vectors.

The paper (https://arxiv.org/abs/2109.01134, section 4.3 and table 4) compares each context vector with the rows of the
token embedding by their Euclidean distance.
"""

from typing import Any

import torch
from accelerate.utils import align_module_device
from torch.nn import functional as F

from .checks import check_counts


__all__ = ["format_nearest_tokens", "nearest_rows", "nearest_tokens", "readable_token"]

METRICS = ("euclidean", "cosine")
_SPARE = 16  # candidates beyond top_k that are measured again exactly, against rounding in the first, fast measure


def _distances(vectors: torch.Tensor, rows: torch.Tensor, metric: str) -> torch.Tensor:
    """Exact distances between `(n, dim)` vectors and `(n, k, dim)` rows, in fp64."""
    vectors, rows = vectors.double()[:, None], rows.double()
    if metric == "euclidean":
        return (vectors - rows).norm(dim=-1)
    return 1 - F.cosine_similarity(vectors, rows, dim=-1)


@torch.no_grad()
def nearest_rows(
    vectors: torch.Tensor, table: torch.Tensor, top_k: int = 5, metric: str = "euclidean", chunk_bytes: int = 2**26
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a table nearest to each vector.

    Args:
        vectors (`torch.Tensor`): `(num_vectors, dim)`.
        table (`torch.Tensor`): `(num_rows, dim)`, such as the token embedding's weight.
        top_k (`int`, *optional*, defaults to 5): how many; at most `num_rows` come back.
        metric (`str`, *optional*, defaults to `"euclidean"`): or `"cosine"`, 1 - cosine similarity.
        chunk_bytes (`int`, *optional*, defaults to 64 MiB): about how much memory the distances take at a time.

    Returns:
        distances `(num_vectors, top_k)`, fp64, ascending, and row numbers `(num_vectors, top_k)`, int64; of equal
        distances the smaller row number comes first.
    """
    if metric not in METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(map(repr, METRICS))}, got {metric!r}.")
    check_counts(top_k=top_k)
    vectors = vectors.detach().to(table.device).float()
    top_k = min(top_k, len(table))
    width = min(top_k + _SPARE, len(table))
    # Ranks rows; |v|² is the same for all of them and is left out.
    if metric == "euclidean":
        half_squares = torch.cat([part.float().square().sum(dim=1) for part in table.split(4096)]) / 2
    else:
        norms = torch.cat([part.float().norm(dim=1) for part in table.split(4096)]).clamp_min(1e-12)
    all_distances, all_ids = [], []
    rows_at_a_time = max(1, chunk_bytes // (4 * len(table)))
    for part in vectors.split(rows_at_a_time):
        scores = part.to(table.dtype) @ table.T if table.dtype == torch.float32 else part @ table.float().T
        scores = scores - half_squares if metric == "euclidean" else scores / norms
        ids = scores.topk(width, dim=-1).indices.sort(dim=-1).values
        exact = torch.cat(
            [_distances(v[None], table[i][None], metric) for v, i in zip(part, ids)]
        )  # one vector at a time: (top_k, dim) each
        order = exact.sort(dim=-1, stable=True)
        all_distances.append(order.values[:, :top_k])
        all_ids.append(ids.gather(1, order.indices[:, :top_k]))
    return torch.cat(all_distances), torch.cat(all_ids)


def readable_token(tokenizer: Any, token_id: int) -> str:
    """A vocabulary entry as a reader sees it: "photo" for a whole word, "pho-" for a piece that goes on."""
    raw = tokenizer.convert_ids_to_tokens(token_id)
    if raw is None or token_id in tokenizer.all_special_ids:
        return raw or f"[{token_id}]"
    text = tokenizer.decode([token_id]).strip()
    if not text or "\ufffd" in text or not text.isprintable():
        return raw  # part of a character, or nothing that can be seen
    return text if raw.endswith("</w>") else f"{text}-"


def nearest_tokens(
    model: Any,
    top_k: int = 5,
    metric: str = "euclidean",
    adapter_name: str | None = None,
    max_classes: int | None = None,
) -> Any:
    """For each context vector the nearest vocabulary entries.

    Args:
        model (`CoOpModel`): whose context.
        top_k (`int`, *optional*, defaults to 5): how many entries for each vector.
        metric (`str`, *optional*, defaults to `"euclidean"`): the paper's; or `"cosine"`, 1 - cosine similarity.
        adapter_name (`str`, *optional*, defaults to the active adapter): which adapter.
        max_classes (`int`, *optional*, defaults to all): of a class-specific context, how many classes.

    Returns:
        For a unified context a list of M lists, one for each vector, of
        `{"token": str, "id": int, "distance": float}`, nearest first. `token` is the entry as a reader sees it; a
        piece of a word ends in "-". For a class-specific context a dictionary of such lists by class name.

    Raises:
        ValueError: no such adapter, an unknown metric, or a bad `top_k`.

    Example:

    ```python
    >>> nearest_tokens(model, top_k=1)[0]
    [{'token': 'potd', 'id': 18562, 'distance': 1.7136}]
    ```
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.adapters:
        raise ValueError(f"there is no adapter named {name!r}; this model has {', '.join(map(repr, model.adapters))}.")
    context, config = model.adapters[name].context, model.adapters[name].config
    names = config.class_names[:max_classes] if config.class_specific else None
    if names is not None:
        context = context[: len(names)]
    embedding = model.family.token_embedding
    with align_module_device(embedding):
        distances, ids = nearest_rows(context.detach().flatten(0, -2), embedding.weight, top_k, metric)
    words = {token_id: readable_token(model.tokenizer, token_id) for token_id in set(ids.flatten().tolist())}
    entries = [
        [{"token": words[i], "id": i, "distance": d} for i, d in zip(row_ids, row_distances)]
        for row_ids, row_distances in zip(ids.tolist(), distances.tolist())
    ]
    if names is None:
        return entries
    return {c: entries[k * config.n_ctx : (k + 1) * config.n_ctx] for k, c in enumerate(names)}


def format_nearest_tokens(nearest: Any, max_classes: int = 20) -> str:
    """What [`nearest_tokens`] returns, as a table for the terminal.

    Args:
        nearest (`list` or `dict`): as [`nearest_tokens`] returns it.
        max_classes (`int`, *optional*, defaults to 20): of a class-specific context, how many classes to show.

    Returns:
        `str`: one line for each context vector, `1  potd 1.7136  that 1.4015 ...`; distances with four decimals.
    """
    if isinstance(nearest, dict):
        parts = [f"{name}\n{format_nearest_tokens(rows)}" for name, rows in list(nearest.items())[:max_classes]]
        if len(nearest) > max_classes:
            parts.append(f"... and {len(nearest) - max_classes} more classes")
        return "\n\n".join(parts)
    cells = [[f"{entry['token']} {entry['distance']:.4f}" for entry in row] for row in nearest]
    widths = [max(map(len, column)) for column in zip(*cells)]
    number = len(str(len(cells)))
    lines = [
        f"{k:>{number}}  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
        for k, row in enumerate(cells, start=1)
    ]
    return "\n".join(line.rstrip() for line in lines)
