"""Where the time of a step goes: the CPU that issues it, the kernels that run, and what was predicted of both."""

import collections
import statistics
import time
import traceback
from typing import Any

from cases import wait_for_plans
from common import Context, DeviceStep, Record, synchronize
from placement_cases import Case
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from hf_trainopt.placement.plan.plan import PlacementPlan


# By case; a plan that there is not is left out.
PLANS = {
    "gpt2-small-bf16": ("none", "all", "sqrt", "75%, rewrites", "25%, rewrites"),
    "resnet50-224": ("none", "all"),
    "llama-bf16": ("none", "all", "50%, rewrites"),
}
KERNELS, NAME_CHARACTERS = 25, 80


class _Operators(TorchDispatchMode):
    """Counts the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def where_time_goes(context: Context, record: Record, case: Case) -> None:
    """Measure the plans of a case, as a part of its own."""
    with record.part(f"{case.name}: where the time goes") as part:
        entries = wait_for_plans(context, case.name, max(1.0, context.left - 5))["plans"]
        named = {name: entry for entry in entries for name in [entry["placement"], *entry["also"]]}
        step = DeviceStep(case, context.device)
        step.make_states()
        part |= {"title": case.title, "plans": []}
        for name in PLANS[case.name]:
            if name not in named:
                continue
            entry = named[name]
            if context.left < context.pick(4.0, 0.5):
                record.skip(f"{case.name}, {name}: where the time goes", f"{context.left:.0f} s are left")
                continue
            predicted = entry["baseline_seconds"] * (1 + entry["extra_time_ratio"] + entry["rewritten_time_ratio"])
            found = {"placement": name, "rewrites": entry["rewrites"], "predicted_seconds": predicted}
            try:
                with step.under(PlacementPlan.from_dict(entry["plan"])):
                    found |= measured(step, context.pick(5, 2), with_kernels=name == "none")
            except Exception:  # the other plans can still be measured
                record.fail(f"{case.name}, {name}: where the time goes", traceback.format_exc())
                step.optimizer.zero_grad()
                continue
            part["plans"].append(found)
            record.save()
        record.check(f"{case.name}: kernels were seen", all(plan["kernels"] > 0 for plan in part["plans"]))


def measured(step: DeviceStep, repeats: int, with_kernels: bool) -> dict[str, Any]:
    """Return seconds of host and device, and numbers of operators and kernels, of one step.

    Args:
        step: Under its plan.
        repeats: Steps on the clock.
        with_kernels: Whether the kernels that take longest are named.
    """
    step()  # fills the allocator's pools
    host, whole = [], []
    for _ in range(repeats):
        synchronize(step.device)
        started = time.perf_counter()
        step()
        host.append(time.perf_counter() - started)
        synchronize(step.device)
        whole.append(time.perf_counter() - started)
    with _Operators() as operators:
        step()
    found = {
        "host_seconds": statistics.median(host), "step_seconds": statistics.median(whole),
        "operators": operators.number,
    }  # fmt: skip
    return found | profiled(step, with_kernels)


def profiled(step: DeviceStep, with_kernels: bool) -> dict[str, Any]:
    """Return what the profiler saw of one step: kernels, copies and fills on a GPU, operators on a CPU.

    `device_seconds` is their sum, `span_seconds` is from the start of the first to the end of the last.
    """
    on_gpu = step.device.type == "cuda"
    synchronize(step.device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        synchronize(step.device)
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if (event.device_type() == DeviceType.CUDA) == on_gpu and not event.is_user_annotation()
    ]
    if not on_gpu:  # an operator's time contains that of those that it calls
        events = _outermost(events)
    taken = collections.defaultdict(list)
    for event in events:
        taken[event.name()].append(event.duration_ns())
    first = min((event.start_ns() for event in events), default=0)
    last = max((event.start_ns() + event.duration_ns() for event in events), default=0)
    found: dict[str, Any] = {
        "device_seconds": sum(map(sum, taken.values())) / 1e9, "span_seconds": (last - first) / 1e9,
        "kernels": len(events),
    }  # fmt: skip
    if with_kernels:
        longest = sorted(taken, key=lambda name: -sum(taken[name]))[:KERNELS]
        found["longest"] = [
            {"kernel": name[:NAME_CHARACTERS], "number": len(taken[name]), "milliseconds": sum(taken[name]) / 1e6}
            for name in longest
        ]
    return found


def _outermost(events: list[Any]) -> list[Any]:
    found, ends = [], {}
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns())):
        thread = event.start_thread_id()
        if event.start_ns() >= ends.get(thread, 0):
            found.append(event)
            ends[thread] = event.start_ns() + event.duration_ns()
    return found
