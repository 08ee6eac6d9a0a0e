"""Ratios of arms to the baseline: all of geometric means, as `hf-trainopt compare` has them."""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_trainopt.lab.compare.comparison import RATIOS, ArmResult
from hf_trainopt.lab.compare.statistics import WIDEST, Estimate, Measured
from hf_trainopt.metrics.targets import Target

from .arms import Arm
from .comparison import ComparisonFolder
from .contents import IntervalPanel
from .metrics import evaluation_metrics
from .runs import Run
from .summary import largest, last_rate


_FIELDS = {"time_to_target": "seconds", "samples_to_target": "samples", "steps_to_target": "steps"}

# What a verdict shows of many arms; the other quantities come later.
MAIN = ("time_to_target", "peak_memory", "final_metric")

# Of these, a ratio of one for all arms is no news: the runs were given the same data.
_USUALLY_EQUAL = ("optimizer_steps", "samples")


@dataclass(frozen=True)
class Ratio:
    """One quantity of an arm, relative to the baseline.

    Args:
        quantity: Key of `RATIOS`.
        label: What it is, for a row of a table or a chart.
        arm: Index of the arm.
        estimate: The ratio.
    """

    quantity: str
    label: str
    arm: int
    estimate: Estimate


def arm_ratios(
    arms: Sequence[Arm], baseline: Arm, target: Target | None, comparison: ComparisonFolder | None
) -> list[Ratio]:
    """Return the ratios of all other arms to the baseline, a quantity after the other.

    Args:
        arms: All arms.
        baseline: One of them.
        target: What time to target is measured to.
        comparison: Whose estimates, with their intervals, are taken for its arms; for others there is no interval.
    """
    metric = target.metric if target is not None else next(iter(evaluation_metrics(arms)), None)
    results = _results(arms, comparison)
    found = []
    for quantity, label in RATIOS.items():
        measure = _measure(quantity, target, metric)
        of_quantity = []
        for index, arm in enumerate(arms):
            if arm is baseline:
                continue
            if index in results:
                estimate = results[index].ratios.get(quantity)
            else:
                estimate = ratio_of_means([measure(run) for run in arm.runs], [measure(run) for run in baseline.runs])
            if estimate is not None and estimate.value is not None:
                of_quantity.append(Ratio(quantity, _label(quantity, label, metric, target), index, estimate))
        is_news = any(abs(ratio.estimate.value - 1) >= 0.0005 for ratio in of_quantity)
        found += of_quantity if is_news or quantity not in _USUALLY_EQUAL else []
    return found


def _results(arms: Sequence[Arm], comparison: ComparisonFolder | None) -> dict[int, ArmResult]:
    """Return index of an arm -> its result in a comparison."""
    if comparison is None or comparison.result is None:
        return {}
    places = {run.folder: index for index, arm in enumerate(arms) for run in arm.runs}
    by_name = {name: places[run.folder] for name, run in comparison.runs if run.folder in places}
    return {by_name[arm.name]: arm for arm in comparison.result.arms if arm.name in by_name}


def _label(quantity: str, label: str, metric: str | None, target: Target | None) -> str:
    rises = quantity == "throughput"
    if quantity == "final_metric" and metric is not None:
        label, rises = f"{metric} at the end", target is not None and target.greater_is_better
    return f"{label} (more is better)" if rises else label


def _measure(quantity: str, target: Target | None, metric: str | None) -> Callable[[Run], Measured | None]:
    plain: dict[str, Callable[[Run], float | None]] = {
        "train_time": lambda run: run.end("time"),
        "optimizer_steps": lambda run: run.steps,
        "samples": lambda run: run.end("samples"),
        "peak_memory": lambda run: largest(run, "peak_memory_gib"),
        "throughput": lambda run: last_rate(run, "samples_per_second", run.end("samples")),
        "final_metric": lambda run: run.last(metric) if metric is not None else None,
    }

    def value(run: Run) -> Measured | None:
        if quantity in plain:
            found, censored = plain[quantity](run), False
        else:
            crossing = run.crossing(target) if target is not None else None
            if crossing is None:
                return None
            found, censored = getattr(crossing, _FIELDS[quantity]), not crossing.reached
        return None if found is None else Measured(float(found), censored)

    return value


def ratio_of_means(ours: Sequence[Measured | None], baseline: Sequence[Measured | None]) -> Estimate | None:
    """Return the ratio of two geometric means, without an interval: the mean of the ratios where runs are paired.

    A run that ended before it was there makes it a bound. Returns `None` where a value is unknown or not positive.
    """
    if any(run is None or not 0 < run.value < math.inf for run in (*ours, *baseline)):
        return None
    ratio = statistics.geometric_mean([run.value for run in ours])
    ratio /= statistics.geometric_mean([run.value for run in baseline])
    above, below = any(run.censored for run in ours), any(run.censored for run in baseline)
    bound = "unknown" if above and below else "at least" if above else "at most" if below else "exact"
    value = None if bound == "unknown" else ratio
    return Estimate(value, None, None, bound, min(len(ours), len(baseline)))


def ends(estimate: Estimate) -> tuple[float, float]:
    """Return the ends of an interval as charts have them: NaN without one, 0 or infinity where it is open."""
    if estimate.bound == "at least":
        return estimate.value, math.inf
    if estimate.bound == "at most":
        return 0.0, estimate.value
    if estimate.interval is None:
        return math.nan, math.nan
    lower, upper = estimate.interval
    return max(lower, sys.float_info.min), upper  # 0 stands for an open end


def is_resolved(low: float, high: float) -> bool:
    """Whether the ends of an interval say anything in numbers."""
    return low > 0 and high <= WIDEST * low


def ratio_panel(name: str, ratios: Sequence[Ratio], arms: Sequence[Arm], baseline: str) -> IntervalPanel | None:
    """Return ratios as a chart; `None` without any."""
    if not ratios:
        return None
    several = len({ratio.arm for ratio in ratios}) > 1
    points = tuple(
        (f"{arms[ratio.arm].name}: {ratio.label}" if several else ratio.label, ratio.arm, ratio.estimate.value,
         *ends(ratio.estimate))
        for ratio in ratios
    )  # fmt: skip
    has_intervals = any(ratio.estimate.interval is not None for ratio in ratios)
    xlabel = f"ratio to {baseline}{', 95 % interval' if has_intervals else ''}"
    said = "; ".join(f"{label} {ratio:.3g}" for label, _, ratio, _, _ in points)
    return IntervalPanel(name, f"Ratios to {baseline}", xlabel, points, summary=f"{said}.")
