"""The fit of scaling laws against numpy, scipy and laws that are known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moonlight.errors import UserError
from moonlight.studies.fit import PFLOPS_DAY, SizeLosses, compare, interval, least_squares

FLOPS = (3e11, 8e11, 2e12, 4e12, 9e12)
PAPER = {"muon": (2.506, -0.052), "adamw": (2.608, -0.054)}


def cells(laws, noise=0.0, seeds=1, seed=0, flops=FLOPS):
    generator = np.random.default_rng(seed)
    return {
        name: {
            f"s{number}": SizeLosses(
                c, tuple(a * (c / PFLOPS_DAY) ** b * np.exp(noise * generator.standard_normal(seeds)))
            )
            for number, c in enumerate(flops)
        }
        for name, (a, b) in laws.items()
    }


def flops_of(cell):
    return cell.flops


def loss_of(cell):
    return cell.losses[0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(20, 40), st.floats(-1, 3)), min_size=3, max_size=9, unique_by=lambda p: round(p[0]))
)
def test_least_squares_equals_scipy(points):
    x, y = (np.array(values) for values in zip(*points, strict=True))
    intercept, slope = least_squares(x, y)
    wanted = stats.linregress(x, y)
    assert slope == pytest.approx(wanted.slope, rel=1e-6, abs=1e-9)
    assert intercept == pytest.approx(wanted.intercept, rel=1e-6, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 5), st.floats(-0.3, -0.02), st.floats(0.3, 1.5))
def test_a_law_without_noise_is_found_exactly(a, b, share):
    """AdamW's law, and Muon's that needs `share` of the FLOPs at every loss."""
    found = compare(cells({"muon": (a * share**-b, b), "adamw": (a, b)}), draws=200)
    assert found.laws["adamw"].a == pytest.approx(a, rel=1e-6)
    assert found.laws["adamw"].b == pytest.approx(b, rel=1e-6)
    for at in found.ratios:
        # Muon's loss is a (share^-1 C)^b: it has AdamW's loss of C at share C.
        assert at.ratio == pytest.approx(share, rel=1e-6)
        assert at.interval == pytest.approx((share, share), rel=1e-6)


def test_the_papers_laws_give_its_share():
    found = compare(cells(PAPER, flops=(1e19, 3e19, 1e20, 3e20, 1e21)), draws=100)
    assert 0.45 < found.middle.ratio < 0.60
    assert found.laws["muon"].a == pytest.approx(2.506)


def test_intervals_hold_what_is_true_about_as_often_as_they_say():
    """A bootstrap of five sizes is somewhat narrow or wide: intervals of 95% hold in nine of ten cases at least."""
    laws = {"muon": (2.5, -0.06), "adamw": (2.6, -0.06)}
    true = (2.5 / 2.6) ** (1 / 0.06)
    held = 0
    for seed in range(60):
        low, high = compare(cells(laws, noise=0.002, seeds=2, seed=seed), draws=400).middle.interval
        held += low <= true <= high
    assert held >= 54


def test_seeds_and_sizes_both_widen_the_interval():
    quiet = compare(cells(PAPER, noise=1e-4, seeds=3), draws=500).middle.interval
    loud = compare(cells(PAPER, noise=1e-2, seeds=3), draws=500).middle.interval
    assert loud[1] - loud[0] > 10 * (quiet[1] - quiet[0])
    # Equal means on a line: what is left is the seeds' scatter.
    split = {
        name: {
            size: SizeLosses(cell.flops, (cell.losses[0] * 0.99, cell.losses[0] * 1.01)) for size, cell in own.items()
        }
        for name, own in cells(PAPER).items()
    }
    low, high = compare(split, draws=500).middle.interval
    assert high - low > 0.05


def test_a_size_of_one_optimizer_alone_is_used_for_it():
    made = cells(PAPER)
    del made["muon"]["s1"]
    found = compare(made, draws=300)
    assert found.laws["muon"].b == pytest.approx(-0.052, rel=1e-6)
    assert all(math.isfinite(bound) for bound in found.middle.interval)


def test_what_lies_beyond_the_ladder_is_said():
    found = compare(cells({"muon": (2.5 * 0.5**0.06, -0.06), "adamw": (2.5, -0.06)}), draws=10)
    assert [ratio.is_measured for ratio in found.ratios] == [False, True, True]


def test_shares_are_read_off_between_sizes():
    """On a law without noise they are the law's; beyond Muon's sizes nothing is read off."""
    share = 0.8
    made = cells({"muon": (2.5 * share**0.06, -0.06), "adamw": (2.5, -0.06)}, flops=(1e12, 2e12, 4e12))
    below, *others = compare(made, draws=50).interpolated
    assert below.ratio == 0 and below.interval == (0, pytest.approx(1)) and not below.is_measured
    for at in others:
        assert at.ratio == pytest.approx(share, rel=1e-6) and at.is_measured
        assert at.interval == pytest.approx((share, share), rel=1e-6)
    worse = cells({"muon": (2.5, -0.06), "adamw": (2.5 * share**0.06, -0.06)}, flops=(1e12, 2e12, 4e12))
    above = compare(worse, draws=50).interpolated[-1]
    assert above.ratio == math.inf and above.interval == (pytest.approx(1), math.inf)


def test_a_law_that_bends_shows_in_the_distance_from_the_line():
    made = cells(PAPER)
    assert compare(made, draws=10).laws["muon"].max_deviation == pytest.approx(0, abs=1e-9)
    bent = made["muon"]["s2"]
    made["muon"]["s2"] = SizeLosses(bent.flops, tuple(1.02 * loss for loss in bent.losses))
    found = compare(made, draws=10)
    line = np.polyfit(*(np.log([pick(cell) for cell in made["muon"].values()]) for pick in (flops_of, loss_of)), 1)
    apart = [np.log(loss_of(cell)) - np.polyval(line, np.log(flops_of(cell))) for cell in made["muon"].values()]
    assert found.laws["muon"].max_deviation == pytest.approx(np.expm1(np.abs(apart).max()), rel=1e-6)


def test_the_same_results_give_the_same_intervals():
    made = cells(PAPER, noise=0.003, seeds=2)
    assert compare(made, draws=300).middle == compare(made, draws=300).middle


def test_infinite_draws_count():
    assert interval(np.array([0.5] * 90 + [np.inf] * 10)) == (0.5, math.inf)


@pytest.mark.parametrize(
    "laws, flops, words",
    [
        (PAPER, FLOPS[:2], "2 sizes"),
        (PAPER, (1e12, 1e12, 1e12), "different FLOPs"),
        ({"muon": (2.5, 0.01), "adamw": (2.6, -0.05)}, FLOPS, "does not fall"),
    ],
)
def test_what_cannot_be_fitted_is_refused(laws, flops, words):
    with pytest.raises(UserError, match=words):
        compare(cells(laws, flops=flops), draws=10)
