"""The choice of the cases that `make test` runs; `make test-slow` runs the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Return the cases for `pytest.mark.parametrize`, with all but the chosen ones marked slow.

    A tuple gives one value to each of several arguments.
    """
    cases = list(cases)
    unknown = [case for case in chosen if case not in cases]
    assert chosen and not unknown, f"no such cases: {unknown}"
    return [case if case in chosen else slow(*case) if isinstance(case, tuple) else slow(case) for case in cases]


def slow(*values: Any) -> Any:
    """Return one case, marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)
