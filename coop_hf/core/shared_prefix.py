"""The fast pass: the same class embeddings as the plain pass, without computing anything twice.

The text tower is causal: what a token becomes depends only on the tokens before it. So in the prompts of many classes

    end, unified       [SOS] [V]1 ... [V]M | cat . [EOS]             left of the bar: the same for every class
                       [SOS] [V]1 ... [V]M | sea lion . [EOS]
    middle, unified    [SOS] [V]1 ... [V]M/2 | cat [V]M/2+1 ... [V]M . [EOS]
    class-specific     [SOS] | [V]1 ... [V]M cat . [EOS]             left of the bar: a constant
    front              [SOS] | cat ‖ [V]1 ... [V]M . [EOS]           left of the double bar: constants

everything falls into three parts, and attention needs only keys and values of what stands to the left:

1. the **shared** part runs once for all classes. Where it holds context vectors it runs at every step, with gradients;
2. the **constant** part, class tokens that no context vector precedes, runs once for ever;
3. the **live** part runs for each class. The live tokens of several classes stand side by side in blocks of
   `BLOCK_SIZE` tokens, unpadded, and a mask lets each see the shared part, its own class's constants and the live
   tokens before it in its own class.

In the last layer only EOS asks for anything: its row alone goes through the last query, output and MLP.

The layers' own projections, norms and MLPs are called, so LoRA-merged, quantised or cast layers work as they do in
the base; attention itself is `scaled_dot_product_attention`, equal to every attention implementation of transformers.
"""

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel
from transformers.activations import QuickGELUActivation

from .layout import PromptLayout
from .text_tower import prompt_embeddings


__all__ = ["BLOCK_SIZE", "SharedPrefixPass", "class_parallel_features"]

BLOCK_SIZE = 64  # tokens: large enough for efficient matrix products, small enough that masked-out scores cost little


@dataclass
class _Blocks:
    """The live tokens of a run of classes, side by side in B blocks of N tokens; and K constant tokens a block.

    Attributes:
        tokens, positions, class_index (`torch.Tensor`): `(B, N)`, of the live tokens: id or -1 - k for context slot k,
            position in the prompt, and class (-1 for padding).
        mask (`torch.Tensor`): `(B, 1, N, shared + K + N)`, true where a live token looks.
        constant_tokens, constant_positions (`torch.Tensor`): `(B, K)`; K is 0 except in front.
        constant_mask (`torch.Tensor`): `(B, 1, K, shared + K)`.
        eos_places (`torch.Tensor`): `(B, G)`, where in its block EOS of the block's first, second ... class stands.
        class_slots (`torch.Tensor`): `(num_classes,)`, each class's place in the flattened `eos_places`.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    class_index: torch.Tensor
    mask: torch.Tensor
    constant_tokens: torch.Tensor
    constant_positions: torch.Tensor
    constant_mask: torch.Tensor
    eos_places: torch.Tensor
    class_slots: torch.Tensor

    def to(self, device) -> "_Blocks":
        return _Blocks(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def _first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Puts items of these lengths into bins of `capacity`, longest first, each into the first bin with room."""
    bins: list[list[int]] = []
    room: list[int] = []
    first_open = 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for b in range(first_open, len(bins)):
            if room[b] >= lengths[item]:
                break
        else:
            b = len(bins)
            bins.append([])
            room.append(capacity)
        bins[b].append(item)
        room[b] -= lengths[item]
        while first_open < len(bins) and room[first_open] == 0:
            first_open += 1
    return bins


def _side_by_side(rows: dict[int, list[int]], starts: dict[int, int], bins: list[list[int]], pad_id: int):
    """Token rows of the classes in each bin, one after the other: tokens, positions and classes, each (B, N)."""
    width = max(sum(len(rows[c]) for c in members) for members in bins)
    tokens = torch.full((len(bins), width), pad_id)
    positions = torch.zeros(len(bins), width, dtype=torch.long)
    class_index = torch.full((len(bins), width), -1)
    for b, members in enumerate(bins):
        flat = [(token, starts[c] + i, c) for c in members for i, token in enumerate(rows[c])]
        if flat:
            columns = torch.tensor(flat).T
            tokens[b, : len(flat)], positions[b, : len(flat)], class_index[b, : len(flat)] = columns
    return tokens, positions, class_index


def _looks_at(query_class, query_position, key_class, key_position, num_shared: int) -> torch.Tensor:
    """(B, 1, queries, shared + keys), true for the shared part and for tokens of one's own class up to oneself."""
    own = (query_class[:, :, None] == key_class[:, None, :]) & (query_position[:, :, None] >= key_position[:, None, :])
    shared = own.new_ones(*own.shape[:2], num_shared)
    return torch.cat([shared, own], dim=-1)[:, None]


class _QuickGELU(torch.autograd.Function):
    """x · sigmoid(1.702 x). Keeps x alone, and on the CPU goes in slices whose intermediate values stay in cache."""

    @staticmethod
    def _slices(x: torch.Tensor) -> int:
        return 128 if x.device.type == "cpu" else x.shape[0]

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        result = torch.empty_like(x)
        rows = _QuickGELU._slices(x)
        for x_slice, out in zip(x.split(rows), result.split(rows)):
            torch.mul(x_slice, 1.702, out=out).sigmoid_().mul_(x_slice)
        return result

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        result = torch.empty_like(x)
        rows = _QuickGELU._slices(x)
        for x_slice, grad_slice, out in zip(x.split(rows), grad.split(rows), result.split(rows)):
            # With s = sigmoid(1.702 x): d(x s)/dx = s (1 + 1.702 x (1 - s)).
            s = torch.mul(x_slice, 1.702).sigmoid_()
            torch.sub(1, s, out=out).mul_(x_slice).mul_(1.702).add_(1).mul_(s).mul_(grad_slice)
        return result


def _heads(layer, projected: torch.Tensor) -> torch.Tensor:
    """(..., tokens, dim) to (..., tokens, heads, head_dim)."""
    return projected.unflatten(-1, (-1, layer.self_attn.head_dim))


def _attend(layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs) -> torch.Tensor:
    """Attention over (rows, tokens, heads, head_dim), through the layer's output projection."""
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=layer.self_attn.scale, **kwargs
    )
    return layer.self_attn.out_proj(attended.transpose(1, 2).flatten(2))


def _mlp(layer, hidden_states: torch.Tensor) -> torch.Tensor:
    mlp = layer.mlp
    if not isinstance(mlp.activation_fn, QuickGELUActivation) or torch.compiler.is_compiling():
        return mlp(hidden_states)
    inner = mlp.fc1(hidden_states)
    return mlp.fc2(_QuickGELU.apply(inner.flatten(0, -2)).view_as(inner))


def _run_layers(text_model, hidden_states, left_keys_values, mask, eos_places=None):
    """The layers of the tower over blocks of tokens, given keys and values of what stands to the left of them.

    Args:
        text_model (`CLIPTextModel`): the tower.
        hidden_states (`torch.Tensor`): `(B, N, dim)`.
        left_keys_values (`list[list[tuple]]`): for each layer the (key, value) pairs to the left, in order, each
            `(B or 1, tokens, heads, head_dim)`.
        mask (`torch.Tensor`, *optional*): `(B, 1, N, everything to the left + N)`; `None`: causal, with nothing to
            the left.
        eos_places (`torch.Tensor`, *optional*): `(B, G)`, see `_Blocks`. Given: returns the last layer's hidden
            states there, `(B, G, dim)`. Not given: returns each layer's (key, value), `(B, N, heads, head_dim)`.
    """
    layers = text_model.encoder.layers
    keys_values = []
    for index, layer in enumerate(layers):
        is_last = index == len(layers) - 1
        normed = layer.layer_norm1(hidden_states)
        key = own_key = _heads(layer, layer.self_attn.k_proj(normed))
        value = own_value = _heads(layer, layer.self_attn.v_proj(normed))
        if eos_places is None:
            keys_values.append((own_key, own_value))
            if is_last:
                return keys_values
        elif is_last:
            rows = torch.arange(len(eos_places), device=eos_places.device)[:, None]
            hidden_states, normed = hidden_states[rows, eos_places], normed[rows, eos_places]
            mask = mask[rows, :, eos_places].transpose(1, 2)
        left = left_keys_values[index] if left_keys_values else []
        if left:
            blocks = len(hidden_states)
            key = torch.cat([k.expand(blocks, -1, -1, -1) for k, _ in left] + [own_key], dim=1)
            value = torch.cat([v.expand(blocks, -1, -1, -1) for _, v in left] + [own_value], dim=1)
        query = _heads(layer, layer.self_attn.q_proj(normed))
        hidden_states = hidden_states + _attend(layer, query, key, value, attn_mask=mask, is_causal=mask is None)
        hidden_states = hidden_states + _mlp(layer, layer.layer_norm2(hidden_states))
    return hidden_states


class SharedPrefixPass:
    """The fast pass for the prompts of one list of classes on one base model; made once, called at every step.

    Args:
        base_model (`CLIPModel`): the frozen base.
        layout (`PromptLayout`): the prompts.
        class_specific (`bool`, *optional*, defaults to `False`): whether each class has its own context.
    """

    def __init__(self, base_model: CLIPModel, layout: PromptLayout, class_specific: bool = False):
        self.base_model = base_model
        self.layout = layout
        self.num_shared = 1 if class_specific else 1 + layout.num_shared_slots
        num_constant = layout.name_lengths if layout.class_token_position == "front" else [0] * layout.num_classes
        self.live_starts = [self.num_shared + n for n in num_constant]
        self._blocks: dict = {}
        self._constants: dict = {}

    def __call__(
        self, context: torch.Tensor | None, chunk_size: int | None = None, classes: range | None = None
    ) -> torch.Tensor:
        """Class embeddings.

        Args:
            context (`torch.Tensor`, *optional*): `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`; `None` for a layout
                without context slots.
            chunk_size (`int`, *optional*): how many classes are computed at a time. With gradients, a chunk is
                computed again in the backward pass instead of being kept: memory is bounded, the numbers are the same.
            classes (`range`, *optional*, defaults to all): the classes to compute.

        Returns:
            `torch.Tensor` `(len(classes), projection_dim)`, projected, not normalised.
        """
        classes = range(self.layout.num_classes) if classes is None else classes
        if self.num_shared == 1 or context is None:
            shared = self._constant("shared", lambda: self._shared_keys_values(None))
        else:
            shared = self._shared_keys_values(context)
        if chunk_size is None or chunk_size >= len(classes):
            return self._live_features(context, shared, classes, keep_constants=True)
        features = []
        for start in range(classes.start, classes.stop, chunk_size):
            chunk = range(start, min(start + chunk_size, classes.stop))
            if torch.is_grad_enabled():
                features.append(
                    checkpoint(
                        self._live_features, context, shared, chunk, use_reentrant=False, preserve_rng_state=False
                    )
                )
            else:
                features.append(self._live_features(context, shared, chunk))
        return torch.cat(features)

    def equal_shares(self, num_shares: int) -> list[int]:
        """Bounds that cut the classes into runs, none empty, of about equally many live tokens."""
        lengths = [len(row) - start for row, start in zip(self.layout.tokens, self.live_starts)]
        total, bounds, seen = sum(lengths), [0], 0
        for c, length in enumerate(lengths):
            left = num_shares - len(bounds)
            if left and c > bounds[-1]:
                enough = seen + length / 2 >= total * len(bounds) / num_shares
                if enough or len(lengths) - c == left:
                    bounds.append(c)
            seen += length
        return [*bounds, len(lengths)]

    def _shared_keys_values(self, context):
        """Part 1: keys and values `(1, num_shared, heads, head_dim)` of the shared tokens, for each layer."""
        text_model = self.base_model.text_model
        tokens = torch.tensor([self.layout.tokens[0][: self.num_shared]], device=self._device)
        return _run_layers(text_model, prompt_embeddings(text_model, tokens, context), None, mask=None)

    def _constant_keys_values(self, shared, blocks: _Blocks):
        """Part 2: keys and values `(B, K, heads, head_dim)` of class tokens that no context vector precedes."""
        text_model = self.base_model.text_model
        embeddings = prompt_embeddings(text_model, blocks.constant_tokens, None, blocks.constant_positions)
        return _run_layers(text_model, embeddings, [[pair] for pair in shared], blocks.constant_mask)

    def _live_features(self, context, shared, classes: range, keep_constants: bool = False) -> torch.Tensor:
        """Part 3: the live tokens of these classes, to their class embeddings."""
        text_model = self.base_model.text_model
        blocks = self._get_blocks(classes)
        left = [[pair] for pair in shared]
        if blocks.constant_tokens.shape[1]:
            if keep_constants:
                constants = self._constant(classes, lambda: self._constant_keys_values(shared, blocks))
            else:
                with torch.no_grad():
                    constants = self._constant_keys_values(shared, blocks)
            left = [[*pairs, constant] for pairs, constant in zip(left, constants)]
        embeddings = prompt_embeddings(
            text_model, blocks.tokens, context, blocks.positions, blocks.class_index.clamp_min(0)
        )
        pooled = _run_layers(text_model, embeddings, left, blocks.mask, blocks.eos_places)
        pooled = pooled.flatten(0, 1)[blocks.class_slots]
        return self.base_model.text_projection(text_model.final_layer_norm(pooled))

    @property
    def _device(self) -> torch.device:
        return self.base_model.text_model.embeddings.position_ids.device

    def weights_state(self) -> tuple:
        """Changes whenever the tower's weights are written to, moved or cast, or autocast is switched."""
        device = self._device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        modules = (self.base_model.text_model, self.base_model.text_projection)
        return (device, autocast, tuple((id(w), w._version, w.dtype) for m in modules for w in m.parameters()))

    def _constant(self, key, compute):
        """`compute()`, kept until the base's weights change."""
        state = self.weights_state()
        if key not in self._constants or self._constants[key][0] != state:
            with torch.inference_mode(False), torch.no_grad():  # training may need it too
                self._constants[key] = (state, compute())
        return self._constants[key][1]

    def _get_blocks(self, classes: range) -> _Blocks:
        if classes not in self._blocks or self._blocks[classes].tokens.device != self._device:
            with torch.inference_mode(False):
                self._blocks[classes] = self._make_blocks(classes).to(self._device)
        return self._blocks[classes]

    def _make_blocks(self, classes: range) -> _Blocks:
        layout, pad_id = self.layout, self.layout.eos_token_id
        live = {c: layout.tokens[c][self.live_starts[c] :] for c in classes}
        constant = {c: layout.tokens[c][self.num_shared : self.live_starts[c]] for c in classes}
        longest = max(map(len, live.values()))
        bins = _first_fit([len(live[c]) for c in classes], max(BLOCK_SIZE, longest))
        bins = [[classes[i] for i in members] for members in bins]
        starts = {c: self.live_starts[c] for c in classes}
        tokens, positions, class_index = _side_by_side(live, starts, bins, pad_id)
        constant_tokens, constant_positions, constant_index = _side_by_side(
            constant, dict.fromkeys(classes, self.num_shared), bins, pad_id
        )
        # Padding in the constants belongs to no class, so no live token looks at it.
        constant_index = torch.where(constant_index < 0, -2, constant_index)
        num_slots = max(map(len, bins))
        eos_places = torch.zeros(len(bins), num_slots, dtype=torch.long)
        class_slots = torch.zeros(len(classes), dtype=torch.long)
        for b, members in enumerate(bins):
            place = 0
            for slot, c in enumerate(members):
                place += len(live[c])
                eos_places[b, slot] = place - 1
                class_slots[c - classes.start] = b * num_slots + slot
        return _Blocks(
            tokens=tokens,
            positions=positions,
            class_index=class_index,
            mask=_looks_at(
                class_index,
                positions,
                torch.cat([constant_index, class_index], dim=1),
                torch.cat([constant_positions, positions], dim=1),
                self.num_shared,
            ),
            constant_tokens=constant_tokens,
            constant_positions=constant_positions,
            constant_mask=_looks_at(
                constant_index, constant_positions, constant_index, constant_positions, self.num_shared
            ),
            eos_places=eos_places,
            class_slots=class_slots,
        )


class _Gather(torch.autograd.Function):
    """Concatenates the rows of all processes; each gets back the gradients of its own rows, summed over processes."""

    @staticmethod
    def forward(ctx, own, sizes):
        ctx.sizes = sizes
        parts = [own.new_empty(size, *own.shape[1:]) for size in [max(sizes)] * len(sizes)]
        padded = torch.cat([own, own.new_zeros(max(sizes) - len(own), *own.shape[1:])])  # gathers want equal sizes
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.split(ctx.sizes)[dist.get_rank()], None


def class_parallel_features(
    shared_pass: SharedPrefixPass, context: torch.Tensor, chunk_size: int | None = None
) -> torch.Tensor:
    """Class embeddings, of which each process of the default group computes its share; every process gets them all.

    All processes must call this together, with the same context. The gradient that a process gets holds the share of
    its classes in the sum of all processes' losses; the mean over processes, which `DistributedDataParallel` takes,
    is the gradient of the mean loss.

    Args:
        shared_pass (`SharedPrefixPass`): the pass.
        context (`torch.Tensor`): `(n_ctx, dim)` or `(num_classes, n_ctx, dim)`.
        chunk_size (`int`, *optional*): see `SharedPrefixPass.__call__`.

    Returns:
        `torch.Tensor` `(num_classes, projection_dim)`.
    """
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    num_classes = shared_pass.layout.num_classes
    if num_processes == 1 or num_classes < num_processes:
        return shared_pass(context, chunk_size)
    bounds = shared_pass.equal_shares(num_processes)
    sizes = [stop - start for start, stop in zip(bounds, bounds[1:])]
    rank = dist.get_rank()
    own = shared_pass(context, chunk_size, range(bounds[rank], bounds[rank + 1]))
    return _Gather.apply(own, sizes)
