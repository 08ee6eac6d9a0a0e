"""Ratios of paired runs: against tables and by Monte Carlo."""

import math
import random
import statistics

import pytest

from hf_trainopt.lab.compare.statistics import (
    Measured,
    mean_interval,
    paired_difference,
    paired_ratio,
)


# Two-sided 95 % points of the usual table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042}


@pytest.mark.parametrize("degrees", TABLE)
def test_intervals_are_as_wide_as_the_table_says(degrees):
    generator = random.Random(degrees)
    values = [generator.gauss(0, 1) for _ in range(degrees + 1)]
    mean, lower, upper = mean_interval(values)
    half = TABLE[degrees] * statistics.stdev(values) / math.sqrt(degrees + 1)
    assert (upper - mean, mean - lower) == (pytest.approx(half, rel=2e-4),) * 2


def test_interval_of_ratios_covers_the_true_ratio_in_95_percent():
    generator = random.Random(0)
    rounds, covered = 4000, 0
    for _ in range(rounds):
        # What a seed does to both runs cancels in their ratio.
        seeds = [math.exp(generator.gauss(0, 1)) for _ in range(4)]
        ours = [0.7 * seed * math.exp(generator.gauss(0, 0.1)) for seed in seeds]
        estimate = paired_ratio(ours, seeds)
        covered += estimate.lower <= 0.7 <= estimate.upper
    assert abs(covered / rounds - 0.95) < 4 * math.sqrt(0.95 * 0.05 / rounds)


def test_ratio_is_the_geometric_mean_and_one_pair_has_no_interval():
    assert paired_ratio([2.0, 8.0], [1.0, 1.0]).value == pytest.approx(4.0)
    estimate = paired_ratio([3.0], [4.0])
    assert (estimate.value, estimate.lower, estimate.upper, estimate.bound) == (0.75, None, None, "exact")


def test_censored_runs_leave_a_bound():
    late, exact = Measured(10.0, censored=True), Measured(5.0)
    assert paired_ratio([late, exact], [exact, exact]).bound == "at least"
    assert paired_ratio([late, exact], [exact, exact]).value == pytest.approx(math.sqrt(2))
    assert paired_ratio([exact, exact], [late, exact]).bound == "at most"
    assert paired_ratio([exact, exact], [late, exact]).lower is None
    mixed = paired_ratio([exact, late], [late, exact])
    assert (mixed.value, mixed.bound, mixed.num_censored) == (None, "unknown", 2)
    assert paired_ratio([late], [late]).bound == "unknown"


def test_differences():
    estimate = paired_difference([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    mean, lower, upper = mean_interval([0.0, 1.0, 3.0])
    assert (estimate.value, estimate.lower, estimate.upper) == (mean, lower, upper)
    assert lower == pytest.approx(4 / 3 - 4.303 * 1.5275 / math.sqrt(3), abs=1e-3)


@pytest.mark.parametrize(("ours", "baseline"), [([], []), ([0.0], [1.0]), ([1.0], [float("nan")])])
def test_what_has_no_ratio_is_refused(ours, baseline):
    with pytest.raises(ValueError, match=r"no pair|positive"):
        paired_ratio(ours, baseline)


def test_values_of_seeds_as_text():
    """The mean is the one that ratios are of."""
    from hf_trainopt.lab.compare.render import _mean

    assert [_mean([]), _mean([2.0]), _mean([2.0, 2.0])] == ["–", "2", "2"]
    assert _mean([1.0, 4.0]) == "2 (1 to 4)"
    assert _mean([1.0, 4.0, None]) == "2 (1 to 4), 2 of 3 seeds"
    assert _mean([-1.0, 4.0]) == "-1 to 4"
