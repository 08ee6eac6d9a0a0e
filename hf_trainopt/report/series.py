"""Columns of a log as curves, short enough to be drawn."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from .contents import Band, Line
from .runs import Run
from .settings import reference_steps


# Points of all curves of a chart together; beyond what a screen can show they only make the page large.
POINTS_PER_PANEL = 3000


def points_per_curve(num_curves: int) -> int:
    """Return how many points a curve may have in a chart with so many of them."""
    return max(60, POINTS_PER_PANEL // max(1, num_curves))


def thinned(ys: np.ndarray, limit: int) -> np.ndarray:
    """Return the indices of at most `limit` points (4 at least) that keep the shape of a curve.

    The first and the last point stay, and of each of equally long stretches between them the lowest and the highest,
    so that no peak is lost; of a stretch without a number its first point, so that the gap is kept.
    """
    count = len(ys)
    limit = max(4, limit)
    if count <= limit:
        return np.arange(count)
    edges = np.linspace(1, count - 1, (limit - 2) // 2 + 1).astype(int)
    kept = {0, count - 1}
    for start, end in itertools.pairwise(edges):
        part = ys[start:end]
        if len(part) and not np.isnan(part).all():
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
        elif len(part):
            kept.add(int(start))
    return np.array(sorted(kept))


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


def curve(run: Run, arm: int, axis: str, key: str, limit: int, style: str = "line") -> Line | None:
    """Return a column as a curve of at most `limit` points; `None` where the run has nothing of it."""
    xs, (ys,) = columns(run, axis, [key])
    if not len(xs) or np.isnan(ys).all():
        return None
    kept = thinned(ys, limit)
    return Line(arm, xs[kept], ys[kept], style)


def k_curve(run: Run, arm: int, axis: str, limit: int) -> Line | None:
    """Return k; as it was set, where it cannot vary and so is not logged."""
    steps = reference_steps(run.settings)
    end = run.end(axis)
    if "accumulation_steps" in run.keys or steps is None or not end:
        return curve(run, arm, axis, "accumulation_steps", limit, "step")
    return Line(arm, np.array([0.0, end]), np.full(2, float(steps)), "step")


def derived_rate(run: Run, arm: int, axis: str, counts: Sequence[float | None], limit: int) -> Line | None:
    """Return how many of something there were in a second, between each training line and the one before.

    Args:
        run: Whose log; its times are known.
        arm: Index of its arm.
        axis: Name in `runs.AXES`.
        counts: For each line of the log, how many there had been by then.
        limit: Most points.
    """
    lines = zip(run.history, run.positions("time"), counts, run.positions(axis), strict=True)
    known = [row for line, *row in lines if "loss" in line and None not in row]
    table = np.array(sorted({(0.0, 0.0, 0.0), *map(tuple, known)}))
    # The first interval holds the warm-up, with compilation and the first reading of the data.
    seconds, counted = np.diff(table[:, 0])[1:], np.diff(table[:, 1])[1:]
    rates, xs = counted[seconds > 0] / seconds[seconds > 0], table[2:, 2][seconds > 0]
    kept = thinned(rates, limit)
    return Line(arm, xs[kept], rates[kept]) if len(xs) else None


def batch_curve(run: Run, arm: int, axis: str, limit: int) -> Line | None:
    """Return samples of an optimizer step; where they are not logged, the mean between log lines."""
    logged = curve(run, arm, axis, "effective_batch_size", limit, "step")
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
    kept = thinned(ys, limit)
    return Line(arm, xs[kept], ys[kept], "step")


def noise_curves(run: Run, arm: int, axis: str, limit: int) -> tuple[list[Line], Band | None]:
    """Return the noise scale and its interval.

    Where the gradient is not resolved from zero there is no upper end: the interval is open (infinity), and the value
    is a guess, which is drawn as such.
    """
    xs, (low, value, high) = columns(run, axis, ["noise_scale_low", "noise_scale", "noise_scale_high"])
    if not len(xs):
        xs, (value,) = columns(run, axis, ["noise_scale"])
        kept = thinned(value, limit)
        return ([Line(arm, xs[kept], value[kept])] if len(xs) else []), None
    # By the upper end where there is one: neither the widest nor the open intervals may be thinned away.
    kept = thinned(np.where(np.isnan(high), np.inf, high), limit)
    xs, low, value, high = xs[kept], low[kept], value[kept], high[kept]
    resolved = ~np.isnan(high)
    lines = []
    # A log axis has no place for estimates that are not positive.
    value = np.where(value > 0, value, np.nan)
    for style, where in (("line", resolved), ("guess", ~resolved)):
        ys = np.where(where, value, np.nan)
        if not np.isnan(ys).all():
            lines.append(Line(arm, xs, ys, style))
    return lines, Band(arm, xs, low, np.where(resolved, high, np.inf))
