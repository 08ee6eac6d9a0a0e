"""Numbers of runs and arms, and their table."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_trainopt.core.log_lines import is_last_line
from hf_trainopt.metrics.targets import Target, falls_when_better

from .arms import Arm
from .contents import Table
from .metrics import evaluation_metrics
from .runs import Run, number
from .settings import reference_steps


NOT_RECORDED = "not recorded"

# Parts of the names of metrics that rise; of others that are no loss it is not known.
_RISING = ("accuracy", "f1", "precision", "recall", "bleu", "rouge")


# ---- Numbers as text -----------------------------------------------------------------------------------------------


def figure(value: float, digits: int = 4) -> str:
    """Return a number with so many significant digits, whole thousands in full: `5.402`, `1,852`, `3.2e-05`."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "not a number"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.{digits - 1}g}"
    return f"{value:.{digits}g}"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return how many seconds the unit has that a time is best told in, and its name."""
    return (1.0, "s") if seconds < 120 else (60.0, "min") if seconds < 7200 else (3600.0, "h")


def size_unit(gib: float) -> tuple[float, str]:
    """Return the unit that a size is best told in, by how many there are in a GiB, and its name."""
    return (1.0, "GiB") if gib >= 0.1 else (1024.0, "MiB")


def _seconds(values: Sequence[float]) -> tuple[list[float], str]:
    scale, unit = time_unit(statistics.fmean(values))
    return [value / scale for value in values], f" {unit}"


def spread(values: Sequence[float], unit: str = "") -> str:
    """Return the value of one run, or of several their geometric mean with the lowest and the highest in brackets.

    Of values that are not finite it says how many there are; of some that are not positive it has the range alone.

    Args:
        values: At least one.
        unit: `"s"` for seconds, which are told in minutes or hours if that is better, `"GiB"` for sizes, in MiB if
            they are small, `"%"` for shares, or what is to stand behind the number.
    """
    if wrong := sum(not math.isfinite(value) for value in values):
        return figure(values[0]) if len(values) == 1 else f"not finite in {wrong} of {len(values)} seeds"
    shown, suffix = list(values), f" {unit}" if unit else ""
    if unit == "s":
        shown, suffix = _seconds(values)
    elif unit == "GiB":
        scale, name = size_unit(statistics.fmean(values))
        shown, suffix = [value * scale for value in values], f" {name}"
    elif unit == "%":
        shown = [100 * value for value in values]
    digits = 3 if unit in ("s", "%") else 4
    low, high = figure(min(shown), digits), figure(max(shown), digits)
    if low == high:
        return low + suffix
    if min(shown) <= 0:
        return f"{low} to {high}{suffix}"
    return f"{figure(statistics.geometric_mean(shown), digits)}{suffix} ({low} to {high})"


def ratio_text(ratio: float) -> str:
    """Return a ratio with three digits, zeros too: `1.00`, `0.978`, `12.3`."""
    if not math.isfinite(ratio) or ratio >= 1000 or 0 < ratio < 0.001:
        return figure(ratio, 3)
    return f"{ratio:#.3g}".rstrip(".")


# ---- Measures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Args:
        label: What it is.
        value: Returns it for a run; `None`: not recorded.
        unit: As for `spread`.
    """

    label: str
    value: Callable[[Run], float | None]
    unit: str = ""


def _last(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.last(key)


def largest(run: Run, key: str) -> float | None:
    """Return the largest finite number under a key of the log."""
    return max((value for value in run.column(key) if value is not None and math.isfinite(value)), default=None)


def _best(metric: str) -> Callable[[Run], float | None]:
    pick = min if falls_when_better(metric) else max

    def value(run: Run) -> float | None:
        found = [value for value in run.column(metric) if value is not None and math.isfinite(value)]
        return pick(found, default=None)

    return value


def _samples_per_step(run: Run) -> float | None:
    samples, steps = run.end("samples"), run.end("steps")
    return samples / steps if samples and steps else None


def _of_whole_run(key: str) -> Callable[[Run], float | None]:
    """Upstream's figures of a run that was resumed are of the last part of its time only."""
    return lambda run: None if run.is_resumed else run.last(key)


def last_rate(run: Run, key: str, count: float | None = None) -> float | None:
    """Return a rate of the whole run, warm-up left out; of one that has not ended, the median of its lines.

    Args:
        run: The run.
        key: Of the rate.
        count: What the rate is of. A stock run logs no rate: it is this over its training time, warm-up included.
    """
    if key not in run.keys and run.time_is_derived:
        seconds = run.end("time")
        return count / seconds if count and seconds else None
    ends = [index for index, line in enumerate(run.history) if is_last_line(line)]
    values = run.column(key)
    if ends and values[ends[-1]] is not None:
        return values[ends[-1]]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(known) if known else None


PHASES = {
    "forward_backward": "forward and backward pass",
    "optimizer": "optimizer step",
    "evaluation": "evaluation",
    "save": "saving",
}


def measures(arms: Sequence[Arm]) -> list[Measure]:
    """Return what the table of a report has, in its order; evaluation metrics are those that the runs have."""
    rows = [
        Measure("optimizer steps", lambda run: run.steps),
        Measure("samples", lambda run: run.end("samples")),
        Measure("tokens", tokens),
        Measure("epochs", _last("epoch")),
        Measure("training time", lambda run: run.end("time"), "s"),
        Measure("whole run, evaluations and saves included", _of_whole_run("train_runtime"), "s"),
        Measure("train loss, last logged", _last("loss")),
        Measure("the same, mean or sum over k", _doubtful_loss),
    ]
    for metric in evaluation_metrics(arms):
        rows.append(Measure(f"{metric}, last", _last(metric)))
        if falls_when_better(metric) or any(part in metric for part in _RISING):
            rows.append(Measure(f"{metric}, best", _best(metric)))
    rows += [
        Measure("perplexity, last", _last("perplexity")),
        Measure("samples/s", lambda run: last_rate(run, "samples_per_second", run.end("samples"))),
        Measure("tokens/s", lambda run: last_rate(run, "tokens_per_second", tokens(run))),
        Measure("samples/s of the whole run, evaluations included", _of_whole_run("train_samples_per_second")),
        Measure("TFLOP/s", lambda run: _scaled(last_rate(run, "flops_per_second"), 1e-12)),
        Measure("MFU", lambda run: last_rate(run, "mfu"), "%"),
        Measure("samples per optimizer step, mean", _samples_per_step),
        Measure("k, last", _last_k),
        Measure("noise scale in samples, last with both ends", _resolved_noise),
        Measure("peak memory", lambda run: largest(run, "peak_memory_gib"), "GiB"),
        Measure("peak of a step, measured", measured_peak, "GiB"),
        Measure("peak of a step, predicted", predicted_peak, "GiB"),
        Measure("skipped steps", _last("skipped_steps")),
    ]
    return rows


def tokens(run: Run) -> float | None:
    """Return the tokens that a run was counting (`include_num_input_tokens_seen`)."""
    counted = run.last("num_input_tokens_seen")
    return counted if counted is not None else number(run.state.get("num_input_tokens_seen")) or None


def _doubtful_loss(run: Run) -> float | None:
    return run.as_logged.last("loss") if run.loss_scale.in_doubt else None


def _last_k(run: Run) -> float | None:
    logged = run.last("accumulation_steps")
    return logged if logged is not None else reference_steps(run.settings)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _resolved_noise(run: Run) -> float | None:
    columns = (run.column("noise_scale"), run.column("noise_scale_high"))
    found = [value for value, high in zip(*columns, strict=True) if value is not None and high is not None]
    return found[-1] if found else None


def measured_peak(run: Run) -> float | None:
    """Return the measured peak of an optimizer step in GiB: from the log, else from the plan."""
    logged = run.last("measured_peak_gib")
    kept = run.plan.measured_peak_bytes if run.plan is not None else None
    return logged if logged is not None or kept is None else kept / 2**30


def predicted_peak(run: Run) -> float | None:
    """Return the predicted peak of an optimizer step in GiB: from the log, else from the plan."""
    logged = run.last("predicted_peak_gib")
    kept = run.plan.predicted_peak_bytes if run.plan is not None else None
    return logged if logged is not None or kept is None else kept / 2**30


# ---- Tables --------------------------------------------------------------------------------------------------------


def arm_values(arm: Arm, measure: Measure) -> list[float] | None:
    """Return a measure of all runs of an arm; `None` if a run has not recorded it."""
    values = [measure.value(run) for run in arm.runs]
    return None if any(value is None for value in values) else values


def cell(arm: Arm, measure: Measure) -> str:
    """Return a measure of an arm."""
    values = arm_values(arm, measure)
    return NOT_RECORDED if values is None else spread(values, measure.unit)


def headings(arms: Sequence[Arm], baseline: Arm | None) -> tuple[str, ...]:
    """Return the headings of columns that are arms."""
    return ("", *(f"{arm.label}{', baseline' if arm is baseline and len(arms) > 1 else ''}" for arm in arms))


def summary_table(arms: Sequence[Arm], baseline: Arm | None, target: Target | None = None) -> Table:
    """Return the table of all measures that at least one arm has, a column for each arm; the target comes first."""
    rows = []
    models = [sorted({run.model or NOT_RECORDED for run in arm.runs}) for arm in arms]
    if any(names != [NOT_RECORDED] for names in models):
        rows.append(("model", *(", ".join(names) for names in models)))
    if target is not None:
        rows += _target_rows(arms, target)
    for measure in measures(arms):
        if any(arm_values(arm, measure) is not None for arm in arms):
            rows.append((measure.label, *(cell(arm, measure) for arm in arms)))
    return Table(headings(arms, baseline), tuple(rows))


def _target_rows(arms: Sequence[Arm], target: Target) -> list[tuple[str, ...]]:
    """Return whether arms have reached a target, and after what time, samples and steps."""
    axes = {"time": ("training time", "s"), "samples": ("samples", ""), "steps": ("optimizer steps", "")}
    rows = []
    reached = []
    for arm in arms:
        crossings = [run.crossing(target) for run in arm.runs]
        known = [crossing for crossing in crossings if crossing is not None]
        count = sum(crossing.reached for crossing in known)
        several = len(arm.runs) > 1
        reached.append(
            NOT_RECORDED if not known
            else f"{count} of {len(arm.runs)} seeds" if several
            else "yes" if count else "no"
        )  # fmt: skip
    rows.append(("target reached", *reached))
    for axis, (label, unit) in axes.items():
        cells = [_target_cell(arm, target, axis, unit) for arm in arms]
        if any(text != NOT_RECORDED for text in cells):
            rows.append((f"{label} to target", *cells))
    return rows


_FIELDS = {"time": "seconds", "samples": "samples", "steps": "steps"}


def _target_cell(arm: Arm, target: Target, axis: str, unit: str) -> str:
    crossings = [run.crossing(target) for run in arm.runs]
    values = [getattr(crossing, _FIELDS[axis]) if crossing is not None else None for crossing in crossings]
    if any(value is None for value in values):
        return NOT_RECORDED
    if all(crossing.reached for crossing in crossings):
        return spread(values, unit)
    # Censored: it takes longer than the run was, and a mean with such values in it is a lower bound.
    return f"over {spread([statistics.geometric_mean(values) if min(values) > 0 else min(values)], unit)}"
