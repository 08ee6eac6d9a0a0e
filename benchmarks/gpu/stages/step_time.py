"""Step times under each placement, against the roofline, stock checkpointing and `torch.compile`; where the time goes.

Plans take turns, in an order that shifts from round to round. Seconds are between device events.
"""

import collections
import contextlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from cases import TIMED, cases, wait_for_plans
from common import Context, DeviceStep, Record, peak_of, release, spread, synchronize, timed
from overhead import INTERVAL, LOOPS, MEASURED, STOCK, WINDOWS
from placement_cases import Case
from run import REPOSITORY
from tasks import TokenBlocks
from where import where_time_goes

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.accumulation import controller
from hf_trainopt.machine.devices import DeviceSpec
from hf_trainopt.placement.plan.plan import PlacementPlan
from hf_trainopt.placement.recompute.apply import apply_placement


STOCK_CHECKPOINTING = "stock checkpointing"
KNOB = (0.5, 0.25)


def run(context: Context, record: Record, prepared: Any) -> None:
    transformers.logging.set_verbosity_error()
    ceilings = measured_ceilings(context)
    record.values["measured_ceilings"] = ceilings
    waiting = cases(context)[:TIMED]
    for case in waiting:
        where_time_goes(context, record, case)
    for index, case in enumerate(waiting):
        if context.left < context.pick(6.0, 1.0):
            record.skip(case.name, f"{context.left:.0f} s are left")
            continue
        with record.part(case.name) as part:
            # A case may take more than its share while there is time.
            share = context.pick(1.3 * context.left / (len(waiting) - index), 60.0)
            time_case(context, record, case, part, min(context.left - 2, share), ceilings)
    if context.left < context.pick(12.0, 1.0):
        record.skip("loops of the Trainer", f"{context.left:.0f} s are left")
    else:
        with record.part("loops of the Trainer") as part:
            loops(context, record, part, context.pick(16.0, context.left))
    # Last: what compiling takes is not known, and what is cut off in the middle loses nothing else.
    compile_part(context, record, waiting[0])


def measured_ceilings(context: Context) -> dict[str, float]:
    """Return what `environment` has measured, in this run or in an earlier one; empty without it."""
    folders = [context.output] if context.rehearse else [context.output, REPOSITORY / "benchmarks/results/gpu"]
    found = next((path for folder in folders if (path := folder / "environment.json").exists()), None)
    if found is None:
        return {}
    with contextlib.suppress(ValueError, KeyError):
        parts = json.loads(found.read_text())["parts"]
        return {
            "bf16_flops": 1e12 * parts["matrix products"]["teraflops"]["bfloat16"]["median"],
            "fp32_flops": 1e12 * parts["matrix products"]["teraflops"]["float32"]["median"],
            "bytes_per_second": 1e9 * parts["copies"]["gigabytes_per_second"]["median"],
        }
    return {}


# ---- Placements ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stock_checkpointing(step: DeviceStep) -> Iterator[None]:
    """Context in which the model checkpoints as transformers or timm do it themselves."""
    model = step.model
    # The second name is that of transformers before 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        disable()


def time_case(
    context: Context, record: Record, case: Case, part: dict[str, Any], seconds: float, ceilings: dict[str, float]
) -> None:
    """Time all plans of a case, round by round, as long as there is time."""
    until = context.left - seconds
    entries = wait_for_plans(context, case.name, max(1.0, seconds - 5))["plans"]
    entries = [entry for entry in entries if not entry["placement"].startswith("frontier")]
    step = DeviceStep(case, context.device)
    step.make_states()
    contexts = {entry["placement"]: PlacementPlan.from_dict(entry["plan"]) for entry in entries}
    taken: dict[str, list[float]] = {name: [] for name in [*contexts, STOCK_CHECKPOINTING]}
    names, repeats = list(taken), context.pick(2, 1)
    if context.on_gpu:  # a round is not broken off
        predicted = sum(
            entry["baseline_seconds"] * (1 + entry["extra_time_ratio"] + entry["rewritten_time_ratio"])
            for entry in entries
        )
        needed = 1.5 * (1 + repeats) * predicted + 1.0
        if context.left < needed:
            record.skip(case.name, f"{context.left:.0f} s are left, a round takes {needed:.0f} s")
            return
    rounds = 0
    for number in range(-1, context.pick(3, 1)):  # the first warms up
        started = context.left
        for turn in range(len(names)):
            name = names[(turn + number) % len(names)]
            with (
                stock_checkpointing(step)
                if name == STOCK_CHECKPOINTING
                else apply_placement(step.model, contexts[name])
            ):
                step()  # the allocator's pools are those of this plan
                found = timed(step, repeats, context.device)
            if number == 0:
                taken[name].clear()  # what the round of the warm-up has said counts only where no other follows
            taken[name].append(statistics.median(found))
        rounds += number >= 0
        _write(part, case, entries, taken, rounds, ceilings, context.spec)
        record.save()
        if context.left - (started - context.left) < until:
            break
    del step
    record.check(f"{case.name}: every placement was timed", all(taken.values()))


def _write(
    part: dict[str, Any], case: Case, entries: list[dict[str, Any]], taken: dict[str, list[float]], rounds: int,
    ceilings: dict[str, float], spec: DeviceSpec,
) -> None:  # fmt: skip
    none = taken["none"]
    dtype = case.autocast_dtype or torch.float32
    base = entries[0]
    flops, median = base["baseline_flops"], statistics.median(none)
    part |= {
        "title": case.title, "rounds": rounds, "device_of_the_plans": spec.name,
        "model_flops": flops, "predicted_seconds": base["baseline_seconds"], "seconds": spread(none),
        "mfu_by_data_sheet": flops / median / (spec.flops.get(dtype) or spec.flops[torch.float32]),
    }  # fmt: skip
    ceiling = ceilings.get("bf16_flops" if dtype == torch.bfloat16 else "fp32_flops")
    if ceiling:
        part["mfu_by_measured_rate"] = flops / median / ceiling
    if case.block_size is not None:
        part["tokens_per_second"] = case.batch_size * case.block_size / median
    else:
        part["images_per_second"] = case.batch_size / median
    part["plans"] = []
    for entry in entries:
        name = entry["placement"]
        part["plans"].append(
            {"placement": name, "also": entry["also"], "rewrites": entry["rewrites"], "seconds": spread(taken[name]),
             "ratio": spread([a / b for a, b in zip(taken[name], none, strict=False)]),
             "predicted_ratio": 1 + entry["extra_time_ratio"] + entry["rewritten_time_ratio"],
             "predicted_bytes": entry["replayed_bytes"], "extra_flops_ratio": entry["extra_flops_ratio"]}
        )  # fmt: skip
    stock = taken[STOCK_CHECKPOINTING]
    part[STOCK_CHECKPOINTING] = {
        "seconds": spread(stock), "ratio": spread([a / b for a, b in zip(stock, none, strict=False)])
    }  # fmt: skip


# ---- torch.compile -------------------------------------------------------------------------------------------------


def compile_part(context: Context, record: Record, case: Case) -> None:
    """Measure `torch.compile` with values of its budget, and the fastest plans of ours that need no more memory."""
    needed = context.pick(40.0, 0.0)  # for the first value: what compiling GPT-2 Small takes
    with record.part("torch.compile") as part:
        plans = wait_for_plans(context, case.name, max(1.0, context.left - 2))["plans"]
        step = DeviceStep(case, context.device)
        step.make_states()
        part |= {"case": case.name, "backend": context.pick("inductor", "aot_eager_decomp_partition"), "values": []}
        for value in KNOB[: context.pick(2, 1)]:
            if context.left < needed + context.pick(8.0, 0.0):
                record.skip(f"torch.compile, budget {value}", f"{context.left:.0f} s are left, {needed:.0f} s needed")
                continue
            started = time.monotonic()
            found = compiled(context, step, value, part["backend"])
            needed = context.pick(1.0, 0.0) * (time.monotonic() - started)
            # Ours with the least predicted time that needs no more, and no more than the step as it is.
            fitting = [entry for entry in plans if entry["replayed_bytes"] <= found["peak_bytes"]]
            if fitting:
                best = min(fitting, key=lambda entry: entry["extra_time_ratio"] + entry["rewritten_time_ratio"])
                with step.under(PlacementPlan.from_dict(best["plan"])):
                    step()
                    ours = timed(step, context.pick(6, 1), context.device)
                    found["ours_at_no_more"] = {
                        "placement": best["placement"], "rewrites": best["rewrites"], "seconds": spread(ours),
                        **peak_of(step),
                    }  # fmt: skip
            part["values"].append(found)
            record.save()
        part["seconds_eager"] = spread(timed(step, context.pick(6, 1), context.device))
        part["eager"] = peak_of(step)
        record.check("torch.compile: measured or left out for lack of time", bool(part["values"]) or context.on_gpu)


def compiled(context: Context, step: DeviceStep, value: float, backend: str) -> dict[str, Any]:
    """Return time and peak of compiled steps with one value of the knob."""
    torch._dynamo.reset()
    eager = step.model
    started = time.monotonic()
    with torch._functorch.config.patch(activation_memory_budget=value):
        step.model = torch.compile(eager, backend=backend)
        try:
            step()
            synchronize(context.device)
            found: dict[str, Any] = {"budget": value, "compile_s": round(time.monotonic() - started, 1)}
            step()
            found["seconds"] = spread(timed(step, context.pick(6, 1), context.device))
            if context.on_gpu:
                found |= peak_of(step)
            else:  # the tracker cannot follow compiled code
                from placement_measure import profiler_peak

                found["peak_bytes"] = profiler_peak(step)
        finally:
            step.model = eager
    release(context.device)
    return found


# ---- The loop ------------------------------------------------------------------------------------------------------


class StepEvents(transformers.TrainerCallback):
    """Marks the end of each optimizer step, on the device; counts synchronisations in some steps.

    Args:
        device: Which.
        watched: Optimizer steps in which synchronisations are counted; they are not timed.
    """

    def __init__(self, device: torch.device, watched: range):
        self.device, self.watched, self.marks = device, watched, []

    def on_step_begin(self, args, state, control, **kwargs):
        if self.device.type == "cuda" and state.global_step in self.watched:
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> dict[int, float]:
        """By number of the step, from 1; without the first ones and those that were watched."""
        synchronize(self.device)

        def between(before, after):
            return before.elapsed_time(after) / 1000 if self.device.type == "cuda" else after - before

        first = self.watched.stop + 2
        return {n: between(self.marks[n - 2], self.marks[n - 1]) for n in range(first, len(self.marks) + 1)}


def loops(context: Context, record: Record, part: dict[str, Any], seconds: float) -> None:
    """Time steps of k = 2 of stock `Trainer`, of our windows at constant k, and with gradient statistics."""
    until = context.left - seconds
    controller.STARTUP_WINDOWS = 0  # the first 16 steps of a run, all of them measured, are left out
    case = cases(context)[0]
    with context.device:
        model, _ = case.real()
    tokens = torch.randint(0, 300, (4096 * case.block_size,)).numpy()
    data = TokenBlocks(tokens, case.block_size)
    steps, watched = context.pick(18, 8), range(2, 4)
    ratios: dict[str, list[float]] = {WINDOWS: [], MEASURED: []}
    stock_seconds: list[float] = []
    part["synchronisations_per_step"], part["where"] = {}, {}
    for index in range(context.pick(4, 1)):
        started = context.left
        order = list(LOOPS) if index % 2 else list(reversed(LOOPS))
        taken = {
            loop: train_steps(context, case, model, data, LOOPS[loop], steps, watched, part, loop) for loop in order
        }
        stock_seconds.append(statistics.median(taken[STOCK].values()))
        ratios[WINDOWS].append(statistics.median(taken[WINDOWS].values()) / stock_seconds[-1])
        # The second step of a run is the first that is measured, so those of even number are.
        measured, plain = (
            [value for number, value in taken[MEASURED].items() if number % 2 == rest] for rest in (0, 1)
        )
        share = statistics.median(measured) / statistics.median(plain) - 1
        ratios[MEASURED].append(1 + share / INTERVAL)
        part |= {
            "case": case.name, "k": 2, "stock_seconds": spread(stock_seconds), "rounds": index + 1,
            "tokens_per_second": 2 * case.batch_size * case.block_size / statistics.median(stock_seconds),
            WINDOWS: spread(ratios[WINDOWS]), MEASURED: spread(ratios[MEASURED]),
            "a_measured_step": 1 + share, "measured_every": INTERVAL,
        }  # fmt: skip
        record.save()
        if context.left - (started - context.left) < until:
            break


def train_steps(
    context: Context, case: Case, model: torch.nn.Module, data: Any, loop: dict[str, Any] | None, steps: int,
    watched: range, part: dict[str, Any], name: str,
) -> dict[int, float]:  # fmt: skip
    """Return the seconds of optimizer steps by their number; note the synchronisations."""
    events = StepEvents(context.device, watched)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        common = {
            "output_dir": folder, "per_device_train_batch_size": case.batch_size, "gradient_accumulation_steps": 2,
            "max_steps": steps, "logging_strategy": "no", "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "use_cpu": context.rehearse, "bf16": case.autocast_dtype is not None,
        }  # fmt: skip
        if loop is None:
            args = transformers.TrainingArguments(**common)
            trainer = transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=[events])
        else:
            args = EfficientTrainingArguments(**common, **loop, measurements="none")
            trainer = EfficientTrainer(model=model, args=args, train_dataset=data, callbacks=[events])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    if context.on_gpu:
        synchronising = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
        part["synchronisations_per_step"][name] = len(synchronising) / len(watched)
        places = collections.Counter(
            f"{'/'.join(warning.filename.split('/')[-3:])}:{warning.lineno}" for warning in synchronising
        )
        part["where"][name] = dict(places.most_common(12))
    else:
        part["synchronisations_per_step"][name] = None  # a CPU waits for nothing
    return events.seconds()
