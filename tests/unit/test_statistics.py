"""Intervals, p-values, power: against values by hand and by simulation."""

import math

import numpy as np
import pytest

from benchmarks.false_claims import DRAWS, SIZES, rate
from birbal_ray import statistics


@pytest.mark.parametrize(("kind", "most"), [("normal", 0.07), ("exponential", 0.13)])
def test_false_claims_stay_rare(kind, most):
    for size in SIZES:
        values = DRAWS[kind](np.random.default_rng(size), (4000, size))
        _, low, high = statistics.interval(values)
        assert rate(low, high) <= most, size


def test_symmetric_values_get_the_t_interval():
    # 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t of two degrees of freedom 4.3027.
    found = statistics.paired_difference([0.1, 0.2, 0.3])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (found.mean, found.high - found.mean, found.mean - found.low) == pytest.approx((0.2, half, half), rel=1e-5)
    # From the same t: 0.2 / (0.1 / √3) = 3.4641, two-sided with two degrees of freedom 0.0742.
    assert found.p_value == pytest.approx(0.0742, abs=1e-4)
    assert statistics.outcome(found.low, found.high, found.num_pairs, min_pairs=2) == statistics.NO_DIFFERENCE


def test_a_long_tail_widens_the_interval_towards_it():
    values = np.array([0.0, 0.0, 0.01, 0.02, 0.05, 0.4])
    mean, low, high = statistics.interval(values)
    reach = 2.570582 * values.std(ddof=1) / math.sqrt(6)
    assert low == pytest.approx(mean - reach, rel=1e-5)
    assert high > mean + 1.2 * reach
    _, mirrored_low, mirrored_high = statistics.interval(-values)
    assert (mirrored_low, mirrored_high) == pytest.approx((-high, -low))


def test_a_p_value_is_below_5_percent_exactly_where_the_interval_excludes_0():
    chance = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        values = chance.exponential(size=chance.integers(2, 40)) - chance.random()
        _, low, high = statistics.interval(values)
        assert (statistics.p_value(values) < 0.05) == (low > 0 or high < 0)
        seen.add(low > 0 or high < 0)
    assert seen == {True, False}


def test_verdicts_need_six_tasks_and_one_pair_says_nothing():
    clear = [0.3, 0.31, 0.29, 0.3, 0.32, 0.28]
    for values, verdict in (
        (clear, statistics.BETTER),
        ([-value for value in clear], statistics.WORSE),
        (clear[:5], statistics.TOO_FEW),
    ):
        found = statistics.paired_difference(values)
        assert statistics.outcome(found.low, found.high, found.num_pairs) == verdict
    one = statistics.paired_difference([0.4])
    assert (one.mean, one.low, one.high, one.p_value) == (0.4, -math.inf, math.inf, 1.0)
    same = statistics.paired_difference([0.05] * 8)
    assert (same.low, same.high, same.p_value) == (pytest.approx(0.05), pytest.approx(0.05), 0.0)
    assert statistics.paired_difference([0.0] * 8).p_value == 1.0


def test_holm_by_hand():
    # Sorted 0.01, 0.03, 0.04: × 3, × 2, × 1, never falling.
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_power():
    # Textbook: 34 pairs for half a standard deviation at 80 % power (G*Power, two-sided paired t test).
    assert statistics.pairs_needed(0.5, 1.0) == 34
    assert statistics.detectable_difference(34, 1.0) < 0.5 < statistics.detectable_difference(33, 1.0)
    assert statistics.pairs_needed(0.0, 1.0) is None
    assert math.isinf(statistics.detectable_difference(1, 1.0))
    # By simulation: an effect of the detectable size is found about 8 times in 10.
    size, chance = 40, np.random.default_rng(1)
    values = chance.normal(statistics.detectable_difference(size, 1.0), 1.0, (4000, size))
    _, low, _ = statistics.interval(values)
    assert (low > 0).mean() == pytest.approx(0.8, abs=0.04)


def test_half_widths():
    assert statistics.wilson(0.5, 100)[1] == pytest.approx(0.0962, abs=1e-4)
    assert statistics.wilson(1.0, 10)[1] > 0.1, "ten right answers of ten don't prove 1"
    assert statistics.t_half_width(0.1, 3) == pytest.approx(0.2484, abs=1e-4)
    assert math.isinf(statistics.t_half_width(0.1, 1))
