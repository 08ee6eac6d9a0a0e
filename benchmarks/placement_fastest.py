"""Whether the micro-batch and plan that `--find` calls the fastest are: real steps of all that fit, in CPU seconds."""

import dataclasses
import statistics
import time
from typing import Any

from placement_cases import NAMED, Case, TrainingStep, provenance
from placement_time import spread

from hf_trainopt.machine.devices import DeviceSpec, measured_cpu
from hf_trainopt.placement.plan.plan import PlacementPlan
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.plan.sizes import fastest_micro_batch, step_seconds
from hf_trainopt.placement.show.models import build_model
from hf_trainopt.placement.simulate.step_setup import model_loss


SHARES = (1.0, 0.75, 0.55, 0.3, 0.14)


@dataclasses.dataclass
class Entry:
    """A micro-batch with a plan.

    Args:
        size: Samples of the micro-batch.
        plan: What is recomputed.
        predicted: Seconds of a whole step.
    """

    size: int
    plan: PlacementPlan
    predicted: float
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> Any:
        return self.size, tuple(self.plan.stages.items())


class Grid:
    """All micro-batches that divide a case's batch, with the planners of their steps."""

    def __init__(self, case: Case, device: DeviceSpec):
        self.case, self.device = case, device
        self.sizes = {s: case.batch_size // s for s in range(1, case.batch_size + 1) if case.batch_size % s == 0}
        self._planners: dict[int, PlacementPlanner] = {}

    def planner(self, size: int) -> PlacementPlanner:
        if size not in self._planners:
            built = build_model(self.case.request, size, self.case.block_size, self.case.image_size)
            setup = dataclasses.replace(self.case.setup(self.device), accumulation_steps=self.sizes[size])
            self._planners[size] = PlacementPlanner(built.model, built.batch, setup, memory_rewrites="none")
        return self._planners[size]

    def entry(self, size: int, plan: PlacementPlan) -> Entry:
        replay = self.planner(size).replay(plan.stages, plan.rewrites)
        return Entry(size, plan, step_seconds(replay, self.sizes[size]))

    def fitting(self, budget: int) -> list[Entry]:
        """Return what fits: named placements, and the plan for the budget, of each micro-batch."""
        found = []
        for size in self.sizes:
            plans = [self.planner(size).named(name) for name in NAMED]
            try:
                plans.append(self.planner(size).for_budget(budget))
            except ValueError:
                continue
            found += [self.entry(size, plan) for plan in plans if plan.predicted_peak_bytes <= budget]
        return found


class Step(TrainingStep):
    """An optimizer step of several micro-batches."""

    def timed(self, entry: Entry) -> float:
        """Take a step; return its CPU seconds."""
        started, batch = time.process_time(), self.batch
        rows = zip(*(values.split(entry.size) for values in batch.values()), strict=True)
        pieces = [dict(zip(batch, piece, strict=True)) for piece in rows]
        with self.under(entry.plan):
            for piece in pieces:
                (model_loss(self.model, piece) / len(pieces)).backward()
        self.finish()
        return time.process_time() - started


def fastest(case: Case, rounds: int) -> dict[str, Any]:
    """Return the record of a case: for each budget what was chosen, and how it compares with the fastest that fits."""
    grid = Grid(case, measured_cpu())
    whole = grid.planner(case.batch_size).baseline.peak_bytes
    budgets = {share: int(share * whole) for share in SHARES}
    fitting = {share: grid.fitting(budget) for share, budget in budgets.items()}
    entries = {entry.key: entry for found in fitting.values() for entry in found}
    step = Step(case)
    for round_number in range(-1, rounds):  # the first one warms up
        order = list(entries.values())
        for entry in order[round_number % len(order) :] + order[: round_number % len(order)]:
            seconds = step.timed(entry)
            if round_number >= 0:
                entry.cpu_seconds.append(seconds)
    results = []
    for share, budget in budgets.items():
        if not fitting[share]:
            continue
        best = fastest_micro_batch(grid.planner, grid.sizes, budget)[0]
        chosen = entries[grid.entry(best.micro_batch, best.plan).key]
        fits = [entries[entry.key] for entry in fitting[share]]
        first = min(fits, key=lambda entry: statistics.median(entry.cpu_seconds))
        ratios = [ours / theirs for ours, theirs in zip(chosen.cpu_seconds, first.cpu_seconds, strict=True)]
        results.append(
            {"share": share, "budget_bytes": budget, "fitting": len({entry.key for entry in fits}),
             "fit_as_they_are": sum(grid.planner(size).baseline.peak_bytes <= budget for size in grid.sizes),
             "chosen": _told(chosen), "fastest": _told(first), "ratio": spread(ratios),
             "slowest_ratio": max(statistics.median(entry.cpu_seconds) for entry in fits)
             / statistics.median(first.cpu_seconds)}
        )  # fmt: skip
        print(f"{case.name}, {share:.0%}: {results[-1]['chosen']} {results[-1]['fastest']} {results[-1]['ratio']}")
    return {"case": case.name, "title": case.title, **provenance(), "rounds": rounds, "samples": case.batch_size,
            "budgets": results}  # fmt: skip


def _told(entry: Entry) -> dict[str, Any]:
    return {"micro_batch": entry.size, "plan": entry.plan.summary(), "predicted_seconds": entry.predicted,
            "cpu_seconds": spread(entry.cpu_seconds)}  # fmt: skip
