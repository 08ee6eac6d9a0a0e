"""When parameters are whole under ZeRO-3: `partitioned_param_coordinator.py` and `parameter_offload.py` of DeepSpeed.

Each module gathers its own parameters before its forward and its backward pass and gives them up afterwards. The first
pass records the order of these calls. From then on parameters are gathered ahead, a bucket at a time, and those that
are needed again soon (`max_reuse_distance`) are kept: in a model with fewer parameters, all of them from the forward
pass to the backward pass. Small parameters stay whole but for the optimizer's step.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .rank import ceil_div, removal_of
from .sharding import Sharding
from .tracker import StorageTracker


class _Handle:
    """A gather under way: its buffers, one for each type, live until all its parameters were waited for."""

    def __init__(self, parameters: list[nn.Parameter], buffers: list[torch.Tensor]):
        self.parameters, self.buffers, self.is_complete = parameters, buffers, False


class _Before(torch.autograd.Function):
    """Calls back before the backward pass of what is computed from its output."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
        ctx.call = call
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        ctx.call()
        return gradient, None


class Gathering:
    """Which parameters are whole.

    Args:
        model: The whole model; its parameters are not counted themselves.
        sharding: How it is spread.
        has_host: Whether the memory of the host is another than the device's.
    """

    def __init__(self, model: nn.Module, sharding: Sharding, has_host: bool):
        self._model, self._sharding, self._num = model, sharding, sharding.num_devices
        self._copies_shards = sharding.offload_parameters and has_host
        self._names = {id(p): index for index, p in enumerate(model.parameters())}
        self._persistent: set[int] = set()
        total = 0
        for parameter in model.parameters():
            fits = parameter.numel() + total <= sharding.zero.model_persistence_threshold
            if fits and parameter.numel() <= sharding.zero.persistence_threshold:
                self._persistent.add(id(parameter))
                total += parameter.numel()
        self._trace: list[nn.Module] | None = None
        self._is_recording = False
        self._tracker: StorageTracker | None = None
        self.forget()

    def forget(self) -> None:
        """Back to the time before a step."""
        self._whole: dict[int, torch.Tensor] = {}
        self._handles: dict[int, _Handle] = {}
        self._active: dict[int, set[int]] = {}
        self._running: dict[int, nn.Module] = {}
        self._recomputed: dict[int, list[nn.Parameter]] = {}
        self._remaining: dict[int, int] = {}
        self._before: dict[int, int] = {}
        self._reset()

    def _reset(self) -> None:
        """The start of a forward pass of the model."""
        for handle in {id(handle): handle for handle in self._handles.values()}.values():
            self._wait(handle)
        for parameter in self._model.parameters():
            if id(parameter) in self._handles:
                self._give_up(parameter)
        self._handles.clear()
        self._step = self._available = 0
        self._fetched_for: dict[int, int] = {}
        self._queue: deque[tuple[nn.Parameter, int]] = deque()
        if self._trace is not None and not self._is_recording:
            self._queue.extend((p, step) for step, module in enumerate(self._trace) for p in self._own(module))

    # ---- The order of modules --------------------------------------------------------------------------------------

    def record(self) -> None:
        """Begin to record the order of modules."""
        self._trace, self._is_recording = [], True
        self.forget()

    def end_recording(self) -> None:
        """End it."""
        self._is_recording = False
        self.forget()

    @property
    def _is_complete(self) -> bool:
        return self._trace is not None and not self._is_recording

    # ---- A step ----------------------------------------------------------------------------------------------------

    def begin_step(self, tracker: StorageTracker) -> None:
        """Count what stays whole, as the step before has left it."""
        self._tracker = tracker
        self.gather_persistent()
        tracker.count(self._whole.values(), "gathered")

    def gather_persistent(self) -> None:
        """Gather the small parameters, each on its own."""
        with self._tagged():
            for parameter in self._model.parameters():
                if id(parameter) in self._persistent:
                    self._whole[id(parameter)] = self._empty(parameter, is_padded=True)

    def release_all(self) -> None:
        """Give up all whole parameters, the small ones too."""
        self._whole.clear()
        self._handles.clear()
        self._active.clear()

    def end_backward(self) -> None:
        """Give up what modules hold whose inputs have no gradient."""
        while self._running:
            _, module = self._running.popitem()
            for parameter in (*self._own(module), *self._recomputed.pop(id(module), [])):
                self._active.get(id(parameter), set()).discard(id(module))
                if id(parameter) not in self._persistent:
                    self._give_up(parameter)

    def watch(self) -> Callable[[], None]:
        """Follow the calls of modules; return what ends that."""
        handles = []
        for module in self._model.modules():
            # Each before those that are there, so in reverse order.
            handles.append(module.register_forward_pre_hook(self._follow_inputs, prepend=True))
            handles.append(module.register_forward_pre_hook(self._before_forward, prepend=True))
            handles.append(module.register_forward_hook(self._after_forward))
        handles.append(self._model.register_forward_pre_hook(lambda *_: self._reset(), prepend=True))

        return removal_of(handles)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self._note(module)
        self._fetch(module, is_forward=True)

    def _follow_inputs(self, module: nn.Module, args: Any) -> Any:
        self._remaining[id(module)] = 0

        def done():
            self._remaining[id(module)] -= 1
            if not self._remaining[id(module)]:
                self._release(module, is_forward=False)

        def follow(leaf):
            if not (isinstance(leaf, torch.Tensor) and leaf.requires_grad):
                return leaf
            self._remaining[id(module)] += 1
            return _Before.apply(leaf, done)

        return tree_map(follow, args)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._release(module, is_forward=True)

        def begin():
            if self._before[id(module)] > 0:
                self._note(module)
                self._fetch(module, is_forward=False)
                self._before[id(module)] -= 1

        def follow(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            self._before[id(module)] = self._before.get(id(module), 0) + 1
            return _Before.apply(leaf, begin) if leaf.requires_grad else leaf

        return tree_map(follow, output)

    def _note(self, module: nn.Module) -> None:
        if self._is_recording:
            self._trace.append(module)
        elif self._is_complete and (self._step >= len(self._trace) or self._trace[self._step] is not module):
            self._trace = None  # as DeepSpeed does: nothing is gathered ahead from here on

    def _own(self, module: nn.Module) -> list[nn.Parameter]:
        found = {id(p): p for p in module._parameters.values() if p is not None}
        return sorted(found.values(), key=lambda p: self._names[id(p)])

    # ---- Gathering -------------------------------------------------------------------------------------------------

    def _is_there(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._whole or id(parameter) in self._handles

    @torch.no_grad()
    def _fetch(self, module: nn.Module, is_forward: bool) -> None:
        parameters = self._own(module)
        if not is_forward:
            self._running[id(module)] = module
        self._gather([p for p in parameters if not self._is_there(p)])
        recomputes = is_forward and torch._C._current_graph_task_id() != -1
        for parameter in parameters:
            self._active.setdefault(id(parameter), set()).add(id(module))
            if recomputes and self._running and not parameter.requires_grad:
                self._recomputed.setdefault(next(reversed(self._running)), []).append(parameter)
            if id(parameter) in self._handles:
                self._wait(self._handles.pop(id(parameter)))
        if self._is_complete:
            self._gather_ahead(parameters)
        self._step += 1

    def _gather_ahead(self, parameters: list[nn.Parameter]) -> None:
        missing = sum(self._fetched_for.get(id(p), -1) < self._step for p in parameters)
        found: set[int] = set()
        while self._queue and len(found) < missing:
            parameter, step = self._queue.popleft()
            self._fetched_for[id(parameter)] = step
            found.add(id(parameter))
        zero = self._sharding.zero
        most = min(zero.max_live_parameters - self._available, zero.prefetch_bucket_size)
        ahead: dict[int, nn.Parameter] = {}
        numel = 0
        while zero.prefetch_bucket_size > 0 and self._queue and numel < most:
            parameter, step = self._queue.popleft()
            self._fetched_for[id(parameter)] = max(self._fetched_for.get(id(parameter), -1), step)
            if not self._is_there(parameter) and id(parameter) not in ahead:
                ahead[id(parameter)] = parameter
                numel += parameter.numel()
        self._gather(list(ahead.values()))

    def _gather(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = sorted(parameters, key=lambda p: self._names[id(p)])
        if not parameters:
            return
        self._available += sum(p.numel() for p in parameters)
        with self._tagged():
            sent = [self._shard(p) for p in parameters] if self._copies_shards else []
            buffers = []
            if self._num > 1 and len(parameters) == 1:  # straight into the parameter
                self._whole[id(parameters[0])] = self._empty(parameters[0], is_padded=True)
            elif self._num > 1:
                for dtype in dict.fromkeys(p.dtype for p in parameters):
                    numel = sum(self._num * ceil_div(p.numel(), self._num) for p in parameters if p.dtype == dtype)
                    buffers.append(torch.empty(numel, dtype=dtype))
            del sent
        handle = _Handle(parameters, buffers)
        for parameter in parameters:
            self._handles[id(parameter)] = handle

    def _wait(self, handle: _Handle) -> None:
        """Copy parameters out of the buffer."""
        if handle.is_complete:
            return
        handle.is_complete = True
        with self._tagged():
            for parameter in handle.parameters:
                if id(parameter) not in self._whole:
                    self._whole[id(parameter)] = self._empty(parameter)

    @torch.no_grad()
    def _release(self, module: nn.Module, is_forward: bool) -> None:
        parameters = self._own(module)
        released = self._to_release(parameters)
        if not is_forward:
            recomputed = self._recomputed.pop(id(module), [])
            parameters = [*parameters, *recomputed]
            released |= {id(p) for p in recomputed if id(p) not in self._persistent}
            self._running.pop(id(module), None)
        for parameter in parameters:
            self._active.get(id(parameter), set()).discard(id(module))
            if id(parameter) in released:
                self._give_up(parameter)

    def _to_release(self, parameters: list[nn.Parameter]) -> set[int]:
        """Return which parameters of a module are not needed again soon."""
        if not self._is_complete:
            return {id(p) for p in parameters}
        found = {id(p) for p in parameters if id(p) not in self._persistent}
        found -= {id(p) for p in parameters if self._fetched_for.get(id(p), -1) > self._step}
        passed = 0
        for module in self._trace[self._step :]:
            if passed >= self._sharding.zero.max_reuse_distance or not found:
                break
            for parameter in self._own(module):
                found.discard(id(parameter))
                passed += parameter.numel()
        return found

    def _give_up(self, parameter: nn.Parameter) -> None:
        handle = self._handles.get(id(parameter))
        under_way = handle is not None and not handle.is_complete
        if id(parameter) in self._whole and not under_way and not self._active.get(id(parameter)):
            del self._whole[id(parameter)]
            self._available -= parameter.numel()

    # ---- Tensors ---------------------------------------------------------------------------------------------------

    def _tagged(self):
        return (self._tracker or StorageTracker()).tagged("gathered")

    def _shard(self, parameter: nn.Parameter) -> torch.Tensor:
        return torch.empty(ceil_div(parameter.numel(), self._num), dtype=parameter.dtype)

    def _empty(self, parameter: nn.Parameter, is_padded: bool = False) -> torch.Tensor:
        numel = self._num * ceil_div(parameter.numel(), self._num) if is_padded else parameter.numel()
        return torch.empty(numel, dtype=parameter.dtype)
