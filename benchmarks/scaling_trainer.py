"""One timed run of `scaling.py`: what a micro-batch, the reduction of gradients and our own part of a window take."""

import statistics
import time
from typing import Any

from tasks import Task, common_arguments
from transformers import PrinterCallback, TrainerCallback

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.accumulation.gradient_norms import MicroBatchNorms


REFERENCE_STEPS = 8  # of the adaptive arm


class Clock(TrainerCallback):
    """Wall time at the end of each optimizer step."""

    def __init__(self):
        self.marks: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.marks.append(time.perf_counter())


class Timed(EfficientTrainer):
    """Adds up where wall time goes, one entry an optimizer step."""

    def __init__(self, *args, clock: Clock, **kwargs):
        super().__init__(*args, callbacks=[clock], **kwargs)
        self.clock = clock
        self.plain: list[float] = []  # micro-batches whose gradients are not reduced
        self.last: list[float] = []
        self.steps: list[dict[str, float]] = []
        self._begin_step()
        backward, reduce = self.accelerator.backward, self.accelerator.reduce

        def timed_backward(*args, **kwargs):
            backward(*args, **kwargs)
            seconds = time.perf_counter() - self._began - self._hooks
            (self.last if self.accelerator.sync_gradients else self.plain).append(seconds)
            self.step["micro_batches"] += 1
            self.step["forward_backward"] += seconds
            self.step["statistics"] += self._hooks

        def timed_reduce(*args, **kwargs):
            began = time.perf_counter()
            result = reduce(*args, **kwargs)
            self.step["agreement"] += time.perf_counter() - began
            return result

        self.accelerator.backward, self.accelerator.reduce = timed_backward, timed_reduce
        self._time_statistics()
        self._began = self._hooks = 0.0

    def _begin_step(self) -> None:
        self.step = dict.fromkeys(("micro_batches", "forward_backward", "statistics", "agreement"), 0.0)

    def compute_loss(self, *args, **kwargs):
        self._began, self._hooks = time.perf_counter(), 0.0
        return super().compute_loss(*args, **kwargs)

    def _time_statistics(self) -> None:
        """Time what the end of a window takes; waiting for the other rank is in the agreement."""
        accumulation = self.trainopt.accumulation
        for name in ("advance", "propose", "finish_window"):
            setattr(accumulation, name, self._timed(getattr(accumulation, name)))

    def _timed(self, function):
        def timed(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.step["statistics"] += time.perf_counter() - began
            return result

        return timed

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.step["micro_batches"]:  # not at the end of an epoch
            self.steps.append(self.step)
            self._begin_step()


class TimedNorms(MicroBatchNorms):
    """Tells how long its hooks take, which run inside the backward pass."""

    trainer: Timed

    def _make_hook(self, key: int):
        hook = super()._make_hook(key)

        def timed(gradient):
            began = time.perf_counter()
            hook(gradient)
            self.trainer._hooks += time.perf_counter() - began

        return timed


def train(
    parts: dict[str, Any], task: Task, arm: str, micro_batches: int, warm_up: int, output_dir: str
) -> dict[str, Any]:
    """Train one arm and return its times, the first `warm_up` optimizer steps left out.

    Args:
        parts: Model and data.
        task: What they are of.
        arm: k, or "adaptive".
        micro_batches: Of each rank.
        warm_up: Optimizer steps that are not timed.
        output_dir: Scratch.
    """
    k = REFERENCE_STEPS if arm == "adaptive" else int(arm)
    policy = {} if arm == "adaptive" else {"accumulation_policy": "fixed"}
    common = common_arguments(task, output_dir)
    steps = max(micro_batches // k, warm_up + 2)
    common |= {"gradient_accumulation_steps": k, "max_steps": steps, "logging_strategy": "no", "measurements": "none"}
    clock = Clock()
    trainer = Timed(
        model=parts["model"],
        args=EfficientTrainingArguments(**common, **policy),
        train_dataset=parts["train_dataset"],
        clock=clock,
    )
    trainer.remove_callback(PrinterCallback)
    values = trainer.set_initial_training_values

    def with_timed_norms(*args, **kwargs):
        result = values(*args, **kwargs)
        measurement = trainer.trainopt.accumulation.measurement
        if measurement is not None and measurement.norms is not None:
            measurement.norms = TimedNorms(trainer.model, trainer.args.device)
            measurement.norms.trainer = trainer
            measurement.result = trainer._timed(measurement.result)
        return result

    trainer.set_initial_training_values = with_timed_norms
    trainer.train()
    timed = trainer.steps[warm_up:]
    seconds = clock.marks[-1] - clock.marks[warm_up - 1]
    total = {name: sum(step[name] for step in timed) for name in timed[0]}
    count = int(total.pop("micro_batches"))
    first = int(sum(step["micro_batches"] for step in trainer.steps[:warm_up]))
    plain, last = trainer.plain[first - warm_up :], trainer.last[warm_up:]  # each step has one that is the last
    return {
        "ranks": trainer.args.world_size,
        "seconds": seconds,
        "optimizer_steps": len(timed),
        "micro_batches": count,
        "samples": count * task.micro_batch_size,
        "mean_k": count / len(timed),
        "plain_micro_batch": statistics.median(plain) if plain else None,
        "last_micro_batch": statistics.median(last),
        "shares": total,
    }
