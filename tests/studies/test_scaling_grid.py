"""The grid of learning rates is equal for both optimizers and grows until no best rate is at an edge."""

import math

from hypothesis import given
from hypothesis import strategies as st

from moonlight.studies.grid import best_rate, on_edge, pending_rates, rounded

START = (0.004, 0.008, 0.016)


def bowl(best, rate):
    return 3.0 + math.log2(rate / best) ** 2


def fill_grid(best, max_rates=20, diverges_above=math.inf, factor=2.0):
    """Return the losses of both optimizers after evaluating pending rates until none is left."""
    values = {"muon": {}, "adamw": {}}
    for _ in range(50):
        rates = pending_rates(START, factor, max_rates, values)
        missing = [(name, rate) for name in values for rate in rates if rate not in values[name]]
        if not missing:
            return values
        for name, rate in missing:
            values[name][rate] = math.inf if rate > diverges_above else bowl(best[name], rate)
    raise AssertionError("the grid never ends")


@given(st.floats(1e-4, 0.5), st.floats(1e-4, 0.5), st.sampled_from((2.0, math.sqrt(2))))
def test_best_is_inside_and_grids_are_equal(muon, adamw, factor):
    values = fill_grid({"muon": muon, "adamw": adamw}, max_rates=60, factor=factor)
    assert values["muon"].keys() == values["adamw"].keys()
    for name, best in (("muon", muon), ("adamw", adamw)):
        assert on_edge(values[name]) == ""
        assert abs(math.log(best_rate(values[name]) / best)) <= math.log(max(factor, 2.0))  # START has steps of 2
    assert sorted(values["muon"]) == sorted({rounded(rate) for rate in values["muon"]})


def test_an_interrupted_grid_has_the_same_rates():
    """Results that arrive one at a time in another order lead to the same grid."""
    expected = fill_grid({"muon": 0.05, "adamw": 0.002})
    values = {"muon": {}, "adamw": {}}
    while True:
        rates = pending_rates(START, 2.0, 20, values)
        missing = [(name, rate) for name in ("adamw", "muon") for rate in reversed(rates) if rate not in values[name]]
        if not missing:
            break
        name, rate = missing[0]
        values[name][rate] = bowl({"muon": 0.05, "adamw": 0.002}[name], rate)
    assert values == expected


def test_diverged_runs_bound_the_grid_from_above():
    values = fill_grid({"muon": 0.1, "adamw": 0.1}, diverges_above=0.01)
    assert best_rate(values["muon"]) == 0.008
    assert on_edge(values["muon"]) == ""


def test_a_grid_at_its_size_limit_ends_at_its_edge():
    values = fill_grid({"muon": 0.5, "adamw": 0.008}, max_rates=4)
    assert sorted(values["adamw"]) == [0.004, 0.008, 0.016, 0.032]
    assert on_edge(values["muon"]) == "upper"
    assert on_edge(values["adamw"]) == ""
    assert on_edge({0.1: math.inf, 0.2: math.inf}) == "lower"
