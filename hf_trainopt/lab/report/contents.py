"""What a report consists of, apart from how it is shown: tables and charts as data."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        columns: Headings; the first column names the rows.
        rows: Cells.
        title: Heading of the table, if it has one of its own.
        folded: Whether a page shows it on request only.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Line:
    """A curve of one run, or the median over the seeds of an arm.

    Args:
        arm: Index of its arm, which says colour and dashes.
        xs: Positions, increasing.
        ys: Values; NaN is a gap.
        style: `"line"`, `"faint"` (raw training values), `"marked"` (evaluations), `"step"` (holds until the next
            value) or `"guess"` (not resolved).
        of_seed: Whether it is one of several seeds, whose median is drawn as well.
    """

    arm: int
    xs: np.ndarray
    ys: np.ndarray
    style: str = "line"
    of_seed: bool = False


@dataclass(frozen=True)
class Band:
    """An interval along a curve.

    Args:
        arm: Index of its arm.
        xs: Positions, increasing.
        low: Lower ends.
        high: Upper ends; infinity where there is none.
    """

    arm: int
    xs: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class LinePanel:
    """Curves over one axis.

    Args:
        name: Short name, unique in a report.
        title: Heading.
        xlabel: Axis with its unit.
        ylabel: Values with their unit.
        lines: Curves.
        bands: Intervals, drawn below the curves.
        level: A value to reach, as (value, text).
        scale: `"linear"`, `"log"` or `"log2"` (ticks at powers of two).
        summary: What the chart shows, in a sentence for those who do not see it.
    """

    name: str
    title: str
    xlabel: str
    ylabel: str
    lines: tuple[Line, ...]
    bands: tuple[Band, ...] = ()
    level: tuple[float, str] | None = None
    scale: str = "linear"
    summary: str = ""


@dataclass(frozen=True)
class BarPanel:
    """Horizontal bars, each of one or more parts laid end to end.

    Args:
        name: Short name, unique in a report.
        title: Heading.
        xlabel: Values with their unit.
        bars: (text, arm or `None`, values of the parts).
        parts: Names of the parts; empty where each bar is one.
        summary: What the chart shows.
    """

    name: str
    title: str
    xlabel: str
    bars: tuple[tuple[str, int | None, tuple[float, ...]], ...]
    parts: tuple[str, ...] = ()
    summary: str = ""


@dataclass(frozen=True)
class IntervalPanel:
    """Ratios with their intervals on a log axis, 1 marked.

    Args:
        name: Short name, unique in a report.
        title: Heading.
        xlabel: What the ratios are of.
        points: (text, arm or `None`, ratio, lower end, upper end); ends are NaN where there is no interval, 0 or
            infinite where it is open.
        summary: What the chart shows.
    """

    name: str
    title: str
    xlabel: str
    points: tuple[tuple[str, int | None, float, float, float], ...]
    summary: str = ""


Panel = LinePanel | BarPanel | IntervalPanel


def arms_shown(panels: Sequence[Panel]) -> list[int]:
    """Return the arms that have a colour in some of the charts, in order."""
    found: set[int] = set()
    for panel in panels:
        if isinstance(panel, LinePanel):
            found |= {line.arm for line in panel.lines} | {band.arm for band in panel.bands}
        elif isinstance(panel, BarPanel):
            found |= {arm for _, arm, _ in panel.bars if arm is not None}
    return sorted(found)


@dataclass(frozen=True)
class Section:
    """A part of a report under one heading.

    Args:
        name: Short name, unique in a report; that of the PNG file too.
        title: Heading.
        text: Paragraphs before the rest.
        tables: Tables.
        panels: Charts.
        legend: Further entries of the legend, beside the arms: (style of line, text).
        lead: Sentences that stand above all else, in large letters.
    """

    name: str
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    panels: tuple[Panel, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()
    lead: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contents:
    """A whole report.

    Args:
        title: Its heading.
        arms: Labels of what is compared, in the order of colours.
        sections: Its parts.
        absent: What the runs have not recorded, as (what, how to get it).
    """

    title: str
    arms: tuple[str, ...]
    sections: tuple[Section, ...]
    absent: Sequence[tuple[str, str]] = field(default=())
