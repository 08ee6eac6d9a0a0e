"""The parts of a report, each from what the runs have recorded."""

import math
from collections.abc import Sequence

from hf_trainopt.lab.compare.render import target_words
from hf_trainopt.metrics.targets import Target
from hf_trainopt.placement.plan.budget import gib
from hf_trainopt.placement.plan.plan import PlacementPlan, StageChoice, describe
from hf_trainopt.placement.show.render import percent, words

from .arms import Arm
from .comparison import ComparisonFolder
from .contents import Contents, LinePanel, Section, Table
from .metrics import common_axis, evaluation_metrics, main_metric, without_axis
from .panels import (
    accumulation_panels,
    doubtful_loss_panel,
    every_run,
    has_values,
    line_panel,
    loss_panel,
    noise_panel,
    phase_panel,
    rate_curve,
    step_memory_panel,
)
from .ratios import MAIN, Ratio, arm_ratios, ratio_panel
from .seeds import seed_legend
from .settings import settings_rows
from .summary import NOT_RECORDED, PHASES, figure, headings, largest, spread, summary_table
from .verdict import verdicts


TIME_ABSENT = (
    "Add ThroughputCallback (hf_trainopt.metrics) to a stock Trainer, or report_to='tensorboard', to have it."
)

# More ratios than these don't stand beside the verdict.
_MOST_RATIOS = 14
# More metrics than these are in the table only.
_MOST_METRIC_PANELS = 4


def contents(
    arms: Sequence[Arm],
    *,
    title: str,
    baseline: Arm | None = None,
    target: Target | None = None,
    no_target: str | None = None,
    comparisons: Sequence[ComparisonFolder] = (),
) -> Contents:
    """Return a report of arms.

    Args:
        arms: What is compared; may be empty if there are comparisons.
        title: Heading.
        baseline: The arm that others are divided by.
        target: What time to target is measured to.
        no_target: Why there is no target.
        comparisons: Results of `hf-trainopt compare`.
    """
    sections: list[Section] = []
    absent: list[tuple[str, str]] = []
    leading = _leading(baseline, target, comparisons)
    if arms:
        loss = loss_panels(arms, main_metric(arms), target)
        ratios = arm_ratios(arms, baseline, target, leading) if baseline is not None else []
        main, more = _by_importance(ratios)
        sections.append(_verdict(arms, baseline, target, leading, loss[:1], ratios, main))
        sections.append(_summary(arms, baseline, target, leading, more))
        absent += [] if target is not None else [("Time to target", no_target or "no target was set.")]
    sections += [
        _comparison(comparison, index, arms)
        for index, comparison in enumerate(comparisons)
        if comparison is not leading
    ]
    if arms:
        axis = common_axis(arms)
        parts = [
            _loss(arms, loss),
            _metrics(arms, axis),
            _accumulation(arms, axis),
            _noise(arms, axis),
            _rate(arms, axis),
            _throughput(arms, axis),
            _memory(arms),
            _placement(arms),
        ]
        sections += [part for part in parts if isinstance(part, Section)]
        absent += [part for part in parts if isinstance(part, tuple)]
        sections.append(_runs(arms))
    return Contents(title, tuple(arm.label for arm in arms), tuple(sections), tuple(absent))


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)


def _leading(
    baseline: Arm | None, target: Target | None, comparisons: Sequence[ComparisonFolder]
) -> ComparisonFolder | None:
    """Return the comparison whose ratios the verdict takes: it has the baseline and the target of the report."""
    first = comparisons[0] if comparisons else None
    if first is None or first.result is None or baseline is None or first.target != target:
        return None
    folders = {run.folder for name, run in first.runs if name == first.result.baseline}
    return first if any(run.folder in folders for run in baseline.runs) else None


def _verdict(
    arms: Sequence[Arm],
    baseline: Arm | None,
    target: Target | None,
    comparison: ComparisonFolder | None,
    loss: Sequence[LinePanel],
    ratios: Sequence[Ratio],
    main: Sequence[Ratio],
) -> Section:
    shown = ratio_panel("ratios", main, arms, baseline.name if baseline is not None else "")
    text = []
    if target is not None:
        text.append(f"Target: {target} ({target.source}); interpolated between evaluations, whose time isn't counted.")
    if comparison is not None:
        text += comparison.text()
    elif ratios:
        text.append(
            f"Ratios to {baseline.name}{' are of geometric means, and' if _has_seeds(arms) else ''} have no interval: "
            "hf-trainopt compare pairs runs by their seeds and gives them one."
        )
    panels = [*loss, *([shown] if shown is not None else [])]
    return Section(
        "verdict", "Verdict", tuple(text), panels=tuple(panels), legend=_loss_legend(arms, loss),
        lead=tuple(verdicts(arms, baseline, ratios, target)),
    )  # fmt: skip


def _by_importance(ratios: Sequence[Ratio]) -> tuple[list[Ratio], list[Ratio]]:
    """Return the ratios that stand beside the verdict, and those for which there is no room there."""
    if len(ratios) <= _MOST_RATIOS:
        return list(ratios), []
    main = [ratio for ratio in ratios if ratio.quantity in MAIN]
    return main, [ratio for ratio in ratios if ratio not in main]


def _has_seeds(arms: Sequence[Arm]) -> bool:
    return any(len(arm.runs) > 1 for arm in arms)


def _summary(
    arms: Sequence[Arm],
    baseline: Arm | None,
    target: Target | None,
    comparison: ComparisonFolder | None,
    ratios: Sequence[Ratio],
) -> Section:
    text = []
    if _has_seeds(arms):
        text.append("Several seeds: geometric mean (lowest to highest).")
    crossings = [run.crossing(target) for _, run in every_run(arms)] if target is not None else []
    if any(crossing is not None and not crossing.reached for crossing in crossings):
        text.append("A run that never reached the target took over the length of the run.")
    timeless = without_axis(arms, "time")
    if timeless and len(timeless) < len(arms):
        text.append(
            f"No training time was logged by {_names(timeless)}, so runs are compared on samples and steps only. "
            f"{TIME_ABSENT}"
        )
    elif timeless:
        text.append(f"No training time was logged; there is no time axis. {TIME_ABSENT}")
    derived = [arm.name for arm in arms if any(run.samples_are_derived for run in arm.runs)]
    if derived:
        text.append(
            f"Samples of {_names(derived)} weren't logged: they follow from those of the whole run, or from the batch "
            "that was set."
        )
    text += _clocks(arms)
    text += _loss_scales(arms)
    if unknown := without_axis(arms, "samples"):
        text.append(f"Samples of {_names(unknown)} are not known, so charts are over steps.")
    rows = settings_rows([[run.settings for run in arm.runs] for arm in arms])
    tables = [summary_table(arms, baseline, target)]
    tables += [Table(headings(arms, baseline), tuple(rows), "Settings", folded=True)] if rows else []
    tables += comparison.tables() if comparison is not None else ()
    more = ratio_panel("more_ratios", ratios, arms, baseline.name if baseline is not None else "")
    return Section("summary", "Results", tuple(text), tuple(tables), (more,) if more is not None else ())


def _clocks(arms: Sequence[Arm]) -> list[str]:
    """Return where the times of stock runs are from."""
    names: dict[str, list[str]] = {}
    for arm in arms:
        for source in dict.fromkeys(run.clock.source for run in arm.runs if run.time_is_derived):
            names.setdefault(source, []).append(arm.name)
    return [
        f"Training time of {_names(of)} wasn't logged. It is from {source}: no evaluations, but saves and warm-up."
        for source, of in names.items()
    ]


def _loss_scales(arms: Sequence[Arm]) -> list[str]:
    """Return which training losses are not shown as they were logged, or apart, and why."""
    text = []
    for arm in arms:
        for scale in dict.fromkeys(run.loss_scale for run in arm.runs if run.loss_scale.reason):
            done = (
                "The training loss is drawn apart, as it was logged; the gradient norm isn't drawn" if scale.in_doubt
                else "Shown are means, of gradient norms too"
            )  # fmt: skip
            text.append(f"Loss of {arm.name}: {scale.reason}. {done}.")
    return text


def loss_panels(arms: Sequence[Arm], metric: str | None, target: Target | None) -> list[LinePanel]:
    """Return training loss and evaluations over time, samples and steps, as far as the runs have them."""
    panels = [loss_panel(arms, axis, metric, target) for axis in ("time", "samples", "steps")]
    return [panel for panel in panels if panel is not None]


def _loss_legend(arms: Sequence[Arm], panels: Sequence[LinePanel]) -> tuple[tuple[str, str], ...]:
    styles = {line.style for panel in panels for line in panel.lines}
    of_seeds = seed_legend(panels)
    divided = any(run.loss_scale.divisor != 1 for _, run in every_run(arms))
    logged = (
        "training loss"
        + ("" if divided else ", as logged")
        + ("; with several seeds, their median" if of_seeds else "")
    )
    legend = [("faint", logged)] if "faint" in styles else []
    legend += [("marked", main_metric(arms))] if "marked" in styles else []
    return (*legend, *of_seeds)


def _loss(arms: Sequence[Arm], panels: Sequence[LinePanel]) -> Section | tuple[str, str] | None:
    """Return the charts of the loss that the verdict has no room for."""
    doubtful = [panel for index in range(len(arms)) if (panel := doubtful_loss_panel(arms, index)) is not None]
    if not panels and not doubtful:
        return "Loss", "the logs have no loss on any line; set logging_steps."
    text = []
    timeless = without_axis(arms, "time")
    if timeless and len(timeless) < len(arms):
        text.append(f"Without a clock, and so not in the chart over time: {_names(timeless)}.")
    bad = sum(value is not None and not math.isfinite(value) for _, run in every_run(arms) for value in _losses(run))
    if bad:
        text.append(f"{bad} logged {'loss is' if bad == 1 else 'losses are'} not finite: gaps in the curves.")
    shown = (*panels[1:], *doubtful)
    if not shown and not text:
        return None
    return Section("loss", "Loss", tuple(text), panels=shown, legend=_loss_legend(arms, shown))


def _losses(run) -> list[float | None]:
    return run.column("loss")


def _metrics(arms: Sequence[Arm], axis: str) -> Section | None:
    others = [metric for metric in evaluation_metrics(arms) if metric != main_metric(arms)][:_MOST_METRIC_PANELS]
    panels = [
        line_panel(arms, axis, metric, name=f"metric_{index}", title=metric, ylabel=metric, style="marked")
        for index, metric in enumerate(others)
    ]
    panels = [panel for panel in panels if panel is not None]
    if not panels:
        return None
    return Section("metrics", "Evaluation metrics", panels=tuple(panels), legend=seed_legend(panels))


def _accumulation(arms: Sequence[Arm], axis: str) -> Section | tuple[str, str]:
    panels = accumulation_panels(arms, axis)
    if not panels:
        return "k and the effective batch", "EfficientTrainer logs them."
    text = []
    without = [arm.name for arm in arms if not has_values([arm], ["accumulation_steps"])]
    if without:
        text.append(
            f"{_names(without)} logged no k: it is drawn as it was set, where that is known. The effective batch is "
            "the samples per step between log lines."
        )
    return Section("accumulation", "Accumulation", tuple(text), panels=tuple(panels), legend=seed_legend(panels))


def _noise(arms: Sequence[Arm], axis: str) -> Section | tuple[str, str]:
    panel = noise_panel(arms, axis)
    if panel is None:
        return "Noise scale", "EfficientTrainer measures it where k adapts, or with measure_noise_scale=True."
    legend = [("band", "95 % interval")] if panel.bands else []
    if any(math.isinf(value) for band in panel.bands for value in band.high):
        legend += [("open", "no upper end: the gradient is not resolved from noise")]
    if any(line.style == "guess" for line in panel.lines):
        legend += [("guess", "then no more than a guess")]
    return Section("noise_scale", "Noise scale", panels=(panel,), legend=tuple(legend))


def _rate(arms: Sequence[Arm], axis: str) -> Section | tuple[str, str]:
    panels = [
        line_panel(arms, axis, "learning_rate", name="learning_rate", title="Learning rate", ylabel="learning rate"),
        line_panel(
            arms, axis, "grad_norm", name="grad_norm", title="Gradient norm", ylabel="norm before clipping",
            scale="log",
        ),
        line_panel(arms, axis, "loss_scale", name="loss_scale", title="Loss scale", ylabel="factor", scale="log2"),
    ]  # fmt: skip
    panels = [panel for panel in panels if panel is not None]
    if not panels:
        return "Learning rate", "the logs have no learning_rate; set logging_steps."
    return Section("learning_rate", "Learning rate and gradients", panels=tuple(panels), legend=seed_legend(panels))


def _throughput(arms: Sequence[Arm], axis: str) -> Section | tuple[str, str]:
    keys = {"samples_per_second": "samples/s", "tokens_per_second": "tokens/s", "mfu": "MFU"}
    panels = [
        line_panel(arms, axis, key, name=key, title=label, ylabel=label, make=rate_curve(key))
        for key, label in keys.items()
    ]
    panels = [panel for panel in panels if panel is not None]
    if not panels:
        return "Throughput", f"measurements='throughput' logs it. {TIME_ABSENT}"
    text = ["Evaluations, saves and warm-up left out."]
    derived = [arm.name for arm in arms if any(run.time_is_derived for run in arm.runs)]
    text += [f"{_names(derived)}: from samples and times of log lines, saves included."] if derived else []
    return Section("throughput", "Throughput", tuple(text), panels=tuple(panels), legend=seed_legend(panels))


def _memory(arms: Sequence[Arm]) -> Section | tuple[str, str]:
    panels = [panel for panel in (phase_panel(arms), step_memory_panel(arms)) if panel is not None]
    rows = []
    for phase, label in {"": "largest of all", **PHASES}.items():
        key = f"peak_memory_{phase}_gib" if phase else "peak_memory_gib"
        cells = []
        for arm in arms:
            values = [largest(run, key) for run in arm.runs]
            cells.append(NOT_RECORDED if None in values else spread(values, "GiB"))
        if any(text != NOT_RECORDED for text in cells):
            rows.append((label, *cells))
    if not panels and not rows:
        return "Memory by phase", "measurements='memory' logs it."
    tables = (Table(headings(arms, None), tuple(rows)),) if rows else ()
    text = ("CUDA: what the allocator gave out, maximum over ranks. CPU: the high-water mark of the process.",)
    return Section("memory", "Memory", text if rows else (), tables, tuple(panels))


def _placement(arms: Sequence[Arm]) -> Section | tuple[str, str]:
    planned = [(arm.name, run.plan) for arm in arms for run in arm.runs[:1] if run.plan is not None]
    if not planned:
        return "Checkpoint placement", "memory_budget or checkpoint_placement make a plan, kept in the output folder."
    rows = {
        "policy": [plan.policy for _, plan in planned],
        "peak without placement": [_size(plan.baseline_peak_bytes) for _, plan in planned],
        "peak predicted": [_size(plan.predicted_peak_bytes) for _, plan in planned],
        "peak measured": [_measured(plan) for _, plan in planned],
        "budget": [_size(plan.budget_bytes) for _, plan in planned],
        "floor": [_size(plan.floor_peak_bytes) for _, plan in planned],
        "extra time to recompute": [percent(plan.extra_time_ratio) or NOT_RECORDED for _, plan in planned],
        "what it does": [words(plan) for _, plan in planned],
    }
    names = ("", *(name for name, _ in planned))
    tables = [Table(names, tuple((label, *cells) for label, cells in rows.items()))]
    for name, plan in planned:
        title = "Stages" if len(planned) == 1 else f"Stages of {name}"
        if plan.stages:
            tables.append(Table(("stages", "in the backward pass"), stage_rows(plan), title, folded=True))
    return Section("placement", "Checkpoint placement", tables=tuple(tables))


def _size(num_bytes: int | None) -> str:
    return NOT_RECORDED if num_bytes is None else gib(num_bytes)


def _measured(plan: PlacementPlan) -> str:
    if plan.measured_peak_bytes is None or plan.predicted_peak_bytes is None:
        return _size(plan.measured_peak_bytes)
    off = percent(plan.measured_peak_bytes / plan.predicted_peak_bytes - 1, signed=True)
    return f"{gib(plan.measured_peak_bytes)} ({off} against predicted)"


def stage_rows(plan: PlacementPlan) -> tuple[tuple[str, str], ...]:
    """Return what each stage does in the backward pass; neighbours that do the same are one row."""
    groups: list[tuple[StageChoice, list[str]]] = []
    for name, choice in plan.stages.items():
        before = groups[-1][0] if groups else None
        if before is not None and (before == choice or (choice.run is not None and choice.run == before.run)):
            groups[-1][1].append(name)
        else:
            groups.append((choice, [name]))
    return tuple((describe(names), _choice(choice, len(names))) for choice, names in groups)


def _choice(choice: StageChoice, count: int) -> str:
    kinds = {"none": "everything kept", "activation": "activation functions recomputed", "full": "recomputed"}
    if choice.recompute == "selective":
        text = f"recomputed but for {len(choice.saved_ops)} kept operators"
    else:
        text = kinds[choice.recompute] + (", as one segment" if choice.run is not None and count > 1 else "")
    return text + (", input on the host" if choice.offload else "")


def _comparison(comparison: ComparisonFolder, index: int, arms: Sequence[Arm]) -> Section:
    """Return a comparison with another baseline or target than the report's."""
    name = "comparison" if index == 0 else f"comparison_{index + 1}"
    title = "Comparison" if index == 0 else f"Comparison in {comparison.folder}"
    panel, target = None, ()
    if comparison.result is not None:
        baseline = comparison.result.baseline
        places = {run.folder: number for number, arm in enumerate(arms) for run in arm.runs}
        own = next((arms[places[run.folder]] for name, run in comparison.runs
                    if name == baseline and run.folder in places), None)  # fmt: skip
        if own is not None:
            members = {places[run.folder] for _, run in comparison.runs if run.folder in places}
            ratios = arm_ratios(arms, own, comparison.target, comparison)
            panel = ratio_panel(name, [ratio for ratio in ratios if ratio.arm in members], arms, baseline)
        target = (target_words(comparison.result),)
    panels = (panel,) if panel is not None else ()
    return Section(name, title, (*target, *comparison.text()), comparison.tables(), panels)


def _runs(arms: Sequence[Arm]) -> Section:
    rows = []
    for arm in arms:
        for run in arm.runs:
            rows.append(
                (
                    run.name,
                    arm.name,
                    str(run.folder) if run.folder is not None else "in memory",
                    NOT_RECORDED if run.steps is None else figure(run.steps),
                    f"{len(run.history):,}",
                    " ".join(run.notes),
                )
            )
    columns = ("run", "arm", "folder", "steps", "log lines", "notes")
    folded = not any(run.notes for _, run in every_run(arms))
    return Section("runs", "Runs", tables=(Table(columns, tuple(rows), "Where the numbers are from", folded),))
