"""What fits, and what is fastest: the search over sizes of a batch, each with the plan that is best for it.

A peak grows almost linearly with the size of a batch, so two plans say about where the third will fit. Every answer is
checked by a plan of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...machine.costs import Cost
from ..errors import PlacementError
from ..simulate.replay import Replay
from .plan import PlacementPlan
from .planner import PlacementPlanner


def step_seconds(replay: Replay, accumulation_steps: int) -> float:
    """Return the time of an optimizer step of several micro-batches, from the replay of a step of one.

    Args:
        replay: Of a micro-batch and the optimizer's step.
        accumulation_steps: k.
    """
    once = replay.section("step").cost
    total = sum((replay.cost - once for _ in range(accumulation_steps)), Cost()) + once
    return total.seconds


def largest_size(fits: Callable[[int], int], limit: int, budget: int, *, first: int = 1, unit: int = 1) -> int:
    """Return the largest multiple of `unit` up to `limit` that fits; 0 if not even `unit` does.

    Args:
        fits: Size -> least peak in bytes, which rises with it.
        limit: Largest size of interest.
        budget: Bytes.
        first: Where to begin.
        unit: Sizes are multiples of it.
    """
    low, low_peak = 0, 0  # fits
    high = limit // unit + 1  # doesn't, or is out of bounds
    high_peak = None
    number = max(1, min(first // unit, high - 1))
    while high - low > 1:
        peak = fits(number * unit)
        if peak <= budget:
            previous, (low, low_peak) = (low, low_peak), (number, peak)
        else:
            previous, (high, high_peak) = (high, high_peak), (number, peak)
        if high - low <= 1:
            break
        known = [(low, low_peak)] * (low > 0) + ([(high, high_peak)] if high_peak is not None else [])
        if len(known) < 2 and previous[0] and previous[1] and previous[0] != number:
            known.append(previous)
        if len(known) == 2 and known[0][1] != known[1][1]:
            (a, peak_a), (b, peak_b) = known
            guess = int(a + (budget - peak_a) * (b - a) / (peak_b - peak_a))
        else:
            guess = 2 * low if low else high // 2
        # Just past the guess, if the guess itself is what is known to fit.
        number = min(max(guess, low + 1), high - 1)
    return low * unit


# Predicted times of a CPU are right to about a tenth (benchmarks/placement.md, step times).
_ERROR_ON_CPU = 1.1


@dataclass(frozen=True)
class SizedPlan:
    """A micro-batch, and the best plan for it.

    Args:
        micro_batch: Samples that go through the model at once.
        accumulation_steps: k, so that the batch of a step is the same for all.
        baseline_peak_bytes: Peak without recomputation.
        plan: The plan.
        seconds: Predicted time of a whole optimizer step.
    """

    micro_batch: int
    accumulation_steps: int
    baseline_peak_bytes: int
    plan: PlacementPlan
    seconds: float

    @property
    def samples_per_second(self) -> float:
        """Predicted throughput of one device."""
        return self.micro_batch * self.accumulation_steps / self.seconds


def fastest_micro_batch(
    planner_for: Callable[[int], PlacementPlanner], sizes: Mapping[int, int], memory_budget: str | int
) -> list[SizedPlan]:
    """Return the best plan for each micro-batch that fits, the fastest of them first.

    The search goes from large to small. On a GPU it ends with the first micro-batch that needs no recomputation: a
    smaller one does the same work in more and smaller kernels. On a CPU all are tried: smaller ones may gain, because
    more of the work stays in the caches, and the first is the largest of those that are within the error of the
    prediction and recompute no more. Where times are equal, the larger micro-batch comes first.

    Args:
        planner_for: Micro-batch -> planner.
        sizes: Micro-batches to try -> k, so that an optimizer step has the same samples.
        memory_budget: As `PlacementPlanner.for_budget` takes it. A share of the peak is of the first size's.

    Returns:
        Nothing if none fits.
    """
    found = []
    for size in sorted(sizes, reverse=True):
        try:
            planner = planner_for(size)
        except ValueError:  # batch norms can't train on one sample, lists can't be divided
            break
        try:
            plan = planner.for_budget(memory_budget)
        except PlacementError:
            continue
        seconds = step_seconds(planner.replay(plan.stages, plan.rewrites), sizes[size])
        found.append(SizedPlan(size, sizes[size], planner.baseline.peak_bytes, plan, seconds))
        if plan.is_stock and planner.setup.device.kind != "cpu":
            break
    ordered = sorted(found, key=lambda sized: (round(sized.seconds, 9), -sized.micro_batch))
    if not ordered or planner_for(ordered[0].micro_batch).setup.device.kind != "cpu":
        return ordered
    # What a smaller one gains within the error of the prediction it may lose to Python, unless a larger one recomputes
    # more.
    first = ordered[0]
    close = [
        sized
        for sized in ordered
        if sized.seconds <= _ERROR_ON_CPU * first.seconds
        and sized.plan.extra_time_ratio <= first.plan.extra_time_ratio
    ]
    best = max(close, key=lambda sized: sized.micro_batch)
    return [best, *(sized for sized in ordered if sized is not best)]
