"""Peaks with inputs of recomputed layers on the host: predicted against real steps on a CPU.

Host and device are one memory here, so the copies of the host are NumPy's, which PyTorch's profiler doesn't see.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from placement_cases import Case, TrainingStep, provenance
from placement_measure import measured_apart, profiler_peak

from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.placement.plan.plan import PlacementPlan
from hf_trainopt.placement.recompute import offload as copies


# As fast a link as the memory has: the floor is what is looked at, and not whether a copy pays.
LINK = 10e9


def offloaded(case: Case) -> dict[str, Any]:
    """Return the record of a case: the least peaks without and with copies on the host."""
    device = dataclasses.replace(DEVICES["cpu"], link=LINK)
    entries = []
    for offload in (False, True):
        planner = case.planner("none", device, offload=offload)
        plan = planner.for_budget(planner.floor.peak_bytes)
        measured, on_host = measured_apart(_measure, case, plan)
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
