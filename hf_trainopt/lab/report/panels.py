"""Charts of a report, from arms."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hf_trainopt.core.log_lines import is_last_line
from hf_trainopt.metrics.targets import Target

from .arms import Arm
from .contents import BarPanel, Line, LinePanel
from .runs import Run
from .seeds import with_medians
from .series import batch_curve, curve, derived_rate, k_curve, noise_curves
from .summary import PHASES, figure, largest, measured_peak, size_unit, time_unit


AXIS_TITLES = {"time": "training time", "samples": "samples", "steps": "optimizer steps"}

# Above this ratio of the largest to the smallest value a loss is shown on a log axis.
_LOG_FROM = 20.0

_KINDS = {
    "parameters": "parameters", "buffers": "parameters", "gradients": "gradients", "communication": "gradients",
    "gathered": "parameters",
    "optimizer": "optimizer state", "inputs": "activations", "activations": "activations", "loss": "loss",
    "workspace": "loss", "temporary": "loss",
}  # fmt: skip


def every_run(arms: Sequence[Arm]) -> list[tuple[int, Run]]:
    """Return all runs with the index of their arm."""
    return [(index, run) for index, arm in enumerate(arms) for run in arm.runs]


def axis_scale(arms: Sequence[Arm], axis: str) -> tuple[float, str]:
    """Return what positions on an axis are divided by, and the label of the axis with its unit."""
    if axis != "time":
        return 1.0, AXIS_TITLES[axis]
    ends = [run.end(axis) for _, run in every_run(arms) if run.has_axis(axis)]
    scale, unit = time_unit(max((end for end in ends if end is not None), default=0.0))
    return scale, f"{AXIS_TITLES[axis]} ({unit})"


def _rescaled(line: Line, scale: float) -> Line:
    return replace(line, xs=line.xs / scale)


def ends_in_words(arms: Sequence[Arm], lines: Sequence[Line], what: str, xlabel: str) -> str:
    """Return a sentence with the last values of the curves."""
    last: dict[int, list[float]] = {}
    for line in lines:  # of each run; medians are not among them
        known = line.ys[~np.isnan(line.ys)]
        if len(known):
            last.setdefault(line.arm, []).append(float(known[-1]))
    ends = [f"{arms[arm].name} {' and '.join(figure(value) for value in values)}" for arm, values in last.items()]
    return f"{what} over {xlabel}. Last values: {'; '.join(ends)}."


def line_panel(
    arms: Sequence[Arm],
    axis: str,
    key: str,
    *,
    name: str,
    title: str,
    ylabel: str,
    style: str = "line",
    scale: str = "linear",
    make: Callable[[Run, int, str], Line | None] | None = None,
) -> LinePanel | None:
    """Return a chart of one column of the log; `None` where no run has it.

    Args:
        arms: What is compared.
        axis: Name in `runs.AXES`.
        key: The column.
        name: Of the chart.
        title: Of the chart.
        ylabel: Values with their unit.
        style: Of the curves.
        scale: Of the values.
        make: Makes the curve from run, arm and axis, in place of the column's.
    """
    runs = every_run(arms)
    make = make or (lambda run, arm, axis: curve(run, arm, axis, key, style))
    found = [make(run, arm, axis) for arm, run in runs if run.has_axis(axis)]
    divisor, xlabel = axis_scale(arms, axis)
    lines = tuple(_rescaled(line, divisor) for line in found if line is not None)
    if not lines:
        return None
    summary = ends_in_words(arms, lines, title, xlabel)
    return LinePanel(name, title, xlabel, ylabel, tuple(with_medians(lines)), scale=scale, summary=summary)


def rate_curve(key: str) -> Callable[[Run, int, str], Line | None]:
    """Return what makes the curve of a rate, without the lines at ends of `train`: these have the whole run's mean.

    For a run that logs no rate but whose times are known otherwise it is the count between two lines over the time.
    """

    def make(run: Run, arm: int, axis: str) -> Line | None:
        if key not in run.keys and run.time_is_derived and not run.clock.is_uniform:
            counts = {"samples_per_second": run.positions("samples"),
                      "tokens_per_second": run.column("num_input_tokens_seen")}  # fmt: skip
            return derived_rate(run, arm, axis, counts[key]) if key in counts else None
        lines = tuple(line for line in run.history if not is_last_line(line))
        return curve(replace(run, history=lines), arm, axis, key)

    return make


def loss_panel(arms: Sequence[Arm], axis: str, metric: str | None, target: Target | None) -> LinePanel | None:
    """Return training loss and evaluations over one axis."""
    runs = [(arm, run) for arm, run in every_run(arms) if run.has_axis(axis)]
    train = [curve(run, arm, axis, "loss", "faint") for arm, run in runs]
    evaluated = [curve(run, arm, axis, metric, "marked") for arm, run in runs] if metric else []
    divisor, xlabel = axis_scale(arms, axis)
    lines = [_rescaled(line, divisor) for line in (*train, *evaluated) if line is not None]
    if not lines:
        return None
    values = np.concatenate([line.ys[~np.isnan(line.ys)] for line in lines])
    log = values.min() > 0 and values.max() > _LOG_FROM * values.min()
    shown = [line for line in lines if line.style == "marked"] or lines
    return LinePanel(
        f"loss_{axis}",
        f"Loss against {AXIS_TITLES[axis]}",
        xlabel,
        "loss",
        tuple(with_medians(lines)),
        level=(target.value, "target") if target is not None and target.metric == metric else None,
        scale="log" if log else "linear",
        summary=ends_in_words(arms, shown, "Evaluated loss" if shown is not lines else "Training loss", xlabel),
    )


def doubtful_loss_panel(arms: Sequence[Arm], index: int) -> LinePanel | None:
    """Return the training loss of an arm of which nobody knows what it is k times of; `None` for any other arm."""
    runs = [run.as_logged for run in arms[index].runs if run.loss_scale.in_doubt]
    lines = [line for run in runs if (line := curve(run, index, "steps", "loss")) is not None]
    if not lines:
        return None
    title = f"Training loss of {arms[index].name}, as logged"
    summary = ends_in_words(arms, lines, title, AXIS_TITLES["steps"])
    return LinePanel(f"loss_{index}", title, AXIS_TITLES["steps"], "loss", tuple(with_medians(lines)), summary=summary)


def noise_panel(arms: Sequence[Arm], axis: str) -> LinePanel | None:
    """Return the noise scale with its interval."""
    runs = every_run(arms)
    divisor, xlabel = axis_scale(arms, axis)
    lines, bands = [], []
    for arm, run in runs:
        if "noise_scale_low" in run.keys or "noise_scale" in run.keys:
            found, band = noise_curves(run, arm, axis)
            lines += [_rescaled(line, divisor) for line in found]
            bands += [band] if band is not None else []
    if not lines and not bands:
        return None
    resolved = [line for line in lines if line.style == "line"]
    summary = ends_in_words(arms, resolved, "Noise scale", xlabel) if resolved else "Noise scale, never resolved."
    return LinePanel(
        "noise_scale", "Gradient noise scale", xlabel, "samples", tuple(lines), tuple(bands), scale="log",
        summary=summary,
    )  # fmt: skip


def accumulation_panels(arms: Sequence[Arm], axis: str) -> list[LinePanel]:
    """Return k and the effective batch."""
    panels = [
        line_panel(
            arms, axis, "accumulation_steps", name="accumulation_steps", title="k, micro-batches of a step",
            ylabel="micro-batches", style="step", scale="log2", make=k_curve,
        ),
        line_panel(
            arms, axis, "", name="effective_batch", title="Effective batch", ylabel="samples", scale="log2",
            make=batch_curve,
        ),
    ]  # fmt: skip
    return [panel for panel in panels if panel is not None]


def phase_panel(arms: Sequence[Arm]) -> BarPanel | None:
    """Return the peak memory of each phase, largest over the seeds."""
    bars = []
    for phase, label in PHASES.items():
        for index, arm in enumerate(arms):
            values = [value for run in arm.runs if (value := largest(run, f"peak_memory_{phase}_gib")) is not None]
            if values:
                bars.append((label if len(arms) == 1 else f"{label}, {arm.name}", index, (max(values),)))
    return _sizes_panel("memory_phases", "Peak memory by phase", bars)


Bar = tuple[str, int | None, tuple[float, ...]]


def _sizes_panel(name: str, title: str, bars: Sequence[Bar], parts: tuple[str, ...] = ()) -> BarPanel | None:
    """Return bars of sizes, given in GiB, in the unit that suits the longest; `None` without bars."""
    if not bars:
        return None
    scale, unit = size_unit(max(sum(values) for _, _, values in bars))
    scaled = tuple((label, arm, tuple(scale * value for value in values)) for label, arm, values in bars)
    words = "; ".join(f"{label} {figure(sum(values), 3)} {unit}" for label, _, values in scaled)
    return BarPanel(name, title, unit, scaled, parts, summary=f"{words}.")


def step_memory_panel(arms: Sequence[Arm]) -> BarPanel | None:
    """Return what is alive at the peak of a step, without placement and under each plan, and what was measured."""
    parts = tuple(dict.fromkeys(_KINDS.values()))
    bars = []
    for index, arm in enumerate(arms):
        run = next((run for run in arm.runs if run.plan is not None), None)
        if run is None:
            continue
        before = "" if len(arms) == 1 else f"{arm.name}: "
        found = []
        for key, label in (("baseline_by_kind", "without placement"), ("predicted_by_kind", "planned")):
            table = run.plan.details.get(key)
            if isinstance(table, dict) and all(isinstance(value, int | float) for value in table.values()):
                sizes = dict.fromkeys(parts, 0.0)
                for kind, num_bytes in table.items():
                    sizes[_KINDS.get(kind, "loss")] += num_bytes / 2**30
                found.append((before + label, None, tuple(sizes.values())))
        measured = measured_peak(run)
        if found and measured is not None:
            found.append((f"{before}measured", index, (measured,)))
        bars += found
    return _sizes_panel("memory_step", "Peak of an optimizer step", bars, parts)


def has_values(arms: Sequence[Arm], keys: Sequence[str]) -> bool:
    """Whether some run has one of these keys in its log."""
    return any(key in run.keys for _, run in every_run(arms) for key in keys)
