"""What one device holds in a replay, and when: the base of all kinds of sharding, and what one device or DDP does.

The replay runs the forward and backward pass of the whole model. A rank says what of it is really there: it counts
what it holds before the step, follows the passes with hooks, and takes the optimizer's step.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .step_setup import StepSetup
from .tracker import StorageTracker


Owner = Callable[[str], str]


class Rank:
    """One device that holds everything; under DDP it has buckets for gradients as well.

    Args:
        model: The whole model, made of fake tensors. All methods are called in its fake mode.
        mode: This mode.
        setup: How the step is made.
    """

    def __init__(self, model: nn.Module, mode: FakeTensorMode, setup: StepSetup):
        self.model, self.mode, self.setup, self.sharding = model, mode, setup, setup.sharding
        self.trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.accumulates = setup.accumulation_steps > 1
        self._held: list[Any] = []

    # ---- The optimizer ---------------------------------------------------------------------------------------------

    def make_optimizer(self) -> torch.optim.Optimizer | None:
        """Return the optimizer over what this rank steps, without state."""
        return self.setup.make_optimizer(self.model)

    @property
    def chooses_foreach(self) -> bool:
        """Whether torch takes foreach kernels of an optimizer on CUDA unasked."""
        return self.setup.device.kind == "cuda"

    # ---- A step ----------------------------------------------------------------------------------------------------

    def rehearse(self, run: Callable[[], None]) -> None:
        """Learn what has to be known of the passes before the step. Called before anything is counted.

        Args:
            run: Runs the model forward and backward.
        """

    def count(self, tracker: StorageTracker, optimizer: torch.optim.Optimizer | None, owner: Owner) -> None:
        """Count what is there before the step: parameters, state, gradients of earlier micro-batches, buffers."""
        self._count_states(self.model, tracker, optimizer, owner)
        if self.accumulates:
            self._count_gradients(tracker, owner)
        if self.sharding.kind == "ddp" and self.sharding.num_devices > 1:
            self._hold(tracker, (torch.zeros_like(p) for _, p in self.trained), "communication")

    @staticmethod
    def _count_states(
        model: nn.Module, tracker: StorageTracker, optimizer: torch.optim.Optimizer | None, owner: Owner
    ) -> None:
        """Count the parameters of a model, and what an optimizer of them keeps."""
        names = {}
        for name, parameter in model.named_parameters():
            names[id(parameter)] = name
            tracker.count([parameter], "parameters", owner(name))
        if optimizer is not None:
            for parameter, state in optimizer.state.items():
                tracker.count(tree_leaves(state), "optimizer", owner(names.get(id(parameter), "")))

    def _count_gradients(self, tracker: StorageTracker, owner: Owner) -> None:
        """Give each parameter that is trained a whole gradient."""
        for name, parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
            tracker.count([parameter.grad], "gradients", owner(name))

    def _hold(self, tracker: StorageTracker, tensors: Iterable[torch.Tensor], kind: str, scope: str = "") -> None:
        """Count new tensors that stay for the whole step."""
        held = list(tensors)
        self._held += held
        tracker.count(held, kind, scope)

    def watch(self, tracker: StorageTracker, owner: Owner) -> Callable[[], None]:
        """Follow the passes of a step; return what ends that. Called after the hooks that count gradients."""
        return lambda: None

    def end_backward(self, tracker: StorageTracker) -> None:
        """Do what is done once the backward pass is over."""

    def step(self, tracker: StorageTracker, optimizer: torch.optim.Optimizer) -> None:
        """Clip gradients, step, and free gradients."""
        if self.setup.max_grad_norm:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.setup.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def reset(self) -> None:
        """Forget what a step has left behind."""
        self._held = []
        for parameter in self.model.parameters():
            parameter.grad = None

    # ---- For those that spread the model ---------------------------------------------------------------------------

    @property
    def _has_host(self) -> bool:
        """Whether the memory of the host is another than the device's: not on a CPU."""
        return self.setup.device.kind != "cpu"

    @property
    def _dtype(self) -> torch.dtype | None:
        """Type of the parameters that are trained, if any is."""
        return next((parameter.dtype for _, parameter in self.trained), None)

    def _place(self, tracker: StorageTracker, is_offloaded: bool) -> AbstractContextManager:
        """Return the context in which tensors are counted where they lie."""
        return tracker.on_host() if is_offloaded and self._has_host else nullcontext()


class ZeroStage0(Rank):
    """DeepSpeed without partitions: at the end of a window all gradients are copied into a buffer and reduced.

    `DeepSpeedEngine.buffered_allreduce_fallback` and `allreduce_no_retain`, in DeepSpeed 0.19.
    """

    _BUCKET = 500_000_000

    def end_backward(self, tracker: StorageTracker) -> None:
        """Copy gradients into one buffer after another."""
        if self.sharding.num_devices == 1:
            return
        with tracker.tagged("communication"):
            for dtype in dict.fromkeys(parameter.dtype for _, parameter in self.trained):
                numel = 0
                for parameter in (p for _, p in self.trained if p.dtype == dtype):
                    numel += parameter.numel()
                    if numel > self._BUCKET:
                        torch.empty(numel, dtype=dtype)
                        numel = 0
                if numel:
                    torch.empty(numel, dtype=dtype)


def removal_of(handles: Iterable[RemovableHandle]) -> Callable[[], None]:
    """Return what removes hooks."""

    def remove():
        for handle in handles:
            handle.remove()

    return remove


def ceil_div(number: int, divisor: int) -> int:
    """Return the quotient, rounded up."""
    return -(-number // divisor)
