"""Writes `benchmarks/README.md`, the figures of all benchmarks beside the goals of the project, from their records.

python benchmarks/summary.py
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import scipy.stats
from convergence_report import (
    TASKS,
    arms,
    curve,
    describe,
    is_default,
    loss_at,
    ranks_arms,
    ranks_target,
    ratio,
    targets,
    wall_curve,
)
from convergence_suite import TASK_BETA2, best, load, recipe
from page_tables import table
from scaling_report import efficiencies, spread

from hf_trainopt.metrics.targets import first_crossing


HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
GOALS_OF_TIME = {"language": "0.40", "vision": "0.85"}
NOISE_SCALE_POLICIES = ("noise_scale", "half_noise_scale")


def goals_table(records: list[dict]) -> str:
    """Return each goal of the project with what was measured for it."""
    rows = []
    for task in TASKS:
        eight, first, runs = arms(records, task).values()
        frozen = targets(records, task)
        goal = GOALS_OF_TIME[task]
        rows += [
            [f"{task}: time to the loss that stock k = 8 has at 80 % of its data", f"at most {goal} of stock k = 8",
             ratio(runs, eight, frozen["eight"][0], "seconds"), len(runs)],
            [f"{task}: time to the loss that the best of k × rate × β2 has at 90 %", "at most 1.00 of that best",
             ratio(runs, first, frozen["best"][0], "seconds"), len(runs)],
            [f"{task}: final loss against the best of k × rate × β2", "at most equal", _loss_gap(runs, first),
             len(runs)],
        ]  # fmt: skip
        rows += _wrong_rates(records, task)
    rows.append(_noise_scale_row(records))
    rows += _ranks_rows(records)
    rows.append(_scaling_row())
    rows += _memory_rows()
    for task, entry in json.loads((RESULTS / "overhead.json").read_text())["tasks"].items():
        for loop, goal in (("windows", "at most 1 %"), ("measured", "at most 2 %")):
            low, high = (100 * (value - 1) for value in entry[loop]["range"])
            what = "with everything off but the loop" if loop == "windows" else "with gradient statistics"
            middle = 100 * (entry[loop]["median_ratio"] - 1)
            result = f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"
            rows.append([f"{task}: time of a step {what}", goal, result, "–"])
    return table(["what", "goal", "measured (95 % interval, or range)", "seeds"], rows)


def _wrong_rates(records: list[dict], task: str) -> list[list]:
    """Final loss at half and at twice the rate, against the right one on the same seeds."""
    rate = recipe(records, task)["learning_rate"]
    runs = [r for r in records if r["task"] == task and is_default(r) and r["ranks"] == 1
            and r["adam_beta2"] == TASK_BETA2[task]]  # fmt: skip
    right = [r for r in runs if r["learning_rate"] == rate]
    rows = []
    for factor, name in ((0.5, "half"), (2.0, "twice")):
        found = [r for r in runs if r["learning_rate"] == rate * factor]
        gap = _loss_gap(found, right) if found else "not run"
        rows.append([f"{task}: final loss at {name} the rate", "at most 1.5 % above", gap, len(found)])
    return rows


def _loss_gap(ours: list[dict], stock: list[dict]) -> str:
    losses = {r["seed"]: r["eval_loss"] for r in stock}
    gaps = [100 * (r["eval_loss"] / losses[r["seed"]] - 1) for r in ours if r["seed"] in losses]
    if len(gaps) == 1:
        return f"{gaps[0]:+.1f} %"
    # Student's t, two-sided 95 %.
    half = float(scipy.stats.t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / len(gaps) ** 0.5
    mean = statistics.mean(gaps)
    return f"{mean:+.1f} % ({mean - half:+.1f} to {mean + half:+.1f})"


def _noise_scale_row(records: list[dict]) -> list:
    """Optimizer steps of `noise_scale` against stock at k = 1, to the loss of the latter at 90 % of its data."""
    one = best(records, task="language", policy="fixed", k=1)
    runs = [
        r
        for r in records
        if (r["task"], r["seed"], r["ranks"]) == ("language", 0, 1) and r["policy"] in NOISE_SCALE_POLICIES
    ]
    result = "not run"
    if runs:
        # The fewest steps among those that get there.
        enough = [r for r in runs if r["eval_loss"] <= one["eval_loss"]]
        found = min(enough, key=lambda r: r["optimizer_steps"]) if enough else min(runs, key=lambda r: r["eval_loss"])
        pair = [first_crossing(curve(r), loss_at(one, 0.9), False) for r in (found, one)]
        result = describe([pair], "steps")
        result += (
            f" ({found['optimizer_steps']} steps to {found['eval_loss']:.3f} against {one['optimizer_steps']} to "
            f"{one['eval_loss']:.3f}; {found['policy']}, {found['rule']}, {found['learning_rate']:g})"
        )
    return ["language, `noise_scale`: optimizer steps to the loss of stock k = 1 at 90 % of its data", "at most 0.40",
            result, 1 if runs else 0]  # fmt: skip


def _ranks_rows(records: list[dict]) -> list[list]:
    (_, stock), *own = ranks_arms(records).items()
    target = ranks_target(records)
    rows = []
    for name, runs in own:
        what = f"language on 2 ranks, {name}: wall time to the loss of the best fixed k at 90 % of its data"
        rows.append([what, "at most 0.90", ratio(runs, stock, target, "seconds", wall_curve), len(runs)])
    return rows


def _scaling_row() -> list:
    rounds = json.loads((RESULTS / "scaling" / "scaling.json").read_text())["rounds"]
    cells = [
        f"{name} {spread(efficiencies(rounds, arm)['efficiency'], '.0%')}"
        for arm, name in (("adaptive", ""), ("1", "; k = 1:"), ("16", "; k = 16:"))
    ]
    what = "language, weak scaling on the two cores of one machine: throughput of 2 ranks over twice that of 1"
    return [what, "at least 94.6 % for adaptive k", "".join(cells).strip(), f"– ({len(rounds)} rounds)"]


def _memory_rows() -> list[list]:
    """What a budget of three quarters costs, by replays on shapes."""
    rows = []
    for name in ("gpt2-small-fp32", "resnet50-224"):
        record = json.loads((RESULTS / "placement" / f"budgets-{name}.json").read_text())
        for rewrites, what in (("none", "no rewrites"), ("auto", "default")):
            plan = record[rewrites]["75%"]
            cut = plan["peak_bytes"] / record["baseline_bytes"] - 1
            result = f"{100 * cut:+.1f} % at {100 * plan['extra_flops_ratio']:+.1f} % FLOPs"
            rows.append([f"{record['title']}, memory_budget=75%, {what}: peak memory", "-25 %", result, "–"])
    return rows


def main() -> None:
    records = load(RESULTS / "convergence")
    parts: dict[str, Callable[[], str]] = {"goals": lambda: goals_table(records)}
    text = (HERE / "README.template.md").read_text()
    for name, make in parts.items():
        text = text.replace(f"@@{name}@@", make())
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
