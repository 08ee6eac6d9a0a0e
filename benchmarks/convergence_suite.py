"""Which runs the parts of `convergence.py` are made of."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


REFERENCE = 8  # k of the recipe that a user comes with
TASK_BETA2 = {"language": 0.95, "vision": 0.999, "code": 0.95, "resnet50": 0.999}
# Learning rates of stock by k at the task's own β2: factors of two around what a first search found
# further down where the lowest was the best.
SWEEP = {
    "language": {
        1: (1.5e-3, 3e-3, 6e-3),
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
# The same with other β2, given by the half-life in data of Adam's second moment over the one of the recipe: β2 is the
# task's to the power of k/8 over that number.
SWEEP_BETA2 = {
    "language": {
        1: {1: (7.5e-4, 1.5e-3, 2e-3, 3e-3), 2: (7.5e-4, 1.5e-3, 2e-3)},
        2: {1: (1.5e-3, 2e-3, 3e-3), 2: (2e-3,)},
        4: {1: (2e-3, 3e-3)},
        8: {2: (2e-3,), 4: (2e-3,)},
        16: {1: (2e-3,)},
    },
    "vision": {
        1: {1: (1.75e-4, 3.5e-4), 0.1: (1.75e-4, 3.5e-4)},
        2: {1: (5e-4,), 0.1: (5e-4,)},
        8: {0.1: (7e-4,)},
    },
}
# Cost of an optimizer step in micro-batches, measured on the idle machine (results/unit_costs.json); ours
# measures it in the run, which on a machine that runs two at a time would be another figure in every run.
STEP_COST = {"language": 0.04, "vision": 0.24, "code": 0.04, "resnet50": 0.14}
DEFAULT = ("surge", "tokens")  # what lr_batch_scaling="auto" is under goodput, and adam_clock
# The parts of the default, each without the other.
PARTS_OF_DEFAULT = (("surge", "steps"), ("none", "tokens"), ("sqrt", "tokens"))
# ρ and rule of the policy that follows the noise scale itself, at the rate of k = 8.
NOISE_SCALE = (("noise_scale", "surge"), ("half_noise_scale", "surge"), ("half_noise_scale", "sqrt"))
RANKS_SEEDS = range(3)
# Learning rates of stock on two ranks where β2 has the recipe's half-life in data.
RANKS_BETA2 = {1: (2e-3, 3e-3)}
SEEDS = range(5)
# Seeds of language at twice its rate, where it is at the edge of what is stable.
TWICE_SEEDS = (1, 2)
# Costs of an optimizer step in micro-batches, as an optimizer on the host or a slow network may have.
DEAR_STEPS = (1.0, 3.0)
# What is then the fastest of the sweep to the first target (seed 0, both costs): k, rate, half-life of β2 in data.
FASTEST_WITH_DEAR_STEPS = (2, 2e-3, 1)
# Tasks on which no default was tuned, and rates of stock at k = 8.
OTHERS = {"code": (2e-3, 4e-3, 8e-3)}
OTHER_BETA2 = {"code": (0.95, 0.98)}
# A larger net: rates of stock at k = 8, and at the k that was best for ResNet-18.
RESNET50_SWEEP = {8: (1.75e-4, 3.5e-4, 7e-4, 1.4e-3), 2: (1.25e-4, 2.5e-4, 5e-4)}
QUICK_SWEEP = {"language": {1: (3e-3,), 8: (2e-3,)}, "vision": {1: (3.5e-4,), 8: (1.4e-3,)}}

Runs = Iterator[list[str]]


def stock(task: str, k: int, rate: float, seed: int = 0, beta2: float | None = None) -> list[str]:
    return ["--task", task, "--policy", "fixed", "-k", str(k), "--learning_rate", f"{rate:g}", *_beta2(task, beta2),
            "--seed", str(seed)]  # fmt: skip


def adaptive(
    task: str,
    rate: float,
    rule: str = DEFAULT[0],
    clock: str = DEFAULT[1],
    seed: int = 0,
    policy: str = "goodput",
    on: int = 1,
    beta2: float | None = None,
    step_cost: float | None = None,
) -> list[str]:
    cost = ["--step_cost", f"{STEP_COST[task] if step_cost is None else step_cost:g}"] if on == 1 else []
    return ["--task", task, "--policy", policy, "--rule", rule, "--clock", clock, "--learning_rate", f"{rate:g}",
            *cost, *_beta2(task, beta2), "--seed", str(seed)]  # fmt: skip


def _beta2(task: str, value: float | None) -> list[str]:
    return [] if value is None or value == TASK_BETA2[task] else ["--beta2", f"{value:.6g}"]


def beta2_in_data(task: str, k: int, half_life: float = 1.0, of: float | None = None) -> float:
    """Return the β2 whose half-life in data at k is a multiple of the one that `of`, or the task's, has at k = 8."""
    return float(f"{(of or TASK_BETA2[task]) ** (k / REFERENCE / half_life):.6g}")


def load(results: Path) -> list[dict]:
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    for record in records:  # those of stock at the task's β2 were made before β2 was searched
        record.setdefault("adam_beta2", TASK_BETA2[record["task"]])
        record.setdefault("adam_clock", None)
    return records


def best(records: list[dict], **where) -> dict:
    """Return the record of seed 0 and one rank with the lowest final loss among those that `where` describes."""
    where = {"seed": 0, "ranks": 1, **where}
    found = [r for r in records if all(r[key] == value for key, value in where.items())]
    if not found:
        raise SystemExit(f"there is no record with {where}; run the sweep first.")
    return min(found, key=lambda r: r["eval_loss"])


def recipe(records: list[dict], task: str) -> dict:
    """Return the run of stock at k = 8, the task's β2 and its best rate: what a user comes with."""
    return best(records, task=task, policy="fixed", k=REFERENCE, adam_beta2=TASK_BETA2[task])


def sweep(results: Path, quick: bool) -> Runs:
    for task, rates_of in (QUICK_SWEEP if quick else SWEEP).items():
        for k, rates in rates_of.items():
            for rate in rates:
                yield stock(task, k, rate)
    for task, of_k in ({} if quick else SWEEP_BETA2).items():
        for k, of_half_life in of_k.items():
            for half_life, rates in of_half_life.items():
                for rate in rates:
                    yield stock(task, k, rate, beta2=beta2_in_data(task, k, half_life))
    for task, rates in ({} if quick else OTHERS).items():
        for rate in rates:
            yield stock(task, REFERENCE, rate)


def paired(results: Path, quick: bool) -> Runs:
    """Stock at k = 8, the sweep's best, and ours with the rate and β2 of stock at k = 8."""
    records = load(results)
    for seed in range(1) if quick else SEEDS:
        for task in SWEEP:
            yield from compared(task, records, (seed,))


def compared(task: str, records: list[dict], seeds: Iterable[int]) -> Runs:
    """The three runs of each seed that are compared."""
    eight, first = recipe(records, task), best(records, task=task, policy="fixed")
    for seed in seeds:
        runs = [
            stock(task, REFERENCE, eight["learning_rate"], seed),
            adaptive(task, eight["learning_rate"], seed=seed),
            stock(task, first["k"], first["learning_rate"], seed, first["adam_beta2"]),
        ]
        yield from runs[:: 1 if seed % 2 == 0 else -1]  # who is first must not matter


def others(results: Path, quick: bool) -> Runs:
    """Tasks that no default was tuned on: ours on either clock and stock at k = 1, at the best rate of k = 8."""
    records = load(results)
    for task in () if quick else OTHERS:
        rate = recipe(records, task)["learning_rate"]
        for beta2 in OTHER_BETA2[task]:
            yield stock(task, REFERENCE, rate, beta2=beta2)
            yield adaptive(task, rate, beta2=beta2)
            yield adaptive(task, rate, clock="steps", beta2=beta2)
            yield stock(task, 1, rate, beta2=beta2_in_data(task, 1, of=beta2))


def resnet50(results: Path, quick: bool) -> Runs:
    """ResNet-50: a search of its own over rates; seed 0."""
    for k, rates in ({} if quick else RESNET50_SWEEP).items():
        for rate in rates:
            yield stock("resnet50", k, rate)


def resnet50_paired(results: Path, quick: bool) -> Runs:
    """Three seeds of what is compared, with ResNet-50."""
    if not quick:
        yield from compared("resnet50", load(results), RANKS_SEEDS)


def ablations(results: Path, quick: bool) -> Runs:
    """The default's parts, a rate that is wrong, the policy that saves steps; seed 0 (and two more)."""
    records = load(results)
    for task in ["language"] if quick else SWEEP:
        rate = recipe(records, task)["learning_rate"]
        for rule, clock in PARTS_OF_DEFAULT[:1] if quick else PARTS_OF_DEFAULT:
            yield adaptive(task, rate, rule, clock)
        for factor in () if quick else (0.5, 2.0):
            yield adaptive(task, rate * factor)
            yield stock(task, REFERENCE, rate * factor)
        for seed in TWICE_SEEDS if task == "language" and not quick else ():
            yield adaptive(task, rate * 2, seed=seed)
    for policy, rule in NOISE_SCALE[:1] if quick else NOISE_SCALE:
        yield adaptive("language", recipe(records, "language")["learning_rate"], rule, policy=policy)


def dear_steps(results: Path, quick: bool) -> Runs:
    """Ours where an optimizer step is dear; stock has its sweep, whose losses don't depend on what a step costs."""
    rate = recipe(load(results), "language")["learning_rate"]
    for seed in range(1) if quick else RANKS_SEEDS:
        for step_cost in DEAR_STEPS[:1] if quick else DEAR_STEPS:
            yield adaptive("language", rate, seed=seed, step_cost=step_cost)
        k, best_rate, half_life = FASTEST_WITH_DEAR_STEPS
        if not quick:
            yield stock("language", k, best_rate, seed, beta2_in_data("language", k, half_life))


def ranks(results: Path, quick: bool) -> Runs:
    """The language task on two ranks: stock over k and, where it matters, β2; ours with its defaults; seed 0.

    Rates of stock at the recipe's β2 are those that were best on one rank. An optimizer step has a cost of
    communication here, which ours measures in the run.
    """
    records = load(results)
    for k in (8,) if quick else (1, 2, 4, 8):
        yield on_two_ranks(stock("language", k, rate_of_stock(records, k)))
    for k, rates in ({} if quick else RANKS_BETA2).items():
        for rate in rates:
            yield on_two_ranks(stock("language", k, rate, beta2=beta2_in_data("language", k)))
    yield on_two_ranks(adaptive("language", recipe(records, "language")["learning_rate"], on=2))


def ranks_paired(results: Path, quick: bool) -> Runs:
    """More seeds on two ranks of the best stock run and of ours with its defaults."""
    records = load(results)
    first = best(records, task="language", policy="fixed", ranks=2)
    for seed in () if quick else RANKS_SEEDS:
        runs = [
            stock("language", first["k"], first["learning_rate"], seed, first["adam_beta2"]),
            adaptive("language", recipe(records, "language")["learning_rate"], seed=seed, on=2),
        ]
        yield from map(on_two_ranks, runs[:: 1 if seed % 2 == 0 else -1])


def rate_of_stock(records: list[dict], k: int) -> float:
    return best(records, task="language", policy="fixed", k=k, adam_beta2=TASK_BETA2["language"])["learning_rate"]


def on_two_ranks(arguments: list[str]) -> list[str]:
    return [*arguments, "--ranks", "2"]


PARTS: dict[str, Callable[[Path, bool], Runs]] = {
    "sweep": sweep, "paired": paired, "others": others, "ablations": ablations, "dear_steps": dear_steps,
    "resnet50": resnet50, "resnet50_paired": resnet50_paired,
    "ranks": ranks, "ranks_paired": ranks_paired,
}  # fmt: skip
