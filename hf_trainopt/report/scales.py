"""Axes of charts: ranges, ticks and where a value lies between them. Pure functions, no drawing."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .contents import LinePanel


# How far, as a factor, an interval may stretch a log axis beyond the curves: the rest of it is cut off.
_BAND_REACH = 10.0


@dataclass(frozen=True)
class Scale:
    """One axis.

    Args:
        kind: `"linear"`, `"log"` or `"log2"`.
        low: Its start; positive unless linear.
        high: Its end, above `low`.
        ticks: Values that are marked.
    """

    kind: str
    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at the start, 1 at the end, beyond them for what is outside.

        What is not positive has no place on a log axis and is NaN.
        """
        if self.kind == "linear":
            return (value - self.low) / (self.high - self.low)
        if not value > 0:
            return math.nan
        return math.log(value / self.low) / math.log(self.high / self.low)


def linear_scale(low: float, high: float, count: int = 5, *, tight: bool = False) -> Scale:
    """Return an axis from `low` to `high` with about `count` ticks at 1, 2, 2.5 or 5 times a power of ten.

    Args:
        low: Smallest value.
        high: Largest value.
        count: Ticks, roughly.
        tight: Whether the axis ends with the values; if not, 4 % beyond them, but not below zero if none is.
    """
    if not high - low > max(1e-12 * max(abs(low), abs(high)), 1e-300):
        pad = abs(low) * 0.1 or 1.0
        low, high = (low - pad if low - pad >= 0 or low < 0 else 0.0), high + pad
    elif not tight:
        pad = 0.04 * (high - low)
        low, high = (0.0 if 0 <= low < pad else low - pad), high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(math.log(raw / power / factor)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Scale("linear", low, high, tuple(float(f"{index * step:.12g}") for index in range(first, last + 1)))


def log_scale(low: float, high: float, count: int = 6) -> Scale:
    """Return a log axis with ticks at powers of ten, or also 2 and 5 times those where there are few.

    Args:
        low: Smallest value, positive.
        high: Largest value.
        count: Most ticks.
    """
    factor = max((high / low) ** 0.04, 1.02) if high > low else 1.5
    low, high = low / factor, high * factor
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples, every in (((1, 2, 5), 1), ((1, 3), 1), *(((1,), every) for every in range(1, 400))):
        ticks = [m * 10.0**e for e in exponents if e % every == 0 for m in multiples]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= count:
            break
    if len(ticks) < 2:  # a narrow range has no such numbers in it
        ticks = list(linear_scale(low, high, 4, tight=True).ticks)
    return Scale("log", low, high, tuple(ticks))


def log2_scale(low: float, high: float, count: int = 7) -> Scale:
    """Return a log axis with ticks at powers of two; at least one factor of two is shown."""
    first, last = math.floor(math.log2(low) + 1e-9), math.ceil(math.log2(high) - 1e-9)
    if last == first:
        first, last = first - 1, last + 1
    every = max(1, math.ceil((last - first + 1) / count))
    factor = 2.0 ** (0.04 * (last - first))
    ticks = tuple(2.0**exponent for exponent in range(first, last + 1, every))
    return Scale("log2", 2.0**first / factor, 2.0**last * factor, ticks)


_MAKERS = {"linear": linear_scale, "log": log_scale, "log2": log2_scale}


def _known(values: Iterable[float], positive: bool) -> list[float]:
    return [float(value) for value in values if math.isfinite(value) and (value > 0 or not positive)]


def scales_of(panel: LinePanel) -> tuple[Scale, Scale]:
    """Return the axes of a chart; a log axis of values of which none is positive is a linear one."""
    kind = panel.scale
    values = _known(np.concatenate([line.ys for line in panel.lines]) if panel.lines else (), kind != "linear")
    ends = _known((end for band in panel.bands for end in (*band.low, *band.high)), kind != "linear")
    if values and kind != "linear":
        ends = [min(max(end, min(values) / _BAND_REACH), max(values) * _BAND_REACH) for end in ends]
    level = _known([panel.level[0]] if panel.level is not None else (), kind != "linear")
    shown = [*values, *ends, *level]
    if not shown:
        kind, shown = "linear", [0.0, 1.0]
    xs = _known((x for curve in (*panel.lines, *panel.bands) for x in curve.xs), False) or [0.0, 1.0]
    return _across(min(xs), max(xs)), _MAKERS[kind](min(shown), max(shown))


def _across(first: float, last: float) -> Scale:
    """Return the axis along which a run goes: from its beginning at 0, with room for a mark at its end."""
    if not 0 <= first < last:
        return linear_scale(first, last)
    return linear_scale(0.0, last + 0.015 * last, tight=True)


def tick_text(value: float) -> str:
    """Return a tick as text, short: `0.0005`, `1e-5`, `12,000`, `2.5M`."""
    if abs(value) >= 1e6:
        power, name = (1e9, "G") if abs(value) >= 1e9 else (1e6, "M")
        return f"{value / power:,.6g}{name}"
    text = f"{value:,.6g}"
    mantissa, separator, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if separator else text.replace("-", "−")


def bar_scale(totals: Sequence[float]) -> Scale:
    """Return an axis for bars: from zero to a little beyond the longest."""
    longest = max((total for total in totals if math.isfinite(total)), default=0.0)
    return linear_scale(0.0, longest if longest > 0 else 1.0, 4, tight=True)


def ratio_scale(points: Sequence[tuple[float, float, float]]) -> Scale:
    """Return a log axis for (ratio, lower end, upper end), in which 1 lies and has a tick."""
    values = _known((value for point in points for value in point), True)
    ratios = _known((ratio for ratio, _, _ in points), True) or [1.0]
    low, high = min(*ratios, 1.0) / _BAND_REACH, max(*ratios, 1.0) * _BAND_REACH
    values = [1.0, *(min(max(value, low), high) for value in values)]
    scale = log_scale(min(*values, 0.8), max(*values, 1.25), 5)
    if 1.0 in scale.ticks:
        return scale
    near = [tick for tick in scale.ticks if abs(scale.place(tick) - scale.place(1.0)) > 0.08]
    return Scale("log", scale.low, scale.high, tuple(sorted([*near, 1.0])))
