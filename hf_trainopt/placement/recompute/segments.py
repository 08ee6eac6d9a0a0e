"""Runs: the calls of consecutive modules as one checkpointed region. A stage on its own is a run of one.

The stages of a run are called one by one from the model's own forward, which stays as it is, so the region is put
together from their calls: its frame is entered for each call and left after it, and each call is recorded so that they
can be replayed in order.
Nothing is entered between two calls: what the model computes there is saved as usual, and an exception there leaves
nothing behind.

A call joins the region of the call before only if it takes what a stage of that region has returned. Anything else (a
stage that is skipped at random, called twice or out of order, two forward passes at the same time) begins a region of
its own. So gradients are right whatever the model does; only memory can be more than planned, of which is warned.
"""

import logging
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_trainopt.machine.random_state import CallState, devices_of, forked_for_calls
from hf_trainopt.placement.recompute.batchnorm import BufferKeeper, BufferSnapshot
from hf_trainopt.placement.recompute.frame import Frame
from hf_trainopt.placement.recompute.regions import Call, refuse_compiling, tensors_of, without_cache
from hf_trainopt.placement.recompute.selective import selective_contexts


logger = logging.getLogger(__name__)

_NOTHING = (nullcontext(), nullcontext())


class _Seen:
    """A tensor, recognised again while it lives and nobody has modified it. Does not keep it alive."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = weakref.ref(tensor)
        self._version = tensor._version

    def is_same(self, tensor: torch.Tensor) -> bool:
        return self._tensor() is tensor and tensor._version == self._version


class _Input:
    """An argument that is an input of the region."""

    def __init__(self, index: int):
        self.index = index


@dataclass(frozen=True)
class _Output:
    """An argument that an earlier call of the region has returned: number of the call, and of the tensor in it."""

    call: int
    index: int


class _Held:
    """An argument from elsewhere, for example made from outputs between two calls.

    Detached, because its graph can hold the region that holds it: a cycle that only a backward pass would break.
    """

    def __init__(self, tensor: torch.Tensor, stage: str):
        self._tensor = tensor.detach()
        self._requires_grad = tensor.requires_grad
        self._version = tensor._version
        self._stage = stage

    def get(self) -> torch.Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"an argument of stage '{self._stage}' was modified in place after the call and cannot be used to "
                "recompute it; choose recompute='none' for this stage."
            )
        return self._tensor.detach().requires_grad_(self._requires_grad)


@dataclass
class _Recorded:
    """One call, as it can be made again."""

    call: Call
    arguments: list[_Input | _Output | _Held]
    state: CallState
    buffers: BufferSnapshot | None
    reusing: AbstractContextManager

    def finish(self) -> None:
        """Drop everything that the call didn't need: call after the forward pass."""
        self.state.finish()
        if self.buffers is not None:
            self.buffers.finish()


class _Replay:
    """Makes the recorded calls again. Does not refer to the frame."""

    def __init__(self):
        self.calls: list[_Recorded] = []

    def __call__(self, *inputs: torch.Tensor) -> None:
        needed = {
            argument for recorded in self.calls for argument in recorded.arguments if isinstance(argument, _Output)
        }
        outputs: dict[_Output, torch.Tensor] = {}
        with forked_for_calls([recorded.state for recorded in self.calls]):
            for number, recorded in enumerate(self.calls):
                result = self._call(recorded, inputs, outputs)
                if not needed:
                    continue
                for index, tensor in enumerate(tensors_of(result)):
                    if (output := _Output(number, index)) in needed:
                        outputs[output] = tensor

    @staticmethod
    def _call(recorded: _Recorded, inputs: tuple[torch.Tensor, ...], outputs: dict[_Output, torch.Tensor]) -> Any:
        tensors = []
        for argument in recorded.arguments:
            if isinstance(argument, _Input):
                tensors.append(inputs[argument.index])
            else:
                tensors.append(outputs[argument] if isinstance(argument, _Output) else argument.get())
        with ExitStack() as stack:
            if recorded.buffers is not None:
                stack.enter_context(recorded.buffers.restored())
            # The random state is set for each call, since the model may have drawn between two of them.
            stack.enter_context(recorded.state.restored())
            stack.enter_context(recorded.reusing)
            return recorded.call(*tensors)


class _Open:
    """A region that later stages can still join."""

    def __init__(self, stage: str, inputs: list[torch.Tensor], offload: bool):
        self.replay = _Replay()
        self.frame = Frame(stage, self.replay, inputs, offload)
        self.last = -1
        self.inputs = [_Seen(tensor) for tensor in inputs]
        self.outputs: dict[_Output, _Seen] = {}

    def find(self, tensor: torch.Tensor, stage: str) -> _Input | _Output | _Held:
        for output, seen in self.outputs.items():
            if seen.is_same(tensor):
                return output
        for index, seen in enumerate(self.inputs):
            if seen.is_same(tensor):
                return _Input(index)
        return _Held(tensor, stage)


class Run:
    """The regions of consecutive stages: only the inputs of the first are kept.

    Args:
        stages: Names of the stages in the order in which the model calls them.
        saved_ops: Compute-bound operators whose outputs are kept as well; only for a run of one stage.
        offload: Whether its input is kept on the host.
    """

    def __init__(self, stages: Sequence[str], saved_ops: Sequence[int] = (), offload: bool = False):
        self.stages = list(stages)
        self.saved_ops = tuple(saved_ops)
        self.offload = offload
        self.buffers = BufferKeeper()
        self._open: _Open | None = None
        self._warned = False

    def __deepcopy__(self, memo: dict) -> "Run":
        return Run(self.stages, self.saved_ops, self.offload)

    def call(self, position: int, function, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a stage and record the call.

        Raises:
            RuntimeError: `torch.compile` is tracing, or a key-value cache would be updated twice.
        """
        stage = self.stages[position]
        refuse_compiling(stage)
        call = Call(function, *without_cache(module, stage, args, kwargs))
        tensors = call.take_tensors()
        region, self._open = self._open, None
        arguments: list[_Input | _Output | _Held] = []
        if region is not None and region.last < position:
            arguments = [region.find(tensor, stage) for tensor in tensors]
        if not any(isinstance(argument, _Output) for argument in arguments):
            region = _Open(stage, tensors, self.offload)
            arguments = [_Input(index) for index in range(len(tensors))]
            if position > 0:
                self._warn(stage)
        storing, reusing = selective_contexts(self.saved_ops, stage) if self.saved_ops else _NOTHING
        recorded = _Recorded(call, arguments, CallState(devices_of(tensors)), self.buffers.take(module), reusing)
        # Before the call: a model that computes gradients in its forward pass has the region recomputed there.
        region.replay.calls.append(recorded)
        with region.frame.storing(), storing:
            output = call(*tensors)
        recorded.finish()
        if position + 1 < len(self.stages):
            number = len(region.replay.calls) - 1
            region.outputs |= {_Output(number, index): _Seen(leaf) for index, leaf in enumerate(tensors_of(output))}
            region.last = position
            self._open = region
        return output

    def _warn(self, stage: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                f"Stage '{stage}' was not called with what the stages before it in the run {', '.join(self.stages)} "
                "have returned. It keeps its own inputs: gradients are right, but less memory is saved than planned."
            )


class RunMember:
    """Leads the calls of one stage of a run into it."""

    def __init__(self, run: Run, position: int):
        self.run = run
        self.position = position

    def __call__(self, function, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.run.call(self.position, function, module, args, kwargs)
