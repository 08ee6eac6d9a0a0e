"""Slow, obviously right twins of the estimators and of the data cursor: full history, textbook formulas."""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def estimate_noise_by_pairs(gradients: np.ndarray, num_items: np.ndarray) -> tuple[float, float]:
    """tr Σ (per item) and |G|² from all micro-batch gradients, without any formula for sums.

    |G|²: mean inner product over pairs of different micro-batches (they are independent, so E g_i·g_j = |G|²),
    weighted by the product of their numbers of items. tr Σ: weighted sample variance, Σ n_i |g_i − ĝ|²/(m − 1), which
    estimates the covariance of one item (Var g_i = Σ/n_i).

    Args:
        gradients: Mean gradients of the micro-batches, shape (m, P).
        num_items: Items of each, shape (m,).
    """
    m = len(gradients)
    mean = (num_items[:, None] * gradients).sum(0) / num_items.sum()
    trace = sum(n * ((g - mean) ** 2).sum() for n, g in zip(num_items, gradients, strict=True)) / (m - 1)
    total = weight = 0.0
    for i in range(m):
        for j in range(m):
            if i != j:
                total += num_items[i] * num_items[j] * gradients[i] @ gradients[j]
                weight += num_items[i] * num_items[j]
    return float(trace), float(total / weight)


def naive_noise(gradients: np.ndarray, num_items: np.ndarray) -> tuple[float, float]:
    """The formula of McCandlish et al. 2018, appendix A.1, with plain means: biased when sizes differ."""
    m = len(gradients)
    b_small, b_big = num_items.mean(), num_items.sum()
    small = (gradients**2).sum(1).mean()
    big = (((num_items[:, None] * gradients).sum(0) / num_items.sum()) ** 2).sum()
    trace = (small - big) / (1 / b_small - 1 / b_big)
    square = (b_big * big - b_small * small) / (b_big - b_small)
    assert m > 1
    return float(trace), float(square)


@dataclass
class TrackedWindow:
    trace: float
    square: float
    num_micro_batches: int
    num_samples: float
    position: float  # samples seen at its end
    in_halves: bool = False


def caps(windows: list[TrackedWindow], weights: np.ndarray, half_life: float) -> np.ndarray:
    """Weights without their decay. Those before a window in halves are on average no larger than its own."""
    weights = weights.copy()
    for index, window in enumerate(windows):
        if window.in_halves and index:
            earlier = weights[:index] * [0.5 ** ((window.position - w.position) / half_life) for w in windows[:index]]
            weights[:index] *= min(1.0, weights[index] / np.average(weights[:index], weights=earlier))
    return weights


def tracked_noise(windows: list[TrackedWindow], now: float, half_life: float) -> dict[str, float]:
    """What `NoiseScaleTracker` must report, from the whole history and numpy's weighted moments."""
    age = np.array([now - w.position for w in windows])
    decay = 0.5 ** (age / half_life)
    m = np.array([w.num_micro_batches for w in windows], dtype=float)
    samples = np.array([w.num_samples for w in windows], dtype=float)
    x = np.array([w.trace for w in windows])
    y = np.array([w.square for w in windows])
    a, c = decay * caps(windows, m - 1, half_life), decay * caps(windows, (m - 1) / m * samples**2, half_life)
    trace, square = np.average(x, weights=a), np.average(y, weights=c)
    effective = c.sum() ** 2 / (c**2).sum()
    correction = effective / (effective - 1)
    return {
        "trace": trace,
        "square": square,
        "effective": effective,
        "trace_variance": (a**2 * (x - trace) ** 2).sum() / a.sum() ** 2 * correction,
        "square_variance": (c**2 * (y - square) ** 2).sum() / c.sum() ** 2 * correction,
        "covariance": (a * c * (x - trace) * (y - square)).sum() / (a.sum() * c.sum()) * correction,
    }


def walk_the_data(
    window_sizes: list[int], micro_batches_per_epoch: int, reference_steps: int, budget: int
) -> list[tuple[int, int, Fraction]]:
    """Where each window ends if an epoch is a list of micro-batches and windows eat from it.

    Returns:
        For each window `(epoch, micro-batches taken, position in reference windows)`; stops when the budget of
        reference windows is used up. A window never crosses the end of an epoch, and the rest of an epoch that is
        shorter than a reference window counts as a whole one.
    """
    result, epoch, left, finished = [], 0, list(range(micro_batches_per_epoch)), 0
    for size in window_sizes:
        position = Fraction(finished) + Fraction(micro_batches_per_epoch - len(left), reference_steps)
        if position >= budget:
            break
        taken = 0
        while taken < size and left and position < budget:
            left.pop(0)
            taken += 1
            position += Fraction(1, reference_steps)
        this_epoch = epoch
        if not left:
            finished += -(-micro_batches_per_epoch // reference_steps)
            epoch, left = epoch + 1, list(range(micro_batches_per_epoch))
            position = Fraction(finished)
        result.append((this_epoch, taken, position))
    return result


def all_paths(chain) -> list[tuple]:
    """Every way through the stages of a placement chain, one after another."""

    def from_stage(start):
        if start == chain.num_stages:
            return [()]
        return [
            (segment, *rest)
            for segment in chain.segments
            if segment.start == start
            for rest in from_stage(segment.stop)
        ]

    return from_stage(0)


def best_path_twin(chain, budget):
    """(seconds, path) of the fastest way whose peak, added up stage by stage, is within the budget."""
    best = None
    for path in all_paths(chain):
        kept, peak = chain.base_bytes, chain.fixed_bytes
        for segment in path:
            peak = max(peak, kept + segment.need_bytes)
            kept = kept + segment.keep_bytes
        peak = max(peak, kept + chain.head_bytes)
        seconds = sum(segment.seconds for segment in path)
        if peak <= budget and (best is None or seconds < best[0]):
            best = (seconds, path)
    return best


def median_at_positions(curves, holds):
    """Median of curves, point by point, on the stretch that all have: lists of (x, y) in the order of x.

    At the positions of the shortest curve (the first of them) and at the ends; linear between two points, or the value
    of the point before if `holds`. Not a number where a curve has a gap.
    """
    start, end = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
    if not start < end:
        return None
    shortest = min(curves, key=len)
    places = [start, *(x for x, _ in shortest if start < x < end), end]

    def value(points, x):
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x == x0:
                return y0
            if x0 < x < x1:
                return y0 if holds else y0 + (x - x0) / (x1 - x0) * (y1 - y0)
        return points[-1][1]

    result = []
    for x in places:
        values = sorted(value(points, x) for points in curves)
        if any(math.isnan(value(points, x)) for points in curves):
            result.append((x, math.nan))
        else:
            middle = len(values) // 2
            result.append((x, values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2))
    return result


def adam_by_definition(
    weights: np.ndarray,
    gradients: list[np.ndarray],
    batch_ratios: list[float],
    rates: list[float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rate_factors: list[float],
    longest: float = np.inf,
) -> tuple[np.ndarray, np.ndarray]:
    """AdamW on a clock of data, in float64, from the whole history: no running average, no step count.

    After n windows the second moment is the mean of the square gradients, each weighted by what it came in with,
    1 − d(κ), times what all later windows have left of it, d(κ) = ½^(κ/half-life in data). A mean: the weights are
    divided by their sum. The first moment likewise, with β1 at every window. Weights decay by 1 − η·λ·κ a window,
    where η is the rate without the factor for its batch.

    Args:
        weights: Before the first window, shape (P,).
        gradients: Of each window, shape (P,).
        batch_ratios: κ of each.
        rates: Learning rate of each, factor for the batch included.
        betas: Of the recipe.
        eps: ε.
        weight_decay: λ.
        rate_factors: Factor for the batch of each.
        longest: Longest half-life in reference windows that a smaller batch is given.

    Returns:
        Weights, and the second moment as the optimizer keeps it (not divided).
    """
    weights = weights.astype(np.float64)
    of_recipe = np.log(0.5) / np.log(betas[1])  # its half-life in windows of k_ref
    decays = []
    for ratio in batch_ratios:
        in_data = of_recipe if ratio >= 1 else min(of_recipe, max(of_recipe * ratio, longest))
        decays.append(0.5 ** (ratio / in_data))
    for n in range(1, len(gradients) + 1):
        first, second = np.zeros_like(weights), np.zeros_like(weights)
        first_weight = second_weight = 0.0
        for i in range(n):
            own = 1 - betas[0]
            for _ in range(i + 1, n):
                own *= betas[0]
            first, first_weight = first + own * gradients[i], first_weight + own
            own = 1 - decays[i]
            for j in range(i + 1, n):
                own *= decays[j]
            second, second_weight = second + own * gradients[i] ** 2, second_weight + own
        rate = rates[n - 1]
        weights = weights * (1 - rate / rate_factors[n - 1] * weight_decay * batch_ratios[n - 1])
        weights = weights - rate * (first / first_weight) / (np.sqrt(second / second_weight) + eps)
    return weights, second


def largest_size_by_scan(peak, limit, budget, unit):
    """Return the largest multiple of `unit` up to `limit` whose peak is within the budget; 0 if none is."""
    return max((size for size in range(unit, limit + 1, unit) if peak(size) <= budget), default=0)
