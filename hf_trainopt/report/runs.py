"""What a run has left in its output folder, read without running or unpickling anything."""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_trainopt.evidence.targets import Crossing, Evaluation, Target, falls_when_better, first_crossing
from hf_trainopt.placement.plan import PlacementPlan
from hf_trainopt.placement.trainer import PLAN_NAME


STATE_NAME = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

# Axis of a plot -> key of the log lines that it is read from.
AXES = {"time": "train_time_s", "samples": "samples_seen", "steps": "step"}


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Args:
        name: What it is called: the name of its folder.
        folder: Output folder; `None` for a run that is still in memory.
        history: Lines of the log, in order.
        state: The rest of `trainer_state.json`.
        results: Metrics of `all_results.json` and its like.
        plan: Placement plan, if one was kept.
        model: Name of the model, if known.
        notes: What could not be read, in sentences.
    """

    name: str
    folder: Path | None
    history: Sequence[Mapping[str, Any]] = ()
    state: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    plan: PlacementPlan | None = None
    model: str | None = None
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
        """Return the numbers under a key, one for each line; `None` where there is none."""
        if key not in self._columns:
            self._columns[key] = [number(line.get(key)) for line in self.history]
        return self._columns[key]

    def last(self, key: str) -> float | None:
        """Return the last number under a key, finite or not; if the log has none, that of the results."""
        found = (value for value in reversed(self.column(key)) if value is not None)
        return next(found, None) if key in self.keys else number(self.results.get(key))

    @functools.cached_property
    def samples_are_derived(self) -> bool:
        """Whether samples are not logged but follow from rate and time of the whole run (stock `Trainer`)."""
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
        """Samples of a step, from the line at the end of `train`."""
        rate, seconds = self.last("train_samples_per_second"), self.last("train_runtime")
        steps = self._steps_of_last_call or number(self.state.get("max_steps"))
        if not rate or not seconds or not steps or steps < 0 or not math.isfinite(rate * seconds):
            return None
        return rate * seconds / steps

    def positions(self, axis: str) -> list[float | None]:
        """Return where each line lies on an axis: seconds of training, samples over all ranks, or steps."""
        if axis == "samples" and self.samples_are_derived:
            return [None if step is None else step * self._samples_per_step for step in self.column("step")]
        steps = self.column("step")
        known = self.column(AXES[axis])
        return [0.0 if step == 0 else value for step, value in zip(steps, known, strict=True)]

    def has_axis(self, axis: str) -> bool:
        """Whether lines can be placed on an axis."""
        return AXES[axis] in self.keys or (axis == "samples" and self.samples_are_derived)

    def end(self, axis: str) -> float | None:
        """Return how far the run went on an axis."""
        return max((value for value in self.positions(axis) if value is not None), default=None)

    # ---- Targets ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def target(self) -> Target | None:
        """The target that `TargetCallback` was given, as far as the run has kept it."""
        stored = self.state.get("stateful_callbacks")
        stored = stored.get("TargetCallback") if isinstance(stored, Mapping) else None
        stored = stored[-1] if isinstance(stored, list) and stored else stored
        given = stored.get("args") if isinstance(stored, Mapping) else None
        if not isinstance(given, Mapping) or number(given.get("value")) is None:
            return None
        metric = str(given.get("metric"))
        greater = given.get("greater_is_better")
        greater = greater if isinstance(greater, bool) else not falls_when_better(metric)
        return Target(metric, number(given["value"]), greater, "set in the runs")

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


# ---- Reading -------------------------------------------------------------------------------------------------------


def read_run(folder: str | Path) -> RunRecord:
    """Read an output folder of `EfficientTrainer` or of stock `Trainer`, or a checkpoint in one.

    Args:
        folder: As in `output_dir`. `trainer_state.json` is taken from it or else from the last checkpoint that has
            one; results, model config and placement plan are taken if they are there.

    Raises:
        ValueError: The folder is not there, or has nothing of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; pass the output_dir of a run.")
    notes: list[str] = []
    state_path, state = _read_state(folder, notes)
    results = _read_results(folder, notes)
    if state is None and not results:
        detail = f" ({' '.join(notes)})" if notes else ""
        raise ValueError(
            f"{folder} is no output folder of a run: there is neither {STATE_NAME} (in it or in a checkpoint-N) nor "
            f"all_results.json{detail}."
        )
    if state is None:
        notes.append(f"There is no {STATE_NAME}, so that only the final results are known.")
    elif state_path.parent != folder:
        notes.append(f"The log is that of {state_path.parent.name}: the run has not saved its state at the end.")
    state = dict(state or {})
    history = state.pop("log_history", None)
    lines = [line for line in history if isinstance(line, dict)] if isinstance(history, list) else []
    return RunRecord(
        name=_name_of(folder),
        folder=folder,
        history=tuple(lines),
        state=state,
        results=results,
        plan=_read_plan(folder, notes),
        model=_read_model(folder, state_path),
        notes=tuple(notes),
    )


def read_beside(folder: Path, notes: list[str]) -> tuple[PlacementPlan | None, str | None]:
    """Return placement plan and name of the model in an output folder, which need not be there."""
    return (_read_plan(folder, notes), _read_model(folder, None)) if folder.is_dir() else (None, None)


def is_run(folder: Path) -> bool:
    """Whether a folder has something of a run in it."""
    states = (folder / STATE_NAME, *(path / STATE_NAME for path in _checkpoints(folder)))
    return any(path.is_file() for path in states) or any(folder.glob("*_results.json"))


def _name_of(folder: Path) -> str:
    path = folder.resolve()
    return f"{path.parent.name}/{path.name}" if _CHECKPOINT.fullmatch(path.name) else path.name or str(path)


def _read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """Return a JSON mapping; `None`, with a note, if there is something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is no JSON"
        notes.append(f"{path.name} cannot be read ({reason}).")
        return None
    if not isinstance(values, dict):
        notes.append(f"{path.name} has no mapping in it.")
        return None
    return values


def _checkpoints(folder: Path) -> list[Path]:
    """Return checkpoint folders, the last one first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _read_state(folder: Path, notes: list[str]) -> tuple[Path | None, dict[str, Any] | None]:
    for place in (folder, *_checkpoints(folder)):
        state = _read_json(place / STATE_NAME, notes)
        if state is not None:
            return place / STATE_NAME, state
    return None, None


def _read_results(folder: Path, notes: list[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    # all_results.json has the others in it where `save_metrics` wrote them; it is read last, so that it wins.
    paths = sorted(folder.glob("*_results.json"), key=lambda path: (path.name == "all_results.json", path.name))
    for path in paths:
        merged |= _read_json(path, notes) or {}
    return merged


def _read_plan(folder: Path, notes: list[str]) -> PlacementPlan | None:
    for path in (folder / PLAN_NAME, folder.parent / PLAN_NAME):
        in_checkpoint = _CHECKPOINT.fullmatch(folder.resolve().name)
        if path.is_file() and (path.parent == folder or in_checkpoint):
            try:
                return PlacementPlan.load(path)
            except ValueError as error:
                notes.append(f"The placement plan is left out: {error}")
    return None


def _read_model(folder: Path, state_path: Path | None) -> str | None:
    places = [folder, *([state_path.parent] if state_path else [])]
    for place in places:
        config = _read_json(place / "config.json", [])
        if config is not None:
            return model_name(config)
    return None


def model_name(config: Mapping[str, Any]) -> str | None:
    """Return what a model config calls its model: the class, and where the weights came from."""
    classes = config.get("architectures")
    kind = classes[0] if isinstance(classes, list) and classes else config.get("model_type")
    origin = config.get("_name_or_path") or config.get("architecture")
    parts = [str(part) for part in (kind, origin) if part]
    return f"{parts[0]} ({parts[1]})" if len(parts) == 2 else parts[0] if parts else None
