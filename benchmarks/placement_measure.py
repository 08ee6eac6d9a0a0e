"""Peaks of real training steps: what the profiler, our tracker and the operating system say."""

import ctypes
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from placement_cases import BUDGETS, CASES, NAMED, Case, TrainingStep, provenance
from torch.utils.flop_counter import FlopCounterMode

from hf_trainopt.machine.devices import DeviceSpec
from hf_trainopt.placement.plan.chain import path_of
from hf_trainopt.placement.plan.plan import PlacementPlan
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.simulate.scratch import cpu_scratch
from hf_trainopt.placement.simulate.tracker import StorageTracker


# With these glibc gives memory back as soon as it is freed, so that the resident set follows the tensors.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
QUIET = {"KINETO_LOG_LEVEL": "99"}
REWRITES = ("none", "auto")


# ---- Plans ---------------------------------------------------------------------------------------------------------


def plans_for(
    planner: PlacementPlanner, budgets: Sequence[str] = BUDGETS, points: int = 0
) -> list[tuple[str, PlacementPlan]]:
    """Return the named placements, those of the budgets, and as many of the frontier.

    A budget that cannot be had becomes the floor.
    """
    plans = []
    if not planner.allowed[0].names():
        plans = [(policy, planner.named(policy)) for policy in NAMED]
    for budget in budgets:
        try:
            plans.append((budget, planner.for_budget(budget)))
        except ValueError:
            plans.append(("floor", planner.for_budget(f"{planner.floor.peak_bytes}B")))
            break
    if points:
        plans += [(f"frontier {number}", plan) for number, plan in enumerate(planner.frontier(points))]
    return plans


def all_plans(
    case: Case,
    device: DeviceSpec | None = None,
    budgets: Sequence[str] = BUDGETS,
    allowed: Sequence[str] = REWRITES,
    points: int = 0,
) -> list[dict[str, Any]]:
    """Return the plans of a case with what was predicted for them, equal ones once."""
    found: dict[Any, dict[str, Any]] = {}
    for rewrites in allowed:
        planner = case.planner(rewrites, device)
        if rewrites == "auto" and len(planner.allowed) == 1:
            continue
        for name, plan in plans_for(planner, budgets, points):
            key = (plan.rewrites, tuple(plan.stages.items()))
            label = name if rewrites == "none" else f"{name}, rewrites"
            if key in found:
                if rewrites == "none":
                    found[key]["also"].append(label)
                continue
            replay = planner.replay(plan.stages, plan.rewrites)
            found[key] = {
                "placement": label, "also": [], "memory_rewrites": rewrites, "plan": plan.to_dict(),
                "rewrites": plan.rewrites.names(), "counts": plan.counts(),
                "chain_bytes": chain_bytes(planner, plan), "replayed_bytes": plan.predicted_peak_bytes,
                "replayed_flops": replay.cost.flops, "extra_time_ratio": plan.extra_time_ratio,
                "rewritten_time_ratio": plan.details["rewritten_time_ratio"],
                "extra_flops_ratio": plan.details["extra_flops_ratio"],
                "baseline_seconds": planner.step_seconds, "baseline_flops": planner.flops,
            }  # fmt: skip
    return list(found.values())


def chain_bytes(planner: PlacementPlanner, plan: PlacementPlan) -> int | None:
    """Return what the solver's chain of stages says the peak of a plan is."""
    chain = planner.chains()[plan.rewrites]
    path = path_of(chain, plan.stages)
    return None if path is None else chain.peak(path)


# ---- Peaks ---------------------------------------------------------------------------------------------------------


def profiler_peak(step: TrainingStep) -> int:
    """Return the most live bytes in a step by the profiler's record of every allocation and release."""
    resident = step.resident_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return resident + peak


def tracker_peak(step: TrainingStep) -> int:
    """Return the most live bytes in a step by our tracker, on real tensors."""
    tracker = StorageTracker(scratch=cpu_scratch)
    tracker.count(step.resident(), "parameters")
    with tracker:
        step()
    return tracker.peak_bytes


def process_peak(step: TrainingStep) -> int:
    """Return the high-water mark of the process in a step, less what was resident before and is no tensor."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return _status("VmHWM") - before + step.resident_bytes()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def counted_flops(step: TrainingStep) -> int:
    """Return the FLOPs of a step by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def _measure(case: Case, plan: PlacementPlan, queue: Any) -> None:
    step = TrainingStep(case)
    step.make_states()
    with step.under(plan):
        queue.put(
            {"profiler_bytes": profiler_peak(step), "tracker_bytes": tracker_peak(step),
             "process_bytes": process_peak(step), "resident_bytes": step.resident_bytes()}
        )  # fmt: skip


def measured_apart(measure: Callable[[Case, PlacementPlan, Any], None], case: Case, plan: PlacementPlan) -> Any:
    """Return what `measure` puts into its queue, in a process of its own that inherits the imports."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=measure, args=(case, plan, queue))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{case.name}, {plan.policy}: the process ended with {child.exitcode}.")
    return queue.get()


def measure_peaks(case: Case, plans: list[dict[str, Any]]) -> None:
    """Add what real steps take to plans."""
    for entry in plans:
        entry |= measured_apart(_measure, case, PlacementPlan.from_dict(entry["plan"]))
        print(f"{case.name}, {entry['placement']}: {_summary(entry)}", flush=True)


def _summary(entry: dict[str, Any]) -> str:
    replayed = entry["replayed_bytes"]
    return f"replayed {replayed / 2**20:.1f} MiB; " + ", ".join(
        f"{name} {100 * (replayed / entry[f'{name}_bytes'] - 1):+.2f} %" for name in ("profiler", "tracker", "process")
    )


# ---- Subcommands ---------------------------------------------------------------------------------------------------


def predict(case: Case, threads: int) -> dict[str, Any]:
    """Return the record of predicted against real peaks of one case."""
    plans = all_plans(case)
    record = {"case": case.name, "title": case.title, **provenance(), "malloc": MALLOC}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plans.json"
        path.write_text(json.dumps({"case": case.name, "threads": threads, "plans": plans}))
        # A fresh process: the malloc settings are read when it starts.
        subprocess.run([sys.executable, __file__, str(path)], check=True, env={**os.environ, **MALLOC, **QUIET})
        plans = json.loads(path.read_text())["plans"]
    return {**record, "plans": plans}


def flops(case: Case) -> dict[str, Any]:
    """Return the record of counted against replayed FLOPs of the named placements of one case."""
    plans = [entry for entry in all_plans(case) if entry["memory_rewrites"] == "none"]
    step = TrainingStep(case)
    for entry in plans:
        with step.under(PlacementPlan.from_dict(entry["plan"])):
            entry["counted_flops"] = counted_flops(step)
        entry["exact"] = entry["counted_flops"] == entry["replayed_flops"]
        print(f"{case.name}, {entry['placement']}: {entry['counted_flops']}, exact: {entry['exact']}", flush=True)
    return {"case": case.name, "title": case.title, **provenance(), "plans": plans}


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    measure_peaks(CASES[task["case"]], task["plans"])
    Path(sys.argv[1]).write_text(json.dumps(task))
