"""Which runs the parts of `convergence.py` are made of."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path


# Learning rates of stock by k: factors of two around what a first search found (benchmarks/accumulation.md), further
# down where the lowest was the best.
REFERENCE = 8  # k of the recipe that a user comes with
SWEEP = {
    "language": {
        1: (7.5e-4, 1.5e-3, 3e-3, 6e-3),
        2: (1.5e-3, 3e-3, 6e-3),
        4: (1.5e-3, 3e-3, 6e-3),
        8: (1e-3, 2e-3, 4e-3),
        16: (1e-3, 2e-3, 4e-3),
    },
    "vision": {
        1: (8.75e-5, 1.75e-4, 3.5e-4, 7e-4),
        2: (2.5e-4, 5e-4, 1e-3),
        4: (1.75e-4, 3.5e-4, 7e-4, 1.4e-3),
        8: (3.5e-4, 7e-4, 1.4e-3, 2.8e-3),
        16: (1e-3, 2e-3, 4e-3),
    },
}
# Adam's second moment, beside what the task has for any k: β2 such that its half-life in data is this many times the
# half-life of k = 8 (β2 of the task to the power of k/8 over that number).
BETA2 = {"language": 0.95, "vision": 0.999}
HALF_LIVES = {"language": (1, 2), "vision": (1, 0.1)}
# Cost of an optimizer step in micro-batches, measured on the idle machine (results/accumulation_costs.json); ours
# measures it in the run, which on a machine that runs two at a time would be another figure in every run.
STEP_COST = {"language": 0.04, "vision": 0.24, "vision_resnet50": 0.2}
# Rates of ours at k_ref = 8 that were tried on seed 0, and the rules.
OURS = {"language": (2e-3, 4e-3, 8e-3), "vision": (3.5e-4, 7e-4, 1.4e-3, 2.8e-3)}
DEFAULT_RULE = "surge"  # what lr_batch_scaling="auto" is under goodput
# Rules and rates at k_ref = 8 of the policies that follow the noise scale itself, whose batches are larger.
NOISE_SCALE = (("surge", 4e-3), ("sqrt", 4e-3), ("sqrt", 8e-3))
# Rates of ours at k_ref = 8 that are tried on two ranks under "sqrt", the rule that was best on one.
RANKS_SEARCH = (4e-3, 8e-3, 1.13e-2)
RANKS_SEEDS = range(3)
RULES = (DEFAULT_RULE, "sqrt", "gain")
SEEDS = range(5)
QUICK_SWEEP = {"language": {1: (3e-3,), 8: (2e-3,)}, "vision": {1: (3.5e-4,), 8: (1.4e-3,)}}

Runs = Iterator[list[str]]


def stock(task: str, k: int, rate: float, seed: int = 0, beta2: float | None = None) -> list[str]:
    second = [] if beta2 is None or beta2 == BETA2[task] else ["--beta2", f"{beta2:.6g}"]
    return ["--task", task, "--policy", "fixed", "-k", str(k), "--learning_rate", f"{rate:g}", *second,
            "--seed", str(seed)]  # fmt: skip


def adaptive(task: str, rate: float, rule: str, seed: int = 0, policy: str = "goodput", on: int = 1) -> list[str]:
    cost = ["--step_cost", str(STEP_COST[task])] if on == 1 else []
    return ["--task", task, "--policy", policy, "--rule", rule, "--learning_rate", f"{rate:g}", *cost,
            "--seed", str(seed)]  # fmt: skip


def load(results: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]


def best(records: list[dict], **where) -> dict:
    """Return the record of seed 0 and one rank with the lowest final loss among those that `where` describes."""
    where = {"seed": 0, "ranks": 1, **where}
    found = [r for r in records if all(r[key] == value for key, value in where.items())]
    if not found:
        raise SystemExit(f"there is no record with {where}; run the sweep (and `ours`) first.")
    return min(found, key=lambda r: r["eval_loss"])


def sweep(results: Path, quick: bool) -> Runs:
    for task, rates_of in (QUICK_SWEEP if quick else SWEEP).items():
        for k, rates in rates_of.items():
            for rate in rates:
                for half_life in (None, *HALF_LIVES[task]):
                    beta2 = None if half_life is None else BETA2[task] ** (k / REFERENCE / half_life)
                    yield stock(task, k, rate, beta2=beta2)


def ours(results: Path, quick: bool) -> Runs:
    for task, rates in OURS.items():
        for rate in rates[:1] if quick else rates:
            for rule in RULES[:1] if quick else RULES:
                yield adaptive(task, rate, rule)


def paired(results: Path, quick: bool) -> Runs:
    """Stock at k = 8, the sweep's best, ours at the best rate of stock at k = 8, ours with rule and rate searched."""
    records = load(results)
    for seed in range(1) if quick else SEEDS:
        for task in SWEEP:
            eight = best(records, task=task, policy="fixed", k=8)
            first = best(records, task=task, policy="fixed")
            own = best(records, task=task, policy="goodput")
            runs = [
                stock(task, 8, eight["learning_rate"], seed),
                adaptive(task, eight["learning_rate"], DEFAULT_RULE, seed),
                stock(task, first["k"], first["learning_rate"], seed),
                adaptive(task, own["learning_rate"], own["rule"], seed),
            ]
            yield from runs[:: 1 if seed % 2 == 0 else -1]  # who is first must not matter


def resnet50(results: Path, quick: bool) -> Runs:
    """The paired runs of vision with ResNet-50, at k and rates that were best for ResNet-18: no search of its own."""
    records = load(results)
    eight = best(records, task="vision", policy="fixed", k=8)
    first = best(records, task="vision", policy="fixed")
    for seed in range(1) if quick else SEEDS:
        runs = [
            stock("vision_resnet50", 8, eight["learning_rate"], seed),
            adaptive("vision_resnet50", eight["learning_rate"], DEFAULT_RULE, seed),
            stock("vision_resnet50", first["k"], first["learning_rate"], seed),
        ]
        yield from runs[:: 1 if seed % 2 == 0 else -1]


def ablations(results: Path, quick: bool) -> Runs:
    for rule, rate in () if quick else NOISE_SCALE:
        for policy in ("noise_scale", "half_noise_scale"):
            yield adaptive("language", rate, rule, policy=policy)
    for task in ["language"] if quick else SWEEP:
        rate = best(load(results), task=task, policy="fixed", k=8)["learning_rate"]
        name = f"{task}-goodput-k8-lr{rate:g}-{DEFAULT_RULE}-seed0.json"
        for policy in ["noise_scale"] if quick else ("noise_scale", "ramp", "plain_goodput"):
            yield adaptive(task, rate, "sqrt" if policy == "ramp" else DEFAULT_RULE, policy=policy)
        for policy in ["reversed"] if quick else ("replayed", "reversed"):
            yield [*adaptive(task, rate, DEFAULT_RULE, policy=policy), "--source", str(results / name)]
        for factor in () if quick else (0.5, 2.0):
            yield adaptive(task, rate * factor, DEFAULT_RULE)
            yield stock(task, 8, rate * factor)


def ranks(results: Path, quick: bool) -> Runs:
    """The language task on two ranks: stock over k, ours with its defaults and at other rates, seed 0.

    Rates of stock are those that were best on one rank. An optimizer step has a cost of communication here, which
    ours measures in the run.
    """
    records = load(results)
    for k in (8,) if quick else (1, 2, 4, 8):
        yield on_two_ranks(stock("language", k, rate_of_stock(records, k)))
    yield on_two_ranks(adaptive("language", rate_of_stock(records, 8), DEFAULT_RULE, on=2))
    for rate in () if quick else RANKS_SEARCH:
        yield on_two_ranks(adaptive("language", rate, "sqrt", on=2))


def ranks_paired(results: Path, quick: bool) -> Runs:
    """More seeds on two ranks of the best stock run, of ours with its defaults and of ours with its rate searched."""
    records = load(results)
    first = best(records, task="language", policy="fixed", ranks=2)
    own = best(records, task="language", policy="goodput", ranks=2)
    for seed in () if quick else RANKS_SEEDS:
        runs = [
            stock("language", first["k"], first["learning_rate"], seed),
            adaptive("language", rate_of_stock(records, 8), DEFAULT_RULE, seed, on=2),
            adaptive("language", own["learning_rate"], own["rule"], seed, on=2),
        ]
        yield from map(on_two_ranks, runs[:: 1 if seed % 2 == 0 else -1])


def rate_of_stock(records: list[dict], k: int) -> float:
    return best(records, task="language", policy="fixed", k=k)["learning_rate"]


def on_two_ranks(arguments: list[str]) -> list[str]:
    return [*arguments, "--ranks", "2"]


PARTS: dict[str, Callable[[Path, bool], Runs]] = {
    "sweep": sweep, "ours": ours, "paired": paired, "resnet50": resnet50, "ablations": ablations, "ranks": ranks,
    "ranks_paired": ranks_paired,
}  # fmt: skip
