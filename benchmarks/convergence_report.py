"""The page of `convergence.py`: targets frozen from the sweep, ratios over paired seeds, ablations."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from convergence_suite import DEFAULT_RULE, SEEDS, best, load
from page_tables import mean_spread, table

from hf_trainopt.lab.compare.render import estimate_text
from hf_trainopt.lab.compare.statistics import Measured, paired_ratio
from hf_trainopt.metrics.targets import Crossing, Evaluation, first_crossing


HERE = Path(__file__).resolve().parent
TASKS = ("language", "vision")
PAIRED_TASKS = (*TASKS, "vision_resnet50")
MICRO_BATCH = {"language": 4, "vision": 16, "vision_resnet50": 16}
TARGET_LABELS = (("first target", "bottom"), ("second target", "top"))
# Share of its data at which the loss of a run of seed 0 becomes a target.
SHARES = {"eight": 0.8, "best": 0.9}


COSTS = json.loads((HERE / "results" / "accumulation_costs.json").read_text())["tasks"]


def curve(record: dict) -> list[Evaluation]:
    """Return the evaluations of a record; seconds are those of its micro-batches and steps on the idle machine."""
    cost = COSTS[record["task"]]
    per_sample = cost["micro_batch_seconds"] / MICRO_BATCH[record["task"]]
    return [
        Evaluation(p["loss"], p["step"], p["samples"], p["samples"] * per_sample + p["step"] * cost["step_seconds"])
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
    # ResNet-50 has no sweep of its own: its k is that of ResNet-18.
    of = {"k": best(records, task="vision", policy="fixed")["k"]} if task == "vision_resnet50" else {}
    runs = {
        "eight": best(records, task=task, policy="fixed", k=8),
        "best": best(records, task=task, policy="fixed", **of),
    }
    return {name: (loss_at(run, SHARES[name]), run) for name, run in runs.items()}


def arms(records: list[dict], task: str) -> dict[str, list[dict]]:
    """Return the paired runs by arm, in the order of the seeds."""
    frozen = targets(records, task)
    own = best(records, task=task, policy="goodput")
    eight, first = frozen["eight"][1], frozen["best"][1]

    def of(**where) -> list[dict]:
        found = [r for r in records if r["ranks"] == 1 and all(r[key] == value for key, value in where.items())]
        return sorted((r for r in found if r["seed"] in SEEDS), key=lambda r: r["seed"])

    adaptive = {"task": task, "policy": "goodput"}
    stock = {"task": task, "policy": "fixed"}
    groups = {
        f"stock, k = 8, {eight['learning_rate']:g} (its best rate)": of(
            k=8, learning_rate=eight["learning_rate"], **stock
        ),
        f"stock, k = {first['k']}, {first['learning_rate']:g} (best of the sweep)": of(
            k=first["k"], learning_rate=first["learning_rate"], **stock
        ),
        f"ours, defaults, {eight['learning_rate']:g} (the rate of k = 8)": of(
            learning_rate=eight["learning_rate"], rule=DEFAULT_RULE, **adaptive
        ),
    }
    if (own["rule"], own["learning_rate"]) != (DEFAULT_RULE, eight["learning_rate"]):
        groups[f'ours, "{own["rule"]}", {own["learning_rate"]:g} (rule and rate searched)'] = of(
            learning_rate=own["learning_rate"], rule=own["rule"], **adaptive
        )
    return groups


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
        text += f"; never by the other arm in {never[1]} of {len(pairs)}"
    return text


def sweep_table(records: list[dict], task: str) -> str:
    runs = [r for r in records if r["task"] == task and r["policy"] == "fixed" and r["seed"] == 0 and r["ranks"] == 1]
    chosen = {k: best(records, task=task, policy="fixed", k=k) for k in {r["k"] for r in runs}}
    rows = []
    for k in sorted(chosen):
        tried = sorted((r for r in runs if r["k"] == k), key=lambda r: r["learning_rate"])
        cells = [f"{r['learning_rate']:g}: {r['eval_loss']:.3f}" for r in tried]
        edge = chosen[k] in (tried[0], tried[-1]) and len(tried) > 1
        rows.append([k, ", ".join(cells), f"{chosen[k]['learning_rate']:g}{' (edge)' if edge else ''}"])
    return table(["k", "final loss by learning rate", "best rate"], rows)


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
    accuracy = ["accuracy, %"] if task.startswith("vision") else []
    first, second = (f"{frozen[name][0]:.3f}" for name in ("eight", "best"))
    header = ["arm, learning rate", "seeds", "final loss", *accuracy, "steps", f"time to {first} against k = 8",
              "samples", f"time to {second} against the sweep's best", "samples"]  # fmt: skip
    return table(header, rows)


def other_table(records: list[dict], task: str) -> str:
    """Return what else was run on seed 0: rules, rates, policies, k replayed and reversed."""
    frozen = targets(records, task)
    eight, first = frozen["eight"], frozen["best"]
    rows = []
    for r in sorted(
        records, key=lambda r: (r["policy"] != "goodput", r["policy"], r["rule"] or "", r["learning_rate"])
    ):
        if r["task"] != task or r["policy"] == "fixed" or r["seed"] or r["ranks"] != 1:
            continue
        rows.append([
            f"`{r['policy']}`", r["rule"], f"{r['learning_rate']:g}", f"{r['eval_loss']:.3f}", r["optimizer_steps"],
            ratio([r], [eight[1]], eight[0], "seconds"), ratio([r], [first[1]], first[0], "seconds"),
        ])  # fmt: skip
    header = ["policy", "rule", "learning rate", "final loss", "steps", "time to the first target, of k = 8",
              "time to the second, of the sweep's best"]  # fmt: skip
    return table(header, rows)


def draw_curves(records: list[dict], folder: Path) -> None:
    """Draw the validation loss of the paired runs against time: the median over seeds and, shaded, their range."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    import numpy as np

    folder.mkdir(exist_ok=True)
    for task in PAIRED_TASKS:
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
    own = best(records, task="language", policy="goodput", ranks=2)
    eight = best(records, task="language", policy="fixed", k=8)["learning_rate"]
    settings = {
        f"stock, k = {first['k']}, {first['learning_rate']:g} (best fixed)": first,
        f"ours, defaults, {eight:g} (the rate of k = 8 on one rank)": own
        | {"rule": DEFAULT_RULE, "learning_rate": eight},
        f'ours, "{own["rule"]}", {own["learning_rate"]:g} (rate searched)': own,
    }
    same = ("task", "policy", "k", "rule", "learning_rate", "ranks")
    groups, seen = {}, set()
    for name, setting in settings.items():
        key = tuple(setting[field] for field in same)
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
        name = f"stock, k = {r['k']}" if r["policy"] == "fixed" else f'ours, "{r["rule"]}"'
        crossing = first_crossing(wall_curve(r), target, False)
        spent = f"{crossing.seconds:.0f}" if crossing.reached else "never"
        seconds = f"{wall_curve(r)[-1].seconds:.0f}"
        rows.append([name, f"{r['learning_rate']:g}", f"{r['eval_loss']:.3f}", r["optimizer_steps"], spent, seconds])
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


def write_report(results: Path, path: Path | None = None) -> None:
    """Write `convergence.md`, or another file, from its template and the records."""
    path = path or HERE / "convergence.md"
    records = load(results)
    parts: dict[str, Callable[[], str]] = {
        "ranks search": lambda: ranks_search_table(records),
        "ranks paired": lambda: ranks_paired_table(records),
    }
    for task in PAIRED_TASKS:
        parts[f"{task} paired"] = lambda task=task: paired_table(records, task)
    for task in TASKS:
        parts[f"{task} sweep"] = lambda task=task: sweep_table(records, task)
        parts[f"{task} other"] = lambda task=task: other_table(records, task)
    text = (HERE / "convergence.template.md").read_text()
    for name, make in parts.items():
        text = text.replace(f"@@{name}@@", make())
    path.write_text(text)
    draw_curves(records, path.parent / "figures")
    print(f"wrote {path} from {len(records)} records")
