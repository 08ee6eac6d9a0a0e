"""The estimator: unbiased where the gradient's mean and covariance are known; the naive formula is not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TrackedWindow, estimate_noise_by_pairs, naive_noise, tracked_noise

from hf_trainopt.accumulation.noise_scale import (
    NoiseScaleTracker,
    WindowStatistics,
    estimate_noise,
    ratio_interval,
)
from hf_trainopt.accumulation.sums import SUMMED, Proposal, local_sums, pack_sums, unpack_sums


DIMENSION = 20


def statistics_of(gradients: np.ndarray, num_items: np.ndarray, weights=None, world_size: int = 1, num_samples=None):
    """Statistics as the Trainer takes them: per rank, what `.grad` gets, then one sum over ranks."""
    weights = num_items / num_items.sum() if weights is None else weights
    vector = torch.zeros(len(SUMMED), dtype=torch.float64)
    for rank in range(world_size):
        mine = slice(rank, None, world_size)
        # DDP averages `.grad` over ranks, so that each rank holds W times its term of the sum.
        in_grad = world_size * weights[mine, None] * gradients[mine]
        sums = local_sums(
            list((in_grad**2).sum(1)), list(num_items[mine]), list(weights[mine]), gradient_factor=1 / world_size
        )
        mean = (weights[:, None] * gradients).sum(0)
        vector += pack_sums(Proposal(), len(gradients[mine]), float(mean @ mean) if rank == 0 else 0.0, sums)
    _, statistics = unpack_sums(vector.tolist())
    return statistics


def draw(rng: np.random.Generator, num_items: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Mean gradients of micro-batches with `num_items` items each: N(G, Σ/n), Σ diagonal."""
    noise = rng.standard_normal((len(num_items), DIMENSION)) * deviation
    return mean + noise / np.sqrt(num_items)[:, None]


SIZES = {
    "equal": np.array([8, 8, 8, 8]),
    "unequal": np.array([1, 40, 3, 20]),
    "two micro-batches": np.array([2, 30]),
}


def monte_carlo(estimator, sizes: np.ndarray, draws: int = 20_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean estimate, its standard error, and the truth, for (tr Σ, |G|²)."""
    rng = np.random.default_rng(0)
    mean, deviation = rng.standard_normal(DIMENSION) * 0.3, rng.uniform(0.5, 2.0, DIMENSION)
    values = np.array([estimator(draw(rng, sizes, mean, deviation), sizes) for _ in range(draws)])
    truth = np.array([(deviation**2).sum(), (mean**2).sum()])
    return values.mean(0), values.std(0) / math.sqrt(draws), truth


def ours(gradients, num_items):
    return estimate_noise(statistics_of(gradients, num_items))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_estimates_are_unbiased(sizes):
    mean, error, truth = monte_carlo(ours, sizes)
    assert np.all(np.abs(mean - truth) < 4 * error), (mean, truth, error)
    assert np.all(error < 0.05 * truth.max())  # otherwise the test could not fail


def test_equal_weights_of_unequal_micro_batches_are_unbiased_too():
    """A loss that is a mean per micro-batch weights them equally whatever their sizes."""
    sizes = SIZES["unequal"]

    def estimator(gradients, num_items):
        return estimate_noise(statistics_of(gradients, num_items, weights=np.full(len(sizes), 1 / len(sizes))))

    mean, error, truth = monte_carlo(estimator, sizes)
    assert np.all(np.abs(mean - truth) < 4 * error), (mean, truth, error)


def test_the_naive_formula_fails_the_same_test():
    mean, error, truth = monte_carlo(naive_noise, SIZES["unequal"])
    assert np.any(np.abs(mean - truth) > 20 * error), (mean, truth, error)
    equal_mean, equal_error, truth = monte_carlo(naive_noise, SIZES["equal"])
    assert np.all(np.abs(equal_mean - truth) < 4 * equal_error)


def test_gradient_square_is_unbiased_where_items_are_correlated():
    """Rows whose tokens all carry the same noise: Cov g_i does not fall with n_i. Pairs stay independent."""
    rng = np.random.default_rng(6)
    mean, sizes = rng.standard_normal(DIMENSION) * 0.3, SIZES["unequal"]
    values = np.array([ours(mean + rng.standard_normal((len(sizes), DIMENSION)), sizes)[1] for _ in range(20_000)])
    assert abs(values.mean() - mean @ mean) < 4 * values.std() / math.sqrt(len(values))


@given(st.lists(st.integers(1, 50), min_size=2, max_size=8), st.integers(0, 2**31), st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_estimate_equals_its_slow_twin(sizes, seed, world_size):
    num_items = np.array(sizes)
    gradients = np.random.default_rng(seed).standard_normal((len(sizes), DIMENSION))
    statistics = statistics_of(gradients, num_items, world_size=world_size)
    expected = estimate_noise_by_pairs(gradients, num_items)
    assert estimate_noise(statistics) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_micro_batch_without_items_does_not_count():
    gradients, num_items = np.ones((3, DIMENSION)), np.array([4, 5, 0])
    gradients[2] = 0
    statistics = statistics_of(gradients, num_items)
    assert statistics.num_micro_batches == 2


def window_of_two(individual: float, mean: float) -> WindowStatistics:
    """Two micro-batches of two samples: A and L as given."""
    return WindowStatistics(
        weighted_square_norm=individual,
        squared_weight_square_norm=individual / 2,
        gradient_square_norm=mean,
        individual_coefficient=0.5,
        mean_coefficient=0.25,
        squared_weight=0.5,
        num_micro_batches=2,
        num_items=4.0,
        num_samples=4,
    )


def exact_window(trace: float, square: float, rows: int) -> WindowStatistics:
    """Two pieces of so many rows, whose estimates are exact."""
    return WindowStatistics(
        weighted_square_norm=square + trace / rows,
        squared_weight_square_norm=(square + trace / rows) / 2,
        gradient_square_norm=square + trace / (2 * rows),
        individual_coefficient=1 / rows,
        mean_coefficient=1 / (2 * rows),
        squared_weight=0.5,
        num_micro_batches=2,
        num_items=2.0 * rows,
        num_samples=2 * rows,
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_windows_that_cannot_tell_give_nothing(bad):
    good = window_of_two(2.0, 1.0)
    assert estimate_noise(good) is not None
    for name in ("weighted_square_norm", "squared_weight_square_norm", "gradient_square_norm"):
        assert estimate_noise(replace(good, **{name: bad})) is None
    assert estimate_noise(replace(good, num_micro_batches=1)) is None


def random_windows(rng, count: int):
    mean, deviation = np.full(DIMENSION, 0.4), np.ones(DIMENSION)
    for _ in range(count):
        sizes = rng.integers(1, 30, rng.integers(2, 9))
        yield statistics_of(draw(rng, sizes, mean, deviation), sizes)


@pytest.mark.parametrize("halves", [False, True])
def test_tracker_equals_its_full_history(halves):
    rng = np.random.default_rng(1)
    tracker, half_life = NoiseScaleTracker(half_life=20.0), 20.0
    history, position = [], 0.0
    for index, statistics in enumerate(random_windows(rng, 40)):
        if index % 3 == 0:
            tracker.skip(5)
            position += 5
        in_halves = halves and index % 4 == 3
        tracker.update(statistics, in_halves=in_halves)
        position += statistics.num_samples
        trace, square = estimate_noise(statistics)
        per_sample = statistics.num_items / statistics.num_samples
        history.append(
            TrackedWindow(
                trace / per_sample, square, statistics.num_micro_batches, statistics.num_samples, position, in_halves
            )
        )
        if index < 2:
            continue
        expected, found = tracked_noise(history, position, half_life), tracker.estimate()
        assert found.trace == pytest.approx(expected["trace"], rel=1e-9)
        assert found.gradient_square == pytest.approx(expected["square"], rel=1e-9)
        assert found.effective_windows == pytest.approx(expected["effective"], rel=1e-9)
        interval = ratio_interval(
            expected["trace"], expected["square"], expected["trace_variance"], expected["square_variance"],
            expected["covariance"], 1.96,
        )  # fmt: skip
        assert found.lower == pytest.approx(interval[0], rel=1e-6)
        if found.resolved:
            assert found.upper == pytest.approx(interval[1], rel=1e-6)
            assert found.value == pytest.approx(expected["trace"] / expected["square"], rel=1e-9)


def test_windows_in_halves_are_not_held_up_by_those_before():
    """The signal falls to a fourth while k falls to 1: averages follow as fast as if nothing had been in halves."""
    found = {}
    for in_halves, rows in ((True, 2), (False, 4)):
        tracker = NoiseScaleTracker(half_life=40.0)
        for _ in range(16):
            tracker.update(exact_window(16.0, 4.0, rows=4))
        for _ in range(10):
            tracker.update(exact_window(16.0, 1.0, rows=rows), in_halves=in_halves)
            tracker.skip(8 - 2 * rows)
        found[in_halves] = tracker.estimate().value
    assert found[True] == pytest.approx(found[False], rel=0.05)
    held_up = NoiseScaleTracker(half_life=40.0)
    for rows, square in [(4, 4.0)] * 16 + [(2, 1.0)] * 10:
        held_up.update(exact_window(16.0, square, rows))
        held_up.skip(8 - 2 * rows)
    assert held_up.estimate().value < 0.7 * found[True]


def test_tracker_half_life_is_in_samples_whatever_the_window():
    """The weight of old data depends on the samples since, not on how many windows they came in."""
    old, new = window_of_two(9.0, 1.0), window_of_two(2.0, 1.0)
    results = []
    for skips in ([12], [4, 4, 4], [1] * 12):
        tracker = NoiseScaleTracker(half_life=8.0)
        tracker.update(old)
        for samples in skips:
            tracker.skip(samples)
        tracker.update(new)
        results.append(tracker.estimate().trace)
    assert results[0] == pytest.approx(results[1]) == pytest.approx(results[2])
    # 16 samples between the two are two half-lives: weights 1/4 and 1.
    traces = [estimate_noise(w)[0] for w in (old, new)]
    assert results[0] == pytest.approx((traces[0] / 4 + traces[1]) / 1.25)


def test_non_finite_windows_are_dropped_and_counted():
    rng = np.random.default_rng(2)
    tracker = NoiseScaleTracker(half_life=1e9)
    for statistics in random_windows(rng, 6):
        tracker.update(statistics)
    before = tracker.estimate()
    assert not tracker.update(window_of_two(math.inf, math.inf))
    assert tracker.num_dropped == 1
    assert tracker.estimate().value == before.value


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    mean, deviation = np.full(DIMENSION, 0.5), np.ones(DIMENSION)
    truth = DIMENSION / (0.25 * DIMENSION)
    covered, runs = 0, 400
    for _ in range(runs):
        tracker = NoiseScaleTracker(half_life=1e9)
        for _ in range(25):
            sizes = np.full(4, 1)
            tracker.update(statistics_of(draw(rng, sizes, mean, deviation), sizes))
        found = tracker.estimate()
        covered += found.lower <= truth <= found.upper
    # 25 windows, normal quantile: somewhat below 95 % is what a sandwich variance gives.
    assert 0.88 <= covered / runs <= 0.99


def test_an_unresolved_gradient_is_said_to_be_unresolved():
    """Pure noise: |G|² = 0. B_noise is infinite and nothing may be decided on the ratio of the averages."""
    rng = np.random.default_rng(4)
    unresolved = 0
    for _ in range(100):
        tracker = NoiseScaleTracker(half_life=1e9)
        for _ in range(30):
            sizes = np.full(4, 1)
            tracker.update(statistics_of(draw(rng, sizes, np.zeros(DIMENSION), np.ones(DIMENSION)), sizes))
        found = tracker.estimate()
        unresolved += not found.resolved
        assert found.resolved or found.upper == math.inf
    assert unresolved >= 93


def test_tracker_state_round_trip():
    rng = np.random.default_rng(5)
    windows = list(random_windows(rng, 12))
    whole, first = NoiseScaleTracker(50.0), NoiseScaleTracker(50.0)
    for window in windows[:6]:
        whole.update(window)
        first.update(window)
    second = NoiseScaleTracker(50.0)
    second.load_state_dict(first.state_dict())
    for window in windows[6:]:
        whole.update(window)
        second.update(window)
    assert whole.estimate() == second.estimate()


def test_half_life_must_be_positive():
    with pytest.raises(ValueError, match="half_life"):
        NoiseScaleTracker(0.0)
