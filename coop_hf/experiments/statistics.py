"""Means over draws, and differences between methods that were tested on the same images after the same draws.

Intervals are Student's. *Over draws*: the data sets are those that were tested, and another draw of shots would give
other differences. *Over data sets*: data sets are a sample too; what differs between their mean differences holds the
draws' noise already. Neither speaks of the noise of a small test set, which all methods share.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .scoring import harmonic_mean


__all__ = ["harmonic_means", "mean_and_std", "paired_difference", "t_interval", "t_quantile"]


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation of a sample; `None` for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def t_quantile(probability: float, degrees: float) -> float:
    """The quantile of Student's distribution, from its density, by Simpson's rule and bisection; to about 1e-6.

    Args:
        probability (`float`): from 0.5 to below 1.
        degrees (`float`): degrees of freedom, from 1; need not be whole.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"expected a probability from 0.5 to 1 and degrees from 1, got {probability} and {degrees}.")
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)

    def above_middle(t: float) -> float:
        # With t = √ν·tan(u) the density becomes cos(u)^(ν - 1), which has no tail to cut.
        u = np.linspace(0, math.atan(t / math.sqrt(degrees)), 2001)
        values = np.cos(u) ** (degrees - 1)
        step = u[1] - u[0]
        area = step / 3 * (values[0] + 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum() + values[-1])
        return float(area) * math.sqrt(degrees) * math.exp(log_scale)

    low, high = 0.0, 1.0
    while above_middle(high) < probability - 0.5:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if above_middle(middle) < probability - 0.5 else (low, middle)
    return (low + high) / 2


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """The interval of the mean of a sample; `None` for fewer than two values."""
    mean, std = mean_and_std(values)
    if std is None:
        return None
    half = t_quantile(0.5 + level / 2, len(values) - 1) * std / math.sqrt(len(values))
    return mean - half, mean + half


def paired_difference(
    ours: Mapping[str, Mapping[Any, float]], theirs: Mapping[str, Mapping[Any, float]], level: float = 0.95
) -> dict[str, Any] | None:
    """The difference of two methods over data sets and draws.

    Args:
        ours, theirs (`dict[str, dict[draw, float]]`): a score for each data set and draw. A method that does not learn
            has one, under the draw `None`, which stands against every draw of the other.
        level (`float`, *optional*, defaults to 0.95): of the intervals.

    Returns:
        `dict`: `mean`, of the data sets' mean differences; `by_data`; `over_draws`, its interval for these data sets
        (a t interval whose degrees of freedom are Welch's and Satterthwaite's; `None` with less than two draws of a
        data set); `over_data`, its interval over data sets (a t interval of their mean differences; `None` for one);
        `pairs`, how many differences there are. `None` where the two have nothing in common.
    """
    by_data: dict[str, list[float]] = {}
    for name in ours:
        if name not in theirs:
            continue
        first, second = ours[name], theirs[name]
        draws = [draw for draw in (*first, *(d for d in second if d not in first)) if draw is not None] or [None]
        pairs = [(first.get(draw, first.get(None)), second.get(draw, second.get(None))) for draw in draws]
        found = [a - b for a, b in pairs if a is not None and b is not None]
        if found:
            by_data[name] = found
    if not by_data:
        return None
    means = {name: float(np.mean(values)) for name, values in by_data.items()}
    result: dict[str, Any] = {"mean": float(np.mean(list(means.values()))), "by_data": means}
    result["pairs"] = sum(map(len, by_data.values()))
    result["over_draws"] = _over_draws(list(by_data.values()), result["mean"], level)
    result["over_data"] = t_interval(list(means.values()), level)
    return result


def _over_draws(groups: list[list[float]], mean: float, level: float) -> tuple[float, float] | None:
    """The interval of the mean of means of groups that are fixed, each a sample of its own spread."""
    if any(len(values) < 2 for values in groups):
        return None
    parts = [np.var(values, ddof=1) / len(values) / len(groups) ** 2 for values in groups]
    total = float(sum(parts))
    if total == 0:
        return mean, mean
    degrees = total**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, groups))
    half = t_quantile(0.5 + level / 2, float(degrees)) * math.sqrt(total)
    return mean - half, mean + half


def harmonic_means(base: Mapping[Any, float], new: Mapping[Any, float]) -> tuple[float, float]:
    """Two means that papers both call H: the mean of the cells' harmonic means, and the harmonic mean of the means.

    Args:
        base, new (`dict`): accuracies of each cell (data set and draw) on base and on new classes.

    Returns:
        `tuple(float, float)`: the first is never above the second.
    """
    cells = [harmonic_mean(base[key], new[key]) for key in base]
    return float(np.mean(cells)), harmonic_mean(
        float(np.mean(list(base.values()))), float(np.mean(list(new.values())))
    )
