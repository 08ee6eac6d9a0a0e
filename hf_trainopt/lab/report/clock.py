"""Seconds of training at every step of a stock run, which logs none on most lines."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_trainopt.core.log_lines import is_last_line


@dataclass(frozen=True)
class Clock:
    """Seconds of training, evaluations left out, as a function of steps.

    Args:
        steps: Increasing, from 0.
        seconds: At these steps.
        source: Where they are from, in words.
        is_uniform: Whether only the length of the run is known, so that all steps are taken to be equally long.
    """

    steps: tuple[float, ...]
    seconds: tuple[float, ...]
    source: str
    is_uniform: bool = False

    def at(self, step: float | None) -> float | None:
        """Return the seconds at a step, linear between known steps; `None` beyond the last one."""
        if step is None or not 0 <= step <= self.steps[-1]:
            return None
        return float(np.interp(step, self.steps, self.seconds))


def _evaluation_seconds(line: Mapping[str, Any]) -> float:
    taken = [value for key, value in line.items() if key.startswith("eval_") and key.endswith("_runtime")]
    return sum(value for value in taken if isinstance(value, int | float) and math.isfinite(value))


def _clock(marks: Iterable[tuple[float, float]], source: str, is_uniform: bool = False) -> Clock | None:
    """Return the clock that goes through the first mark of each step; `None` without a step beyond 0."""
    steps, seconds = [0.0], [0.0]
    for step, at in marks:
        if step > steps[-1]:
            steps.append(float(step))
            seconds.append(max(float(at), seconds[-1]))
    return Clock(tuple(steps), tuple(seconds), source, is_uniform) if len(steps) > 1 else None


def clock_of_events(lines: Sequence[tuple[float, Mapping[str, Any]]]) -> Clock | None:
    """Return the clock of lines with the wall time of each, in seconds since the run began."""
    marks, evaluations = [], 0.0
    for wall, line in lines:
        # An evaluation is logged when it is over.
        evaluations += _evaluation_seconds(line)
        marks.append((line["step"], wall - evaluations))
    return _clock(marks, "the wall times of its TensorBoard events")


def clock_of_history(history: Sequence[Mapping[str, Any]], is_resumed: bool) -> Clock | None:
    """Return the clock of what a log says by itself.

    With `include_num_input_tokens_seen` every training line has a `train_runtime`; else only the last line of all has.

    Args:
        history: Lines of the log.
        is_resumed: Whether the last line speaks of a part of the run only.
    """
    marks, before, base, evaluations = [], 0.0, 0.0, 0.0
    for line in history:
        evaluations += _evaluation_seconds(line)
        runtime = line.get("train_runtime")
        if not isinstance(runtime, int | float) or not isinstance(line.get("step"), int | float):
            continue
        if is_last_line(line) and not marks:
            if is_resumed:
                continue
            uniform = [(line["step"], runtime - evaluations)]
            return _clock(uniform, "its train_runtime, as if all steps took the same time", is_uniform=True)
        if runtime < before:  # another call of `train`
            base += before - evaluations
            evaluations = 0.0
        before = runtime
        marks.append((line["step"], base + runtime - evaluations))
    return _clock(marks, "the train_runtime on its lines") if marks else None
