"""What runs are compared on: axes, evaluation metrics, the target."""

import math
from collections.abc import Sequence

from hf_trainopt.metrics.targets import Target

from .arms import Arm


def common_axis(arms: Sequence[Arm], *, time: bool = False) -> str:
    """Return the axis that all runs can be placed on: time if asked for, else samples, else steps."""
    axes = ["time", "samples", "steps"] if time else ["samples", "steps"]
    return next((axis for axis in axes if all(arm.has_axis(axis) for arm in arms)), "steps")


def without_axis(arms: Sequence[Arm], axis: str) -> list[str]:
    """Return the names of arms of which some run cannot be placed on an axis (of `runs.AXES`)."""
    return [arm.name for arm in arms if not arm.has_axis(axis)]


def _evaluated(arms: Sequence[Arm]) -> list[str]:
    """Return keys of evaluations; those after training are among the results only."""
    keys = {key for arm in arms for run in arm.runs for key in (*run.keys, *run.results) if key.startswith("eval_")}
    return sorted(key for key in keys if any(run.last(key) is not None for arm in arms for run in arm.runs))


def main_metric(arms: Sequence[Arm]) -> str | None:
    """Return the evaluation metric that a report is about: `eval_loss`, or else another loss that runs have."""
    keys = _evaluated(arms)
    losses = [key for key in keys if key.endswith("_loss")]
    return "eval_loss" if "eval_loss" in keys else losses[0] if losses else None


# What `Trainer` and our callbacks add to evaluation lines that is no quality.
_NO_METRICS = ("_runtime", "_per_second", "_time", "_samples", "_model_preparation_time")


def evaluation_metrics(arms: Sequence[Arm]) -> list[str]:
    """Return the keys of evaluation metrics, the main one first."""
    metrics = [key for key in _evaluated(arms) if not key.endswith(_NO_METRICS)]
    main = main_metric(arms)
    return sorted(metrics, key=lambda key: (key != main, key))


def choose_target(
    arms: Sequence[Arm], baseline: Arm | None, given: Target | None = None
) -> tuple[Target | None, str | None]:
    """Return the target that runs are compared on, and what is to be said if there is none.

    It is the one that is given, else the one that all runs that were trained towards one agree on, else the last
    evaluation of the baseline (the worst of its seeds), if there are others to compare with.

    Raises:
        ValueError: No run has evaluated the metric of the given target.
    """
    metrics = evaluation_metrics(arms)
    if given is not None:
        if given.metric not in metrics:
            known = f"they have {', '.join(metrics)}" if metrics else "they have no evaluation at all"
            raise ValueError(f"No run has the target_metric '{given.metric}'; {known}.")
        return given, None
    stored = {run.target for arm in arms for run in arm.runs if run.target is not None}
    if len(stored) == 1:
        return stored.pop(), None
    if len(stored) > 1:
        several = ", ".join(sorted(map(str, stored)))
        return (
            None,
            f"the runs had different targets ({several}); name one (target_metric and target_value).",
        )
    metric = main_metric(arms)
    evaluated = [run for run in baseline.runs if metric in run.keys] if baseline is not None else []
    finals = [run.last(metric) for run in evaluated]
    if finals and len(arms) < 2:
        return None, "no target was set; name one (target_metric and target_value)."
    if not all(map(math.isfinite, finals)):
        return None, "the last evaluation of the baseline is not finite; name one (target_metric and target_value)."
    if finals:
        return Target(metric, max(finals), False, f"the last evaluation of the baseline, {baseline.name}"), None
    return None, "no target was set; name one (target_metric and target_value), or evaluate during training."
