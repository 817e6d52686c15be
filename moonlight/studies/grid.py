"""A grid of learning rates, equal for all optimizers, that is widened until no optimizer is best at its edge."""

from collections.abc import Mapping, Sequence
from typing import Any

DIGITS = 4
"""Learning rates are rounded to so many, so that one reached by steps has the name of one that was written down."""


def rounded(rate: float) -> float:
    """A learning rate as the grid names it."""
    return float(f"{rate:.{DIGITS}g}")


def best_rate(values: Mapping[float, Any]) -> float:
    """The rate with the least value, the lower one of equals: of runs that all diverged, the lowest rate."""
    return min(sorted(values), key=lambda rate: values[rate])


def on_edge(values: Mapping[float, Any]) -> str:
    """Where the best rate of one optimizer lies: "lower", "upper", or "" if it has neighbours on both sides."""
    best = best_rate(values)
    return "lower" if best == min(values) else "upper" if best == max(values) else ""


def pending_rates(
    start: Sequence[float], factor: float, max_rates: int, values: Mapping[str, Mapping[float, Any]]
) -> list[float]:
    """The rates that every optimizer should have a value for, in rising order.

    Call it again when they all have: it adds a rate at each side where an optimizer is best at the edge, for all of
    them, until none is or there are `most` rates. It depends on `values` alone, not on their order.

    Args:
        start: the rates to begin with.
        factor: between neighbours, above 1.
        values: by optimizer and rate, of every optimizer; less is better, and a run that diverged has infinity.
    """
    rates = sorted({rounded(rate) for rate in start} | {rate for known in values.values() for rate in known})
    if any(rate not in known for known in values.values() for rate in rates):
        return rates
    edges = {on_edge(known) for known in values.values()}
    for edge, rate in (("lower", rates[0] / factor), ("upper", rates[-1] * factor)):
        if edge in edges and len(rates) < max_rates:
            rates.append(rounded(rate))
    return sorted(rates)
