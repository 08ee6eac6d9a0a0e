"""Charts as SVG inside a page: colours are the page's (CSS variables), nothing has an id, no script."""

import html
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from .contents import Band, BarPanel, IntervalPanel, Line, LinePanel, Panel
from .scales import Scale, bar_scale, ratio_scale, scales_of, tick_text
from .summary import figure, ratio_text
from .theme import ARM_COLOURS, PART_COLOURS, arm_dashes


# Units of the drawing; a phone shows it at nearly this size, so that texts stay legible.
WIDTH, HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 10, 38
_ROW = 34
_CHARACTER = 6.6  # width of one, on average


def escape(text: object) -> str:
    """Return a text so that it is one in HTML and SVG, in attributes too."""
    return html.escape(str(text), quote=True)


def arm_variable(arm: int) -> str:
    """Return the CSS colour of an arm."""
    return f"var(--arm{arm % len(ARM_COLOURS)})"


def part_variable(part: int) -> str:
    """Return the CSS colour of a part of a bar."""
    return f"var(--part{part % len(PART_COLOURS)})"


def draw(panel: Panel) -> str:
    """Return a chart as an `<svg>` element."""
    if isinstance(panel, LinePanel):
        return _line_chart(panel)
    return _bar_chart(panel) if isinstance(panel, BarPanel) else _interval_chart(panel)


def _svg(panel: Panel, height: float, parts: Iterable[str]) -> str:
    label = escape(f"{panel.title}. {panel.summary}")
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _shortened(text: str, room: float) -> str:
    """Return a text cut to what a width has room for."""
    count = max(4, int(room / _CHARACTER))
    return text if len(text) <= count else text[: count - 1] + "…"


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


# ---- Curves --------------------------------------------------------------------------------------------------------


def _line_chart(panel: LinePanel) -> str:
    across, up = scales_of(panel)
    width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    parts = []
    for tick in up.ticks:
        y = _TOP + height * (1 - up.place(tick))
        parts += [_rule(_LEFT, y, _LEFT + width, y, "grid"), _text(_LEFT - 6, y + 4, tick_text(tick), "end")]
    for tick in across.ticks:
        x = _LEFT + width * across.place(tick)
        # The last label stays within the drawing.
        anchor = "end" if x > WIDTH - 24 else "middle"
        parts += [
            _rule(x, _TOP + height, x, _TOP + height + 4, "axis"),
            _text(min(x, WIDTH - 1) if anchor == "end" else x, _TOP + height + 17, tick_text(tick), anchor),
        ]
    parts.append(_rule(_LEFT, _TOP + height, _LEFT + width, _TOP + height, "axis"))
    parts.append(_text(_LEFT + width / 2, HEIGHT - 4, panel.xlabel, "middle", "label"))
    # An inner <svg> cuts off what lies outside the axes.
    parts.append(f'<svg x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}">')
    parts += [_band(band, across, up, width, height) for band in panel.bands]
    parts += [_curve(line, across, up, width, height) for line in sorted(panel.lines, key=depth)]
    parts.append("</svg>")
    if panel.level is not None and 0 <= up.place(panel.level[0]) <= 1:
        y = _TOP + height * (1 - up.place(panel.level[0]))
        parts.append(_rule(_LEFT, y, _LEFT + width, y, "level"))
        above = y > _TOP + 16
        text = f"{panel.level[1]} {figure(panel.level[0])}"
        parts.append(_text(_LEFT + width - 2, y - 4 if above else y + 13, text, "end", "halo"))
    return _svg(panel, HEIGHT, parts)


def depth(line: Line) -> int:
    """Return the order of drawing: raw values and single seeds lie below the others."""
    return 1 if line.of_seed else {"faint": 0, "guess": 2}.get(line.style, 3)


def _points(
    xs: np.ndarray, ys: np.ndarray, across: Scale, up: Scale, width: float, height: float
) -> list[tuple[float, float] | None]:
    """Return places in the drawing; `None` for what has none."""
    found: list[tuple[float, float] | None] = []
    for x, y in zip(xs, ys, strict=True):
        place = (width * across.place(float(x)), height * (1 - up.place(float(y))))
        found.append(place if all(map(math.isfinite, place)) else None)
    return found


def _stretches(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """Return the parts of a curve between its gaps."""
    groups = itertools.groupby(points, key=lambda point: point is None)
    return [list(group) for is_gap, group in groups if not is_gap]


def _path(points: Sequence[tuple[float, float]], steps: bool) -> str:
    words = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for x, y in points[1:]:
        words.append(f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}")
    return "".join(words)


def _curve(line: Line, across: Scale, up: Scale, width: float, height: float) -> str:
    stretches = _stretches(_points(line.xs, line.ys, across, up, width, height))
    colour = arm_variable(line.arm)
    dashes = {"faint": "", "guess": "1.5 3"}.get(line.style, arm_dashes(line.arm))
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    path = "".join(_path(points, line.style == "step") for points in stretches if len(points) > 1)
    kind = f"{line.style} seed" if line.of_seed else line.style
    parts = [f'<path d="{path}" class="curve {kind}" stroke="{colour}"{dashed}/>'] if path else []
    # A single value between gaps would not be seen.
    marked = line.style == "marked" and not line.of_seed
    dots = [p for points in stretches for p in points if marked or len(points) == 1]
    radius = 1.6 if line.of_seed or line.style in ("faint", "guess") else 2.6 if len(dots) <= 60 else 1.6
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>' for x, y in dots]
    return "".join(parts)


def _band(band: Band, across: Scale, up: Scale, width: float, height: float) -> str:
    """Return an interval; where it has no upper end it reaches to the top, fainter."""
    low = _points(band.xs, np.where(band.low > 0, band.low, up.low), across, up, width, height)
    is_open = np.isinf(band.high)
    # Finite ends far outside would only make long numbers.
    high = _points(band.xs, np.where(is_open, up.high, np.minimum(band.high, 2 * up.high)), across, up, width, height)
    parts = []
    pairs = itertools.pairwise(range(len(band.xs)))
    known = [pair for pair in pairs if all(points[i] is not None for points in (low, high) for i in pair)]
    for (opened, _), group in itertools.groupby(
        enumerate(known), key=lambda item: (bool(is_open[list(item[1])].any()), item[1][0] - item[0])
    ):
        stretch = [pair for _, pair in group]
        indices = [stretch[0][0], *(end for _, end in stretch)]
        outline = [low[i] for i in indices] + [high[i] for i in reversed(indices)]
        style = "band open" if opened else "band"
        parts.append(f'<path d="{_path(outline, False)}Z" class="{style}" fill="{arm_variable(band.arm)}"/>')
    return "".join(parts)


# ---- Bars and intervals --------------------------------------------------------------------------------------------


def _bar_chart(panel: BarPanel) -> str:
    scale = bar_scale([sum(values) for _, _, values in panel.bars])
    width, bottom = WIDTH - 8 - 62, 4 + _ROW * len(panel.bars)
    parts = [_rule(8 + width * scale.place(t), 2, 8 + width * scale.place(t), bottom, "grid") for t in scale.ticks]
    for index, (label, arm, values) in enumerate(panel.bars):
        top = 4 + _ROW * index
        parts.append(_text(8, top + 12, _shortened(label, WIDTH - 16), kind="halo"))
        x = 8.0
        for part, value in enumerate(values):
            length = width * max(0.0, scale.place(value))
            colour = part_variable(part) if arm is None else arm_variable(arm)
            parts.append(
                f'<rect x="{x:.1f}" y="{top + 17}" width="{length:.1f}" height="11" fill="{colour}"><title>'
                f"{escape(panel.parts[part] + ': ' if len(values) > 1 and part < len(panel.parts) else '')}"
                f"{figure(value, 3)} {escape(panel.xlabel)}</title></rect>"
            )
            x += length
        parts.append(_text(x + 5, top + 27, figure(sum(values), 3)))
    parts += _bottom_axis(scale, 8, width, bottom, panel.xlabel)
    return _svg(panel, bottom + 38, parts)


def _bottom_axis(scale: Scale, left: float, width: float, bottom: float, label: str) -> list[str]:
    parts = [_rule(left, bottom, left + width, bottom, "axis")]
    for tick in scale.ticks:
        x = left + width * scale.place(tick)
        parts.append(_text(x, bottom + 16, tick_text(tick), "start" if x < 16 else "middle"))
    return [*parts, _text(left + width / 2, bottom + 33, label, "middle", "label")]


def _interval_chart(panel: IntervalPanel) -> str:
    scale = ratio_scale([point[2:] for point in panel.points])
    left, width = 10, WIDTH - 20
    bottom = 4 + _ROW * len(panel.points)

    def across(value: float) -> float:
        return left + width * min(1.0, max(0.0, scale.place(value) if value > 0 else 0.0))

    parts = [_rule(across(tick), 2, across(tick), bottom, "grid") for tick in scale.ticks]
    parts.append(_rule(across(1.0), 2, across(1.0), bottom, "one"))
    for index, (label, arm, ratio, low, high) in enumerate(panel.points):
        top = 4 + _ROW * index
        value = interval_text(ratio, low, high)
        room = WIDTH - 24 - _CHARACTER * len(value)
        parts += [
            _text(left, top + 12, _shortened(label, room), kind="halo"),
            _text(WIDTH - 8, top + 12, value, "end", "halo"),
        ]
        colour, y = arm_variable(arm or 0), top + 23
        if not (math.isnan(low) or math.isnan(high)):
            start, end = across(low), across(high) if math.isfinite(high) else left + width
            parts.append(f'<path d="M{start:.1f} {y}H{end:.1f}" class="interval" stroke="{colour}"/>')
            if math.isinf(high):
                parts.append(f'<path d="M{end - 6:.1f} {y - 4}L{end:.1f} {y}L{end - 6:.1f} {y + 4}" class="interval" '
                             f'stroke="{colour}"/>')  # fmt: skip
            if low <= 0:
                parts.append(f'<path d="M{start + 6:.1f} {y - 4}L{start:.1f} {y}L{start + 6:.1f} {y + 4}" '
                             f'class="interval" stroke="{colour}"/>')  # fmt: skip
        parts.append(f'<circle cx="{across(ratio):.1f}" cy="{y}" r="4.2" fill="{colour}"/>')
    parts += _bottom_axis(scale, left, width, bottom, panel.xlabel)
    return _svg(panel, bottom + 38, parts)


def interval_text(ratio: float, low: float, high: float) -> str:
    """Return a ratio with its interval: `0.63 (0.58 to 0.69)`, `≥ 1.20`, `≤ 0.80`, or alone without one."""
    if math.isinf(high):
        return f"≥ {ratio_text(ratio)}"
    if low <= 0:
        return f"≤ {ratio_text(ratio)}"
    if math.isnan(low) or math.isnan(high):
        return ratio_text(ratio)
    return f"{ratio_text(ratio)} ({ratio_text(low)} to {ratio_text(high)})"
