"""Time, samples and steps to a target."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..core.log_lines import is_last_line
from .base import MeteredCallback


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A value that an evaluation metric shall reach.

    Args:
        metric: Key such as `eval_loss`.
        value: The value.
        greater_is_better: Whether the metric rises.
        source: Where the value is from, in words.
    """

    metric: str
    value: float
    greater_is_better: bool
    source: str = field(default="given", compare=False)

    @classmethod
    def of(cls, metric: str, value: float, greater_is_better: bool | None = None) -> "Target":
        """Return a target as a user names it: `eval_` is put before a metric that lacks it.

        Raises:
            ValueError: The value is not finite.
        """
        if not math.isfinite(value):
            raise ValueError(f"target_value is {value}; it must be a finite number.")
        metric = metric_key(metric)
        rises = not falls_when_better(metric) if greater_is_better is None else bool(greater_is_better)
        return cls(metric, float(value), rises)

    def __str__(self) -> str:
        return f"{self.metric} {'≥' if self.greater_is_better else '≤'} {self.value:.6g}"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: what was measured, and what had been spent by then.

    Args:
        value: The metric.
        steps: Optimizer steps.
        samples: Samples trained on over all ranks; `None`: not known.
        seconds: Seconds of training, evaluations left out; `None`: not known.
    """

    value: float
    steps: float
    samples: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Crossing:
    """Where a curve first meets its target.

    Args:
        reached: Whether it does. If not, the rest says how far the run went: the true values are larger (censored).
        steps: Optimizer steps.
        samples: Samples over all ranks, if known.
        seconds: Seconds of training, if known.
    """

    reached: bool
    steps: float
    samples: float | None
    seconds: float | None


def first_crossing(curve: Sequence[Evaluation], target: float, greater_is_better: bool) -> Crossing | None:
    """Return where `curve` first meets `target`.

    Between the last evaluation that misses and the first that meets it the metric is taken as linear in each axis. A
    target met by the first evaluation of all counts as met there: nothing is known of what was before.

    Args:
        curve: Evaluations in the order of training. Those that are not finite miss the target.
        target: Value to reach.
        greater_is_better: Whether the metric rises.

    Returns:
        The crossing, with `reached=False` at the last evaluation if there is none; `None` for an empty curve.
    """
    sign = 1.0 if greater_is_better else -1.0
    before: Evaluation | None = None
    for after in curve:
        if math.isfinite(after.value) and sign * (after.value - target) >= 0:
            share = 1.0
            if before is not None and math.isfinite(before.value) and after.value != before.value:
                share = (target - before.value) / (after.value - before.value)
            return Crossing(True, *(_between(before, after, axis, share) for axis in ("steps", "samples", "seconds")))
        before = after
    return None if before is None else Crossing(False, before.steps, before.samples, before.seconds)


def _between(before: Evaluation | None, after: Evaluation, axis: str, share: float) -> float | None:
    end = getattr(after, axis)
    start = getattr(before, axis) if before is not None else None
    return end if start is None or end is None else start + share * (end - start)


def curve_from_log(log_history: Iterable[dict[str, Any]], metric: str) -> list[Evaluation]:
    """Return the evaluations of `metric` in a `log_history` (of `trainer_state.json`).

    Args:
        log_history: Lines as `Trainer` keeps them. Seconds are known where `ThroughputCallback` or `TargetCallback`
            was there, samples there and under `EfficientTrainer`.
        metric: Key such as `eval_loss`.

    Returns:
        The curve. Of several evaluations at one step the first counts: those after training may be of the best model.
    """
    curve: list[Evaluation] = []
    for line in log_history:
        if isinstance(line.get(metric), int | float) and not (curve and line["step"] <= curve[-1].steps):
            curve.append(Evaluation(line[metric], line["step"], line.get("samples_seen"), line.get("train_time_s")))
    return curve


def metric_key(name: str) -> str:
    """Return the key of an evaluation metric in the log; `eval_` may be left out of its name."""
    return name if name.startswith("eval_") else f"eval_{name}"


def falls_when_better(metric: str) -> bool:
    """Return whether a metric is better when lower, judged by its name as `Trainer` does: losses and perplexities."""
    return metric.endswith(("loss", "perplexity", "error", "wer", "cer"))


class TargetCallback(MeteredCallback):
    """Measures time, samples and optimizer steps to a target of an evaluation metric.

    Logged keys, from the evaluation on that meets the target: `time_to_target_s` (seconds of training, evaluations
    and saves left out), `samples_to_target` (over all ranks), `steps_to_target`; `target_reached` on every evaluation;
    on the last line of a run that never meets it `target_reached` is false (the times are censored: longer than the
    run). Each value is interpolated between the evaluations around the target. All evaluation lines get
    `train_time_s` and `samples_seen`. Keys of a second target end in `_2`, those of a third in `_3`.

    Args:
        metric: Such as `eval_loss`; `eval_` is put before a name that lacks it.
        value: The target.
        greater_is_better: Whether the metric rises; by its name if unset.
        stop: Whether training ends once the target is met.

    Raises:
        ValueError: The target is not finite.
    """

    def __init__(self, metric: str, value: float, greater_is_better: bool | None = None, stop: bool = False):
        super().__init__()
        target = Target.of(metric, value, greater_is_better)
        self.metric, self.value, self.greater_is_better = target.metric, target.value, target.greater_is_better
        self.stop = stop
        self.curve: list[Evaluation] = []
        self.crossing: Crossing | None = None
        self._others: set[str] = set()
        self._warned = False

    def arguments(self):
        return {
            "metric": self.metric,
            "value": self.value,
            "greater_is_better": self.greater_is_better,
            "stop": self.stop,
        }

    def attributes(self):
        return super().attributes() | {"curve": [asdict(evaluation) for evaluation in self.curve]}

    def begin(self, args, state, saved, model=None, **kwargs):
        super().begin(args, state, saved, model=model, **kwargs)
        if saved and "curve" in saved:
            self.curve = [Evaluation(**evaluation) for evaluation in saved["curve"]]
        else:  # a run resumed with another target, or without one until now
            self.curve = curve_from_log(state.log_history, self.metric)
        self.crossing = first_crossing(self.curve, self.value, self.greater_is_better)
        self._others, self._warned = set(), False

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        if self._others and not self.curve:  # all evaluations of the last step are over, of all datasets
            self._warn_of_absence()

    def _warn_of_absence(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "No evaluation had the target_metric '%s'; they had %s.",
                self.metric,
                ", ".join(sorted(self._others)) or "no metric at all: set eval_strategy='steps'",
            )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
        if self.stop and self.meter.is_running and self.crossing is not None and self.crossing.reached:
            control.should_training_stop = True

    def values(self, args, state, logs):
        if self.metric not in logs:
            self._others |= {key for key in logs if key.startswith("eval_")}
            if not is_last_line(logs):
                return {}
            if not self.curve:
                self._warn_of_absence()
            return self._logged()
        if not (self.meter.is_running or state.global_step):
            return {}  # `evaluate` before `train`
        reading = self.meter.read(args)
        # What is on the line already is what others will read off it.
        seconds = logs.get("train_time_s", reading.seconds)
        samples = logs.get("samples_seen", None if self.is_partial else reading.samples)
        # Once training is over the model may be the best one, not the last.
        if self.meter.is_running and not (self.curve and self.curve[-1].steps >= state.global_step):
            spent = None if self.is_partial else seconds
            self.curve.append(Evaluation(logs[self.metric], state.global_step, samples, spent))
            self.crossing = first_crossing(self.curve, self.value, self.greater_is_better)
        added = {"train_time_s": seconds, **self._logged()}
        if samples is not None:
            added["samples_seen"] = samples
        return added

    def _logged(self) -> dict[str, Any]:
        if self.crossing is None:
            return {}
        logged: dict[str, Any] = {"target_reached": self.crossing.reached}
        if self.crossing.reached:
            logged |= {
                "time_to_target_s": self.crossing.seconds,
                "samples_to_target": self.crossing.samples,
                "steps_to_target": self.crossing.steps,
            }
        end = f"_{self.position + 1}" if self.position else ""
        return {f"{key}{end}": value for key, value in logged.items() if value is not None}
