"""Measures the peak of one real optimizer step, to be held against the plan's."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from ..machine.peak_memory import PeakReader, accelerator_counter
from .simulate.scratch import cpu_scratch
from .simulate.tracker import StorageTracker


logger = logging.getLogger(__name__)


class PeakMeasurement(TrainerCallback):
    """Measures the second optimizer step of a run (the first makes the optimizer's state), or the only one.

    On accelerators the allocator's high-water mark is read. On the CPU, whose allocator keeps none, the bytes of live
    storages are counted operator by operator during that step.

    Args:
        done: Called with the peak in bytes.
        later: Called with that of other steps. On accelerators these are all that follow; on the CPU, where measuring
            takes time, those that `measure_next` asks for. `None`: no others are measured.
        was_smaller: Asked after the second step whether what went through the model was smaller than planned for. The
            next step is measured in its place, if there is one.
    """

    def __init__(
        self,
        done: Callable[[int], None],
        later: Callable[[int], None] | None = None,
        was_smaller: Callable[[], bool] = lambda: False,
    ):
        self._done, self._later, self._was_smaller = done, later, was_smaller
        self._second: int | None = None
        self._asked = self._is_second = False
        self._first: int | None = None
        self._tracker: StorageTracker | None = None
        self._reader: PeakReader | None = None
        self._before = 0
        self._running = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.stop()  # an earlier run may have ended within the step
        self._first, self._second, self._asked = state.global_step, None, False

    def measure_next(self) -> None:
        """Measure the step that begins next."""
        self._asked = True

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self._second is None:
            self._second = self._first + (1 if state.max_steps > self._first + 1 else 0)
        follows = state.global_step > self._second and args.device.type != "cpu"
        is_other = self._later is not None and (self._asked or follows)
        if self._running or (state.global_step != self._second and not is_other):
            return
        self._running, self._asked = True, False
        self._is_second = state.global_step == self._second
        if args.device.type != "cpu":
            if self._is_second or self._reader is None:  # once a run: this lowers the mark that others may read, too
                self._reader = accelerator_counter(args.device.index).reader()
            self._before = self._reader.peak()
            return
        tracker = StorageTracker(scratch=cpu_scratch, counts_arguments=True)
        tracker.count(model.parameters(), "parameters")
        tracker.count(model.buffers(), "buffers")
        tracker.count((parameter.grad for parameter in model.parameters()), "gradients")
        inner = getattr(optimizer, "optimizer", optimizer)
        tracker.count(tree_leaves(list(getattr(inner, "state", {}).values())), "optimizer")
        tracker.count(held_by_deepspeed(model, inner), "optimizer")
        self._tracker = tracker
        tracker.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if not self._running:
            return
        self._running = False
        if self._is_second and state.global_step < state.max_steps and self._was_smaller():
            self._second = state.global_step
            self.stop()
            return
        done = self._done if self._is_second else self._later
        if args.device.type != "cpu":
            peak = self._reader.peak()
            if self._is_second or peak > self._before:  # else the mark is not of this step
                done(peak)
        elif self._tracker is not None:
            peak = self._tracker.peak_bytes
            self.stop()
            done(peak)

    def stop(self) -> None:
        """Leave the context of a measurement that an exception has cut off."""
        if self._tracker is not None and self._tracker.is_active:
            self._tracker.__exit__(None, None, None)
        self._tracker, self._reader, self._running = None, None, False


def held_by_deepspeed(model: torch.nn.Module, optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that ZeRO holds between steps: partitions, master weights, buckets; none without DeepSpeed.

    Args:
        model: The model that the engine has.
        optimizer: The engine's optimizer.
    """
    if not type(optimizer).__module__.startswith("deepspeed"):
        return
    for parameter in model.parameters():
        if isinstance(getattr(parameter, "ds_tensor", None), torch.Tensor):
            yield parameter.ds_tensor
    seen: set[int] = set()
    waiting = [*vars(optimizer).values(), optimizer.state]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.device.type != "meta":
                yield value
            waiting.append(value.grad if value.is_leaf else None)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif type(value).__name__.startswith("IPGBucket"):
            waiting += vars(value).values()
