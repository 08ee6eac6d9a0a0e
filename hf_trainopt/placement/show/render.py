"""Plans as text: where the memory goes, the frontier, the plan that was chosen. Pure functions, 100 columns wide."""

import json
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..plan.budget import gib, is_of_device, stated_budget
from ..plan.plan import PlacementPlan, StageChoice, describe, runs_of
from ..plan.sizes import SizedPlan
from ..simulate.replay import Replay
from ..simulate.tracker import Key


WIDTH = 100

# Column of the memory table -> kinds of bytes in it.
COLUMNS = {
    "parameters": ("parameters", "buffers", "gathered"),
    "gradients": ("gradients", "communication"),
    "optimizer": ("optimizer",),
    "activations": ("inputs", "activations"),
    "loss, temp.": ("loss", "workspace", "temporary"),
}

OUTSIDE = "outside the stages"
LOSS_HEAD = "loss head"

NOT_COUNTED = (
    "Not counted: cuDNN's workspaces, rounding and fragmentation of the allocator, the CUDA context (0.75 GiB). Leave "
    "10 % of the device free with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, 25 % without."
)


_NOT_COUNTED_OF_DEVICE = (
    "Not counted: cuDNN's workspaces, rounding and fragmentation of the allocator, the CUDA context. A budget given "
    "as device leaves room for them."
)
_SELECTIVE = (
    "selective (n kept): of each of these layers, the outputs of n matrix products, convolutions or attentions are "
    "stored and everything else is recomputed."
)


def not_counted(budget: str | None, kind: str = "cuda") -> str:
    """Return what plans don't count, and where there is room for it.

    Args:
        budget: As given.
        kind: Of the device.
    """
    if kind == "mps":
        return "Not counted: rounding and fragmentation of the allocator, and what Metal takes. Leave room for them."
    return NOT_COUNTED if budget is None or not is_of_device(budget) else _NOT_COUNTED_OF_DEVICE


# Plans that save less than this share of the baseline beyond the plan above them are not shown.
_WORTH_A_LINE = 0.005


@dataclass(frozen=True)
class MemoryRow:
    """Bytes that are alive at the peak, of one part of the model.

    Args:
        name: Module name of a stage, `OUTSIDE` or `LOSS_HEAD`.
        columns: Column -> bytes.
    """

    name: str
    columns: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all columns."""
        return sum(self.columns.values())


def memory_rows(peak_by_key: Mapping[Key, int], stages: Sequence[str]) -> list[MemoryRow]:
    """Return a row for each stage, then one for what lies outside and one for the loss; they add up to the peak."""
    column_of = {kind: column for column, kinds in COLUMNS.items() for kind in kinds}
    table = {name: dict.fromkeys(COLUMNS, 0) for name in (*stages, OUTSIDE, LOSS_HEAD)}
    for (kind, stage), num_bytes in peak_by_key.items():
        name = stage if stage in stages else LOSS_HEAD if kind == "loss" else OUTSIDE
        table[name][column_of[kind]] += num_bytes
    return [MemoryRow(name, columns) for name, columns in table.items()]


def _summed(name: str, rows: Sequence[MemoryRow]) -> MemoryRow:
    return MemoryRow(name, {column: sum(row.columns[column] for row in rows) for column in COLUMNS})


def _cells(row: MemoryRow, size: int, decimals: int) -> list[str]:
    """Return the figures of a row, its total last, in units of `size` bytes."""
    return [f"{value / size:,.{decimals}f}" for value in (*row.columns.values(), row.total)]


_RESIDENT_WORDS = {
    "parameters": "parameters", "buffers": "buffers", "gradients": "gradients", "optimizer": "optimizer state",
    "communication": "communication buffers",
}  # fmt: skip


def first_answer(baseline: Replay, budget: str | None) -> str:
    """Return what a step takes without recomputation, before any search.

    Args:
        baseline: That step.
        budget: What the budget is, as a sentence.
    """
    resident = baseline.resident_by_kind()
    kinds = [words for kind, words in _RESIDENT_WORDS.items() if kind in resident]
    listed = " and ".join(filter(None, (", ".join(kinds[:-1]), *kinds[-1:])))
    text = (
        f"Without recomputation a step takes {gib(baseline.peak_bytes)}. At this peak "
        f"{gib(baseline.resident_bytes)} are {listed}, which recomputation can't free."
    )
    if resident and "gradients" not in resident:
        text += " Gradients are added later in the step, once activations are freed."
    return text if budget is None else f"{text} {budget}"


def render_totals(baseline_by_key: Mapping[Key, int], chosen_by_key: Mapping[Key, int]) -> str:
    """Return a table of what the peaks without recomputation and under the chosen plan consist of."""
    totals = [
        _summed("without recomputation", memory_rows(baseline_by_key, ())),
        _summed("total under the chosen plan", memory_rows(chosen_by_key, ())),
    ]
    unit, size, decimals = _unit(max(row.total for row in totals))
    header = [*COLUMNS, "total"]
    lines = [f"({unit})".ljust(28) + "".join(f"{name:>13}" for name in header)]
    lines += [row.name.ljust(28) + "".join(f"{text:>13}" for text in _cells(row, size, decimals)) for row in totals]
    return "\n".join(lines)


def render_sizes(found: Sequence[SizedPlan], best: SizedPlan) -> str:
    """Return the table of micro-batches with their plans; the best one has an arrow."""
    lines = [
        f"  {'micro-batch':>11}{'k':>5}{'as it is':>12}{'with plan':>12}{'extra time':>12}{'samples/s':>12}"
        "  what the plan does"
    ]
    for sized in found:
        start = (
            f"{'→' if sized is best else ' '} {sized.micro_batch:>11}{sized.accumulation_steps:>5}"
            f"{gib(sized.baseline_peak_bytes):>12}{gib(sized.plan.predicted_peak_bytes):>12}"
            f"{percent(changed_time(sized.plan), signed=True):>12}{sized.samples_per_second:>12,.4g}  "
        )
        first, *more = _wrap(words(sized.plan), WIDTH - len(start))
        lines += [start + first, *(" " * len(start) + text for text in more)]
    return "\n".join(lines)


def _unit(total: int) -> tuple[str, int, int]:
    """Return name, bytes and decimals of the unit that shows a total of so many bytes well."""
    if total >= 100 * 2**30:
        return "GiB", 2**30, 1
    if total >= 10 * 2**30:
        return "GiB", 2**30, 2
    return "MiB", 2**20, 0 if total >= 2**30 else 1 if total >= 2**24 else 3


def render_memory(peak_by_key: Mapping[Key, int], stages: Sequence[str]) -> str:
    """Return the table of where the memory goes at the peak of the step without recomputation.

    Args:
        peak_by_key: (kind, stage) -> bytes in that step.
        stages: Names of the stages, in order.
    """
    rows = memory_rows(peak_by_key, stages)
    unit, size, decimals = _unit(sum(row.total for row in rows))
    groups: list[tuple[list[str], list[str]]] = []
    for row in rows:
        figures = _cells(row, size, decimals)
        # Neighbours that look the same are one line; only those that `describe` can write as a range.
        joined = groups and groups[-1][1] == figures and "," not in describe([*groups[-1][0], row.name])
        if joined:
            groups[-1][0].append(row.name)
        else:
            groups.append(([row.name], figures))
    lines = [(_group_name(names), figures) for names, figures in groups]
    total = [("total at the peak", _cells(_summed("", rows), size, decimals))]
    header = [*COLUMNS, "total"]
    widths = [max(len(header[i]), *(len(figures[i]) for _, figures in lines + total)) + 2 for i in range(len(header))]
    room = WIDTH - sum(widths)
    if any(len(name) >= room for name, _ in lines):
        short = _short_names(stages)
        lines = [(_group_name([short.get(name, name) for name in names]), figures) for names, figures in groups]
    label = min(room, max(len(name) for name, _ in lines + total) + 1)

    def line(name: str, figures: Sequence[str]) -> str:
        name = name if len(name) < label else "…" + name[len(name) - label + 2 :]
        return name.ljust(label) + "".join(text.rjust(width) for text, width in zip(figures, widths, strict=True))

    rule = "-" * (label + sum(widths))
    return "\n".join(
        [line(f"({unit})", header), rule, *(line(*row) for row in lines), rule, *(line(*row) for row in total)]
    )


def _group_name(names: Sequence[str]) -> str:
    return describe(names) + (" (each)" if len(names) > 1 else "")


def _short_names(stages: Sequence[str]) -> dict[str, str]:
    """Return module names without the parents that all of them share; of a single list, its name stays."""
    if not stages:
        return {}
    parents = [name.split(".")[:-1] for name in stages]
    shared = 0
    while all(len(parent) > shared and parent[shared] == parents[0][shared] for parent in parents):
        shared += 1
    if all(len(parent) == shared for parent in parents):
        shared = max(0, shared - 1)
    return {name: name.split(".", shared)[-1] for name in stages}


def words(plan: PlacementPlan) -> str:
    """Return what a plan does: `full on h.8-11; selective (4 kept) on h.0-7; chunked loss`."""
    short = _short_names(list(plan.stages))
    runs = runs_of(plan.stages)
    together = {name for run in runs for name in run}
    groups: dict[str, list[str]] = {}
    for name, choice in plan.stages.items():
        if choice.recompute != "none" and name not in together:
            groups.setdefault(_kind(choice), []).append(short[name])
    parts = [
        f"{kind} on {'all stages' if len(names) == len(plan.stages) else describe(names)}"
        for kind, names in groups.items()
    ]
    if runs:
        for where, offload in (("", False), (", inputs on the host:", True)):
            segments = [
                _segment([short[name] for name in run]) for run in runs if plan.stages[run[0]].offload == offload
            ]
            if segments:
                parts.append(f"full in segments{where} {', '.join(segments)}")
    parts += [name.replace("_activations", " activation").replace("_", " ") for name in plan.rewrites.names()]
    return "; ".join(parts) or "everything kept"


def _kind(choice: StageChoice) -> str:
    offloaded = ", input on the host" if choice.offload else ""
    if choice.recompute == "selective":
        return f"selective ({len(choice.saved_ops)} kept{offloaded})"
    return "activation function" if choice.recompute == "activation" else choice.recompute + offloaded


def _segment(names: Sequence[str]) -> str:
    text = describe(names)
    return text if "," not in text else f"{names[0]} to {names[-1]}"


def percent(ratio: float | None, *, signed: bool = False) -> str:
    """Return a share in per cent; empty for `None`."""
    if ratio is None:
        return ""
    value = round(100 * ratio, 1) + 0.0  # no negative zero
    return f"{value:+.1f} %" if signed else f"{value:.1f} %"


def cut_of(plan: PlacementPlan) -> float:
    """Return by which share a plan's peak is below the baseline's."""
    return 1 - plan.predicted_peak_bytes / plan.baseline_peak_bytes


def changed_time(plan: PlacementPlan) -> float:
    """Return by which share a plan changes the time of a step, recomputation and rewrites together."""
    return plan.extra_time_ratio + (plan.details.get("rewritten_time_ratio", 0.0) if plan.rewrites.names() else 0.0)


def time_words(plan: PlacementPlan) -> str:
    """Return what a plan does to the time of a step: recomputation, and rewrites apart from it."""
    words = f"{percent(plan.extra_time_ratio, signed=True)} to recompute"
    ratio = plan.details.get("rewritten_time_ratio")
    return (
        words if ratio is None or not plan.rewrites.names() else f"{words}, {percent(ratio, signed=True)} by rewrites"
    )


def same_choices(plan: PlacementPlan, other: PlacementPlan | None) -> bool:
    """Whether two plans do the same."""
    return other is not None and plan.stages == other.stages and plan.rewrites == other.rewrites


def _plan_lines(rows: Iterable[tuple[str, PlacementPlan, bool]]) -> list[str]:
    lines = []
    for label, plan, is_chosen in rows:
        rewritten = plan.details.get("rewritten_time_ratio") if plan.rewrites.names() else None
        start = (
            f"{'→' if is_chosen else ' '} {label:<9}{gib(plan.predicted_peak_bytes):>10}{percent(cut_of(plan)):>9}"
            f"{percent(plan.extra_time_ratio, signed=True):>12}{percent(rewritten, signed=True):>10}  "
        )
        first, *more = _wrap(words(plan), WIDTH - len(start))
        lines += [start + first, *(" " * len(start) + text for text in more)]
    return lines


_PLAN_HEADER = f"  {'':<9}{'peak':>10}{'cut':>9}{'extra time':>12}{'rewrites':>10}  what it does"


def render_frontier(
    frontier: Sequence[PlacementPlan],
    named: Sequence[PlacementPlan] = (),
    chosen: PlacementPlan | None = None,
    ends_at_floor: bool = True,
) -> str:
    """Return the tables of plans: the frontier from the baseline to the floor, then named policies for comparison.

    Args:
        frontier: Plans, the largest peak first.
        named: Plans of named policies.
        chosen: The plan that gets an arrow.
        ends_at_floor: Whether the last plan of the frontier is the floor.
    """
    rows = []
    for index, plan in enumerate(frontier):
        label = "baseline" if plan.is_stock else "floor" if ends_at_floor and index == len(frontier) - 1 else ""
        is_chosen = same_choices(plan, chosen)
        saved = rows[-1][1].predicted_peak_bytes - plan.predicted_peak_bytes if rows else plan.baseline_peak_bytes
        if label or is_chosen or saved >= _WORTH_A_LINE * plan.baseline_peak_bytes:
            rows.append((label, plan, is_chosen))
    known = any(is_chosen for _, _, is_chosen in rows)
    policies = [(plan.policy, plan, not known and same_choices(plan, chosen)) for plan in named]
    if chosen is not None and not known and not any(is_chosen for _, _, is_chosen in policies):
        policies.append((chosen.policy, chosen, True))
    lines = [_PLAN_HEADER, "-" * WIDTH, *_plan_lines(rows)]
    if policies:
        lines += ["", "Named policies, for comparison:", *_plan_lines(policies)]
    shown = [plan for _, plan, _ in (*rows, *policies)]
    if any(choice.recompute == "selective" for plan in shown for choice in plan.stages.values()):
        lines += ["", wrapped(_SELECTIVE)]
    return "\n".join(lines)


def render_choice(
    plan: PlacementPlan,
    output: str | None = None,
    script: str = "your script",
    settings: Mapping[str, str | bool] | None = None,
) -> str:
    """Return the chosen plan in a paragraph, and how to use it.

    Args:
        plan: The plan.
        output: The file that it was written to.
        script: The script that it is for.
        settings: Names and values (`True`: a flag) of the settings that make the same plan in a training run.
    """
    settings = settings or {}
    what = f"by policy '{plan.policy}'"
    if plan.budget_bytes is not None:
        given = settings.get("memory_budget", gib(plan.budget_bytes))
        what = f"for a budget of {stated_budget(given, plan.budget_bytes)}"
    sentences = [
        f"Chosen {what}: peak {gib(plan.predicted_peak_bytes)}, {percent(cut_of(plan))} less than the "
        f"{gib(plan.baseline_peak_bytes)} without placement; time {time_words(plan)}.",
        f"It does: {words(plan)}.",
    ]
    if plan.is_stock:
        sentences[1] = "The step fits as it is: nothing is recomputed."
    if plan.offloads:
        sentences.append(f"{gib(plan.details['host_bytes'])} are in memory of the host, for each device.")
    if plan.rewrites.names():
        sentences.append("The rewrites change results by rounding only; --memory_rewrites none leaves them out.")
    if plan.optimality_gap is not None:
        sentences.append(
            f"A better plan for this budget could save {percent(plan.optimality_gap)} of a step's time at most."
            if plan.optimality_gap
            else "No plan for this budget takes less time."
            if changed_time(plan) > 0 or plan.rewrites.names()
            else "It adds no time to a step."
        )
    if plan.floor_peak_bytes is not None:
        sentences.append(f"The floor is {gib(plan.floor_peak_bytes)}.")
    if plan.is_stock and plan.budget_bytes is not None and plan.floor_peak_bytes is None and output is None:
        return wrapped(f"{sentences[1]} Its peak is {gib(plan.predicted_peak_bytes)}.")
    path = output or "plan.json"
    by_file: dict[str, str | bool] = {"checkpoint_placement": path}
    if "use_liger_kernel" in settings:
        by_file["use_liger_kernel"] = True
    if settings.get("memory_rewrites") == "none":
        by_file["memory_rewrites"] = "none"
    lines = [
        *_wrap(" ".join(sentences)),
        "",
        f"Written to {output}. Use it in a training run:" if output else f"Write it with --output {path}, and use it:",
        f"  {script} ... {flags(by_file)}",
        "  # or in Python",
        "  from hf_trainopt import EfficientTrainingArguments",
        f"  EfficientTrainingArguments(..., {_keywords(by_file)})",
        "  # or without Trainer",
        "  from hf_trainopt import PlacementPlan, apply_placement",
        f"  apply_placement(model, PlacementPlan.load({json.dumps(path)}))",
    ]
    if settings:
        lines += [
            "",
            "Or let the run make the plan itself, for its own data and device:",
            f"  {script} ... {flags(settings)}",
            f"  EfficientTrainingArguments(..., {_keywords(settings)})",
        ]
    return "\n".join(lines)


def flags(settings: Mapping[str, str | bool]) -> str:
    """Return settings as flags of a command line."""
    return " ".join(
        f"--{name}" if value is True else f"--{name} {shlex.quote(value)}" for name, value in settings.items()
    )


def _keywords(settings: Mapping[str, str | bool]) -> str:
    return ", ".join(f"{name}={value if value is True else json.dumps(value)}" for name, value in settings.items())


def render_pairs(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and values, one a line, the values below each other."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs) + 2
    lines = []
    for name, value in pairs:
        # Overrides (`a=1,b=2`) break at their commas.
        found = _wrap(re.sub(r",(?=\w+=)", ",\0 ", value), WIDTH - width) or [""]
        first, *more = (line.replace("\0 ", "").rstrip("\0") for line in found)
        lines += [name.ljust(width) + first, *(" " * width + text for text in more)]
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """Return a paragraph in lines."""
    return "\n".join(_wrap(text))


def _wrap(text: str, width: int = WIDTH) -> list[str]:
    """Break a text into lines, but not between a number and its unit."""
    held = re.sub(r"(?<=[0-9]) (?=%|[GM]iB)", "\u00a0", text)
    return [line.replace("\u00a0", " ") for line in textwrap.wrap(held, width, break_on_hyphens=False)]
