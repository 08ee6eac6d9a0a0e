"""Makes the plans that exactness, memory and time need, on the CPU, several cases at a time."""

import multiprocessing
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from cases import BUDGETS, COMPILED, EXACTNESS_BUDGETS, FRONTIER_POINTS, cases, exactness_cases, save_plans
from common import Context, Record
from placement_cases import Case
from placement_measure import all_plans

from hf_trainopt.machine.devices import DEVICES


def run(context: Context, record: Record, prepared: Any) -> None:
    torch.set_num_threads(1)
    waiting, small = cases(context), exactness_cases(context)
    # Two cores are for the stage that has the GPU.
    workers = max(1, min(len(waiting) + len(small), (os.cpu_count() or 1) - 2))
    # Forked: they inherit what is imported. No GPU is to be seen here, so that none is in a state that forking breaks.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        running = {pool.submit(small_plans_of, case): case for case in small}
        running |= {pool.submit(plans_of, context, case): case for case in waiting}
        for done in as_completed(running):
            name = running[done].name
            try:
                values = done.result()
            except Exception:
                values = {"error": traceback.format_exc()}
                record.fail(name, values["error"])
            save_plans(context, name, values)
            if running[done] in small:  # no page shows them
                continue
            record.values["parts"][name] = values | {
                "plans": [
                    {key: value for key, value in entry.items() if key != "plan"} for entry in values.get("plans", [])
                ]
            }
            record.save()
    if context.rehearse:
        for case in waiting:
            with_gpu_rules(record, case)
    record.check("there are plans for every case", all(part["plans"] for part in record.values["parts"].values()))


def with_gpu_rules(record: Record, case: Case) -> None:
    """Check that a step can be replayed as a GPU would run it: other kernels of attention and dropout than a CPU's."""
    name, found = f"{case.name}: a step can be replayed for an H100", False
    try:
        found = case.planner("none", DEVICES["h100"]).baseline.peak_bytes > 0
    except Exception:
        record.fail(name, traceback.format_exc())
    record.check(name, found)


def small_plans_of(case: Case) -> dict[str, Any]:
    """Return the plans that the exactness checks follow."""
    return {"plans": all_plans(case, budgets=EXACTNESS_BUDGETS, allowed=("none",))}


def plans_of(context: Context, case: Case) -> dict[str, Any]:
    """Return the plans of a case, with and without rewrites, and what was predicted for them."""
    began, started = time.monotonic(), time.process_time()
    toy_points, full_points = 1, FRONTIER_POINTS
    points = context.pick(full_points, toy_points) if case.name == COMPILED else 0
    plans = all_plans(case, budgets=context.pick(BUDGETS, BUDGETS[:2]), points=points)
    return {
        "title": case.title,
        "device": case.device,
        "plans": plans,
        "cpu_s": round(time.process_time() - started, 2),
        "part_s": round(time.monotonic() - began, 2),
    }
