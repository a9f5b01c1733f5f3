"""The tokens of many prompts side by side: what the shared-prefix pass sends through the layers."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .layout import PromptLayout


__all__ = ["Tokens", "first_fit", "pack_tokens"]


@dataclass
class Tokens:
    """The tokens that go through the layers: a prefix of P tokens, then B blocks of N live tokens; T = P + B * N.

    Attributes:
        tokens, positions, class_index (`torch.Tensor`): `(T,)`: id or -1 - k for context slot k, position in the
            prompt, and class (-1 for prefix and padding).
        slot_places, slots, slot_classes (`torch.Tensor`): where the context slots are among the T tokens, which slot
            each is, and of which class (0 for the prefix).
        mask (`torch.Tensor`): `(B, 1, N, left + N)`, true where a live token looks.
        eos_mask (`torch.Tensor`): `(B, 1, G, left + N)`, its rows of EOS.
        eos_places (`torch.Tensor`): `(B * G,)`, EOS of each block's first, second ... class among the T tokens.
        class_slots (`torch.Tensor`): `(num_classes,)`, each class's place in `eos_places`.
        num_prefix, num_blocks, width (`int`): P, B and N.
    """

    tokens: Tensor
    positions: Tensor
    class_index: Tensor
    slot_places: Tensor
    slots: Tensor
    slot_classes: Tensor
    mask: Tensor
    eos_mask: Tensor
    eos_places: Tensor
    class_slots: Tensor
    num_prefix: int
    num_blocks: int
    width: int
    n_ctx: int

    def to(self, device: torch.device) -> "Tokens":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
        return Tokens(**moved)


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Puts items of these lengths into bins of `capacity`, longest first, each into the first bin with room.

    All items of one length go through the bins once, so the time grows with the items, not with their square.
    """
    by_length: dict[int, list[int]] = {}
    for item, length in enumerate(lengths):
        by_length.setdefault(length, []).append(item)
    shortest = min(by_length, default=0)
    bins: list[list[int]] = []
    room: list[int] = []
    has_room: list[int] = []
    for length in sorted(by_length, reverse=True):
        items = by_length[length]
        placed = 0
        for b in has_room:
            while room[b] >= length and placed < len(items):
                bins[b].append(items[placed])
                room[b] -= length
                placed += 1
            if placed == len(items):
                break
        while placed < len(items):
            count = max(1, capacity // length) if length else len(items)
            bins.append(items[placed : placed + count])
            room.append(capacity - length * len(bins[-1]))
            has_room.append(len(bins) - 1)
            placed += count
        has_room = [b for b in has_room if room[b] >= max(shortest, 1)]
    return bins


def _offsets(sizes: Tensor) -> Tensor:
    """For groups of these sizes, one after the other, the place of each element in its group."""
    return torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)


def _side_by_side(
    rows: dict[int, list[int]], starts: dict[int, int], bins: list[list[int]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token rows of the classes in each bin, one after the other: tokens, positions and classes, each (B, N)."""
    order = [c for members in bins for c in members]
    lengths = torch.tensor([len(rows[c]) for c in order])
    filled = torch.tensor([sum(len(rows[c]) for c in members) for members in bins])  # tokens of each bin
    width = int(filled.max())
    tokens = torch.full((len(bins), width), pad_id)
    positions = torch.zeros(len(bins), width, dtype=torch.long)
    class_index = torch.full((len(bins), width), -1)
    places = torch.arange(len(bins)).repeat_interleave(filled), _offsets(filled)
    tokens[places] = torch.tensor([token for c in order for token in rows[c]], dtype=torch.long)
    first = torch.tensor([starts[c] for c in order])
    positions[places] = first.repeat_interleave(lengths) + _offsets(lengths)
    class_index[places] = torch.tensor(order).repeat_interleave(lengths)
    return tokens, positions, class_index


def _looks_at(
    query_class: Tensor, query_position: Tensor, key_class: Tensor, key_position: Tensor, num_prefix: int
) -> Tensor:
    """(B, 1, queries, prefix + keys), true for the prefix and for tokens of one's own class up to oneself."""
    own = (query_class[:, :, None] == key_class[:, None, :]) & (query_position[:, :, None] >= key_position[:, None, :])
    prefix = own.new_ones(*own.shape[:2], num_prefix)
    return torch.cat([prefix, own], dim=-1)[:, None]


def pack_tokens(
    layout: PromptLayout,
    classes: range,
    num_prefix: int,
    live_starts: list[int],
    block_size: int,
    constants: bool = False,
) -> Tokens:
    """Puts prefix and live tokens of some classes side by side.

    Args:
        layout (`PromptLayout`): the prompts.
        classes (`range`): which classes.
        num_prefix (`int`): how many tokens all prompts begin with.
        live_starts (`list[int]`): for each class of the layout, where its live part begins.
        block_size (`int`): live tokens of a block, unless one class has more.
        constants (`bool`, *optional*, defaults to `False`): pack the tokens between prefix and live part instead, in
            the blocks of their classes.
    """
    pad_id, starts = layout.eos_token_id, live_starts
    has_slots = any(token < 0 for token in layout.tokens[0][:num_prefix])
    live = {c: layout.tokens[c][starts[c] :] for c in classes}
    constant = {c: layout.tokens[c][num_prefix : starts[c]] for c in classes}
    bins = first_fit([len(live[c]) for c in classes], max(block_size, max(map(len, live.values()))))
    bins = [[classes[i] for i in members] for members in bins]
    live_tokens = _side_by_side(live, {c: starts[c] for c in classes}, bins, pad_id)
    constant_tokens = _side_by_side(constant, dict.fromkeys(classes, num_prefix), bins, pad_id)
    if constants:
        tokens, positions, class_index = constant_tokens
        mask = _looks_at(class_index, positions, class_index, positions, num_prefix)
    else:
        tokens, positions, class_index = live_tokens
        # Padding in the constants belongs to no class, so no live token looks at it.
        constant_index = torch.where(constant_tokens[2] < 0, -2, constant_tokens[2])
        keys = (torch.cat([constant_index, class_index], 1), torch.cat([constant_tokens[1], positions], 1))
        mask = _looks_at(class_index, positions, *keys, num_prefix)
    blocks, width = tokens.shape
    # The prefix goes through the layers with the live tokens only where it learns.
    in_front = num_prefix if has_slots and not constants else 0
    prefix = torch.tensor(layout.tokens[0][:in_front], dtype=torch.long)
    flat = torch.cat([prefix, tokens.flatten()])
    flat_classes = torch.cat([torch.full((in_front,), -1), class_index.flatten()])
    places = (flat < 0).nonzero()[:, 0]
    members = torch.tensor([len(own) for own in bins])
    num_slots = int(members.max())
    order = [c for own in bins for c in own]
    block, slot = torch.arange(blocks).repeat_interleave(members), _offsets(members)
    live_lengths = torch.zeros(blocks, num_slots, dtype=torch.long)
    live_lengths[block, slot] = torch.tensor([len(live[c]) for c in order])
    eos = torch.zeros(blocks, num_slots, dtype=torch.long)
    eos[block, slot] = (live_lengths.cumsum(1) - 1)[block, slot]
    class_slots = torch.zeros(len(classes), dtype=torch.long)
    class_slots[torch.tensor(order) - classes.start] = block * num_slots + slot
    rows = torch.arange(blocks)[:, None]
    return Tokens(
        tokens=flat,
        positions=torch.cat([torch.arange(in_front), positions.flatten()]),
        class_index=flat_classes,
        slot_places=places,
        slots=-1 - flat[places],
        slot_classes=flat_classes[places].clamp_min(0),
        mask=mask,
        eos_mask=mask if constants else mask[rows, :, eos].transpose(1, 2),
        eos_places=(in_front + rows * width + eos).flatten(),
        class_slots=class_slots,
        num_prefix=in_front,
        num_blocks=blocks,
        width=width,
        n_ctx=layout.n_ctx,
    )
