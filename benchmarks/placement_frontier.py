"""Frontiers of peak against time to recompute: ours, the named placements, and torch's budget knob."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from placement_cases import Case, TrainingStep, provenance
from placement_measure import profiler_peak
from placement_time import spread
from torch.utils._python_dispatch import TorchDispatchMode

from hf_trainopt.placement.plan.plan import PlacementPlan
from hf_trainopt.placement.plan.planner import PlacementPlanner


# Cuts in % of the step's peak at extra FLOPs in %, from replays of placements made by hand (issue 3 and its notes).
FIGURES = {
    "gpt2-small-fp32": [
        ("every block", "none", 55.0, 23.8),
        ("every 2nd block", "none", 27.5, 11.9),
        ("loss chunks and fused GELU", "auto", 53.1, 0.0),
        ("these and selective checkpointing", "auto", 64.1, 0.0),
        ("these and every block", "auto", 83.2, 23.8),
    ],
    "resnet50-224": [("every block", "none", 53.2, 32.7), ("the best four blocks", "none", 26.6, 7.4)],
}
_PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}
# `memory_budget`, and the share of the peak that it is.
BUDGETS = {"75%": 0.75, "50%": 0.5, "35%": 0.35, "25%": 0.25}
# Of the knob: a share of what is saved for the backward pass.
KNOB = (1.0, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0)


def point(plan: PlacementPlan) -> dict[str, Any]:
    return {
        "policy": plan.policy, "peak_bytes": plan.predicted_peak_bytes, "extra_time_ratio": plan.extra_time_ratio,
        "extra_flops_ratio": plan.details["extra_flops_ratio"], "rewrites": plan.rewrites.names(),
        "rewritten_time_ratio": plan.details["rewritten_time_ratio"], "counts": plan.counts(),
        "gap": plan.optimality_gap,
    }  # fmt: skip


def frontier(case: Case, points: int) -> dict[str, Any]:
    """Return the record of our frontiers and of the named placements, replayed on shapes."""
    started = time.perf_counter()
    stock = case.planner("none")
    policies = ["all", "sqrt", *(f"every_{n}" for n in range(2, len(stock.stages) + 1))]
    record = {
        "case": case.name, "title": case.title, **provenance(seed=None), "device": case.device, "stages": stock.stages,
        "baseline_bytes": stock.baseline.peak_bytes, "flops": stock.flops,
        "named": [point(stock.named(policy)) for policy in policies],
    }  # fmt: skip
    record["none"] = _front(stock, points, record["named"])
    planners = {"none": stock}
    names = stock.available.names()
    if names:
        planners["auto"] = case.planner("auto")
        rewritten = case.planner(",".join(names))
        record["named_rewritten"] = [point(rewritten.named(policy)) for policy in ("none", *policies)]
        record["auto"] = _front(planners["auto"], points, record["named_rewritten"])
    record["figures"] = [
        {
            "what": what,
            "cut": cut,
            "flops": flops,
            "memory_rewrites": rewrites,
            **_beat(planners[rewrites], cut, flops),
        }
        for what, rewrites, cut, flops in FIGURES.get(case.name, ())
    ]
    record["seconds"] = round(time.perf_counter() - started, 1)
    print(f"{case.name}: {len(record['none'])} and {len(record.get('auto', ()))} plans in {record['seconds']} s")
    return record


def budgets(case: Case) -> dict[str, Any]:
    """Return the record of the plans for `BUDGETS`, `None` where a budget is below the floor."""
    record = {"case": case.name, "title": case.title, **provenance(seed=None), "device": case.device}
    for rewrites in ("none", "auto"):
        planner = case.planner(rewrites)
        peak, floor = planner.baseline.peak_bytes, planner.floor.peak_bytes
        record |= {"baseline_bytes": peak, f"{rewrites} floor_bytes": floor}
        record[rewrites] = {
            budget: point(planner.for_budget(budget)) if share * peak >= floor else None
            for budget, share in BUDGETS.items()
        }
    return record


def _front(planner: PlacementPlanner, points: int, rivals: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return our frontier; what others need is among the budgets that are tried, or it would be compared unfairly."""
    for peak in {rival["peak_bytes"] for rival in rivals}:
        if peak >= planner.floor.peak_bytes:
            planner.for_budget(f"{peak}B")
    return [point(plan) for plan in planner.frontier(points)]


def _beat(planner: PlacementPlanner, cut: float, flops: float) -> dict[str, Any]:
    """Return our plan for the same peak, and the one with the least peak at no more FLOPs."""
    share = round(100 * (1 - cut / 100), 3)
    try:
        same = point(planner.for_budget(f"{share}%"))
    except ValueError:
        same = None
    # The figures are rounded to a tenth of a percent.
    cheap = [plan for plan in planner.frontier(1) if 100 * plan.details["extra_flops_ratio"] <= flops + 0.05]
    least = min(cheap, key=lambda plan: plan.predicted_peak_bytes)
    return {"same_peak": same, "same_flops": point(least)}


# ---- Torch's knob --------------------------------------------------------------------------------------------------


def knob(case: Case, rounds: int, points: int, values: Sequence[float] | None = None) -> dict[str, Any]:
    """Return the record of `activation_memory_budget` against our plans, in real steps of one model."""
    step = TrainingStep(case)
    step.make_states()
    record = {"case": case.name, "title": case.title, **provenance(), "rounds": rounds, "eager": _measured(step)}
    record["knob"] = [{"knob": value, **_compiled(step, value, rounds)} for value in values or KNOB]
    for rewrites in ("none", "auto"):
        planner = case.planner(rewrites)
        record[rewrites] = []
        for plan in planner.frontier(points):
            eager = _seconds(step, rounds)
            with step.under(plan):
                entry = point(plan) | _measured(step)
                ratios = [ours / stock for ours, stock in zip(_seconds(step, rounds), eager, strict=True)]
            record[rewrites].append(entry | {"time_ratio": spread(ratios)})
    return record


def _compiled(step: TrainingStep, value: float, rounds: int) -> dict[str, Any]:
    """Measure steps of which forward and backward passes are compiled with one value of the knob."""
    torch._dynamo.reset()
    eager, eager_model = _seconds(step, rounds), step.model
    with torch._functorch.config.patch(activation_memory_budget=value):
        step.model = torch.compile(eager_model, backend="aot_eager_decomp_partition")
        try:
            step()
            found = _measured(step, compiled=True)
            ratios = [ours / stock for ours, stock in zip(_seconds(step, rounds), eager, strict=True)]
        finally:
            step.model = eager_model
    print(f"knob {value}: {found}", flush=True)
    return found | {"time_ratio": spread(ratios)}


def _seconds(step: TrainingStep, rounds: int) -> list[float]:
    taken = []
    for _ in range(rounds + 1):
        started = time.process_time()
        step()
        taken.append(time.process_time() - started)
    return taken[1:]


class _Products(TorchDispatchMode):
    """Counts matrix products and their FLOPs.

    Profilers count those as well whose results a selective checkpoint has kept; a mode sees only what runs.
    """

    def __init__(self):
        super().__init__()
        self.count = self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in _PRODUCTS:
            left, right = args[-2:]
            self.count += 1
            self.flops += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def _measured(step: TrainingStep, compiled: bool = False) -> dict[str, Any]:
    """Return peak, FLOPs of matrix products and their number."""
    peak = profiler_peak(step)
    if not compiled:
        with _Products() as products:
            step()
        return {"peak_bytes": peak, "flops": products.flops, "products": products.count}
    # A compiled step cannot run under a mode, and keeps nothing that it does not recompute.
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, record_shapes=True, with_flops=True) as profile:
        step()
    found = [entry for entry in profile.key_averages() if entry.key in ("aten::mm", "aten::addmm", "aten::bmm")]
    return {"peak_bytes": peak, "flops": sum(entry.flops for entry in found),
            "products": sum(entry.count for entry in found)}  # fmt: skip
