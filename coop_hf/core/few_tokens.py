"""Frozen linear layers for few tokens on a CPU.

A matrix product first brings the weights into the order that its kernel reads them in. With hundreds of tokens that
costs nothing beside the product; with the some sixty of ten classes it is a third of the time, at every step. Weights
that are frozen can be kept in that order, for the forward pass and, transposed, for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .families import is_bare


__all__ = ["MAX_TOKENS", "LinearLayers"]

MAX_TOKENS = 128  # more tokens gain nothing

# Operations that torch's own compiler uses for this, and has not made public.
_IS_AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)


class _OrderedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_weight: Tensor, backward_weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.backward_weight = backward_weight
        return torch.ops.mkldnn._linear_pointwise(x, forward_weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        product = torch.ops.mkldnn._linear_pointwise(grads[0].contiguous(), ctx.backward_weight, None, "none", [], "")
        return product, None, None, None


class LinearLayers:
    """Calls linear layers; those that it can, with weights in the kernel's order.

    The ordered weights are two copies of the layers' own, and are dropped when these change (`forget`). What is not a
    plain, frozen fp32 `nn.Linear` on a CPU, without hooks, is called as it is: LoRA, quantised and cast layers too.
    """

    def __init__(self) -> None:
        self._ordered: dict[int, tuple[Tensor, int, Tensor, Tensor]] = {}

    def forget(self) -> None:
        self._ordered.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"_ordered": {}}  # such tensors are neither copied nor pickled

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """`layer(x)` for `x` of shape `(..., dim)`."""
        if x.requires_grad and x.numel() // x.shape[-1] <= MAX_TOKENS and _can_order(layer, x):
            forward_weight, backward_weight = self._weights(layer, x.numel() // x.shape[-1])
            result: Tensor = _OrderedLinear.apply(x, forward_weight, backward_weight, layer.bias)  # type: ignore[no-untyped-call]
        else:
            result = layer(x)
        return result

    def _weights(self, layer: Any, tokens: int) -> tuple[Tensor, Tensor]:
        weight = layer.weight
        kept = self._ordered.get(id(layer))
        if kept is None or kept[0] is not weight or kept[1] != weight._version:
            with torch.inference_mode(False), torch.no_grad():
                order = torch.ops.mkldnn._reorder_linear_weight
                both = order(weight.detach(), tokens), order(weight.detach().t().contiguous(), tokens)
            kept = self._ordered[id(layer)] = (weight, weight._version, *both)
        return kept[2], kept[3]


def _can_order(layer: Any, x: Tensor) -> bool:
    return bool(
        not torch.compiler.is_compiling()
        and _IS_AVAILABLE
        and type(layer) is nn.Linear
        and is_bare(layer)
        and x.device.type == layer.weight.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and not layer.weight.requires_grad
        and (layer.bias is None or not layer.bias.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )
