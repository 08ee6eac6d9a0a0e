"""Arms of the headline runs: stock `Trainer` against ours on one task, one after the other in one process."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from arm_list import REFERENCE_K, Arm, arms_for, choose
from arm_targets import BOTH, both_have_run, targets
from common import Context, Record, release, synchronize
from cpu_clock import CpuClock

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.machine.peak_memory import accelerator_counter
from hf_trainopt.metrics import ThroughputCallback


EVALUATIONS = 20
HISTORY = (
    "step", "loss", "learning_rate", "accumulation_steps", "noise_scale", "samples_seen", "tokens_per_second",
    "samples_per_second", "mfu", "measured_peak_gib", "predicted_peak_gib",
)  # fmt: skip


@dataclass
class Headline:
    """A task at the size of a run.

    Args:
        title: For the page.
        micro_batch: Samples.
        arguments: Of `TrainingArguments`, apart from those of the arms; `max_steps` in steps of 8 micro-batches, or
            `num_train_epochs`.
        build: Seed -> keyword arguments of `Trainer`: model, datasets, metrics.
        everything: The whole of the data that the last evaluation is on.
        tokens_per_sample: Tokens of a sample; `None`: it has none.
        metric: Besides the loss.
        learns: Whether the loss must fall: not on labels that are made up.
        seconds: What an arm is expected to take; the first that has run says it better.
        planning_seconds: What a memory budget takes more.
        source: Where the data are from.
    """

    title: str
    micro_batch: int
    arguments: dict[str, Any]
    build: Callable[[int], dict[str, Any]]
    everything: Any
    source: str
    seconds: float
    planning_seconds: float
    tokens_per_sample: int | None = None
    metric: str | None = None
    learns: bool = True
    taken: list[float] = field(default_factory=list)

    def expected(self, arm: Arm) -> float:
        """Seconds that an arm will take at most."""
        seconds = 1.15 * max(self.taken) if self.taken else self.seconds
        return seconds + (self.planning_seconds if arm.ours and "memory_budget" in arm.ours else 0.0)


def chosen_arms(context: Context) -> list[Arm]:
    """Return the arms of this stage that are asked for."""
    return choose(arms_for(context.name, context.rehearse), context.arms)


def run_arms(context: Context, record: Record, task: Headline) -> None:
    """Run arms as long as they end in time; each is in the record as soon as it has ended."""
    arms = chosen_arms(context)
    transformers.logging.set_verbosity_error()
    record.values |= {"title": task.title, "data": task.source, "micro_batch": task.micro_batch, "arms": [],
                      "tokens_per_sample": task.tokens_per_sample}  # fmt: skip
    with record.part("warm-up") as part:  # start-up of CUDA and its libraries is no arm's
        one = train(context, task, Arm("warm-up", 1, 1e-4), {"max_steps": 2, "eval_strategy": "no"}, evaluates=False)
        part["seconds"] = one["wall_s"]
    for arm in arms:
        if context.left < task.expected(arm):
            record.skip(arm.label, f"{context.left:.0f} s are left, {task.expected(arm):.0f} s needed")
            continue
        started = time.monotonic()
        with record.part(arm.label):
            found = train(context, task, arm, {})
            record.values["arms"].append(found)
            record.check(f"{arm.label}: the losses are finite", all(math.isfinite(p["loss"]) for p in found["curve"]))
            if task.learns:
                record.check(f"{arm.label}: it has learned", found["curve"][-1]["loss"] < found["curve"][0]["loss"])
            if found["plan"]:
                budget = found["plan"]["budget_bytes"]
                record.check(f"{arm.label}: within the budget", found["plan"]["measured_peak_bytes"] <= 1.05 * budget)
            print(f"{arm.label}: {found['final_loss']:.4f} after {found['train_time_s']:.1f} s", flush=True)
            task.taken.append(time.monotonic() - started - (task.planning_seconds if found["plan"] else 0.0))
        record.values["targets"] = targets(record.values["arms"])
        record.save()
    if len(arms) == len(arms_for(context.name, context.rehearse)):
        record.check(BOTH, both_have_run(record.values["arms"]))
    else:  # `merge.py` asks this of all arms that there are then
        record.check("an arm has run", bool(record.values["arms"]))


def train(
    context: Context, task: Headline, arm: Arm, changes: dict[str, Any], evaluates: bool = True
) -> dict[str, Any]:
    """Train one arm and return what came of it."""
    release(context.device)
    parts = task.build(arm.seed)
    clock = CpuClock()
    with tempfile.TemporaryDirectory() as folder:
        if "max_steps" in task.arguments:
            steps = task.arguments["max_steps"] * REFERENCE_K // arm.k  # the same data for every k
        else:  # as `Trainer` counts them: the last step of an epoch is a short one
            micro_batches = math.ceil(len(parts["train_dataset"]) / task.micro_batch)
            steps = math.ceil(micro_batches / arm.k) * task.arguments["num_train_epochs"]
        common = {
            "output_dir": folder, "per_device_train_batch_size": task.micro_batch, "report_to": "none",
            "gradient_accumulation_steps": arm.k, "learning_rate": arm.learning_rate, "seed": arm.seed,
            "save_strategy": "no", "disable_tqdm": True, "use_cpu": context.rehearse, "bf16": True,
            "eval_strategy": "steps", "eval_steps": max(1, steps // EVALUATIONS),
            "logging_steps": max(1, steps // 50), **task.arguments,
        }  # fmt: skip
        if "max_steps" in task.arguments:
            common["max_steps"] = steps
        common |= changes
        if arm.ours is None:
            args = transformers.TrainingArguments(**common)
            callbacks = [ThroughputCallback(), clock]
            trainer = transformers.Trainer(args=args, callbacks=callbacks, **parts)
        else:
            args = EfficientTrainingArguments(**common, **arm.ours)
            trainer = EfficientTrainer(args=args, callbacks=[clock], **parts)
        trainer.remove_callback(transformers.PrinterCallback)
        # Measuring callbacks lower the allocator's mark while they train: a reader of its own keeps the highest.
        reader = accelerator_counter(context.device.index).reader() if context.on_gpu else None
        started = time.monotonic()
        trainer.train()
        synchronize(context.device)
        wall = time.monotonic() - started
        peak = reader.peak() if reader is not None else None
        reserved = torch.cuda.max_memory_reserved(context.device) if context.on_gpu else None
        if evaluates and clock.last_step != trainer.state.global_step:
            trainer.evaluate()  # so that each curve ends where the data do
        history = list(trainer.state.log_history)
        curve = clock.curve(history)
        last = trainer.evaluate(task.everything) if evaluates else {}
    final = next((line for line in reversed(history) if "train_runtime" in line), {})
    plan = getattr(trainer, "placement_plan", None)
    found = {
        "name": arm.name, "seed": arm.seed, "k": arm.k, "learning_rate": arm.learning_rate, "arguments": arm.ours,
        "optimizer_steps": trainer.state.global_step, "curve": curve, "wall_s": round(wall, 2),
        "train_time_s": final.get("train_time_s", wall), "final_loss": last.get("eval_loss"),
        "final_metric": last.get(f"eval_{task.metric}") if task.metric else None, "metric": task.metric,
        "samples_per_second": final.get("samples_per_second"), "tokens_per_second": final.get("tokens_per_second"),
        "mfu": final.get("mfu"), "peak_bytes": peak, "reserved_bytes": reserved, "plan": None,
        "history": [{key: line[key] for key in HISTORY if key in line} for line in history if "loss" in line],
    }  # fmt: skip
    if plan is not None:
        found["plan"] = {
            "summary": plan.summary(), "budget_bytes": plan.budget_bytes, "rewrites": plan.rewrites.names(),
            "baseline_peak_bytes": plan.baseline_peak_bytes, "predicted_peak_bytes": plan.predicted_peak_bytes,
            "measured_peak_bytes": plan.measured_peak_bytes, "extra_time_ratio": plan.extra_time_ratio,
        }  # fmt: skip
    return found
