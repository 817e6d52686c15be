"""A grid of learning rates, shared by all optimizers, that grows until no optimizer is best at its edge."""

from collections.abc import Mapping, Sequence
from typing import Any

DIGITS = 4
"""Significant digits of learning rates. Rounding gives a rate the same name whether it is listed or computed."""


def rounded(rate: float) -> float:
    """Return a learning rate rounded to DIGITS significant digits."""
    return float(f"{rate:.{DIGITS}g}")


def best_rate(values: Mapping[float, Any]) -> float:
    """Return the rate with the smallest value. Of equal values, return the lowest rate, also if all runs diverged."""
    return min(sorted(values), key=lambda rate: values[rate])


def on_edge(values: Mapping[float, Any]) -> str:
    """Return the edge that the best rate is at: "lower" or "upper", or "" if it has neighbors on both sides."""
    best = best_rate(values)
    return "lower" if best == min(values) else "upper" if best == max(values) else ""


def pending_rates(
    start: Sequence[float], factor: float, max_rates: int, values: Mapping[str, Mapping[float, Any]]
) -> list[float]:
    """Return the rates at which every optimizer needs a value, in ascending order.

    Call it again when all optimizers have these values. It then adds a rate, for all optimizers, at each edge where an
    optimizer is best. It stops when none is best at an edge or when there are `max_rates` rates. The result depends on
    `values` only, not on their order.

    Args:
        start: the initial rates.
        factor: ratio of neighboring rates, above 1.
        values: value of every optimizer and rate; smaller is better, and a run that diverged has infinity.
    """
    rates = sorted({rounded(rate) for rate in start} | {rate for by_rate in values.values() for rate in by_rate})
    if any(rate not in by_rate for by_rate in values.values() for rate in rates):
        return rates
    edges = {on_edge(by_rate) for by_rate in values.values()}
    for edge, rate in (("lower", rates[0] / factor), ("upper", rates[-1] * factor)):
        if edge in edges and len(rates) < max_rates:
            rates.append(rounded(rate))
    return sorted(rates)
