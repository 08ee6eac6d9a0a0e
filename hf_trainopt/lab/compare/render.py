"""The comparison as Markdown."""

import statistics
from collections.abc import Sequence

from .comparison import RATIOS, ArmResult, Comparison
from .statistics import WIDEST, Estimate


def estimate_text(estimate: Estimate | None, form: str = ".2f") -> str:
    """Return `0.63 (0.58 to 0.69)`, `≥ 1.20` for a bound, `–` where nothing is known.

    Intervals over two pairs aren't shown. One that spans more than a factor of ten reads `(not resolved)`.
    """
    if estimate is None or estimate.value is None:
        return "–"
    sign = {"at least": "≥ ", "at most": "≤ "}.get(estimate.bound, "")
    text = f"{sign}{estimate.value:{form}}"
    if estimate.interval is None:
        return text
    lower, upper = estimate.interval
    if upper > WIDEST * lower and not form.startswith("+"):
        return f"{text} (not resolved)"
    return f"{text} ({lower:{form}} to {upper:{form}})"


def markdown(comparison: Comparison) -> str:
    """Return the tables: what each arm took, and its ratios to the baseline."""
    arms = comparison.arms
    parts = [f"# {comparison.script}: {', '.join(arm.name for arm in arms)}", target_words(comparison)]
    head = ["", *(f"{arm.name}" for arm in arms)]
    rows = value_rows(comparison)
    parts.append("Geometric mean over the seeds (lowest to highest):\n\n" + _table(head, rows))
    others = arms[1:]
    if others:
        rows = ratio_rows(comparison)
        intro = ratio_words(comparison, f"**{comparison.baseline}**")
        parts.append(intro + "\n\n" + _table(["", *(arm.name for arm in others)], rows))
    parts.append(machine_words(comparison))
    return "\n\n".join(parts) + "\n"


def value_rows(comparison: Comparison) -> list[list[str]]:
    """Return what each arm took, a row for each quantity that is known and a column for each arm."""
    rows = [["seeds", *(_seeds(arm) for arm in comparison.arms)]]
    for quantity, label in RATIOS.items():
        cells = [_mean(arm.values[quantity]) for arm in comparison.arms]
        if any(cell != "–" for cell in cells):
            rows.append([_with_metric(quantity, label, comparison), *cells])
    return rows


def ratio_rows(comparison: Comparison) -> list[list[str]]:
    """Return the ratios to the baseline, a column for each arm but that, and the difference at the end."""
    others, rows = comparison.arms[1:], []
    for quantity, label in RATIOS.items():
        cells = [estimate_text(arm.ratios.get(quantity)) for arm in others]
        if any(cell != "–" for cell in cells):
            rows.append([_with_metric(quantity, label, comparison), *cells])
    if any(arm.final_difference is not None for arm in others):
        cells = [estimate_text(arm.final_difference, "+.4f") for arm in others]
        rows.append(["difference of the metric at the end", *cells])
    return rows


def ratio_words(comparison: Comparison, baseline: str) -> str:
    """Return what the ratios are, with the baseline as it shall be written."""
    others = comparison.arms[1:]
    cells = [cell for row in ratio_rows(comparison) for cell in row]
    text = (
        f"Against {baseline}: ratios of runs with the same seed, geometric mean and 95 % interval (t, of logarithms)."
    )
    if any(arm.failed_seeds for arm in comparison.arms):
        text += " A seed whose run has failed, here or there, is left out of them."
    fewest = min((estimate.num_pairs for arm in others for estimate in arm.ratios.values()), default=None)
    if fewest == 1:
        text += " One seed has no interval: use --seeds."
    elif fewest == 2:
        text += " Two seeds have no interval that means anything: use --seeds 5."
    if any("≥" in cell or "≤" in cell for cell in cells):
        text += " ≥ and ≤: a run ended before it was at the target, so that its ratio is only bounded."
    return text


def target_words(comparison: Comparison) -> str:
    """Return what was to be reached."""
    target = comparison.target
    if target is None:
        return "No run was evaluated, so there is no time to a target."
    relation = "at least" if target.greater_is_better else "at most"
    return f"Target: {target.metric} {relation} {target.value:.6g} ({target.source})."


def machine_words(comparison: Comparison) -> str:
    """Return what the runs ran on."""
    machine = comparison.machine
    devices = (
        ", ".join(machine.get("devices", [])) or f"{machine['cores']} cores, {machine['threads']} thread(s) a run"
    )
    known = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    text = f"Machine: {machine['processor']}, {devices}. {known}."
    if machine.get("kinds", 1) > 1:
        kinds = f"{machine['kinds']} kinds of machine or thread counts"
        text += f" That is of the first run; all ran on {kinds}, and times do not compare."
    return text


def _with_metric(quantity: str, label: str, comparison: Comparison) -> str:
    if quantity == "final_metric" and comparison.target is not None:
        return f"{comparison.target.metric} at the end"
    if quantity == "peak_memory":
        return "peak memory (GiB)"
    return label


def _seeds(arm: ArmResult) -> str:
    text = str(len(arm.seeds))
    return f"{text}, {len(arm.failed_seeds)} failed" if arm.failed_seeds else text


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = f"{min(known):.4g}", f"{max(known):.4g}"
    if low == high:
        text = low
    elif min(known) <= 0:  # has no geometric mean
        text = f"{low} to {high}"
    else:
        text = f"{statistics.geometric_mean(known):.4g} ({low} to {high})"
    return text if len(known) == len(values) else f"{text}, {len(known)} of {len(values)} seeds"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
