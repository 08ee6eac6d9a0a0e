"""Seconds of training steps: under each placement, and with placement off against stock `Trainer`."""

import statistics
import tempfile
import time
from typing import Any

import torch
from placement_cases import Case, TrainingStep, provenance
from placement_measure import all_plans

from hf_trainopt.machine.devices import measured_cpu
from hf_trainopt.placement.plan.plan import PlacementPlan


def spread(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "quartiles": [values[0], values[0]]}
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "quartiles": [quartiles[0], quartiles[2]]}


def time_case(case: Case, rounds: int) -> dict[str, Any]:
    """Return the record of step times: all placements take turns, in an order that shifts from round to round."""
    device = measured_cpu()
    plans = all_plans(case, device)
    applied = [PlacementPlan.from_dict(entry["plan"]) for entry in plans]
    step = TrainingStep(case)
    step.make_states()
    wall: list[list[float]] = [[] for _ in plans]
    cpu: list[list[float]] = [[] for _ in plans]
    for round_number in range(-1, rounds):
        for turn in range(len(plans)):
            index = (turn + round_number) % len(plans)
            with step.under(applied[index]):
                step()  # the heap is that of the step before: one that needed less has given memory back
                started = time.perf_counter(), time.process_time()
                step()
                taken = time.perf_counter() - started[0], time.process_time() - started[1]
            if round_number >= 0:  # the first round warms up
                wall[index].append(taken[0])
                cpu[index].append(taken[1])
    for index, entry in enumerate(plans):
        entry |= {
            "seconds": spread(wall[index]), "cpu_seconds": spread(cpu[index]),
            "wall_ratio": spread([a / b for a, b in zip(wall[index], wall[0], strict=True)]),
            "cpu_ratio": spread([a / b for a, b in zip(cpu[index], cpu[0], strict=True)]),
        }  # fmt: skip
        ratio, predicted = entry["cpu_ratio"], 1 + entry["extra_time_ratio"] + entry["rewritten_time_ratio"]
        print(
            f"{case.name}, {entry['placement']}: {ratio['median']:.3f} of none, predicted {predicted:.3f}", flush=True
        )
    measured = {"gflops": device.flops[torch.float32] / 1e9, "gigabytes_per_second": device.bandwidth / 1e9}
    return {"case": case.name, "title": case.title, **provenance(), "rounds": rounds, "measured_cpu": measured,
            "plans": plans}  # fmt: skip


def overhead(task_name: str, rounds: int, steps: int) -> dict[str, Any]:
    """Return the record of `EfficientTrainer` with placement unset against stock `Trainer`, which take turns."""
    from overhead import time_steps
    from tasks import TASKS, build

    task = TASKS[task_name]
    parts = build(task, seed=0)
    parts.pop("eval_dataset")
    parts.pop("compute_metrics", None)
    loops = {"stock": None, "unset": {"accumulation_policy": "fixed"}}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name in sorted(loops, reverse=bool(number % 2)):
                taken = time_steps(task, parts, loops[name], steps, folder)
                seconds[name].append(statistics.median(taken.values()))
    ratios = [ours / stock for ours, stock in zip(seconds["unset"], seconds["stock"], strict=True)]
    result = {"task": task_name, **provenance(), "rounds": rounds, "steps": steps, "clock": "CPU seconds of a step",
              "stock_seconds": spread(seconds["stock"]), "ratio": spread(ratios), "ratios": ratios}  # fmt: skip
    print(f"{task_name}: {result['ratio']}", flush=True)
    return result
