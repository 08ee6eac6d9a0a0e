"""What a rank of FSDP2 holds, and when: as `torch.distributed.fsdp._fully_shard` does it (torch 2.11 to 2.14).

Shards are chunks along the first dimension, padded to the same size on all ranks. A group of modules gathers its
parameters before its forward pass and before its backward pass: into one buffer, from which they are copied out. In
the forward pass that buffer lives until the next group has copied its own out; in the backward pass the group before
gathers ahead. After its backward pass a group copies its gradients into a buffer for the reduce-scatter, which lives
until the next group does so; the result is the gradient of the shards.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .fake import fake_copy, fake_tensor
from .rank import Owner, Rank, ceil_div, removal_of
from .sharding import Group
from .step_setup import StepSetup
from .tracker import StorageTracker
from .wrapped import storage_numel, whole_like


IDLE, FORWARD, BEFORE_BACKWARD, AFTER_BACKWARD = "idle", "forward", "before backward", "after backward"


@dataclass
class _Gathered:
    """A group: its parameters, and where it stands in a step.

    Args:
        modules: The modules whose calls gather it.
        parameters: Name, whole parameter, shard.
        is_kept: Whether parameters stay whole between the passes.
    """

    modules: list[nn.Module]
    parameters: list[tuple[str, nn.Parameter, nn.Parameter]]
    is_kept: bool
    state: str = IDLE
    buffer: torch.Tensor | None = None
    whole: list[torch.Tensor] | None = None
    accumulated: list[torch.Tensor] = field(default_factory=list)
    twins: list[torch.Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    to_run: set[int] = field(default_factory=set)

    def forget(self) -> None:
        """Back to the time before a step."""
        self.state, self.buffer, self.whole = IDLE, None, None
        self.accumulated, self.twins, self.places, self.to_run = [], [], [], set()


class _AfterBackward(torch.autograd.Function):
    """Returns its inputs; calls back once their gradients are there."""

    @staticmethod
    def forward(ctx, done: Callable[[], None], *inputs: torch.Tensor):
        ctx.done = done
        return inputs

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        ctx.done()
        return None, *gradients


class Fsdp2Rank(Rank):
    """The rank that holds most: the first one.

    Args:
        model: The whole model, with parameters in the type of the passes.
        mode: Its fake mode.
        setup: How the step is made.
        stages: Names of the stages, which are groups where the set-up names none.
        source: The model that it was copied from, whose parameters have the type that shards have.
    """

    def __init__(self, model: nn.Module, mode: FakeTensorMode, setup: StepSetup, stages: list[str], source: nn.Module):
        super().__init__(model, mode, setup)
        self._num = self.sharding.num_devices
        self.shards = fake_copy(source, mode, self._shard_like)
        self._groups = self._make_groups(stages)
        self._gathered_last: torch.Tensor | None = None
        self._scattered_last: torch.Tensor | None = None
        self._order: list[_Gathered] = []

    def _shard_like(self, parameter: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
        whole, dtype = whole_like(parameter), self.sharding.shard_dtype
        if dtype is None or not (parameter.requires_grad and parameter.is_floating_point()):
            dtype = parameter.dtype
        shape = tuple(whole.shape)
        if shape:
            shape = (ceil_div(shape[0], self._num), *shape[1:])
        shard = fake_tensor(torch.empty(shape, dtype=dtype, device="meta"), mode)
        held = 0 if self.sharding.shard_dtype else storage_numel(parameter)
        if held <= shard.numel():
            return shard
        # On a CPU, transformers 5.23 loads shards as views of whole parameters, which stay in memory.
        with mode:
            return torch.empty(held, dtype=dtype).narrow(0, 0, shard.numel()).view(shape).detach()

    def _make_groups(self, stages: list[str]) -> list[_Gathered]:
        wanted = self.sharding.groups
        if wanted is None:
            wanted = (*(Group((name,)) for name in stages), Group(("",), True))
        shards = dict(self.shards.named_parameters())
        named = dict(self.model.named_parameters())
        names = {id(parameter): name for name, parameter in named.items()}
        # The innermost group has a parameter, as `fully_shard` is called from the inside to the outside.
        order = sorted(wanted, key=lambda group: -max(name.count(".") + bool(name) for name in group.modules))
        taken: set[int] = set()
        made: dict[Group, _Gathered] = {}
        for group in order:
            modules = [self.model.get_submodule(name) for name in group.modules]
            parameters = []
            if group.parameters is not None:
                whole = dict(self.model.named_parameters(remove_duplicate=False))
                parameters = [
                    (names[id(whole[name])], whole[name], shards[names[id(whole[name])]]) for name in group.parameters
                ]
                taken.update(id(parameter) for _, parameter, _ in parameters)
            for module in modules:
                for parameter in module.parameters():
                    if id(parameter) not in taken:
                        taken.add(id(parameter))
                        parameters.append((names[id(parameter)], parameter, shards[names[id(parameter)]]))
            made[group] = _Gathered(modules, parameters, group.is_kept)
        # In the order of `named_modules`, the root first: that in which a backward pass is ended.
        places = {name: place for place, (name, _) in enumerate(self.model.named_modules())}
        return [made[group] for group in sorted(wanted, key=lambda group: min(places[n] for n in group.modules))]

    # ---- The optimizer ---------------------------------------------------------------------------------------------

    def make_optimizer(self) -> torch.optim.Optimizer | None:
        """Return the optimizer of the shards."""
        return self.setup.make_optimizer(self.shards)

    @property
    def chooses_foreach(self) -> bool:
        """Not for DTensors."""
        return False

    # ---- A step ----------------------------------------------------------------------------------------------------

    def count(self, tracker: StorageTracker, optimizer: torch.optim.Optimizer | None, owner: Owner) -> None:
        tracker.exempt(self.model.parameters())
        with self._place(tracker, self.sharding.offload_parameters):
            self._count_states(self.shards, tracker, optimizer, owner)
            if self.accumulates and self.sharding.reduces_always:
                for name, shard in self.shards.named_parameters():
                    if shard.requires_grad:
                        shard.grad = torch.zeros_like(shard)
                        tracker.count([shard.grad], "gradients", owner(name))
        if self.accumulates and not self.sharding.reduces_always:
            if self._reduce_dtype is None:
                self._count_gradients(tracker, owner)
                for group in self._groups:
                    # A parameter that is gathered for each of its modules has as many gradients.
                    once = {id(parameter) for _, parameter, _ in group.parameters}
                    for name, parameter, _ in group.parameters:
                        if id(parameter) in once:
                            once.discard(id(parameter))
                        elif parameter.requires_grad:
                            group.twins.append(torch.empty_like(parameter))
                            tracker.count(group.twins[-1:], "gradients", owner(name))
            else:
                for group in self._groups:
                    for name, parameter, _ in group.parameters:
                        if parameter.requires_grad:
                            group.accumulated.append(torch.empty_like(parameter, dtype=self._reduce_dtype))
                            tracker.count(group.accumulated[-1:], "gradients", owner(name))

    @property
    def _reduce_dtype(self) -> torch.dtype | None:
        """Type of reductions if it isn't that of gradients."""
        reduce = self.sharding.reduce_dtype
        return None if reduce == self._dtype else reduce

    def watch(self, tracker: StorageTracker, owner: Owner) -> Callable[[], None]:
        handles = []
        for group in self._groups:
            for module in group.modules:
                handles.append(
                    module.register_forward_pre_hook(
                        self._before_forward(group, tracker), prepend=True, with_kwargs=True
                    )
                )
                handles.append(module.register_forward_hook(self._after_forward(group, tracker)))
        handles.append(self.model.register_forward_hook(self._after_model))

        return removal_of(handles)

    def _before_forward(self, group: _Gathered, tracker: StorageTracker) -> Callable[..., Any]:
        def hook(module, args, kwargs):
            if group.state == BEFORE_BACKWARD:  # a recomputation
                if group.whole is None:
                    self._gather(group, tracker)
                    self._copy_out(group, tracker)
                return None
            is_first = group.state != FORWARD
            if not group.to_run:
                group.to_run = {id(member) for member in group.modules}
            group.state = FORWARD
            self._gather(group, tracker)
            self._copy_out(group, tracker)
            if not (is_first and torch.is_grad_enabled()):
                return None
            leaves, structure = tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            if not places:
                return None
            outputs = _AfterBackward.apply(lambda: self._reduce(group, tracker), *(leaves[i] for i in places))
            for place, output in zip(places, outputs, strict=True):
                leaves[place] = output
            return tree_unflatten(leaves, structure)

        return hook

    def _after_forward(self, group: _Gathered, tracker: StorageTracker) -> Callable[..., Any]:
        def before_backward(gradient):
            if group.state == BEFORE_BACKWARD:
                return
            group.state = BEFORE_BACKWARD
            self._gather(group, tracker)
            self._copy_out(group, tracker)
            if group.places and (place := group.places.pop()) > 0:
                self._gather(self._order[place - 1], tracker)

        def hook(module, args, output):
            if group.state == BEFORE_BACKWARD:
                return
            group.to_run.discard(id(module))
            if group.to_run:
                return
            if torch._C._current_graph_task_id() == -1:
                if not group.is_kept:
                    group.whole = None
                group.places.append(len(self._order))
                self._order.append(group)
            group.state = IDLE
            if torch.is_grad_enabled():
                for leaf in tree_leaves(output):
                    if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                        leaf.register_hook(before_backward)

        return hook

    def _after_model(self, module, args, output) -> None:
        self._gathered_last = None

    def _gather(self, group: _Gathered, tracker: StorageTracker) -> None:
        """All-gather into one buffer."""
        if group.buffer is not None or group.whole is not None or not group.parameters:
            return
        sent = []
        with tracker.tagged("gathered"):
            for _, whole, shard in group.parameters:
                if self.sharding.offload_parameters and self._has_host:
                    sent.append(torch.empty_like(shard))
                    if shard.dtype != whole.dtype:
                        sent[-1] = sent[-1].to(whole.dtype)
            if self._num > 1:
                # Those that are cast are copied together; types that differ are gathered as bytes.
                cast = [(whole, shard) for _, whole, shard in group.parameters if shard.dtype != whole.dtype]
                if not sent and cast:
                    sent.append(torch.empty(sum(shard.numel() for _, shard in cast), dtype=cast[0][0].dtype))
                size = sum(shard.numel() * whole.element_size() for _, whole, shard in group.parameters)
                group.buffer = torch.empty(size * self._num, dtype=torch.uint8)
            else:
                group.buffer = torch.empty(0)

    def _copy_out(self, group: _Gathered, tracker: StorageTracker) -> None:
        """Copy the parameters out of the buffer."""
        if group.buffer is None:
            return
        if group.state == FORWARD:
            self._gathered_last = None
        with tracker.tagged("gathered"):
            group.whole = [torch.empty(shard.numel() * self._num, dtype=p.dtype) for _, p, shard in group.parameters]
        if group.state == FORWARD:
            self._gathered_last = group.buffer
        group.buffer = None

    @torch.no_grad()
    def _reduce(self, group: _Gathered, tracker: StorageTracker) -> None:
        """Reduce-scatter the gradients of a group, after its backward pass."""
        group.state = AFTER_BACKWARD
        with_gradient = [(p, shard) for _, p, shard in group.parameters if p.grad is not None]
        gradients = list({id(parameter): parameter.grad for parameter, _ in with_gradient}.values())
        for parameter, _ in with_gradient:
            parameter.grad = None
        if group.accumulated:
            gradients, group.accumulated = group.accumulated, []
        gradients += group.twins
        group.twins = []
        group.whole = self._scattered_last = None
        if not gradients:
            return
        dtype = self.sharding.reduce_dtype or gradients[0].dtype
        shards = [shard for _, shard in with_gradient]
        numel = sum(shard.numel() for shard in shards)
        with tracker.tagged("gathered"):
            scattered = torch.empty(numel * self._num, dtype=dtype)
        gradients.clear()
        with tracker.tagged("gradients"):
            reduced = torch.empty(numel, dtype=dtype)
            if dtype != shards[0].dtype:
                reduced = reduced.to(shards[0].dtype)
        with self._place(tracker, self.sharding.offload_parameters):
            if self.sharding.offload_parameters and self._has_host:
                reduced = reduced.clone()
        start = 0
        for shard in shards:
            piece = reduced.narrow(0, start, shard.numel()).view(shard.shape)
            start += shard.numel()
            if shard.grad is None:
                shard.grad = piece
            else:
                shard.grad.add_(piece)
        self._scattered_last = scattered

    def end_backward(self, tracker: StorageTracker) -> None:
        for group in self._groups:
            if group.state != AFTER_BACKWARD:  # no input has a gradient: the embedding
                self._reduce(group, tracker)
            group.state, group.buffer, group.places = IDLE, None, []
        self._scattered_last = None
        self._order.clear()

    def step(self, tracker: StorageTracker, optimizer: torch.optim.Optimizer) -> None:
        with self._place(tracker, self.sharding.offload_optimizer):
            super().step(tracker, optimizer)

    def reset(self) -> None:
        super().reset()
        for shard in self.shards.parameters():
            shard.grad = None
        for group in self._groups:
            group.forget()
        self._gathered_last = self._scattered_last = None
        self._order.clear()
