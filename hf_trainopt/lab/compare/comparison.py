"""What the records of a comparison say: the target, and each arm against the baseline."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hf_trainopt.core.log_lines import is_last_line
from hf_trainopt.metrics.targets import Crossing, Evaluation, Target, curve_from_log, first_crossing

from .statistics import Estimate, Measured, paired_difference, paired_ratio


SCHEMA_VERSION = 1

# Quantity -> what it is, with its unit; all as ratios to the baseline, of the same seed.
RATIOS = {
    "time_to_target": "seconds of training to the target",
    "samples_to_target": "samples to the target",
    "steps_to_target": "optimizer steps to the target",
    "train_time": "seconds of training, whole run",
    "optimizer_steps": "optimizer steps, whole run",
    "samples": "samples, whole run",
    "peak_memory": "peak memory",
    "throughput": "samples a second",
    "final_metric": "the metric at the end",
}


@dataclass(frozen=True)
class ArmResult:
    """One arm against the baseline.

    Args:
        name: Its name.
        seeds: Seeds of its finished runs.
        values: Quantity -> one value per seed (`None` where it is not known, not finite, or never reached).
        ratios: Quantity -> ratio to the baseline over the seeds that both have.
        final_difference: Of the metric at the end, to the baseline.
        failed_seeds: Seeds whose run has failed.
    """

    name: str
    seeds: list[int]
    values: dict[str, list[float | None]]
    ratios: dict[str, Estimate] = field(default_factory=dict)
    final_difference: Estimate | None = None
    failed_seeds: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """The result, as `comparison.json` has it.

    Args:
        script: What was run.
        baseline: Name of the arm that ratios are to.
        target: What was to be reached; `None` if no run was ever evaluated.
        arms: One result per arm, the baseline first.
        machine: Of the first run; `kinds` is there if others ran on other machines or threads, and says how many.
        versions: Of the first run.
        schema_version: Of this file.
    """

    script: str
    baseline: str
    target: Target | None
    arms: list[ArmResult]
    machine: dict[str, Any]
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def value_at_share(curve: Sequence[Evaluation], share: float) -> float | None:
    """Return the metric at a share of a run's samples (steps where samples are not known), linear in between."""
    if not curve:
        return None
    axis = "samples" if all(point.samples is not None for point in curve) else "steps"
    wanted = share * getattr(curve[-1], axis)
    before = None
    for after in curve:
        if getattr(after, axis) >= wanted:
            if before is None:
                return after.value
            part = (wanted - getattr(before, axis)) / (getattr(after, axis) - getattr(before, axis))
            return before.value + part * (after.value - before.value)
        before = after
    return curve[-1].value


def freeze_target(
    record: dict[str, Any], metric: str, value: float | None, share: float, greater_is_better: bool | None
) -> Target | None:
    """Return the target: as given, or what the baseline's first run reaches at a share of its data.

    Raises:
        ValueError: It reaches nothing finite there.
    """
    if value is not None:
        return Target.of(metric, value, greater_is_better)
    curve = curve_from_log(record["log_history"], metric)
    reached = value_at_share(curve, share)
    if reached is None:
        return None
    name, seed = record["arm"]["name"], record["seed"]
    if not math.isfinite(reached):
        raise ValueError(
            f"{metric} of {name}, seed {seed}, is {reached} at {share:.0%} of its data, which is no target; name one "
            "with --target_value, or another --target_share."
        )
    target = Target.of(metric, reached, greater_is_better)
    source = f"{name}, seed {seed}, at {share:.0%} of its data"
    if first_crossing(curve[:1], target.value, target.greater_is_better).reached and len(curve) > 1:
        source += "; it is no better than that run's first evaluation, so the time to it says little"
    return replace(target, source=source)


def quantities(record: dict[str, Any], target: Target | None, metric: str) -> dict[str, Measured | None]:
    """Return what a run took, by quantity; `None` where it is not known."""
    history = record["log_history"]
    curve = curve_from_log(history, metric)
    crossing = first_crossing(curve, target.value, target.greater_is_better) if target is not None else None
    found: dict[str, Measured | None] = {
        f"{name}_to_target": _of_crossing(crossing, axis)
        for name, axis in (("time", "seconds"), ("samples", "samples"), ("steps", "steps"))
    }
    last = history[-1] if history else {}
    whole = next((line for line in reversed(history) if is_last_line(line)), last)
    peaks = [line["peak_memory_gib"] for line in history if "peak_memory_gib" in line]
    plain = {
        "train_time": whole.get("train_time_s"),
        "optimizer_steps": record["optimizer_steps"],
        "samples": whole.get("samples_seen"),
        "peak_memory": max(peaks) if peaks else record.get("peak_resident_gib"),
        "throughput": whole.get("samples_per_second"),
        "final_metric": curve[-1].value if curve else None,
    }
    return found | {name: None if value is None else Measured(float(value)) for name, value in plain.items()}


def _of_crossing(crossing: Crossing | None, axis: str) -> Measured | None:
    value = getattr(crossing, axis) if crossing is not None else None
    return None if not value else Measured(float(value), not crossing.reached)


def compare(
    script: str,
    baseline: str,
    records: dict[str, list[dict[str, Any]]],
    target: Target | None,
    metric: str,
) -> Comparison:
    """Return the comparison of all arms.

    Args:
        script: What was run.
        baseline: Name of the arm to compare with.
        records: Arm -> its records, failed ones too, in the order of the arms.
        target: What is to be reached.
        metric: Metric of evaluation.

    Raises:
        ValueError: The baseline has no finished run.
    """
    finished = {name: {r["seed"]: r for r in runs if r["status"] == "finished"} for name, runs in records.items()}
    if not finished.get(baseline):
        raise ValueError(f"no run of the baseline '{baseline}' has finished, so there is nothing to compare with.")
    measured = {
        name: {seed: quantities(record, target, metric) for seed, record in runs.items()}
        for name, runs in finished.items()
    }
    arms = []
    for name in sorted(records, key=lambda name: name != baseline):
        seeds = sorted(measured[name])
        values = {quantity: [_exact(measured[name][seed][quantity]) for seed in seeds] for quantity in RATIOS}
        ratios, difference = {}, None
        if name != baseline:
            both = [seed for seed in seeds if seed in measured[baseline]]
            ratios = {
                quantity: estimate
                for quantity in RATIOS
                if (estimate := _ratio([measured[name][s][quantity] for s in both],
                                       [measured[baseline][s][quantity] for s in both])) is not None
            }  # fmt: skip
            difference = _final_difference(measured, name, baseline, both)
        unfinished = sorted(r["seed"] for r in records[name] if r["status"] != "finished")
        arms.append(ArmResult(name, seeds, values, ratios, difference, unfinished))
    first = next(iter(finished[baseline].values()))
    machines = {str(sorted(record["machine"].items())) for runs in finished.values() for record in runs.values()}
    machine = first["machine"] | ({"kinds": len(machines)} if len(machines) > 1 else {})
    return Comparison(script, baseline, target, arms, machine, first["versions"])


def _exact(value: Measured | None) -> float | None:
    return None if value is None or value.censored or not math.isfinite(value.value) else value.value


def _ratio(ours: Sequence[Measured | None], baseline: Sequence[Measured | None]) -> Estimate | None:
    pairs = [(a, b) for a, b in zip(ours, baseline, strict=True) if a is not None and b is not None]
    if not pairs or any(not 0 < run.value < math.inf for pair in pairs for run in pair):
        return None
    return paired_ratio([a for a, _ in pairs], [b for _, b in pairs])


def _final_difference(measured: Any, name: str, baseline: str, seeds: Sequence[int]) -> Estimate | None:
    pairs = [(measured[name][s]["final_metric"], measured[baseline][s]["final_metric"]) for s in seeds]
    pairs = [(a.value, b.value) for a, b in pairs if a is not None and b is not None]
    # Without the seeds that have diverged the mean would be of the lucky ones.
    if not pairs or not all(math.isfinite(value) for pair in pairs for value in pair):
        return None
    return paired_difference([a for a, _ in pairs], [b for _, b in pairs])
