"""Fits of scaling laws equal numpy's, scipy's, and the laws that generated the data."""

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
            f"s{index}": SizeLosses(
                c, tuple(a * (c / PFLOPS_DAY) ** b * np.exp(noise * generator.standard_normal(seeds)))
            )
            for index, c in enumerate(flops)
        }
        for name, (a, b) in laws.items()
    }


def get_flops(cell):
    return cell.flops


def get_loss(cell):
    return cell.losses[0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(20, 40), st.floats(-1, 3)), min_size=3, max_size=9, unique_by=lambda p: round(p[0]))
)
def test_least_squares_equals_scipy(points):
    x, y = (np.array(values) for values in zip(*points, strict=True))
    intercept, slope = least_squares(x, y)
    expected = stats.linregress(x, y)
    assert slope == pytest.approx(expected.slope, rel=1e-6, abs=1e-9)
    assert intercept == pytest.approx(expected.intercept, rel=1e-6, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 5), st.floats(-0.3, -0.02), st.floats(0.3, 1.5))
def test_a_law_without_noise_is_found_exactly(a, b, fraction):
    """The fit recovers AdamW's law, and a Muon law that needs `fraction` of its FLOPs at every loss."""
    fit = compare(cells({"muon": (a * fraction**-b, b), "adamw": (a, b)}), draws=200)
    assert fit.laws["adamw"].a == pytest.approx(a, rel=1e-6)
    assert fit.laws["adamw"].b == pytest.approx(b, rel=1e-6)
    for ratio in fit.ratios:
        # Muon's loss is a (C / fraction)^b, so it equals AdamW's loss of C at fraction * C.
        assert ratio.ratio == pytest.approx(fraction, rel=1e-6)
        assert ratio.interval == pytest.approx((fraction, fraction), rel=1e-6)


def test_the_papers_laws_give_its_flops_ratio():
    fit = compare(cells(PAPER, flops=(1e19, 3e19, 1e20, 3e20, 1e21)), draws=100)
    assert 0.45 < fit.middle.ratio < 0.60
    assert fit.laws["muon"].a == pytest.approx(2.506)


def test_intervals_contain_the_true_ratio_about_as_often_as_stated():
    """95% intervals contain the true ratio in at least 90% of cases; a bootstrap of five sizes is inexact."""
    laws = {"muon": (2.5, -0.06), "adamw": (2.6, -0.06)}
    true = (2.5 / 2.6) ** (1 / 0.06)
    num_contained = 0
    for seed in range(60):
        low, high = compare(cells(laws, noise=0.002, seeds=2, seed=seed), draws=400).middle.interval
        num_contained += low <= true <= high
    assert num_contained >= 54


def test_seeds_and_sizes_both_widen_the_interval():
    quiet = compare(cells(PAPER, noise=1e-4, seeds=3), draws=500).middle.interval
    loud = compare(cells(PAPER, noise=1e-2, seeds=3), draws=500).middle.interval
    assert loud[1] - loud[0] > 10 * (quiet[1] - quiet[0])
    # With means exactly on a line, only the scatter of the seeds is left.
    split = {
        name: {
            size: SizeLosses(cell.flops, (cell.losses[0] * 0.99, cell.losses[0] * 1.01)) for size, cell in sizes.items()
        }
        for name, sizes in cells(PAPER).items()
    }
    low, high = compare(split, draws=500).middle.interval
    assert high - low > 0.05


def test_a_size_of_one_optimizer_is_used_for_its_law():
    losses = cells(PAPER)
    del losses["muon"]["s1"]
    fit = compare(losses, draws=300)
    assert fit.laws["muon"].b == pytest.approx(-0.052, rel=1e-6)
    assert all(math.isfinite(bound) for bound in fit.middle.interval)


def test_ratios_beyond_the_ladder_are_marked():
    fit = compare(cells({"muon": (2.5 * 0.5**0.06, -0.06), "adamw": (2.5, -0.06)}), draws=10)
    assert [ratio.is_measured for ratio in fit.ratios] == [False, True, True]


def test_ratios_are_interpolated_between_sizes():
    """Without noise, interpolated ratios equal the law's. Beyond Muon's sizes there is no ratio."""
    fraction = 0.8
    losses = cells({"muon": (2.5 * fraction**0.06, -0.06), "adamw": (2.5, -0.06)}, flops=(1e12, 2e12, 4e12))
    below, *others = compare(losses, draws=50).interpolated
    assert below.ratio == 0 and below.interval == (0, pytest.approx(1)) and not below.is_measured
    for ratio in others:
        assert ratio.ratio == pytest.approx(fraction, rel=1e-6) and ratio.is_measured
        assert ratio.interval == pytest.approx((fraction, fraction), rel=1e-6)
    worse = cells({"muon": (2.5, -0.06), "adamw": (2.5 * fraction**0.06, -0.06)}, flops=(1e12, 2e12, 4e12))
    above = compare(worse, draws=50).interpolated[-1]
    assert above.ratio == math.inf and above.interval == (pytest.approx(1), math.inf)


def test_max_deviation_measures_the_distance_from_the_line():
    losses = cells(PAPER)
    assert compare(losses, draws=10).laws["muon"].max_deviation == pytest.approx(0, abs=1e-9)
    original = losses["muon"]["s2"]
    losses["muon"]["s2"] = SizeLosses(original.flops, tuple(1.02 * loss for loss in original.losses))
    fit = compare(losses, draws=10)
    line = np.polyfit(*(np.log([pick(cell) for cell in losses["muon"].values()]) for pick in (get_flops, get_loss)), 1)
    deviations = [
        np.log(get_loss(cell)) - np.polyval(line, np.log(get_flops(cell))) for cell in losses["muon"].values()
    ]
    assert fit.laws["muon"].max_deviation == pytest.approx(np.expm1(np.abs(deviations).max()), rel=1e-6)


def test_the_same_results_give_the_same_intervals():
    losses = cells(PAPER, noise=0.003, seeds=2)
    assert compare(losses, draws=300).middle == compare(losses, draws=300).middle


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
def test_invalid_fits_are_refused(laws, flops, words):
    with pytest.raises(UserError, match=words):
        compare(cells(laws, flops=flops), draws=10)
