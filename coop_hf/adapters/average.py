"""The mean of several adapters, as one more adapter: of several trainings of one prompt, or of several tasks."""

from dataclasses import replace
from typing import Any

import torch

from ..checks import clean_class_name, is_finite, shown
from .base import Adapter
from .heads import Head


__all__ = ["add_weighted_adapter"]

# What may differ between prompts that have a mean: the classes of a unified context, and where things come from.
_FREE = {"class_names", "template", "ctx_init", "base_model_name_or_path", "revision", "coop_hf_version"}


@torch.no_grad()
def add_weighted_adapter(
    model: Any,
    adapters: list[str],
    weights: list[float] | None = None,
    adapter_name: str = "mean",
    combination_type: str = "linear",
) -> None:
    """Adds the weighted mean of adapters of this model as one more adapter, without activating it.

    They must be prompts of one method and one shape, learned on one base; what is averaged is all that they learned.
    It takes classes and template from the first.

    Args:
        adapters (`list[str]`): names of at least two adapters of the model.
        weights (`list[float]`, *optional*, defaults to equal ones): one for each, not negative; only their ratios
            count.
        adapter_name (`str`, *optional*, defaults to `"mean"`): the new one's name.
        combination_type (`str`, *optional*, defaults to `"linear"`): PEFT's name for a mean, the only one there is.

    Raises:
        ValueError: unknown names, unfit weights, or adapters that have no mean; says what differs.
    """
    if combination_type != "linear":
        raise ValueError(f"`combination_type` must be 'linear', a weighted mean, got {combination_type!r}.")
    if not isinstance(adapters, (list, tuple)) or len(adapters) < 2:
        raise ValueError(f"`adapters` must be a list of at least two names, got {shown(adapters)}.")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    values = torch.tensor(weights, dtype=torch.float64)
    if len(weights) != len(adapters) or not is_finite(values) or values.min() < 0 or values.sum() <= 0:
        raise ValueError(f"`weights` must be {len(adapters)} numbers from 0 on, not all 0, got {shown(weights)}.")
    parts: list[Adapter] = [model._known(name) for name in adapters]
    first, *others = parts
    for name, part in zip(adapters, parts):
        if isinstance(part, Head):
            raise ValueError(f"{name!r} is a head ({part.method!r}), and only prompts have a mean.")
    for name, other in zip(adapters[1:], others):
        _check_alike(adapters[0], first, name, other)
    share = (values / values.sum()).tolist()
    states = [part.learned_state() for part in parts]
    mean = {key: sum(w * state[key].double() for w, state in zip(share, states)).float() for key in states[0]}
    model._add(adapter_name, replace(first.config), tensors=mean)


def _check_alike(name: str, first: Adapter, other_name: str, other: Adapter) -> None:
    values, others = ({**adapter.config.to_dict(), "method": adapter.method} for adapter in (first, other))
    bound = first.is_class_bound
    for key in ("method", *sorted(values.keys() | others.keys())):
        one, two = values.get(key), others.get(key)
        if key == "class_names" and bound:
            one, two = ([clean_class_name(c) for c in names or []] for names in (one, two))
        elif key in _FREE:
            continue
        if one != two:
            raise ValueError(
                f"the adapters {name!r} and {other_name!r} have no mean: their {key} is {shown(one)} and {shown(two)}."
            )
    shapes = [{key: tuple(value.shape) for key, value in a.learned_state().items()} for a in (first, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the adapters {name!r} and {other_name!r} have no mean: {shapes[0]} and {shapes[1]}.")
