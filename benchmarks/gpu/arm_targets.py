"""The target that the arms of a headline run are compared by."""

from collections.abc import Sequence
from typing import Any

from convergence_report import value_at

from hf_trainopt.metrics.targets import Evaluation, first_crossing


# The loss that the stock run at k = 8 has at this share of its data is the target.
TARGET_SHARE = 0.8
BOTH = "stock and ours have run"


def evaluations(arm: dict[str, Any]) -> list[Evaluation]:
    """Return the curve of an arm."""
    return [Evaluation(p["loss"], p["step"], p.get("samples"), p.get("wall_s")) for p in arm["curve"]]


def targets(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what each arm took to the target: the loss of stock k = 8 of its seed at 80 % of its data."""
    found = []
    reference = {arm["seed"]: arm for arm in arms if arm["name"] == "stock, k = 8"}
    for arm in arms:
        if arm["seed"] not in reference:
            continue
        stock = evaluations(reference[arm["seed"]])
        target = value_at(stock, TARGET_SHARE)
        own, theirs = first_crossing(evaluations(arm), target, False), first_crossing(stock, target, False)
        entry = {"name": arm["name"], "seed": arm["seed"], "target": target, "reached": own.reached}
        for axis in ("seconds", "samples", "steps"):
            entry[axis] = getattr(own, axis)
            entry[f"{axis}_ratio"] = getattr(own, axis) / getattr(theirs, axis) if getattr(theirs, axis) else None
        found.append(entry)
    return found


def both_have_run(arms: Sequence[dict[str, Any]]) -> bool:
    """Return whether there is something to compare."""
    names = [arm["name"] for arm in arms]
    return any("stock" in name for name in names) and any("ours" in name for name in names)
