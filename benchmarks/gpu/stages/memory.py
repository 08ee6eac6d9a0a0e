"""Predicted peaks against the allocator's, and what comes on top of them: context, workspaces, fragmentation."""

import contextlib
from collections.abc import Container, Sequence
from typing import Any

import torch
from cases import cases, wait_for_plans
from common import Context, DeviceStep, Record, peak_of, release, synchronize
from placement_cases import Case

from hf_trainopt.placement.plan.plan import PlacementPlan


# A measured peak further above the prediction is what the Trainer warns of.
TOLERANCE = 1.05
# Shares of the predicted peak that the allocator is limited to, to see with how little a plan runs.
LIMITS = (1.0, 1.01, 1.02, 1.04, 1.07, 1.1, 1.2)
LIMITED = ("none", "50%", "floor")


def run(context: Context, record: Record, prepared: Any) -> None:
    measure_cases(context, record, cases(context))


def measure_cases(
    context: Context, record: Record, waiting: Sequence[Case], only: Container[str] = (),
    limited: Container[str] = LIMITED,
) -> None:  # fmt: skip
    """Measure the plans of all cases.

    Args:
        context: Of the stage.
        record: Where the peaks are noted.
        waiting: The cases, most valuable first.
        only: Names of the plans to measure; empty: all.
        limited: Names of the plans for which the least limit is looked for.
    """
    with record.part("context") as part:
        part |= what_the_context_takes(context)
    for index, case in enumerate(waiting):
        if context.left < context.pick(6.0, 1.0):
            record.skip(case.name, f"{context.left:.0f} s are left")
            continue
        with record.part(case.name) as part:
            plans = wait_for_plans(context, case.name, context.left - 2)
            # A case may take more than its share while there is time; none takes all that is left.
            share = context.left / (len(waiting) - index)
            entries = [
                entry
                for entry in plans["plans"]
                if not only or any(name in only for name in [entry["placement"], *entry["also"]])
            ]
            measure(context, record, case, entries, part, min(context.left, 1.5 * share), limited)
    with record.part("context at the end") as part:
        part |= what_the_context_takes(context)


def measure(
    context: Context, record: Record, case: Case, plans: list[dict[str, Any]], part: dict[str, Any], seconds: float,
    limited: Container[str],
) -> None:  # fmt: skip
    """Measure the peak of each plan of a case, in so many seconds at most."""
    part["title"], part["plans"] = case.title, []
    until = context.left - seconds
    step = DeviceStep(case, context.device)
    step.make_states()
    part["resident_bytes"] = step.resident_bytes()
    for entry in plans:
        if entry["placement"].startswith("frontier"):
            continue  # for step times
        if context.left < until:
            record.skip(f"{case.name}, {entry['placement']}", f"its {seconds:.0f} s are over")
            continue
        plan = PlacementPlan.from_dict(entry["plan"])
        found = {
            "placement": entry["placement"], "also": entry["also"], "rewrites": entry["rewrites"],
            "summary": plan.summary()[:200], "predicted_bytes": entry["replayed_bytes"],
        }  # fmt: skip
        part["plans"].append(found)
        with step.under(plan):
            found |= peak_of(step)
            found["measured_over_predicted"] = found["peak_bytes"] / found["predicted_bytes"]
            if "reserved_bytes" in found:
                found["reserved_over_predicted"] = found["reserved_bytes"] / found["predicted_bytes"]
            if context.on_gpu and any(name in limited for name in [entry["placement"], *entry["also"]]):
                found["runs_within"] = least_limit(step, found["predicted_bytes"])
        record.check(
            f"{case.name}, {entry['placement']}: at most {TOLERANCE} of the prediction",
            found["measured_over_predicted"] <= TOLERANCE,
        )
        print(
            f"{case.name}, {entry['placement']}: {found['measured_over_predicted']:.4f} of the prediction", flush=True
        )
        record.save()


def what_the_context_takes(context: Context) -> dict[str, Any]:
    """Return the bytes that are gone besides tensors, before and after a first product and a first convolution."""
    device = context.device
    if device.type != "cuda":
        return {"why_empty": "a CPU has no context"}
    torch.empty(1, device=device)
    found = {"after_start": _taken(device)}
    a = torch.randn(256, 256, device=device, requires_grad=True)
    (a @ a).sum().backward()
    found["after_a_product"] = _taken(device)
    torch.nn.functional.conv2d(a.view(1, 4, 128, 128), torch.randn(4, 4, 3, 3, device=device), padding=1)
    found["after_a_convolution"] = _taken(device)
    return found


def _taken(device: torch.device) -> dict[str, int]:
    synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return {
        "total_bytes": total, "outside_bytes": total - free - reserved, "reserved_bytes": reserved,
        "allocated_bytes": torch.cuda.memory_allocated(device),
    }  # fmt: skip


def least_limit(step: DeviceStep, predicted: int) -> float | None:
    """Return the least of `LIMITS` with which steps run where the allocator has no more; `None`: with none of them."""
    device = step.device
    total = torch.cuda.get_device_properties(device).total_memory
    for limit in LIMITS:
        step.optimizer.zero_grad()
        release(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * predicted / total), device)
        try:
            for _ in range(2):
                step()
            synchronize(device)
            return limit
        except torch.OutOfMemoryError:
            continue
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            with contextlib.suppress(RuntimeError):
                step.optimizer.zero_grad()
    return None
