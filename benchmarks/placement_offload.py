"""Peaks with inputs of recomputed layers on the host: predicted against real steps on a CPU.

Host and device are one memory here, so the copies of the host are NumPy's, which PyTorch's profiler doesn't see.
"""

import dataclasses
import multiprocessing
from typing import Any

import numpy as np
import torch
from placement_cases import Case, TrainingStep, provenance
from placement_measure import profiler_peak

from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.placement.plan.plan import PlacementPlan
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.recompute import offload as copies
from hf_trainopt.placement.show.models import build_model


# As fast a link as the memory has: the floor is what is looked at, and not whether a copy pays.
LINK = 10e9


def offloaded(case: Case) -> dict[str, Any]:
    """Return the record of a case: the least peaks without and with copies on the host."""
    setup = case.setup(dataclasses.replace(DEVICES["cpu"], link=LINK))
    entries = []
    for offload in (False, True):
        built = build_model(case.request, case.batch_size, case.block_size, case.image_size)
        planner = PlacementPlanner(built.model, built.batch, setup, memory_rewrites="none", offload=offload)
        plan = planner.for_budget(planner.floor.peak_bytes)
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_measure, args=(case, plan, queue))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"{case.name}: the process ended with {child.exitcode}.")
        measured, on_host = queue.get()
        entries.append(
            {"offload": offload, "baseline_bytes": planner.baseline.peak_bytes, "plan": plan.to_dict(),
             "replayed_bytes": plan.predicted_peak_bytes, "profiler_bytes": measured,
             "predicted_host_bytes": plan.details["host_bytes"], "host_bytes": on_host,
             "stages_on_host": sum(choice.offload for choice in plan.stages.values())}
        )  # fmt: skip
        print(f"{case.name}, offload {offload}: {plan.predicted_peak_bytes}, measured {measured}", flush=True)
    return {"case": case.name, "title": case.title, **provenance(), "runs": entries}


def _measure(case: Case, plan: PlacementPlan, queue: Any) -> None:
    """Put the peak of a step, and the bytes that it copied to the host, into a queue."""
    step = TrainingStep(case)
    step.make_states()
    copied = [0]

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        copied[0] += tensor.nbytes
        return torch.from_numpy(np.empty(tuple(tensor.shape), dtype=np.float32)).copy_(tensor)

    copies.to_host = to_host
    with step.under(plan):
        queue.put((profiler_peak(step), copied[0]))
