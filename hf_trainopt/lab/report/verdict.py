"""What a report says first: how the runs came out, in a sentence for each arm, and the charts that show it."""

import math
from collections.abc import Sequence

from hf_trainopt.lab.compare.statistics import Estimate
from hf_trainopt.metrics.targets import Target

from .arms import Arm
from .metrics import evaluation_metrics
from .ratios import Ratio, is_resolved
from .summary import figure, largest, ratio_text, spread


# Below this a difference is called none, as a share.
_SAME = 0.005
# From this on the time of the whole run is told as well: who goes on to the end pays it.
_LONGER = 0.05


def verdicts(arms: Sequence[Arm], baseline: Arm | None, ratios: Sequence[Ratio], target: Target | None) -> list[str]:
    """Return the sentences at the top of a report.

    Args:
        arms: All arms.
        baseline: What others are compared with.
        ratios: To the baseline.
        target: What time to target is measured to.
    """
    others = [arm for arm in arms if arm is not baseline]
    if not others or baseline is None:
        return [_alone(arms[0])] if arms else []
    return [
        _against(arm, baseline, {r.quantity: r.estimate for r in ratios if arms[r.arm] is arm}, target)
        for arm in others
    ]


def _alone(arm: Arm) -> str:
    """Return how a single arm came out."""
    run = arm.runs[0]
    metric = next(iter(evaluation_metrics([arm])), "loss" if "loss" in run.keys else None)
    parts = []
    for label, values, unit in (
        ("{} optimizer steps", [run.steps for run in arm.runs], ""),
        ("{} samples", [run.end("samples") for run in arm.runs], ""),
        ("{}", [run.end("time") for run in arm.runs], "s"),
    ):
        if None not in values:
            parts.append(label.format(spread(values, unit)))
    text = f"{arm.name} took {', '.join(parts)}" if parts else f"{arm.name} has a log without steps"
    ends = [run.last(metric) for run in arm.runs] if metric is not None else [None]
    if None not in ends:
        text += f"; {metric} ended at {spread(ends)}"
    peaks = [largest(run, "peak_memory_gib") for run in arm.runs]
    if None not in peaks:
        text += f"; peak memory {spread(peaks, 'GiB')}"
    return f"{text}."


def _against(arm: Arm, baseline: Arm, ratios: dict[str, Estimate], target: Target | None) -> str:
    """Return how an arm came out against the baseline."""
    to_target = _to_target(ratios, baseline.name)
    parts = (to_target, _whole(ratios), _memory(ratios), _final(ratios, arm, baseline, target))
    said = ", ".join(filter(None, parts))
    if not said:
        return f"{arm.name} and {baseline.name} have nothing in common that could be compared."
    return f"{arm.name}{'' if to_target else ':'} {said}{_seeds(arm, baseline, ratios)}."


def _to_target(ratios: dict[str, Estimate], baseline: str) -> str:
    for quantity, preposition, what in (
        ("time_to_target", "in", "time"),
        ("samples_to_target", "with", "samples"),
        ("steps_to_target", "with", "optimizer steps"),
    ):
        estimate = ratios.get(quantity)
        if estimate is None:
            continue
        value = ratio_text(estimate.value)
        if estimate.bound == "at least":
            return f"did not reach the target {preposition} {value} times the {what} of {baseline}"
        if estimate.bound == "at most":
            return f"reached the target, which {baseline} did not, {preposition} at most {value} of its {what}"
        if abs(estimate.value - 1) < _SAME:
            return f"reached the target {preposition} the same {what}{_interval(estimate)}"
        if estimate.value > 1:
            return f"took {value} times the {what} to the target{_interval(estimate)}"
        return f"reached the target {preposition} {value} of the {what}{_interval(estimate)}"
    return ""


def _whole(ratios: dict[str, Estimate]) -> str:
    estimate = ratios.get("train_time")
    if estimate is None or estimate.bound != "exact" or estimate.value < 1 + _LONGER:
        return ""
    ratio = estimate.value
    change = f"{ratio_text(ratio)} times as long" if ratio >= 1.995 else f"{100 * (ratio - 1):.2g} % longer"
    return f"its whole training took {change}"


def _interval(estimate: Estimate) -> str:
    if estimate.interval is None:
        return ""
    low, high = estimate.interval
    if not is_resolved(low, high):
        return " (too uncertain for an interval)"
    unclear = ", no clear difference" if low <= 1 <= high else ""
    return f" (95 %: {ratio_text(low)}–{ratio_text(high)}{unclear})"


def _memory(ratios: dict[str, Estimate]) -> str:
    estimate = ratios.get("peak_memory")
    return "" if estimate is None else f"{_change(estimate.value, 'less', 'more')} memory"


def _change(ratio: float, below: str, above: str) -> str:
    """Return a ratio as a change in per cent: `31 % less`."""
    if abs(ratio - 1) < _SAME:
        return "the same"
    if ratio >= 1.995:
        return f"{ratio_text(ratio)} times the"
    return f"{100 * abs(ratio - 1):.2g} % {below if ratio < 1 else above}"


def _final(ratios: dict[str, Estimate], arm: Arm, baseline: Arm, target: Target | None) -> str:
    metric = target.metric if target is not None else next(iter(evaluation_metrics([arm, baseline])), None)
    if metric is None:
        return ""
    ends = {run.last(metric) for run in arm.runs}
    if any(value is not None and not math.isfinite(value) for value in ends):
        return f"final {metric} not finite"
    estimate = ratios.get("final_metric")
    if estimate is None:
        return ""
    if abs(estimate.value - 1) < _SAME / 10:
        return f"the same final {metric}"
    ratio = estimate.value
    share = f"{figure(100 * abs(ratio - 1), 2)} % {'lower' if ratio < 1 else 'higher'}"
    text = f"final {metric} {share}" if ratio < 1.995 else f"final {metric} {ratio_text(ratio)} times as high"
    unclear = estimate.interval is not None and estimate.interval[0] <= 1 <= estimate.interval[1]
    return f"{text} (no clear difference)" if unclear else text


def _seeds(arm: Arm, baseline: Arm, ratios: dict[str, Estimate]) -> str:
    """Return what stands for an interval where there is none."""
    exact = [estimate for estimate in ratios.values() if estimate.bound == "exact"]
    if not exact or any(estimate.interval is not None for estimate in exact):
        return ""
    count = min(len(arm.runs), len(baseline.runs))
    return f" ({'one seed' if count == 1 else f'{count} seeds'}, no interval)"
