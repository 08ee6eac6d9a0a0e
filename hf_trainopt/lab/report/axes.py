"""Axes of charts: where they begin and end, and their ticks."""

import math
from collections.abc import Iterable
from typing import Any

from .contents import IntervalPanel, LinePanel


# How far, as a factor, an interval may stretch a log axis beyond the curves: the rest of it is cut off.
_BAND_REACH = 10.0


def _known(values: Iterable[float], positive: bool) -> list[float]:
    return [float(value) for value in values if math.isfinite(value) and (value > 0 or not positive)]


def limits(panel: LinePanel) -> tuple[str, tuple[float, float], tuple[float, float]]:
    """Return the scale of a chart's values and the ends of both its axes.

    A log scale without a positive value is a linear one. The axis along which a run goes begins at 0.
    """
    scale = panel.scale
    is_log = scale != "linear"
    values = _known((y for line in panel.lines for y in line.ys), is_log)
    ends = _known((end for band in panel.bands for end in (*band.low, *band.high)), is_log)
    if values and is_log:
        lowest, highest = min(values) / _BAND_REACH, max(values) * _BAND_REACH
        ends = [min(max(end, lowest), highest) for end in ends]
    every = [*values, *ends, *_known([panel.level[0]] if panel.level is not None else (), is_log)]
    if not every:
        scale, every = "linear", [0.0, 1.0]
    xs = _known((x for curve in (*panel.lines, *panel.bands) for x in curve.xs), False) or [0.0, 1.0]
    first, last = min(xs), max(xs)
    across = (0.0, 1.015 * last) if 0 <= first < last else _padded(first, last)
    return scale, across, (_padded if scale == "linear" else _log_padded)(min(every), max(every), scale)


def _padded(low: float, high: float, scale: str = "linear") -> tuple[float, float]:
    """Return the ends of a linear axis: 4 % beyond the values, but not below zero if none is."""
    size = max(abs(low), abs(high))
    pad = 0.04 * (high - low) if high - low > 1e-9 * size else 0.1 * size
    if size < 1e-280:  # too small for matplotlib's ticks
        pad = 1.0
    return (0.0 if 0 <= low < pad else low - pad), high + pad


def _log_padded(low: float, high: float, scale: str) -> tuple[float, float]:
    """Return the ends of a log axis; to the base 2, at powers of two of which there are two at least."""
    if scale == "log2":
        first, last = math.floor(math.log2(low) + 1e-9), math.ceil(math.log2(high) - 1e-9)
        first, last = (first - 1, last + 1) if first == last else (first, last)
        low, high = 2.0**first, 2.0**last
    factor = max((high / low) ** 0.04, 1.02) if high > low else 1.5
    return low / factor, high * factor


def ratio_limits(panel: IntervalPanel) -> tuple[float, float]:
    """Return the ends of a log axis for ratios and their intervals, on which 1 lies."""
    ratios = _known((ratio for _, _, ratio, _, _ in panel.points), True)
    reach = min(1.0, *ratios) / _BAND_REACH, max(1.0, *ratios) * _BAND_REACH
    ends = _known((end for *_, low, high in panel.points for end in (low, high)), True)
    shown = [*ratios, *(min(max(end, reach[0]), reach[1]) for end in ends)]
    return _log_padded(min(0.8, *shown), max(1.25, *shown), "log")


def set_ticks(axis: Any, scale: str, ends: tuple[float, float]) -> None:
    """Put a few ticks on an axis: on a log axis the more within a decade, the fewer decades there are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    decades = math.log10(ends[1] / ends[0]) if scale != "linear" else 0.0
    if scale == "log2":
        locator = LogLocator(base=2, numticks=7)
    elif scale == "log" and decades > 0.5:
        locator = LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,), numticks=7)
    else:
        locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))


def tick_text(value: float) -> str:
    """Return a tick as text, short: `0.0005`, `1e-5`, `12,000`, `2.5M`."""
    if abs(value) >= 1e6:
        power, name = (1e9, "G") if abs(value) >= 1e9 else (1e6, "M")
        return f"{value / power:,.6g}{name}"
    text = f"{value:,.6g}"
    mantissa, separator, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if separator else text.replace("-", "−")
