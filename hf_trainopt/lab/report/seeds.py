"""Several seeds of an arm in one chart: each of them thin, their median over them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .contents import Line, LinePanel


_LEGEND = ("seed", "one seed each; the heavier curve is their median, as far as all of them go")


def with_medians(lines: Sequence[Line]) -> list[Line]:
    """Return curves with a median over those of one arm and style, where there are several.

    Single seeds are kept, marked as such; but for raw training values (`"faint"`), of which only the median is, unless
    one of them ends early or has gaps.
    """
    groups: dict[tuple[int, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.arm, line.style), []).append(line)
    shown = []
    for (_, style), members in groups.items():
        median = median_curve(members) if len(members) > 1 else None
        if median is None or (style == "faint" and not _covers(median, members)):
            shown += members
        elif style == "faint":
            shown.append(median)
        else:
            shown += [*(replace(line, of_seed=True) for line in members), median]
    return shown


def median_curve(lines: Sequence[Line]) -> Line | None:
    """Return the median of curves on the stretch of the axis that all of them have.

    It has the positions of the curve with the fewest points; between positions the others are linear, or hold their
    value where their style is `"step"`. Where one of them has a gap the median has one.

    Args:
        lines: Curves of one arm and style.

    Returns:
        The median, `None` where the curves have no two positions in common.
    """
    start, end = max(line.xs[0] for line in lines), min(line.xs[-1] for line in lines)
    if not start < end:
        return None
    fewest = min(lines, key=lambda line: len(line.xs)).xs
    grid = np.unique(np.concatenate([[start], fewest[(fewest > start) & (fewest < end)], [end]]))
    values = np.array([_at(line, grid) for line in lines])
    return Line(lines[0].arm, grid, np.median(values, axis=0), lines[0].style)


def _covers(median: Line, lines: Sequence[Line]) -> bool:
    """Whether little is lost where only the median is shown."""
    furthest = max(line.xs[-1] for line in lines)
    return median.xs[-1] >= 0.9 * furthest and not np.isnan(median.ys).any()


def _at(line: Line, grid: np.ndarray) -> np.ndarray:
    """Return the values of a curve at positions within it."""
    if line.style == "step":
        return line.ys[np.searchsorted(line.xs, grid, side="right") - 1]
    # Not between a number and a gap, where there is none; at a number itself there is one.
    values = np.interp(grid, line.xs, line.ys)
    place = np.searchsorted(line.xs, grid)
    at_point = line.xs[place] == grid
    values[at_point] = line.ys[place[at_point]]
    return values


def seed_legend(panels: Sequence[LinePanel]) -> tuple[tuple[str, str], ...]:
    """Return what the legend of charts says of single seeds, if some are drawn."""
    return (_LEGEND,) if any(line.of_seed for panel in panels for line in panel.lines) else ()
