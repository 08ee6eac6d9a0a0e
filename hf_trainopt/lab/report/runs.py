"""A run: the lines of its log and what else is known of it, as columns, positions and crossings."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_trainopt.metrics.targets import Crossing, Evaluation, Target, falls_when_better, first_crossing
from hf_trainopt.placement.plan.plan import PlacementPlan

from .clock import Clock
from .loss_scale import MEAN, LossScale
from .settings import samples_per_step


# Axis of a plot -> key of the log lines that it is read from.
AXES = {"time": "train_time_s", "samples": "samples_seen", "steps": "step"}


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: What it is called: the name of its folder.
        folder: Output folder; `None` for a run that is still in memory.
        history: Lines of the log, in order.
        state: The rest of `trainer_state.json`.
        results: Metrics of `all_results.json` and its like.
        plan: Placement plan, if one was kept.
        model: Name of the model, if known.
        settings: Arguments that it was started with, as `read_settings` returns them.
        clock: Seconds of training at its steps, for a log that has none.
        loss_scale: What its training losses are.
        notes: What could not be read, in sentences.
    """

    name: str
    folder: Path | None
    history: Sequence[Mapping[str, Any]] = ()
    state: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    plan: PlacementPlan | None = None
    model: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    clock: Clock | None = None
    loss_scale: LossScale = MEAN
    notes: tuple[str, ...] = ()

    # ---- Columns of the log ----------------------------------------------------------------------------------------

    @functools.cached_property
    def keys(self) -> frozenset[str]:
        """Keys that have a number on at least one line."""
        return frozenset(key for line in self.history for key, value in line.items() if number(value) is not None)

    @functools.cached_property
    def _columns(self) -> dict[str, list[float | None]]:
        return {}

    def column(self, key: str) -> list[float | None]:
        """Return the numbers under a key, one for each line; `None` where there is none.

        Losses and gradient norms that are a multiple of the mean are divided by it; in doubt there are none.
        """
        if key not in self._columns:
            self._columns[key] = [self.loss_scale.apply(key, number(line.get(key))) for line in self.history]
        return self._columns[key]

    def last(self, key: str) -> float | None:
        """Return the last number under a key, finite or not; if the log has none, that of the results."""
        found = (value for value in reversed(self.column(key)) if value is not None)
        return next(found, None) if key in self.keys else self.loss_scale.apply(key, number(self.results.get(key)))

    @functools.cached_property
    def samples_are_derived(self) -> bool:
        """Whether samples are not logged but follow from the whole run, or from the arguments (stock `Trainer`)."""
        return "samples_seen" not in self.keys and self._samples_per_step is not None

    @functools.cached_property
    def steps(self) -> float | None:
        """Optimizer steps of the whole run."""
        steps = self.state.get("global_step")
        return float(steps) if isinstance(steps, int) and not isinstance(steps, bool) else self.end("steps")

    @functools.cached_property
    def _steps_of_last_call(self) -> float | None:
        """Steps that the line at the end of `train` is of, which are those since the last resume."""
        rate, seconds = self.last("train_steps_per_second"), self.last("train_runtime")
        if not rate or not seconds or not math.isfinite(rate * seconds):
            return None
        # The rate is rounded to three decimals. Before transformers 5 a run that ended early counted `max_steps`.
        room = 0.5 + 0.0006 * seconds
        known = (self.steps, number(self.state.get("max_steps")))
        return next((steps for steps in known if steps and abs(steps - rate * seconds) <= room), rate * seconds)

    @property
    def is_resumed(self) -> bool:
        """Whether `train_runtime` is that of a part of the run only."""
        return None not in (self.steps, self._steps_of_last_call) and self._steps_of_last_call < self.steps

    @functools.cached_property
    def _samples_per_step(self) -> float | None:
        """Samples of a step: the mean by the line at the end of `train`, else those of a full step."""
        rate, seconds = self.last("train_samples_per_second"), self.last("train_runtime")
        steps = self._steps_of_last_call or number(self.state.get("max_steps"))
        if not rate or not seconds or not steps or steps < 0 or not math.isfinite(rate * seconds):
            return None if "accumulation_steps" in self.keys else samples_per_step(self.settings)
        return rate * seconds / steps

    @functools.cached_property
    def time_is_derived(self) -> bool:
        """Whether seconds of training are not logged but those of `clock`."""
        return "train_time_s" not in self.keys and self.clock is not None

    def positions(self, axis: str) -> list[float | None]:
        """Return where each line lies on an axis: seconds of training, samples over all ranks, or steps."""
        if axis == "samples" and self.samples_are_derived:
            return [None if step is None else step * self._samples_per_step for step in self.column("step")]
        steps = self.column("step")
        if axis == "time" and self.time_is_derived:
            return [self.clock.at(step) for step in steps]
        known = self.column(AXES[axis])
        return [0.0 if step == 0 else value for step, value in zip(steps, known, strict=True)]

    def has_axis(self, axis: str) -> bool:
        """Whether lines can be placed on an axis."""
        derived = {"samples": self.samples_are_derived, "time": self.time_is_derived}
        return AXES[axis] in self.keys or derived.get(axis, False)

    def end(self, axis: str) -> float | None:
        """Return how far the run went on an axis."""
        return max((value for value in self.positions(axis) if value is not None), default=None)

    @property
    def as_logged(self) -> "Run":
        """The run with its losses as they were logged."""
        return replace(self, loss_scale=MEAN)

    # ---- Targets ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def target(self) -> Target | None:
        """The target that `TargetCallback` was given, as far as the run has kept it."""
        given = self._arguments_of_target()
        if not isinstance(given, Mapping) or number(given.get("value")) is None:
            return None
        metric = str(given.get("metric"))
        greater = given.get("greater_is_better")
        greater = greater if isinstance(greater, bool) else not falls_when_better(metric)
        return Target(metric, number(given["value"]), greater, "set in the runs")

    def _arguments_of_target(self) -> Any:
        """Arguments of the last `TargetCallback`: among our measurements, or the user's callbacks (stock)."""
        measured = self.state.get("measurements")
        entries = measured if isinstance(measured, list) else []
        named = [entry for entry in entries if isinstance(entry, Mapping) and entry.get("name") == "TargetCallback"]
        if named:
            return named[-1].get("arguments")
        stored = self.state.get("stateful_callbacks")
        stored = stored.get("TargetCallback") if isinstance(stored, Mapping) else None
        stored = stored[-1] if isinstance(stored, list) and stored else stored
        return stored.get("args") if isinstance(stored, Mapping) else None

    def crossing(self, target: Target) -> Crossing | None:
        """Return where the run meets a target, interpolated between evaluations; `None` without evaluations."""
        columns = (self.column(target.metric), *(self.positions(axis) for axis in ("steps", "samples", "time")))
        curve: list[Evaluation] = []
        for value, steps, samples, seconds in zip(*columns, strict=True):
            # Of several evaluations at one step the first counts, as in `curve_from_log`.
            if value is not None and steps is not None and not (curve and steps <= curve[-1].steps):
                curve.append(Evaluation(value, steps, samples, seconds))
        return first_crossing(curve, target.value, target.greater_is_better)


def number(value: Any) -> float | None:
    """Return a number of a log line as `float`, not finite ones as they are; `None` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
