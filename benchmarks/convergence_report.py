"""The page of `convergence.py`: targets frozen from the sweep, ratios over paired seeds, ablations."""

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from convergence_suite import (
    DEAR_STEPS,
    DEFAULT,
    FASTEST_WITH_DEAR_STEPS,
    OTHER_BETA2,
    OTHERS,
    REFERENCE,
    SEEDS,
    STEP_COST,
    TASK_BETA2,
    best,
    beta2_in_data,
    load,
    recipe,
)
from noise_averages import noise_averages_table
from page_tables import mean_spread, table

from hf_trainopt.lab.compare.render import estimate_text
from hf_trainopt.lab.compare.statistics import Measured, paired_ratio
from hf_trainopt.metrics.targets import Crossing, Evaluation, first_crossing


HERE = Path(__file__).resolve().parent
TASKS = ("language", "vision")
MICRO_BATCH = {"language": 4, "vision": 16, "code": 4, "resnet50": 16}
TARGET_LABELS = (("first target", "bottom"), ("second target", "top"))
# Share of its data at which the loss of a run of seed 0 becomes a target.
SHARES = {"eight": 0.8, "best": 0.9}


COSTS = json.loads((HERE / "results" / "unit_costs.json").read_text())["tasks"]


def curve(record: dict) -> list[Evaluation]:
    """Return the evaluations of a record; seconds are those of its micro-batches and steps on the idle machine."""
    cost = COSTS[record["task"]]
    return _timed(record, cost["micro_batch_seconds"], cost["step_seconds"])


def _timed(record: dict, micro_batch: float, step: float) -> list[Evaluation]:
    """Return the evaluations of a record, where a micro-batch and an optimizer step take these times."""
    per_sample = micro_batch / MICRO_BATCH[record["task"]]
    return [
        Evaluation(p["loss"], p["step"], p["samples"], p["samples"] * per_sample + p["step"] * step)
        for p in record["curve"]
    ]


def loss_at(record: dict, share: float) -> float:
    """Return the loss of a run at a share of its data, linear between evaluations."""
    return value_at(curve(record), share)


def value_at(points: Sequence[Evaluation], share: float) -> float:
    """Return the metric at a share of the data of a run, linear between evaluations."""
    wanted = share * points[-1].samples
    for before, after in itertools.pairwise(points):
        if before.samples <= wanted <= after.samples:
            part = (wanted - before.samples) / (after.samples - before.samples)
            return before.value + part * (after.value - before.value)
    raise ValueError(f"no evaluations around {share:.0%} of the data")


def targets(records: list[dict], task: str) -> dict[str, tuple[float, dict]]:
    """Return the two frozen targets with the runs that they are of: stock at k = 8, and the best of the sweep."""
    runs = {"eight": recipe(records, task), "best": best(records, task=task, policy="fixed")}
    return {name: (loss_at(run, SHARES[name]), run) for name, run in runs.items()}


def setting(record: dict) -> str:
    """Return the learning rate of a run, and its β2 where that isn't the task's."""
    beta2 = record["adam_beta2"]
    return f"{record['learning_rate']:g}" + ("" if beta2 == TASK_BETA2[record["task"]] else f", β2 {beta2:.4g}")


def is_default(record: dict) -> bool:
    """Return whether a run of ours has the defaults, and a step the cost that was measured."""
    as_measured = record["ranks"] > 1 or record["optimizer_step_cost"] == STEP_COST[record["task"]]
    return record["policy"] == "goodput" and (record["rule"], record["adam_clock"]) == DEFAULT and as_measured


def arms(records: list[dict], task: str) -> dict[str, list[dict]]:
    """Return the paired runs by arm, in the order of the seeds."""
    frozen = targets(records, task)
    eight, first = frozen["eight"][1], frozen["best"][1]

    def like(run: dict) -> list[dict]:
        same = ("task", "policy", "k", "learning_rate", "adam_beta2", "ranks")
        found = [r for r in records if all(r[key] == run[key] for key in same) and r["seed"] in SEEDS]
        return sorted(found, key=lambda r: r["seed"])

    ours = [r for r in like(eight | {"policy": "goodput"}) if is_default(r)]
    return {
        f"stock, k = 8, {setting(eight)} (its best rate)": like(eight),
        f"stock, k = {first['k']}, {setting(first)} (best of the sweep)": like(first),
        f"ours, defaults, {setting(eight)} (the rate of k = 8)": ours,
    }


def ratio(
    ours: Sequence[dict],
    stock: Sequence[dict],
    target: float,
    axis: str,
    curve_of: Callable[[dict], list[Evaluation]] = curve,
) -> str:
    """Return the ratio of what two arms spend to a target, with its 95 % interval over the seeds that both have."""
    ours, stock = ({r["seed"]: r for r in arm} for arm in (ours, stock))
    seeds = sorted(ours.keys() & stock.keys())
    pairs = [[first_crossing(curve_of(arm[seed]), target, False) for arm in (ours, stock)] for seed in seeds]
    return describe(pairs, axis)


def describe(pairs: Sequence[Sequence[Crossing]], axis: str) -> str:
    """Return a ratio over all pairs; a bound where runs never get there, since those that do are the better ones."""
    never = sum(not a.reached for a, _ in pairs), sum(not b.reached for _, b in pairs)
    ours, stock = ([Measured(getattr(c, axis), not c.reached) for c in arm] for arm in zip(*pairs, strict=True))
    text = estimate_text(paired_ratio(ours, stock))
    if never[0]:
        text += f"; never by {never[0]} of {len(pairs)}"
    if never[1]:
        text += f"; the other arm missed it in {never[1]} of {len(pairs)}"
    return text


def sweep_table(records: list[dict], task: str) -> str:
    """Return the final losses of stock, seed 0: a row for each k and β2."""
    runs = [r for r in records if r["task"] == task and r["policy"] == "fixed" and r["seed"] == 0 and r["ranks"] == 1]
    rows = []
    for k, beta2 in sorted({(r["k"], r["adam_beta2"]) for r in runs}):
        tried = sorted((r for r in runs if (r["k"], r["adam_beta2"]) == (k, beta2)), key=lambda r: r["learning_rate"])
        cells = [f"{r['learning_rate']:g}: {r['eval_loss']:.3f}" for r in tried]
        in_data = " (as k = 8 in data)" if k != REFERENCE and beta2 == beta2_in_data(task, k) else ""
        rows.append([k, f"{beta2:.6g}{in_data}", ", ".join(cells), f"{min(r['eval_loss'] for r in tried):.3f}"])
    return table(["k", "β2", "final loss by learning rate", "best"], rows)


def others_table(records: list[dict], task: str) -> str:
    """Return a task that no default was tuned on: stock at k = 8, then all at the rate that is best for it."""
    here = [r for r in records if r["task"] == task and r["seed"] == 0]
    tried = [r for r in here if (r["policy"], r["k"], r["adam_beta2"]) == ("fixed", REFERENCE, TASK_BETA2[task])]
    rates = ", ".join(
        f"{r['learning_rate']:g}: {r['eval_loss']:.3f}" for r in sorted(tried, key=lambda r: r["learning_rate"])
    )
    rate, rows = recipe(records, task)["learning_rate"], []
    for beta2 in OTHER_BETA2[task]:
        here = {"task": task, "learning_rate": rate}
        eight = best(records, policy="fixed", k=REFERENCE, adam_beta2=beta2, **here)
        one = best(records, policy="fixed", k=1, adam_beta2=beta2_in_data(task, 1, of=beta2), **here)
        steps, tokens = (
            best(records, policy="goodput", adam_clock=clock, adam_beta2=beta2, **here)
            for clock in ("steps", "tokens")
        )
        cells = [f"{run['eval_loss']:.3f} ({run['optimizer_steps']})" for run in (eight, one, steps, tokens)]
        time = ratio([tokens], [eight], loss_at(eight, SHARES["eight"]), "seconds")
        rows.append([f"{beta2:g}", *cells, time])
    header = ["β2", "stock, k = 8", "stock, k = 1, β2 as k = 8 in data", '`adam_clock="steps"`', "ours, defaults",
              "time of ours to the loss of stock k = 8 at 80 %"]  # fmt: skip
    return f"Stock at k = 8 by learning rate: {rates}.\n\n" + table(header, rows)


def paired_table(records: list[dict], task: str) -> str:
    groups = arms(records, task)
    names = list(groups)
    frozen = targets(records, task)
    rows = []
    for name, runs in groups.items():
        losses = [r["eval_loss"] for r in runs]
        quality = [f"{mean_spread(losses)}"]
        if runs[0]["eval_accuracy"] is not None:
            quality.append(mean_spread([100 * r["eval_accuracy"] for r in runs], ".1f"))
        steps = mean_spread([r["optimizer_steps"] for r in runs], ".0f")
        cells = []
        for target, against in (("eight", names[0]), ("best", names[1])):
            cells += [
                "" if name == against else ratio(runs, groups[against], frozen[target][0], axis)
                for axis in ("seconds", "samples")
            ]
        rows.append([name, len(runs), *quality, steps, *cells])
    accuracy = [] if task == "language" else ["accuracy, %"]
    first, second = (f"{frozen[name][0]:.3f}" for name in ("eight", "best"))
    header = ["arm, learning rate", "seeds", "final loss", *accuracy, "steps", f"time to {first} against k = 8",
              "samples", f"time to {second} against the sweep's best", "samples"]  # fmt: skip
    return table(header, rows)


def other_table(records: list[dict], task: str) -> str:
    """Return what else was run on seed 0: rules, rates, policies, k replayed and reversed."""
    frozen = targets(records, task)
    eight, first = frozen["eight"], frozen["best"]
    rows = []
    order = sorted(
        records,
        key=lambda r: (r["policy"] != "goodput", r["policy"], not is_default(r), r["rule"] or "", r["learning_rate"]),
    )
    for r in order:
        if r["task"] != task or r["policy"] == "fixed" or r["seed"] or r["ranks"] != 1:
            continue
        if r["optimizer_step_cost"] in DEAR_STEPS:
            continue
        rows.append([
            f"`{r['policy']}`", r["rule"], r["adam_clock"], setting(r), f"{r['eval_loss']:.3f}",
            r["optimizer_steps"],
            ratio([r], [eight[1]], eight[0], "seconds"), ratio([r], [first[1]], first[0], "seconds"),
        ])  # fmt: skip
    header = ["policy", "rule", "clock", "rate", "final loss", "steps", "time to the first target, of k = 8",
              "time to the second, of the sweep's best"]  # fmt: skip
    return table(header, rows)


def dear_steps_table(records: list[dict]) -> str:
    """Return ours where an optimizer step is dear, against the fixed k that is then the fastest of the sweep."""
    target = targets(records, "language")["eight"][0]
    eight = next(iter(arms(records, "language").values()))
    k, rate, half_life = FASTEST_WITH_DEAR_STEPS
    setup = {"task": "language", "policy": "fixed", "k": k, "learning_rate": rate, "ranks": 1}
    setup["adam_beta2"] = beta2_in_data("language", k, half_life)
    fastest = [r for r in records if all(r[key] == value for key, value in setup.items())]
    if not fastest:
        return "(not run)"
    rows = []
    for cost in DEAR_STEPS:
        ours = [r for r in records if r["optimizer_step_cost"] == cost]
        if not ours:
            continue
        priced = partial(priced_curve, step_cost=cost)
        cells = []
        for runs in (fastest, ours):
            steps = mean_spread([r["optimizer_steps"] for r in runs], ".0f")
            cells.append(f"{mean_spread([r['eval_loss'] for r in runs])}; {steps}")
        times = [ratio(ours, stock, target, "seconds", priced) for stock in (fastest, eight)]
        rows.append([f"{cost:g}", f"k = {k}, {setting(fastest[0])}", *cells, len(ours), *times])
    header = ["a step costs, micro-batches", "fastest fixed k", "its final loss; steps", "ours, defaults", "seeds",
              f"time to {target:.3f} against it", "against k = 8"]  # fmt: skip
    return table(header, rows)


def priced_curve(record: dict, step_cost: float) -> list[Evaluation]:
    """Return the evaluations of a record; time is in micro-batches, where a step costs as many as `step_cost`."""
    return _timed(record, 1.0, step_cost)


def draw_curves(records: list[dict], folder: Path) -> None:
    """Draw the validation loss of the paired runs against time: the median over seeds and, shaded, their range."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    import numpy as np

    folder.mkdir(exist_ok=True)
    for task in TASKS:
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        lowest = []
        for (name, runs), style in zip(arms(records, task).items(), ("--", ":", "-", "-."), strict=False):
            curves = [[(e.seconds, e.value) for e in curve(run)] for run in runs]
            grid = np.linspace(max(c[0][0] for c in curves), min(c[-1][0] for c in curves), 60)
            losses = np.array([np.interp(grid, *zip(*c, strict=True)) for c in curves])
            (line,) = axes.plot(grid, np.median(losses, 0), style, label=f"{name}; {len(runs)} seeds")
            axes.fill_between(grid, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2, lw=0)
            lowest.append(losses.min())
        for (loss, _), (what, side) in zip(targets(records, task).values(), TARGET_LABELS, strict=True):
            axes.axhline(loss, color="gray", lw=0.8)
            axes.annotate(what, (0.01, loss), xycoords=("axes fraction", "data"), va=side, fontsize=8)
        start = np.median([curve(run)[0].value for runs in arms(records, task).values() for run in runs])
        bottom = min(lowest) - 0.05 * (start - min(lowest))
        axes.set(xlabel="seconds of training (idle machine)", ylabel="validation loss", ylim=(bottom, start))
        axes.legend(fontsize=8)
        figure.savefig(folder / f"convergence-{task.replace('_', '-')}.png", dpi=120)
        plt.close(figure)


def ranks_arms(records: list[dict]) -> dict[str, list[dict]]:
    """Return the paired runs on two ranks by arm, in the order of the seeds; the best fixed k is the first."""
    first = best(records, task="language", policy="fixed", ranks=2)
    eight = recipe(records, "language")
    ours = eight | {"policy": "goodput", "rule": DEFAULT[0], "adam_clock": DEFAULT[1], "ranks": 2}
    compared = {
        f"stock, k = {first['k']}, {setting(first)} (best fixed)": first,
        f"ours, defaults, {setting(eight)} (the rate of k = 8 on one rank)": ours,
    }
    same = ("task", "policy", "k", "rule", "adam_clock", "learning_rate", "adam_beta2", "ranks")
    groups, seen = {}, set()
    for name, run in compared.items():
        key = tuple(run[field] for field in same)
        runs = [r for r in records if tuple(r[field] for field in same) == key and r["seed"] in SEEDS]
        if runs and key not in seen:
            groups[name] = sorted(runs, key=lambda r: r["seed"])
            seen.add(key)
    return groups


def ranks_target(records: list[dict]) -> float:
    """Return the loss on two ranks of the best fixed k, seed 0, at its share of the data."""
    return loss_at(best(records, task="language", policy="fixed", ranks=2), SHARES["best"])


def ranks_search_table(records: list[dict]) -> str:
    """Return all runs of seed 0 on two ranks."""
    runs = [r for r in records if r["ranks"] == 2 and r["seed"] == 0]
    target = ranks_target(records)
    rows = []
    for r in sorted(runs, key=lambda r: (r["policy"], r["k"], r["rule"] or "", r["learning_rate"])):
        name = f"stock, k = {r['k']}" if r["policy"] == "fixed" else "ours, defaults"
        crossing = first_crossing(wall_curve(r), target, False)
        spent = f"{crossing.seconds:.0f}" if crossing.reached else "never"
        seconds = f"{wall_curve(r)[-1].seconds:.0f}"
        rows.append([name, setting(r), f"{r['eval_loss']:.3f}", r["optimizer_steps"], spent, seconds])
    header = ["arm", "learning rate", "final loss", "steps", f"wall seconds to {target:.3f}", "of the whole run"]
    return table(header, rows)


def ranks_paired_table(records: list[dict]) -> str:
    """Return the seeds on two ranks: final losses, and wall time and steps against the best fixed k."""
    groups = ranks_arms(records)
    stock = next(iter(groups.values()))
    target = ranks_target(records)
    rows = []
    for name, runs in groups.items():
        cells = ["", ""] if runs is stock else [
            ratio(runs, stock, target, axis, wall_curve) for axis in ("seconds", "steps")
        ]  # fmt: skip
        steps = mean_spread([r["optimizer_steps"] for r in runs], ".0f")
        rows.append([name, len(runs), mean_spread([r["eval_loss"] for r in runs]), steps, *cells])
    header = ["arm, learning rate", "seeds", "final loss", "steps", f"wall time to {target:.3f} against it", "steps"]
    return table(header, rows)


def wall_curve(record: dict) -> list[Evaluation]:
    return [Evaluation(p["loss"], p["step"], p["samples"], p["wall_s"]) for p in record["curve"]]


def overhead_table() -> str:
    """Return what a step costs more than in stock."""
    rows = []
    for task, entry in json.loads((HERE / "results" / "overhead.json").read_text())["tasks"].items():
        cells = []
        for loop in ("windows", "measured"):
            low, high = entry[loop]["range"]
            cells.append(
                f"{100 * (entry[loop]['median_ratio'] - 1):+.1f} % ({100 * (low - 1):+.1f} to {100 * (high - 1):+.1f})"
            )
        rows.append([task, f"{entry['stock_seconds_per_step']:.4f}", *cells])
    return table(["task", "stock, s per step", "windows", "statistics, every 8th step"], rows)


def write_report(results: Path, path: Path | None = None) -> None:
    """Write `convergence.md`, or another file, from its template and the records."""
    path = path or HERE / "convergence.md"
    records = load(results)
    parts: dict[str, Callable[[], str]] = {
        "overhead": overhead_table,
        "noise averages": noise_averages_table,
        "dear steps": lambda: dear_steps_table(records),
        "ranks search": lambda: ranks_search_table(records),
        "ranks paired": lambda: ranks_paired_table(records),
    }
    for task in TASKS:
        parts[f"{task} paired"] = lambda task=task: paired_table(records, task)
    for task in TASKS:
        parts[f"{task} sweep"] = lambda task=task: sweep_table(records, task)
        parts[f"{task} other"] = lambda task=task: other_table(records, task)
    there = {r["task"] for r in records}
    for task in OTHERS:
        parts[f"{task} others"] = lambda task=task: others_table(records, task) if task in there else "(not run)"
    for name, make in (("resnet50 paired", paired_table), ("resnet50 sweep", sweep_table)):
        parts[name] = lambda make=make: make(records, "resnet50") if "resnet50" in there else "(not run)"
    text = (HERE / "convergence.template.md").read_text()
    for name, make in parts.items():
        text = text.replace(f"@@{name}@@", make())
    path.write_text(text)
    draw_curves(records, path.parent / "figures")
    print(f"wrote {path} from {len(records)} records")
