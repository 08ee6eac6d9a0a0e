"""Columns of a log as curves."""

import math
from collections.abc import Sequence

import numpy as np

from .contents import Band, Line
from .runs import Run
from .settings import reference_steps


def columns(run: Run, axis: str, keys: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return positions and values of the lines that have the first key.

    Args:
        run: Whose log.
        axis: Name in `runs.AXES`.
        keys: Columns; where a line lacks one of the others it is NaN. What is not finite is NaN, but for the first of
            them it stays a gap.
    """
    values = [run.column(key) for key in keys]
    rows = [
        (position, *row)
        for position, *row in zip(run.positions(axis), *values, strict=True)
        if position is not None and math.isfinite(position) and row[0] is not None
    ]
    table = np.array(rows, dtype=float).reshape(len(rows), 1 + len(keys))
    table[~np.isfinite(table)] = np.nan
    # Evaluations after training may be logged at an earlier place than the last step (`load_best_model_at_end`).
    table = table[np.argsort(table[:, 0], kind="stable")]
    return table[:, 0], [table[:, 1 + index] for index in range(len(keys))]


def curve(run: Run, arm: int, axis: str, key: str, style: str = "line") -> Line | None:
    """Return a column as a curve; `None` where the run has nothing of it."""
    xs, (ys,) = columns(run, axis, [key])
    if not len(xs) or np.isnan(ys).all():
        return None
    return Line(arm, xs, ys, style)


def k_curve(run: Run, arm: int, axis: str) -> Line | None:
    """Return k; as it was set, where it cannot vary and so is not logged."""
    steps = reference_steps(run.settings)
    end = run.end(axis)
    if "accumulation_steps" in run.keys or steps is None or not end:
        return curve(run, arm, axis, "accumulation_steps", "step")
    return Line(arm, np.array([0.0, end]), np.full(2, float(steps)), "step")


def derived_rate(run: Run, arm: int, axis: str, counts: Sequence[float | None]) -> Line | None:
    """Return how many of something there were in a second, between each training line and the one before.

    Args:
        run: Whose log; its times are known.
        arm: Index of its arm.
        axis: Name in `runs.AXES`.
        counts: For each line of the log, how many there had been by then.
    """
    lines = zip(run.history, run.positions("time"), counts, run.positions(axis), strict=True)
    known = [row for line, *row in lines if "loss" in line and None not in row]
    table = np.array(sorted({(0.0, 0.0, 0.0), *map(tuple, known)}))
    # The first interval holds the warm-up, with compilation and the first reading of the data.
    seconds, counted = np.diff(table[:, 0])[1:], np.diff(table[:, 1])[1:]
    rates, xs = counted[seconds > 0] / seconds[seconds > 0], table[2:, 2][seconds > 0]
    return Line(arm, xs, rates) if len(xs) else None


def batch_curve(run: Run, arm: int, axis: str) -> Line | None:
    """Return samples of an optimizer step; where they are not logged, the mean between log lines."""
    logged = curve(run, arm, axis, "effective_batch_size", "step")
    if logged is not None:
        return logged
    places = zip(run.positions("steps"), run.positions("samples"), run.positions(axis), strict=True)
    known = [place for place in places if all(value is not None and math.isfinite(value) for value in place)]
    if not known:
        return None
    table = np.array(sorted({(0.0, 0.0, 0.0), *known}))
    steps, samples, xs = table[np.diff(table[:, 0], prepend=-1.0) > 0].T
    if len(steps) < 2:
        return None
    ys = np.diff(samples) / np.diff(steps)
    ys = np.append(ys, ys[-1])
    return Line(arm, xs, ys, "step")


def noise_curves(run: Run, arm: int, axis: str) -> tuple[list[Line], Band | None]:
    """Return the noise scale and its interval.

    Where the gradient is not resolved from zero there is no upper end: the interval is open (infinity), and the value
    is a guess, which is drawn as such.
    """
    xs, (low, value, high) = columns(run, axis, ["noise_scale_low", "noise_scale", "noise_scale_high"])
    if not len(xs):
        xs, (value,) = columns(run, axis, ["noise_scale"])
        return ([Line(arm, xs, value)] if len(xs) else []), None
    resolved = ~np.isnan(high)
    lines = []
    # A log axis has no place for estimates that are not positive.
    value = np.where(value > 0, value, np.nan)
    # A guess goes on to the known values beside it, so that the curve has no gaps.
    guessed = ~resolved | np.append(~resolved[1:], False) | np.append(False, ~resolved[:-1])
    for style, where in (("line", resolved), ("guess", guessed)):
        ys = np.where(where, value, np.nan)
        if not np.isnan(ys).all():
            lines.append(Line(arm, xs, ys, style))
    return lines, Band(arm, xs, low, np.where(resolved, high, np.inf))
