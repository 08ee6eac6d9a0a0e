"""The frontier of plans as a picture."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plan.plan import PlacementPlan
from .render import changed_time


SUFFIXES = (".png", ".pdf", ".svg")

_GIB = 2**30
_NAMED, _CHOSEN = "#c2571a", "#1a7f37"
# Mark and colour of plans without rewrites, then with more and more of them.
_MARKS = (("o", "#1f5fa8"), ("^", "#7a3fa0"), ("v", "#b03a78"), ("s", "#12808a"))


def check_plot(path: str) -> None:
    """Check that a plot can be written, before the work for it is done.

    Raises:
        ValueError: The path has another suffix, or matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot {path} must end in {', '.join(SUFFIXES)}.")
    _figure()


def _figure():
    """Return the class of figures, apart from pyplot: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib.") from error
    return Figure


def plot_frontier(
    path: str,
    frontier: Sequence[PlacementPlan],
    named: Sequence[PlacementPlan] = (),
    chosen: PlacementPlan | None = None,
    title: str = "",
) -> None:
    """Write the picture that `frontier_figure` draws to `path`, whose suffix says the format."""
    frontier_figure(frontier, named, chosen, title).savefig(path)


def frontier_figure(
    frontier: Sequence[PlacementPlan],
    named: Sequence[PlacementPlan] = (),
    chosen: PlacementPlan | None = None,
    title: str = "",
) -> Any:
    """Draw peak against time of a step: the frontier as steps, named policies and the budget beside it.

    The time is that to recompute and what the rewrites save or cost, so that the line falls towards larger budgets
    wherever the rewrites stay the same. Plans with other rewrites have another mark: these save memory without
    recomputation and change results by rounding.

    Args:
        frontier: Plans, in any order.
        named: Plans of named policies.
        chosen: The chosen plan.
        title: What was planned: model, batch, precision, device.

    Returns:
        The figure of matplotlib.
    """
    figure = _figure()(figsize=(12, 7.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    compared = [plan for plan in named if not plan.is_stock]
    drawn = [_place(plan) for plan in (*frontier, *compared)]
    right = 1.06 * max(x for x, _ in drawn)
    top, bottom = 1.15 * max(1.0, *(y for _, y in drawn)), min(y for _, y in drawn)
    _draw_frontier(axes, frontier, right)
    _draw_named(axes, compared)
    lines = [(frontier[0].baseline_peak_bytes / _GIB, "without placement", "0.45", ":")]
    if chosen is not None:
        x, y = _place(chosen)
        axes.plot(
            [x], [y], "o", markersize=17, markerfacecolor="none", markeredgecolor=_CHOSEN, markeredgewidth=2.5,
            linestyle="none", label=f"chosen: {x:.2f} GiB, {y:+.1f} %", zorder=5,
        )  # fmt: skip
        if chosen.budget_bytes is not None and chosen.budget_bytes / _GIB <= right:
            lines.append((chosen.budget_bytes / _GIB, "budget", _CHOSEN, "--"))
    for x, name, color, style in lines:
        axes.axvline(x, color=color, linestyle=style, linewidth=1.5)
        # Above the axes, where no points are; a budget close to the baseline makes way to the left.
        aside = name == "budget" and abs(x - lines[0][0]) < 0.25 * right
        axes.annotate(
            f"{name} {x:.2f} GiB", (x, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, 5),
            textcoords="offset points", ha="right" if aside or x > 0.85 * right else "center", va="bottom",
            color=color, fontsize=11, annotation_clip=False,
        )  # fmt: skip
    least = min(x for x, _ in drawn)
    axes.set_xlim(max(0.0, least - 0.12 * (right - least)), right)  # what no plan saves needs no room
    axes.set_ylim(bottom - 0.04 * (top - bottom), top)
    axes.set_xlabel("peak memory of a training step (GiB)", fontsize=13)
    axes.set_ylabel("more time than a step without placement (%)", fontsize=13)
    axes.tick_params(labelsize=11)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(textwrap.fill(title, 105), fontsize=14, loc="left", pad=26)
    # Below the axes: inside them there is no corner that is always free.
    figure.legend(fontsize=11, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _place(plan: PlacementPlan) -> tuple[float, float]:
    """Return where a plan is drawn: GiB, and by how many per cent it changes the time of a step."""
    return plan.predicted_peak_bytes / _GIB, 100 * changed_time(plan)


def _draw_frontier(axes, frontier: Sequence[PlacementPlan], right: float) -> None:
    """Draw the frontier; each combination of rewrites has a mark and a colour, those with the fewest come first."""
    ordered = sorted(frontier, key=_place)
    groups = sorted({tuple(plan.rewrites.names()) for plan in frontier}, key=lambda names: (len(names), names))
    # For a budget between two plans, the one with the lower peak is what fits.
    ends = [*(_place(plan)[0] for plan in ordered[1:]), right]
    for plan, following, end in zip(ordered, [*ordered[1:], ordered[-1]], ends, strict=True):
        (x, y), color = _place(plan), _MARKS[groups.index(tuple(plan.rewrites.names())) % len(_MARKS)][1]
        axes.plot([x, end], [y, y], color=color, linewidth=2, zorder=3)
        axes.plot([end, end], [y, _place(following)[1]], color=color, linewidth=1, zorder=2)
    for index, names in enumerate(groups):
        marker, color = _MARKS[index % len(_MARKS)]
        places = [_place(plan) for plan in ordered if tuple(plan.rewrites.names()) == names]
        rewrites = " and ".join(name.replace("_", " ") for name in names)
        axes.plot(
            *zip(*places, strict=True), linestyle="none", marker=marker, color=color, markersize=8, zorder=4,
            label=f"plans with {rewrites}" if names else "plans without rewrites (exact)",
        )  # fmt: skip


def _draw_named(axes, plans: Sequence[PlacementPlan]) -> None:
    """Draw named policies; of those at about the same place, the labels do not cover each other."""
    if not plans:
        return
    plans = sorted(plans, key=lambda plan: (*_place(plan), plan.policy))
    places = [_place(plan) for plan in plans]
    axes.plot(
        *zip(*places, strict=True), linestyle="none", marker="D", color=_NAMED, markersize=8, label="named policies",
        zorder=4,
    )  # fmt: skip
    widest = max(x for x, _ in places)
    highest = max([y for _, y in places] + [1e-9])
    groups: list[list[tuple[str, tuple[float, float]]]] = []
    for plan, (x, y) in zip(plans, places, strict=True):
        near = [
            group for group in groups
            if abs(group[0][1][0] - x) < 0.06 * widest and abs(group[0][1][1] - y) < 0.06 * highest
        ]  # fmt: skip
        if near:
            near[0].append((plan.policy, (x, y)))
        else:
            groups.append([(plan.policy, (x, y))])

    def label(text: str, place: tuple[float, float], offset: tuple[int, int], side: str) -> None:
        axes.annotate(
            text, place, xytext=offset, textcoords="offset points", ha=side, color=_NAMED, fontsize=12, zorder=6
        )

    for group in groups:
        (first, place), (last, last_place) = group[0], group[-1]
        if len(group) == 2 and last_place[0] - place[0] > 0.005 * widest:
            label(first, place, (-10, 8), "right")
            label(last, last_place, (10, 8), "left")
        else:
            label(", ".join(name for name, _ in group), last_place, (10, 8), "left")
