"""Charts as pictures, drawn by matplotlib: one PNG for each section."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .contents import BarPanel, Contents, IntervalPanel, LinePanel, Section
from .html import arms_shown
from .scales import Scale, bar_scale, ratio_scale, scales_of, tick_text
from .summary import figure as shown
from .svg import depth, interval_text
from .theme import arm_colour, arm_dashes, part_colour


_GREY = "#57606a"
_WIDTH, _HEIGHT = 5.6, 3.5  # inches of one chart


def check_matplotlib() -> None:
    """Check that pictures can be drawn, before the work for them is done.

    Raises:
        ValueError: matplotlib is not installed.
    """
    _figure_class()


def _figure_class() -> Any:
    """Return the class of figures, apart from pyplot: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "PNG pictures need matplotlib: pip install matplotlib; or leave png "
            "out of the formats (the page draws its charts without it)."
        ) from error
    return Figure


def save_pictures(contents: Contents, folder: Path) -> dict[str, str]:
    """Write a PNG for each section that has charts; return section -> file name."""
    saved = {}
    for section in contents.sections:
        if section.panels:
            saved[section.name] = f"{section.name}.png"
            section_figure(section, contents.arms).savefig(folder / saved[section.name], dpi=120)
    return saved


def _plain(text: str) -> str:
    """Return a text in which matplotlib sees no mathematics."""
    return text.replace("$", r"\$")


def section_figure(section: Section, arms: Sequence[str]) -> Any:
    """Draw the charts of a section, at most two in a row.

    Args:
        section: Has at least one chart.
        arms: Labels of the arms.

    Returns:
        The figure of matplotlib.
    """
    columns = min(2, len(section.panels))
    rows = math.ceil(len(section.panels) / columns)
    heights = [_HEIGHT] * rows
    for index, panel in enumerate(section.panels):
        if not isinstance(panel, LinePanel):
            count = len(panel.bars if isinstance(panel, BarPanel) else panel.points)
            heights[index // columns] = max(heights[index // columns], 1.3 + 0.34 * count)
    width = _WIDTH * columns if columns > 1 else 1.3 * _WIDTH
    figure = _figure_class()(figsize=(width, sum(heights) + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights}).ravel()
    for axes, panel in zip(grid, section.panels, strict=False):
        {LinePanel: _lines, BarPanel: _bars, IntervalPanel: _intervals}[type(panel)](axes, panel)
        axes.set_title(_plain(panel.title), loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(_plain(panel.xlabel), fontsize=9.5)
        axes.tick_params(labelsize=9, color=_GREY)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(section.panels) :]:
        axes.set_visible(False)
    _legend(figure, section, arms)
    return figure


def _dashes(arm: int) -> Any:
    words = arm_dashes(arm).split()
    return (0, tuple(0.6 * float(word) for word in words)) if words else "-"


def _set_axis(axis: Any, scale: Scale) -> None:
    axis.set_major_locator(_fixed(scale.ticks))
    axis.set_ticklabels([tick_text(tick) for tick in scale.ticks])
    axis.set_minor_locator(_fixed(()))


def _fixed(ticks: Sequence[float]) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator(ticks)


def _lines(axes: Any, panel: LinePanel) -> None:
    across, up = scales_of(panel)
    axes.set_yscale("linear" if up.kind == "linear" else "log")
    for band in panel.bands:
        is_open = np.isinf(band.high)
        low = np.where(band.low > 0, band.low, up.low)
        high = np.where(is_open, up.high, band.high)
        colour = arm_colour(band.arm)
        around = is_open | np.roll(is_open, 1) | np.roll(is_open, -1)
        axes.fill_between(band.xs, low, high, where=~is_open, color=colour, alpha=0.22, linewidth=0)
        axes.fill_between(band.xs, low, high, where=around, color=colour, alpha=0.09, linewidth=0)
    for line in sorted(panel.lines, key=depth):
        faint = line.of_seed or line.style in ("faint", "guess")
        axes.plot(
            line.xs, line.ys, color=arm_colour(line.arm),
            linestyle=":" if line.style == "guess" else "-" if line.style == "faint" else _dashes(line.arm),
            linewidth=0.7 if line.of_seed else 1.0 if faint else 1.7,
            alpha=0.5 if line.of_seed else 0.45 if line.style == "faint" else 1.0,
            drawstyle="steps-post" if line.style == "step" else "default",
            marker="o" if line.style == "marked" and not line.of_seed else None, markersize=3.2,
        )  # fmt: skip
    if panel.level is not None:
        axes.axhline(panel.level[0], color="#1c2128", linestyle="--", linewidth=1)
        axes.annotate(
            _plain(f"{panel.level[1]} {shown(panel.level[0])}"), (1, panel.level[0]), ha="right", va="bottom",
            xycoords=axes.get_yaxis_transform(), xytext=(-2, 2), textcoords="offset points", fontsize=9,
        )  # fmt: skip
    axes.set_xlim(across.low, across.high)
    axes.set_ylim(up.low, up.high)
    _set_axis(axes.xaxis, across)
    _set_axis(axes.yaxis, up)
    axes.set_ylabel(_plain(panel.ylabel), fontsize=9.5)
    axes.grid(True, axis="y", color="0.9")
    axes.set_axisbelow(True)


def _bars(axes: Any, panel: BarPanel) -> None:
    scale = bar_scale([sum(values) for _, _, values in panel.bars])
    for place, (_, arm, values) in enumerate(panel.bars):
        start = 0.0
        for part, value in enumerate(values):
            axes.barh(
                place, value, left=start, height=0.6, color=part_colour(part) if arm is None else arm_colour(arm)
            )
            start += value
        axes.annotate(
            shown(start, 3), (start, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(panel.bars)), [_plain(label) for label, _, _ in panel.bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * scale.high)
    _set_axis(axes.xaxis, scale)
    if panel.parts:
        from matplotlib.patches import Patch

        keys = [Patch(color=part_colour(part), label=_plain(name)) for part, name in enumerate(panel.parts)]
        axes.legend(
            handles=keys, fontsize=8.5, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.18)
        )


def _intervals(axes: Any, panel: IntervalPanel) -> None:
    scale = ratio_scale([point[2:] for point in panel.points])
    axes.set_xscale("log")
    for place, (_, arm, ratio, low, high) in enumerate(panel.points):
        colour = arm_colour(arm or 0)
        if not (math.isnan(low) or math.isnan(high)):
            axes.plot([max(low, scale.low), min(high, scale.high)], [place, place], color=colour, linewidth=2)
        axes.plot([ratio], [place], "o", color=colour, markersize=6)
    axes.axvline(1, color="#1c2128", linewidth=1.1, zorder=0)
    labels = [f"{label}\n{interval_text(ratio, low, high)}" for label, _, ratio, low, high in panel.points]
    axes.set_yticks(range(len(panel.points)), [_plain(label) for label in labels])
    axes.set_ylim(len(panel.points) - 0.4, -0.6)
    axes.set_xlim(scale.low, scale.high)
    _set_axis(axes.xaxis, scale)
    axes.grid(True, axis="x", color="0.9")
    axes.set_axisbelow(True)


def _legend(figure: Any, section: Section, arms: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ink = "#1c2128"
    styles = {
        "faint": lambda text: Line2D([], [], color=ink, linewidth=1, alpha=0.45, label=text),
        "marked": lambda text: Line2D([], [], color=ink, linewidth=1.7, marker="o", markersize=4, label=text),
        "seed": lambda text: Line2D([], [], color=ink, linewidth=0.7, alpha=0.5, label=text),
        "guess": lambda text: Line2D([], [], color=ink, linewidth=1, linestyle=":", label=text),
        "band": lambda text: Patch(color=ink, alpha=0.22, label=text),
        "open": lambda text: Patch(color=ink, alpha=0.09, label=text),
    }
    curves = any(isinstance(panel, LinePanel) for panel in section.panels)
    handles: list[Any] = [
        Line2D([], [], color=arm_colour(arm), linestyle=_dashes(arm), linewidth=2, label=_plain(arms[arm]))
        if curves
        else Patch(color=arm_colour(arm), label=_plain(arms[arm]))
        for arm in arms_shown(section.panels)
    ]
    handles += [styles[style](_plain(text)) for style, text in section.legend]
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=9, frameon=False)
