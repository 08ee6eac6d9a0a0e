"""Runs: the calls of several consecutive modules as one checkpointed region.

PyTorch's checkpoint takes one function. The stages of a run are called one by one from the model's own forward, which
stays as it is, so the region is put together from their calls: PyTorch's frame (which takes the place of saved tensors
and recomputes them) is entered for each call and left after it, and each call is recorded so that they can be replayed
in order.
Nothing is entered between two calls: what the model computes there is saved as usual, and an exception there leaves
nothing behind.

A call joins the region of the call before only if it takes what a stage of that region has returned. Anything else (a
stage that is skipped at random, called twice or out of order, two forward passes at the same time) begins a region of
its own. So gradients are right whatever the model does; only memory can be more than planned, of which is warned.
"""

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _checkpoint_hook, _CheckpointFrame

from hf_trainopt.core.versions import save_frame_inputs
from hf_trainopt.machine.random_state import CallState, devices_of, forked_random_state
from hf_trainopt.placement.recompute.batchnorm import BufferKeeper, BufferSnapshot
from hf_trainopt.placement.recompute.regions import Call, refuse_compiling, without_cache


logger = logging.getLogger(__name__)


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


class _Replay:
    """Makes the recorded calls again: what PyTorch's frame calls to recompute. Does not refer to the frame."""

    def __init__(self):
        self.calls: list[_Recorded] = []

    def __call__(self, *inputs: torch.Tensor) -> None:
        needed = {
            argument for recorded in self.calls for argument in recorded.arguments if isinstance(argument, _Output)
        }
        devices = list({device: None for recorded in self.calls for device in recorded.state.devices})
        outputs: dict[_Output, torch.Tensor] = {}
        with forked_random_state(devices):
            for number, recorded in enumerate(self.calls):
                result = self._call(recorded, inputs, outputs)
                tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                for index, tensor in enumerate(tensors):
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
        # The random state is set for each call, since the model may have drawn between two of them.
        with recorded.state.restored():
            if recorded.buffers is None:
                return recorded.call(*tensors)
            with recorded.buffers.restored():
                return recorded.call(*tensors)


class _Open:
    """A region that later stages can still join."""

    def __init__(self, inputs: list[torch.Tensor]):
        self.replay = _Replay()
        self.frame = _CheckpointFrame(self.replay, True, None, _metadata)
        save_frame_inputs(self.frame, inputs)
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
    """

    def __init__(self, stages: list[str]):
        self.stages = list(stages)
        self._buffers = BufferKeeper()
        self._open: _Open | None = None
        self._warned = False

    def __deepcopy__(self, memo: dict) -> "Run":
        return Run(self.stages)

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
            region = _Open(tensors)
            arguments = [_Input(index) for index in range(len(tensors))]
            if position > 0:
                self._warn(stage)
        state = CallState(devices_of(tensors))
        snapshot = self._buffers.take(module)
        with _checkpoint_hook(region.frame):
            output = call(*tensors)
        if snapshot is not None:
            snapshot.finish()
        region.replay.calls.append(_Recorded(call, arguments, state, snapshot))
        if position + 1 < len(self.stages):
            number = len(region.replay.calls) - 1
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            region.outputs |= {_Output(number, index): _Seen(leaf) for index, leaf in enumerate(leaves)}
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


def _metadata(tensor: torch.Tensor) -> dict[str, Any]:
    """What must not differ between a saved tensor and its recomputation."""
    return {"shape": tensor.shape, "dtype": tensor.dtype, "device": tensor.device}
