"""The fast pass: the same class embeddings as the plain pass, without computing anything twice.

The text tower is causal: what a token becomes depends only on the tokens before it. So in the prompts of many classes

    end, unified       [SOS] [V]1 ... [V]M | cat . [EOS]             left of the bar: the same for every class
                       [SOS] [V]1 ... [V]M | sea lion . [EOS]
    middle, unified    [SOS] [V]1 ... [V]M/2 | cat [V]M/2+1 ... [V]M . [EOS]
    class-specific     [SOS] | [V]1 ... [V]M cat . [EOS]             left of the bar: a constant
    front              [SOS] | cat ‖ [V]1 ... [V]M . [EOS]           left of the double bar: constants

everything falls into three parts, and attention needs only keys and values of what stands to the left:

1. the **prefix** is what all prompts begin with. It runs once for all classes;
2. the **constant** part, tokens that no context vector precedes, runs once for ever;
3. the **live** part runs for each class. The live tokens of several classes stand side by side in blocks of
   `BLOCK_SIZE` tokens, unpadded, and a mask lets each see the prefix, its own class's constants and the live tokens
   before it in its own class.

Prefix and live part go through the layers together: norms, projections and MLPs see all tokens as one matrix, and only
attention tells them apart. In the last layer only EOS asks for anything: its row alone goes through the last query,
output and MLP. Deep prompts replace the context's places at the input of their layers. Where class-specific ones enter
behind unified ones (TCP), the tokens are rearranged at that layer: what was prefix becomes live. Prompts for each of
several images run side by side as further rows.

The layers' own projections, norms and MLPs are called, so LoRA, quantised or cast layers work as they do in the base;
attention itself is `scaled_dot_product_attention`, equal to every attention implementation of transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import QuickGELUActivation

from .families import Family, get_family
from .few_tokens import LinearLayers
from .layout import PromptLayout
from .packing import Tokens, pack_tokens
from .packing import first_fit as _first_fit  # noqa: F401
from .plain import TextPrompts, as_text_prompts, is_by_image


__all__ = ["BLOCK_SIZE", "SharedPrefixPass", "class_parallel_features"]

BLOCK_SIZE = 64  # tokens: large enough for efficient matrix products, small enough that masked-out scores cost little
# With prompts for each image, at most so many tokens are kept for the backward pass; more are computed again, in
# pieces of this size.
TOKENS_KEPT, TOKENS_AGAIN = 8192, 3072

KeysValues = list[tuple[Tensor, Tensor]]


class _QuickGELU(torch.autograd.Function):
    """x · sigmoid(1.702 x). Keeps x alone, and on the CPU goes in slices whose intermediate values stay in cache."""

    @staticmethod
    def _slices(x: Tensor) -> int:
        return 128 if x.device.type == "cpu" else x.shape[0]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        result = torch.empty_like(x)
        rows = _QuickGELU._slices(x)
        for x_slice, out in zip(x.split(rows), result.split(rows)):
            torch.mul(x_slice, 1.702, out=out).sigmoid_().mul_(x_slice)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result = torch.empty_like(x)
        rows = _QuickGELU._slices(x)
        for x_slice, grad_slice, out in zip(x.split(rows), grads[0].split(rows), result.split(rows)):
            # With s = sigmoid(1.702 x): d(x s)/dx = s (1 + 1.702 x (1 - s)).
            s = torch.mul(x_slice, 1.702).sigmoid_()
            torch.sub(1, s, out=out).mul_(x_slice).mul_(1.702).add_(1).mul_(s).mul_(grad_slice)
        return result


def _heads(layer: Any, projected: Tensor) -> Tensor:
    """(..., tokens, dim) to (..., tokens, heads, head_dim)."""
    return projected.unflatten(-1, (-1, layer.self_attn.head_dim))


def _attend(layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over (rows, tokens, heads, head_dim), to (rows, tokens, dim); without mask, causal."""
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=layer.self_attn.scale,
        attn_mask=mask,
        is_causal=mask is None,
    )
    return attended.transpose(1, 2).flatten(2)


def _mlp(layer: Any, hidden: Tensor, linear: LinearLayers) -> Tensor:
    mlp = layer.mlp
    if not isinstance(mlp.activation_fn, QuickGELUActivation) or torch.compiler.is_compiling():
        return mlp(hidden)
    inner = linear(mlp.fc1, hidden)
    activated = _QuickGELU.apply(inner.flatten(0, -2))  # type: ignore[no-untyped-call]
    return linear(mlp.fc2, activated.view_as(inner))


def _put(hidden: Tensor, part: Tokens, prompts: Tensor) -> Tensor:
    """Hidden states `(1 or images, T, dim)` with `prompts` `(images or 1, classes or 1, M, dim)` in the context slots;
    slots beyond M stay as they are."""
    places, slots, classes = part.slot_places, part.slots, part.slot_classes
    if prompts.shape[2] < part.n_ctx:
        own = slots < prompts.shape[2]
        places, slots, classes = places[own], slots[own], classes[own]
    if prompts.shape[1] > 1:
        slots = slots + classes * prompts.shape[2]
    # An embedding look-up, whose backward pass adds up in a fixed order.
    vectors = torch.stack([F.embedding(slots, own.flatten(0, 1)) for own in prompts])
    images = max(len(hidden), len(vectors))
    vectors = vectors.to(hidden.device, hidden.dtype).expand(images, -1, -1)
    return hidden.expand(images, -1, -1).index_copy(1, places, vectors)


class SharedPrefixPass:
    """The fast pass for the prompts of one list of classes on one base model; made once, called at every step.

    Args:
        base_model (`PreTrainedModel` or [`Family`]): the frozen base.
        layout (`PromptLayout`): the prompts.
        class_specific (`bool`, *optional*, defaults to `False`): whether each class has its own context.
    """

    def __init__(self, base_model: Any, layout: PromptLayout, class_specific: bool = False):
        self.family: Family = get_family(base_model)
        self.layout = layout
        self.class_specific = class_specific
        self.num_prefix = self._common_prefix(class_specific)
        self.live_starts = self._live_starts(self.num_prefix)
        self._parts: dict[Any, Any] = {}
        self._constants: dict[Any, Any] = {}
        self._specific: SharedPrefixPass | None = None
        self._linear = LinearLayers()

    @property
    def num_shared(self) -> int:
        """How many tokens run once for all classes."""
        return self.num_prefix

    def _common_prefix(self, class_specific: bool) -> int:
        """How many tokens all prompts begin with; the last of a prompt is never among them."""
        first, *others = self.layout.tokens
        length = min(map(len, self.layout.tokens)) - 1
        if class_specific:
            length = next((i for i, token in enumerate(first[:length]) if token < 0), length)
        for row in others:
            while row[:length] != first[:length]:
                length -= 1
        return length

    def _live_starts(self, num_prefix: int) -> list[int]:
        """Where the live part of each class begins: at its first context slot, unless the prefix holds one."""
        if any(token < 0 for token in self.layout.tokens[0][:num_prefix]):
            return [num_prefix] * self.layout.num_classes
        slots = [next((i for i, token in enumerate(row) if token < 0), num_prefix) for row in self.layout.tokens]
        return [max(num_prefix, first) for first in slots]

    def __call__(
        self,
        prompts: TextPrompts,
        chunk_size: int | None = None,
        classes: range | None = None,
    ) -> Tensor:
        """Class embeddings.

        Args:
            prompts (`torch.Tensor` or `dict[int, torch.Tensor]`, *optional*): context vectors `(n_ctx, dim)`,
                `(num_classes, n_ctx, dim)` or `(images, 1 or num_classes, n_ctx, dim)`, or such by layer; `None` for a
                layout without context slots.
            chunk_size (`int`, *optional*): how many classes are computed at a time. With gradients, a chunk is
                computed again in the backward pass instead of being kept: memory is bounded, the numbers are the same.
            classes (`range`, *optional*, defaults to all): the classes to compute.

        Returns:
            `torch.Tensor` `(len(classes), projection_dim)`, or `(images, len(classes), projection_dim)`; projected,
            not normalised.
        """
        by_layer = as_text_prompts(prompts)
        classes = range(self.layout.num_classes) if classes is None else classes
        images = max([1, *[len(value) for value in by_layer.values()]])
        chunk_size = min(chunk_size or len(classes), len(classes))
        groups = 1
        if images > 1:
            live = sum(len(self.layout.tokens[c]) - self.live_starts[c] for c in classes) * chunk_size // len(classes)
            tokens = live + self.num_prefix
            if images * tokens > TOKENS_KEPT:  # computed again in any case: then in small pieces, which cost no more
                groups = min(images, -(-images * tokens // TOKENS_AGAIN))
                chunk_size = -(-chunk_size // -(-tokens // TOKENS_AGAIN))
        once = chunk_size == len(classes) and groups == 1
        rows = []
        for own in _split_images(by_layer, images, groups):
            features = []
            for start in range(classes.start, classes.stop, chunk_size):
                chunk = range(start, min(start + chunk_size, classes.stop))
                if once or not torch.is_grad_enabled():
                    features.append(self._features(own, chunk, keep_constants=once))
                else:
                    features.append(
                        checkpoint(self._features, own, chunk, use_reentrant=False, preserve_rng_state=False)
                    )
            rows.append(torch.cat(features, dim=1) if len(features) > 1 else features[0])
        result = torch.cat(rows) if len(rows) > 1 else rows[0]
        return result if is_by_image(prompts) else result[0]

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

    # ------------------------------------------------------------------ the pass

    def _features(self, prompts: dict[int, Tensor], classes: range, keep_constants: bool = False) -> Tensor:
        """Class embeddings `(images, len(classes), projection_dim)`."""
        family, num_layers = self.family, len(self.family.text_layers)
        # Class-specific prompts that enter behind layer 0 make live what was prefix until then.
        turn = 0 if self.class_specific else next((k for k in sorted(prompts) if prompts[k].shape[1] > 1), num_layers)
        part = self._part(classes, self.num_prefix)
        left = self._left(classes, part, keep_constants)
        hidden = self._embed(part, prompts.get(0))
        if 0 < turn < num_layers:
            hidden = self._run(hidden, part, left, range(turn), prompts)
            specific, part, source = self._turned(classes)
            left = specific._left(classes, part, keep_constants)
            hidden = self._run(hidden[:, source], part, left, range(turn, num_layers), prompts)
        else:
            hidden = self._run(hidden, part, left, range(num_layers), prompts)
        return family.project_text(hidden[:, part.class_slots])

    def _embed(self, part: Tokens, context: Tensor | None) -> Tensor:
        """What the first layer sees, `(images, T, dim)`."""
        vectors = self.family.token_embedding(part.tokens.clamp_min(0))[None]
        if context is not None and len(part.slot_places):
            vectors = _put(vectors, part, context)
        return self.family.embed_text(vectors, part.positions[None])

    def _run(
        self,
        hidden: Tensor,
        part: Tokens,
        left: list[KeysValues] | None,
        layers: range,
        prompts: dict[int, Tensor],
        keys_values: KeysValues | None = None,
    ) -> Tensor:
        """Some layers of the tower.

        Args:
            hidden (`torch.Tensor`): `(images, T, dim)`.
            part (`Tokens`): the tokens.
            left (`list[list[tuple]]`, *optional*): for each layer the constant (key, value) pairs to the left of the
                live tokens, each `(B or 1, tokens, heads, head_dim)`.
            layers (`range`): which layers. Behind the last of the tower only the rows of EOS are left.
            prompts (`dict[int, torch.Tensor]`): what enters at layers behind 0.
            keys_values (`list`, *optional*): takes each layer's (key, value) of the live tokens; then the last layer
                goes no further.
        """
        images, num_prefix, linear = len(hidden), part.num_prefix, self._linear
        shape = (part.num_blocks, part.width)
        all_layers = self.family.text_layers
        mask = part.mask.repeat(images, 1, 1, 1) if images > 1 else part.mask
        for index in layers:
            layer = all_layers[index]
            if index and index in prompts and len(part.slot_places):
                hidden = _put(hidden, part, prompts[index])
                if len(hidden) != images:
                    images = len(hidden)
                    mask = part.mask.repeat(images, 1, 1, 1)
            normed = layer.layer_norm1(hidden)
            attention = layer.self_attn
            pair = [_heads(layer, linear(project, normed)) for project in (attention.k_proj, attention.v_proj)]
            own = [x[:, num_prefix:].unflatten(1, shape).flatten(0, 1) for x in pair]
            if keys_values is not None:
                keys_values.append((own[0], own[1]))
                if index == len(all_layers) - 1:
                    return hidden
            is_last = index == len(all_layers) - 1
            if is_last:
                hidden, normed = hidden[:, part.eos_places], normed[:, part.eos_places]
                mask = part.eos_mask.repeat(images, 1, 1, 1) if images > 1 else part.eos_mask
            query = _heads(layer, linear(attention.q_proj, normed))
            live = query if is_last else query[:, num_prefix:]
            live = live.unflatten(1, (part.num_blocks, -1)).flatten(0, 1)
            key, value = (self._with_left(x, y, left, index, i, part) for i, (x, y) in enumerate(zip(pair, own)))
            attended = _attend(layer, live, key, value, mask).unflatten(0, (images, -1)).flatten(1, 2)
            if num_prefix and not is_last:
                heads, keys, values = (x[:, :num_prefix] for x in (query, *pair))
                prefix = _attend(layer, heads, keys, values, None)
                attended = torch.cat([prefix, attended], dim=1)
            hidden = hidden + linear(attention.out_proj, attended)
            hidden = hidden + _mlp(layer, layer.layer_norm2(hidden), linear)
        return hidden

    @staticmethod
    def _with_left(
        flat: Tensor, own: Tensor, left: list[KeysValues] | None, index: int, which: int, part: Tokens
    ) -> Tensor:
        """Keys (or values) that each block sees: the prefix's, the constants', its own."""
        images, blocks = len(flat), part.num_blocks
        seen = []
        if part.num_prefix:
            prefix = flat[:, None, : part.num_prefix].expand(-1, blocks, -1, -1, -1)
            seen.append(prefix.flatten(0, 1) if images > 1 else prefix[0])
        for pair in left[index] if left else []:
            seen.append(pair[which].expand(blocks, -1, -1, -1).repeat(images, 1, 1, 1))
        return torch.cat([*seen, own], dim=1) if seen else own

    # ------------------------------------------------------------------ constants

    def _left(self, classes: range, part: Tokens, keep: bool) -> list[KeysValues] | None:
        """Keys and values of the constant prefix, and of the constants of each block."""
        if part.num_prefix:
            return None
        left = [[pair] for pair in self._constant("prefix", self._prefix_keys_values)]
        if any(self.live_starts[c] > self.num_prefix for c in classes):

            def compute() -> KeysValues:
                return self._keys_values(self._part(classes, self.num_prefix, constants=True), left)

            if keep:
                constants = self._constant(classes, compute)
            else:
                with torch.no_grad():
                    constants = compute()
            left = [[*pairs, constant] for pairs, constant in zip(left, constants)]
        return left

    def _prefix_keys_values(self) -> KeysValues:
        length, device = self.num_prefix, self.family.device
        tokens = torch.tensor(self.layout.tokens[0][:length], dtype=torch.long, device=device)
        positions = torch.arange(length, device=device)
        none = torch.zeros(0, dtype=torch.long, device=device)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
        part = Tokens(tokens, positions, none, none, none, none, mask, mask, none, none, 0, 1, length, 0)
        return self._keys_values(part, None)

    def _keys_values(self, part: Tokens, left: list[KeysValues] | None) -> KeysValues:
        found: KeysValues = []
        self._run(self._embed(part, None), part, left, range(len(self.family.text_layers)), {}, found)
        return found

    def forget(self) -> None:
        """Drops what was computed from the base's weights."""
        self._constants.clear()
        self._linear.forget()
        if self._specific is not None:
            self._specific.forget()

    def weights_state(self) -> tuple[Any, ...]:
        """See [`Family.text_state`]."""
        return self.family.text_state()

    def _constant(self, key: Any, compute: Callable[[], KeysValues]) -> KeysValues:
        """`compute()`, kept until the base's weights change."""
        kept = self._constants.get(key)  # read once: another thread may drop it
        if kept is not None and torch.compiler.is_compiling():
            return kept[1]  # a compiled step is of the weights that it was compiled with
        state = self.weights_state()
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # training may need it too
                kept = self._constants[key] = (state, compute())
        return kept[1]

    # ------------------------------------------------------------------ tokens

    def _part(self, classes: range, num_prefix: int, constants: bool = False) -> Tokens:
        key = (classes, num_prefix, constants)
        part = self._parts.get(key)
        if part is None or part.tokens.device != self.family.device:
            starts = self._live_starts(num_prefix)
            with torch.inference_mode(False):
                tokens = pack_tokens(self.layout, classes, num_prefix, starts, BLOCK_SIZE, constants)
                part = self._parts[key] = tokens.to(self.family.device)
        return part

    def _turned(self, classes: range) -> tuple["SharedPrefixPass", Tokens, Tensor]:
        """The pass in which all context slots are live, its tokens, and where each stands among the usual ones."""
        if self._specific is None:
            self._specific = SharedPrefixPass(self.family, self.layout, class_specific=True)
        before = self._part(classes, self.num_prefix)
        after = self._specific._part(classes, self._specific.num_prefix)
        key = ("source", classes)
        if key not in self._parts or self._parts[key].device != self.family.device:
            pairs = zip(before.class_index.tolist(), before.positions.tolist())
            where = {pair: place for place, pair in enumerate(pairs)}
            pairs = zip(after.class_index.tolist(), after.positions.tolist())
            source = [p if c >= 0 and p < before.num_prefix else where.get((c, p), 0) for c, p in pairs]
            self._parts[key] = torch.tensor(source, device=self.family.device)
        return self._specific, after, self._parts[key]


def _split_images(prompts: dict[int, Tensor], images: int, groups: int) -> list[dict[int, Tensor]]:
    """The prompts of several images in groups of about equal size."""
    bounds = [images * g // groups for g in range(groups + 1)]
    pairs = list(zip(bounds, bounds[1:]))
    return [{k: v[a:b] if len(v) > 1 else v for k, v in prompts.items()} for a, b in pairs]


class _Gather(torch.autograd.Function):
    """Concatenates the rows of all processes; each gets back the gradients of its own rows, summed over processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        parts = [own.new_empty(size, *own.shape[1:]) for size in [max(sizes)] * len(sizes)]
        padded = torch.cat([own, own.new_zeros(max(sizes) - len(own), *own.shape[1:])])  # gathers want equal sizes
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad.split(ctx.sizes)[dist.get_rank()], None


def class_parallel_features(
    shared_pass: SharedPrefixPass, prompts: TextPrompts, chunk_size: int | None = None
) -> Tensor:
    """Class embeddings, of which each process of the default group computes its share; every process gets them all.

    All processes must call this together, with the same prompts. The gradient that a process gets holds the share of
    its classes in the sum of all processes' losses; the mean over processes, which `DistributedDataParallel` takes,
    is the gradient of the mean loss.

    Args:
        shared_pass (`SharedPrefixPass`): the pass.
        prompts (`torch.Tensor` or `dict[int, torch.Tensor]`): as for the pass, but not by image.
        chunk_size (`int`, *optional*): see `SharedPrefixPass.__call__`.

    Returns:
        `torch.Tensor` `(num_classes, projection_dim)`.
    """
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    num_classes = shared_pass.layout.num_classes
    if num_processes == 1 or num_classes < num_processes:
        return shared_pass(prompts, chunk_size)
    bounds = shared_pass.equal_shares(num_processes)
    sizes = [stop - start for start, stop in zip(bounds, bounds[1:])]
    rank = dist.get_rank()
    own = shared_pass(prompts, chunk_size, range(bounds[rank], bounds[rank + 1]))
    return _Gather.apply(own, sizes)  # type: ignore[no-untyped-call]
