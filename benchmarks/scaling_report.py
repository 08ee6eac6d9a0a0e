"""The page of `scaling.py`."""

import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from page_tables import table


HERE = Path(__file__).resolve().parent
CLAIM = (4, 0.946)  # ranks and efficiency of the original claim
SHARES = ("compute", "reduction", "statistics", "agreement", "rest")


def throughput(records: Sequence[dict]) -> float:
    """Samples a second of all processes of a setting.

    Ranks of one run end together, so that the slower clock counts; runs that know nothing of each other add up.
    """
    if records[0]["ranks"] > 1:
        return sum(r["samples"] for r in records) / max(r["seconds"] for r in records)
    return sum(r["samples"] / r["seconds"] for r in records)


def spread(values: Sequence[float], form: str) -> str:
    """Median, least and largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def efficiencies(rounds: Sequence[dict], arm: str) -> dict[str, list[float]]:
    """By round: throughput of each setting, efficiency, what two cores cost each other, what communication costs."""
    found = {name: [throughput(r[name][arm]) for r in rounds] for name in ("one", "two", "control")}
    pairs = list(zip(found["one"], found["two"], found["control"], strict=True))
    return found | {
        "efficiency": [two / (2 * one) for one, two, _ in pairs],
        "control efficiency": [control / (2 * one) for one, _, control in pairs],
        "against control": [two / control for _, two, control in pairs],
    }


def shares(found: dict, arm: str) -> dict[str, float]:
    """Where the wall time of the first of two ranks goes, as shares of it.

    Reduction is what a micro-batch takes longer whose gradients are reduced. At k = 1 there is no other one: those of
    k = 4 in the same round stand for it.
    """
    record = found["two"][arm][0]
    plain = record["plain_micro_batch"] or found["two"]["4"][0]["plain_micro_batch"]
    parts = record["shares"]
    reduction = max(0.0, record["last_micro_batch"] - plain) * record["optimizer_steps"]
    seconds = {
        "compute": parts["forward_backward"] - reduction,
        "reduction": reduction,
        "statistics": parts["statistics"],
        "agreement": parts["agreement"],
        "rest": record["seconds"] - parts["forward_backward"] - parts["statistics"] - parts["agreement"],
    }
    return {name: value / record["seconds"] for name, value in seconds.items()}


# ---- The simulation ------------------------------------------------------------------------------------------------


def claim_sentence(rows: Sequence[dict]) -> str:
    """Return which simulated setups reach the original claim, of DDP."""
    ranks, share = CLAIM
    found = [row for row in rows if row["ranks"] == ranks and row["level"] == "as recorded" and not row["zero"]]
    shares = [row["efficiency"]["1"] for row in found]
    below = [row["setup"] for row in found if row["efficiency"]["1"] < share]
    reach = sum(row["efficiency"]["16"] >= share for row in found)
    return (
        f"On {ranks} ranks under DDP, k = 1 reaches {min(shares):.0%} to {max(shares):.0%}. Below {share:.1%} of the "
        f"{len(found)} setups: {', '.join(below) or 'none'}. At k = 16, {reach} reach it."
    )


def gains_sentence(rows: Sequence[dict]) -> str:
    """Return how `goodput` compares with the best fixed k, over all simulated setups, ranks and levels."""
    within = sum(0.99 <= row["over_best"] <= 1.01 for row in rows) / len(rows)
    best, worst = min(rows, key=lambda row: row["over_best"]), max(rows, key=lambda row: row["over_best"])
    one = sum(row["best_k"] == 1 for row in rows) / len(rows)
    where = f"{best['setup']}, {best['ranks']} ranks, {best['level']}"
    return (
        f"In {within:.0%} of the {len(rows)} cases `goodput` takes as long as the best fixed k, within 1 %. In "
        f"{one:.0%} that is k = 1. Its largest gain is {1 - best['over_best']:.1%} ({where}), its largest loss "
        f"{worst['over_best'] - 1:.1%}."
    )


def simulation_table(rows: Sequence[dict], level: str, ranks: Sequence[int] = (4, 16, 64, 1024)) -> str:
    """Return efficiencies and times of all setups at one level of the noise scale."""
    lines = [
        [row["setup"], row["ranks"], *(f"{row['efficiency'][k]:.0%}" for k in ("1", "16")),
         f"{row['adaptive_efficiency']:.0%} (mean k {row['mean_k']:.1f})", row["best_k"], f"{row['over_best']:.2f}",
         *(f"{row['over_fixed'][k]:.2f}" for k in ("1", "8"))]
        for row in rows if row["level"] == level and row["ranks"] in ranks
    ]  # fmt: skip
    header = ["setup", "ranks", "efficiency at k = 1", "at k = 16", "of `goodput`", "best fixed k",
              "time of `goodput` over the best fixed k", "over k = 1", "over k = 8"]  # fmt: skip
    return table(header, lines)


def check_of_step_times(rounds: Sequence[dict]) -> list[list[str]]:
    """Predict two ranks at k = 4 and 16 from k = 1 and from two runs apart: reduction is paid once in a step."""

    def step(records: Sequence[dict]) -> float:
        return max(record["seconds"] / record["optimizer_steps"] for record in records)

    rows = []
    for k in ("4", "16"):
        predicted = [step(r["control"][k]) + step(r["two"]["1"]) - step(r["control"]["1"]) for r in rounds]
        measured = [step(r["two"][k]) for r in rounds]
        errors = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
        rows.append([f"this page, k = {k}", spread(predicted, ".2f"), spread(measured, ".2f"), spread(errors, "+.0%")])
    return rows


def two_rank_runs() -> dict[int, dict]:
    """Return the recorded fixed-k runs of the language task on two ranks, seed 0, by k."""
    found = {}
    for path in sorted((HERE / "results" / "convergence").glob("language-fixed-*-ranks2-seed0.json")):
        record = json.loads(path.read_text())
        found[record["k"]] = record
    return dict(sorted(found.items()))


def check_of_convergence(runs: dict[int, dict], loss: float = 5.7) -> list[list[str]]:
    """Predict step times of k = 2 and 4 from k = 1 and 8, and the data to a loss at k > 1 from k = 1 and its noise.

    Args:
        runs: Of `two_rank_runs`.
        loss: That all of them reach.
    """
    from scale_simulation import curve_of

    def step(run: dict) -> float:
        first, last = run["curve"][0], run["curve"][-1]
        return (last["wall_s"] - first["wall_s"]) / (last["step"] - first["step"])

    def samples_to(run: dict) -> float:
        for before, after in pairwise(run["curve"]):
            if after["loss"] <= loss:
                share = (before["loss"] - loss) / (before["loss"] - after["loss"])
                return before["samples"] + share * (after["samples"] - before["samples"])
        raise ValueError(f"k = {run['k']} does not reach a loss of {loss}")

    rows = []
    slope = (step(runs[8]) - step(runs[1])) / 7
    for k in (2, 4):
        predicted, measured = step(runs[1]) + (k - 1) * slope, step(runs[k])
        rows.append([f"convergence records, k = {k}", f"{predicted:.3f}", f"{measured:.3f}",
                     f"{predicted / measured - 1:+.0%}"])  # fmt: skip
    # Fixed runs have no noise scale: that of `goodput` on two ranks, seed 0, by samples.
    path = HERE / "results" / "convergence" / "language-goodput-k8-lr0.002-surge-tokens-ranks2-seed0.json"
    history = json.loads(path.read_text())["history"]
    noise = [(line["samples_seen"], value / 128) for line, (_, value) in
             zip([line for line in history if "samples_seen" in line], curve_of(history), strict=True)]  # fmt: skip

    def noise_at(samples: float) -> float:
        return next((value for seen, value in noise if seen >= samples), noise[-1][1])

    def worth(samples: float, batch: int) -> float:
        """Steps without noise that so many samples are worth."""
        pieces = [min(batch, samples - begun) for begun in range(0, int(samples), batch)]
        return sum(p / batch / (1 + noise_at(i * batch) / batch) for i, p in enumerate(pieces))

    target = worth(samples_to(runs[1]), 8)
    for k in (2, 4, 8):
        measured, predicted = samples_to(runs[k]), 0.0
        while worth(predicted, 8 * k) < target and predicted < 1e5:
            predicted += 8 * k
        rows.append([f"samples to a loss of {loss}, k = {k}", f"{predicted:.0f}", f"{measured:.0f}",
                     f"{predicted / measured - 1:+.0%}"])  # fmt: skip
    return rows


def draw_simulation(rows: Sequence[dict], path: Path) -> None:
    """Draw efficiency and time to the target against the number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["setup"] for row in rows))
    for index, name in enumerate(names):
        mine = [row for row in rows if row["setup"] == name and row["level"] == "10⁶ tokens"]
        ranks, color = [row["ranks"] for row in mine], f"C{index}"
        left.plot(ranks, [row["efficiency"]["1"] for row in mine], "-", color=color, label=name)
        left.plot(ranks, [row["efficiency"]["16"] for row in mine], "--", color=color)
        right.plot(ranks, [row["over_best"] for row in mine], "-", color=color)
        right.plot(ranks, [row["over_fixed"]["1"] for row in mine], ":", color=color)
    left.plot(*CLAIM, "k*", ms=11, label="the original claim: 94.6 % on 4 devices", zorder=9)
    left.set(xscale="log", xlabel="ranks", ylabel="weak-scaling efficiency", ylim=(0, 1.3))
    left.set_title("simulated: k = 1 (solid), k = 16 (dashed)", fontsize=10)
    right.set(xscale="log", xlabel="ranks", ylabel="time of goodput over that of a fixed k")
    right.set_title("simulated, 10⁶ tokens: over the best k (solid), over k = 1 (dotted)", fontsize=10)
    for axes in (left, right):
        axes.set_xticks([1, 4, 16, 64, 256, 1024], labels=["1", "4", "16", "64", "256", "1,024"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=70)


def write_report(record: dict, path: Path) -> None:
    """Write the page from its template and the record."""
    rounds = record["rounds"]
    arms = list(rounds[0]["two"])
    first, second = [], []
    for arm in arms:
        found = efficiencies(rounds, arm)
        mean_k = statistics.median(r["two"][arm][0]["mean_k"] for r in rounds)
        name = f"adaptive (mean {mean_k:.1f})" if arm == "adaptive" else arm
        first.append([
            name,
            *(f"{statistics.median(found[setting]):.1f}" for setting in ("one", "two", "control")),
            *(spread(found[what], ".1%") for what in ("efficiency", "control efficiency", "against control")),
        ])  # fmt: skip
        parts = [shares(r, arm) for r in rounds]
        second.append([name, *(spread([part[what] for part in parts], ".1%") for what in SHARES)])
    machine, versions = record["machine"], record["versions"]
    values = {
        "efficiency": table(["k", "one rank, samples/s", "two ranks", "two runs apart", "efficiency",
                             "two runs apart", "two ranks against two runs apart"], first),
        "shares": table(["k", *SHARES], second),
        "setup": f"{machine['cores']} cores ({machine['processor']}), load {machine['load_at_the_end'][0]:.1f} at the "
                 f"end, " + ", ".join(f"{name} {version}" for name, version in versions.items())
                 + f"; {len(rounds)} rounds in {record['minutes']:.1f} minutes",
        "command": record["command"],
    }  # fmt: skip
    simulated = json.loads((HERE / "results" / "scaling" / "simulation.json").read_text())
    runs = two_rank_runs()
    checks = check_of_step_times(rounds) if set(arms) >= {"1", "4", "16"} else []
    values |= {
        "claim": claim_sentence(simulated),
        "gains": gains_sentence(simulated),
        "simulation": simulation_table(simulated, "10⁶ tokens"),
        "checks": table(["", "predicted", "measured", "predicted over measured"], checks + check_of_convergence(runs)),
    }
    text = (HERE / "scaling.template.md").read_text()
    for name, value in values.items():
        text = text.replace(f"@@{name}@@", value)
    path.write_text(text)
    print(f"wrote {path}")
