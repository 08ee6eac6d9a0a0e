"""The page of `scaling.py`."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from page_tables import table


HERE = Path(__file__).resolve().parent
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
    text = (HERE / "scaling.template.md").read_text()
    for name, value in values.items():
        text = text.replace(f"@@{name}@@", value)
    path.write_text(text)
    print(f"wrote {path}")
