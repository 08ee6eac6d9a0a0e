"""Draws charts into axes of matplotlib."""

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np

from .axes import limits, ratio_limits, set_ticks
from .contents import BarPanel, IntervalPanel, Line, LinePanel, Panel
from .ratios import is_resolved
from .summary import figure as shown
from .summary import ratio_text
from .theme import arm_dashes, arm_name, light, part_name


# Of a chart in points, the units of the SVG. A phone shows it at about this size, so that texts stay legible.
WIDTH, HEIGHT = 400, 250
_ROW = 36
# Opacity of raw training values on paper; the style sheet has one of its own for dark pages.
FAINT = 0.7
# Width of a character of the size 11, on average.
_CHARACTER = 5.9

# What the `gid` of an artist begins with: the class of its element on a page and, behind |, a text for the mouse.
CLASS = "class:"

# Points of all curves of a chart together; beyond what a screen can show they only make the page large.
_POINTS = 3000

_BASE = {"log": 10, "log2": 2}


def height(panel: Panel) -> float:
    """Return the height of a chart in points."""
    if isinstance(panel, LinePanel):
        return HEIGHT
    return 44 + _ROW * len(panel.bars if isinstance(panel, BarPanel) else panel.points)


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


def draw(axes: Any, panel: Panel) -> None:
    """Draw a chart, without its title."""
    {LinePanel: _lines, BarPanel: _bars, IntervalPanel: _intervals}[type(panel)](axes, panel)
    axes.set_xlabel(printable(panel.xlabel))


def dashes(arm: int) -> Any:
    """Return the dashes of an arm as matplotlib has them."""
    return (0, arm_dashes(arm)) if arm_dashes(arm) else "-"


def printable(text: str) -> str:
    """Return a text without what XML has no place for: control characters, halves of surrogate pairs."""
    return re.sub(r"[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def _shortened(text: str, taken: float = 0.0) -> str:
    """Return a text cut to what a row has room for, some of which is taken."""
    count = max(4, int((WIDTH - 16 - taken) / _CHARACTER))
    return printable(text if len(text) <= count else text[: count - 1] + "…")


def depth(line: Line) -> int:
    """Return the order of drawing: raw values and single seeds lie below the others."""
    return 1 if line.of_seed else {"faint": 0, "guess": 2}.get(line.style, 3)


def _lines(axes: Any, panel: LinePanel) -> None:
    scale, (left, right), (low, high) = limits(panel)
    axes.set_yscale("linear" if scale == "linear" else "log", **({} if scale == "linear" else {"base": _BASE[scale]}))
    room = max(60, _POINTS // max(1, len(panel.lines) + len(panel.bands)))
    for band in panel.bands:
        # By the upper end: neither the widest nor the open intervals may be thinned away.
        band = _at(band, thinned(band.high, room))
        is_open = np.isinf(band.high)
        bottom = np.where(band.low > 0, band.low, low)
        top = np.where(is_open, high, np.minimum(band.high, 2 * high))
        around = is_open | np.append(is_open[1:], False) | np.append(False, is_open[:-1])
        for where, alpha, kind in ((~is_open, 0.22, "band"), (around, 0.09, "band open")):
            axes.fill_between(band.xs, bottom, top, where=where & ~np.isnan(bottom) & ~np.isnan(top), alpha=alpha,
                              color=light(arm_name(band.arm)), linewidth=0, gid=CLASS + kind)  # fmt: skip
    for line in sorted(panel.lines, key=depth):
        _curve(axes, _at(line, thinned(line.ys, room)))
    if panel.level is not None and low <= panel.level[0] <= high:
        value, text = panel.level
        axes.axhline(value, color=light("ink"), linestyle=(0, (5, 4)), linewidth=1)
        text = f"{printable(text)} {shown(value)}"
        side, place = free_place(panel, text, (left, right), (low, high), scale)
        axes.annotate(text, (side == "right", value), xycoords=axes.get_yaxis_transform(), ha=side,
                      va="bottom" if place == "above" else "top", xytext=(-2 if side == "right" else 2,
                      3 if place == "above" else -3), textcoords="offset points", gid=CLASS + "halo")  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    set_ticks(axes.xaxis, "linear", (left, right))
    set_ticks(axes.yaxis, scale, (low, high))
    axes.grid(True, axis="y")


def free_place(
    panel: LinePanel, text: str, across: tuple[float, float], up: tuple[float, float], scale: str
) -> tuple[str, str]:
    """Return where the text at a chart's level hides least of the curves.

    Args:
        panel: The chart.
        text: The text.
        across: Ends of the axis along which runs go.
        up: Ends of the axis of the values.
        scale: Of that axis.

    Returns:
        `"right"` or `"left"`, and `"above"` or `"below"` the level; on the right and above it if all are free.
    """

    def height_of(ys: Any) -> Any:
        low, high, values = (np.log(v) if scale != "linear" else v for v in (*up, np.maximum(ys, np.nextafter(0, 1))))
        return (values - low) / (high - low)

    level, tall = float(height_of(panel.level[0])), 1.6 * _CHARACTER * 1.6 / HEIGHT
    wide = min(1.0, (_CHARACTER * len(text) + 8) / (0.9 * WIDTH))
    best = None
    for place, ends in (("above", (level, level + tall)), ("below", (level - tall, level))):
        for side, span in (("right", (1 - wide, 1.0)), ("left", (0.0, wide))):
            xs = across[0] + (across[1] - across[0]) * np.linspace(*span, 25)
            hidden = 1000.0 * (ends[0] < 0 or ends[1] > 1.02)
            for line in panel.lines:
                heights = height_of(np.interp(xs, line.xs, line.ys, left=np.nan, right=np.nan))
                hidden += np.count_nonzero((heights > ends[0]) & (heights < ends[1])) / (4 if line.of_seed else 1)
            if best is None or hidden < best[0]:
                best = hidden, side, place
    return best[1], best[2]


def _at(curve: Any, indices: np.ndarray) -> Any:
    """Return some points of a curve or a band."""
    arrays = {name: value[indices] for name, value in vars(curve).items() if isinstance(value, np.ndarray)}
    return replace(curve, **arrays)


def _curve(axes: Any, line: Line) -> None:
    colour, faint = light(arm_name(line.arm)), line.of_seed or line.style in ("faint", "guess")
    look = {"color": colour, "alpha": {"faint": FAINT, "guess": 0.7}.get(line.style, 0.5 if line.of_seed else 1.0)}
    pattern = {"faint": "-", "guess": (0, (1.5, 3))}.get(line.style, dashes(line.arm))
    marked = line.style == "marked" and not line.of_seed
    axes.plot(
        line.xs, line.ys, linestyle=pattern, linewidth=0.9 if line.of_seed else 1.0 if faint else 1.9,
        drawstyle="steps-post" if line.style == "step" else "default", marker="o" if marked else None,
        markersize=5 if np.count_nonzero(~np.isnan(line.ys)) <= 60 else 3, markeredgewidth=0,
        gid=f"{CLASS}curve {line.style}{' seed' if line.of_seed else ''}", **look,
    )  # fmt: skip
    known = ~np.isnan(line.ys)
    # A single value between gaps would not be seen.
    alone = known & ~np.append(known[1:], False) & ~np.append(False, known[:-1])
    if alone.any() and not marked:
        axes.plot(line.xs[alone], line.ys[alone], "o", markersize=3.2, markeredgewidth=0, gid=CLASS + "alone", **look)


def _rows(axes: Any, count: int) -> None:
    """Set up axes with a row for each bar or interval, whose texts stand above it."""
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks([])


def _row_text(axes: Any, row: int, text: str, side: str) -> None:
    axes.annotate(text, (0 if side == "left" else 1, row - 0.12), xycoords=axes.get_yaxis_transform(), ha=side,
                  va="bottom", gid=CLASS + "halo", annotation_clip=False)  # fmt: skip


def _bars(axes: Any, panel: BarPanel) -> None:
    totals = [sum(values) for _, _, values in panel.bars]
    longest = max((total for total in totals if math.isfinite(total) and total > 0), default=1.0)
    _rows(axes, len(panel.bars))
    for row, (label, arm, values) in enumerate(panel.bars):
        _row_text(axes, row, _shortened(label), "left")
        start = 0.0
        for part, value in enumerate(values):
            name = f"{panel.parts[part]}: " if len(values) > 1 and part < len(panel.parts) else ""
            axes.barh(row + 0.2, value, left=start, height=0.34, linewidth=0,
                      color=light(part_name(part) if arm is None else arm_name(arm)),
                      gid=f"{CLASS}bar|{name}{shown(value, 3)} {panel.xlabel}")  # fmt: skip
            start += value
        axes.annotate(shown(start, 3), (start, row + 0.2), xytext=(5, 0), textcoords="offset points", va="center",
                      color=light("soft"), annotation_clip=False)  # fmt: skip
    axes.set_xlim(0, 1.16 * longest)
    set_ticks(axes.xaxis, "linear", (0, longest))
    axes.grid(True, axis="x")


def _intervals(axes: Any, panel: IntervalPanel) -> None:
    low, high = ratio_limits(panel)
    axes.set_xscale("log")
    _rows(axes, len(panel.points))
    axes.set_xlim(low, high)
    set_ticks(axes.xaxis, "log", (low, high))
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high and tick != 1]
    for row, (label, arm, ratio, lower, upper) in enumerate(panel.points):
        text = interval_text(ratio, lower, upper)
        _row_text(axes, row, _shortened(label, _CHARACTER * (len(text) + 1)), "left")
        _row_text(axes, row, text, "right")
        colour = light(arm_name(arm or 0))
        # Not through the texts: the lines of a grid, and that at 1, are as high as the interval of their row.
        axes.vlines(ticks, row + 0.02, row + 0.48, color=light("grid"), linewidth=1, zorder=0.5)
        axes.vlines([1], row + 0.02, row + 0.48, color=light("ink"), linewidth=1.3, zorder=1, gid=CLASS + "one")
        if not (math.isnan(lower) or math.isnan(upper)):
            ends = (max(lower, low), min(upper, high))
            axes.plot(ends, [row + 0.25] * 2, color=colour, linewidth=2.2, gid=CLASS + "interval")
            for end, mark, is_cut in ((ends[0], "<", lower < low), (ends[1], ">", upper > high)):
                if is_cut:  # it goes on beyond the chart, or for ever
                    axes.plot([end], [row + 0.25], marker=mark, color=colour, markersize=8, markeredgewidth=0,
                              clip_on=False, gid=CLASS + "arrow")  # fmt: skip
        axes.plot([ratio], [row + 0.25], "o", color=colour, markersize=8, markeredgewidth=0, zorder=3)


def interval_text(ratio: float, low: float, high: float) -> str:
    """Return a ratio with its interval: `0.63 (0.58 to 0.69)`, `≥ 1.20`, `≤ 0.80`, or alone without one.

    The ends of an interval that spans more than a factor of ten say nothing: `0.63 (not resolved)`.
    """
    if math.isinf(high):
        return f"≥ {ratio_text(ratio)}"
    if low <= 0:
        return f"≤ {ratio_text(ratio)}"
    if math.isnan(low) or math.isnan(high):
        return ratio_text(ratio)
    if not is_resolved(low, high):
        return f"{ratio_text(ratio)} (not resolved)"
    return f"{ratio_text(ratio)} ({ratio_text(low)} to {ratio_text(high)})"
