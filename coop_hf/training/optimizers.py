"""`TensorAdam`, the fast recipe's optimizer: the gradient's own direction, in steps of a known size."""

from collections.abc import Callable
from typing import Any

import torch


__all__ = ["TensorAdam"]


class TensorAdam(torch.optim.Optimizer):
    """AdamW with one second moment for a whole tensor instead of one for each value.

    With g the gradient, n the product of its last two dimensions and bias corrected as in Adam:

        m = mean of g        v = mean of ‖g‖² / n        p = (1 - lr · weight_decay) p - lr · m / (√v + eps)

    Adam takes every value about as far as any other, which makes noise of what a few images say little about. Here
    values keep the gradient's proportions, and `lr` still says how far a step goes, whatever the gradient's size: an
    unchanging gradient moves the last two dimensions by `lr`, in the root mean square. Dimensions before them share
    one step, so that contexts of many classes go together no further than one context of all.

    Args:
        params: as of any optimizer.
        lr (`float`): size of a step.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): of both means.
        eps (`float`, *optional*, defaults to 1e-8): below which a gradient counts as none.
        weight_decay (`float`, *optional*, defaults to 0): decoupled, as in AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient, state = parameter.grad, self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["step"] += 1
                first, second = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
                # Few operations, none of which asks the device for a number: each costs as much as a small context.
                flat = gradient.float().flatten()
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                share = (1 - beta2) / max(1, parameter.shape[-2:].numel())
                state["exp_avg_sq"].mul_(beta2).add_(torch.dot(flat, flat), alpha=share)
                root = state["exp_avg_sq"].sqrt().mul_(second**-0.5).add_(group["eps"])
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / first)
        return loss
