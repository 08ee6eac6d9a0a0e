"""What a rank of DeepSpeed's ZeRO-1 and 2 holds, and when: as `runtime/zero/stage_1_and_2.py` does it (0.19).

The parameters of each group of the optimizer are one flat tensor, whole on all ranks. A rank steps a partition of it,
of which it has a copy in float32 (in float32 runs, too), with the state. In the backward pass gradients go into a
bucket. A full bucket is averaged through a second copy, and what belongs to the rank's partition is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .rank import Owner, Rank, ceil_div, removal_of
from .tracker import StorageTracker


@dataclass
class _FlatGroup:
    """The parameters of a group of the optimizer as one flat tensor.

    Args:
        parameters: In order.
        size: Numbers in the partition of a rank.
        master: This rank's partition in float32.
    """

    parameters: list[nn.Parameter]
    size: int
    master: nn.Parameter

    def slices(self, parameter: nn.Parameter, start: int) -> list[tuple[int, int]]:
        """Return (rank, numbers) of the partitions over which a parameter that begins at `start` is spread."""
        found, place, end = [], start, start + parameter.numel()
        while place < end:
            rank = place // self.size
            stop = min(end, (rank + 1) * self.size)
            found.append((rank, stop - place))
            place = stop
        return found


def trained_groups(
    optimizer: torch.optim.Optimizer | None, trained: list[nn.Parameter]
) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
    """Return the groups of an optimizer of which a parameter is trained, each with these parameters.

    Args:
        optimizer: `None`: there is one group, without settings.
        trained: All parameters that are trained.
    """
    groups = [{"params": trained}] if optimizer is None else optimizer.param_groups
    return [(group, found) for group in groups if (found := [p for p in group["params"] if p.requires_grad])]


class ZeroRank(Rank):
    """The rank of ZeRO-1 or 2 whose partition touches the largest parameters.

    Args:
        model: The whole model, with parameters in the type that DeepSpeed casts them to.
        mode: Its fake mode.
        setup: How the step is made.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._partitions_gradients = self.sharding.kind == "zero2"
        self._groups: list[_FlatGroup] = []
        self._starts: dict[int, tuple[_FlatGroup, int]] = {}
        self._owned: set[int] = set()
        self._forget()

    def _forget(self) -> None:
        self._buckets: list[torch.Tensor] = []
        self._filled = 0
        self._in_bucket: list[nn.Parameter] = []
        self._kept: torch.Tensor | None = None
        self._averaged: torch.Tensor | None = None
        self._host_gradients: list[torch.Tensor] = []

    # ---- The optimizer ---------------------------------------------------------------------------------------------

    def make_optimizer(self) -> torch.optim.Optimizer | None:
        """Return the optimizer of this rank's partitions."""
        optimizer = self.setup.make_optimizer(self.model)
        num = self.sharding.num_devices
        self._groups = []
        used = trained_groups(optimizer, [p for _, p in self.trained])
        for group, parameters in used:
            size = ceil_div(sum(p.numel() for p in parameters), 2 * num) * 2
            self._groups.append(_FlatGroup(parameters, size, nn.Parameter(torch.zeros(size))))
            group["params"] = [self._groups[-1].master]
        if optimizer is not None:
            optimizer.param_groups[:] = [group for group, _ in used]
        for group in self._groups:
            start = 0
            for parameter in group.parameters:
                self._starts[id(parameter)] = group, start
                start += parameter.numel()
        owned = [self._owned_by(rank) for rank in range(num)]
        self._owned = max(owned, key=lambda ids: sum(p.numel() for _, p in self.trained if id(p) in ids))
        return optimizer

    def _owned_by(self, rank: int) -> set[int]:
        return {id(p) for _, p in self.trained if any(r == rank for r, _ in self._slices(p))}

    def _slices(self, parameter: nn.Parameter) -> list[tuple[int, int]]:
        group, start = self._starts[id(parameter)]
        return group.slices(parameter, start)

    # ---- A step ----------------------------------------------------------------------------------------------------

    @property
    def _owned_numel(self) -> int:
        """Numbers of the parameters that this rank's partitions touch: DeepSpeed keeps their gradients whole."""
        return sum(p.numel() for _, p in self.trained if id(p) in self._owned)

    def count(self, tracker: StorageTracker, optimizer: torch.optim.Optimizer | None, owner: Owner) -> None:
        for name, parameter in self.model.named_parameters():
            tracker.count([parameter], "parameters", owner(name))
        num, dtype = self.sharding.num_devices, self._dtype
        padding = sum(num * g.size - sum(p.numel() for p in g.parameters) for g in self._groups)
        self._hold(tracker, [torch.empty(padding, dtype=dtype)], "parameters")
        offloaded = self.sharding.offload_optimizer
        largest = max(p.numel() for _, p in self.trained)
        with self._place(tracker, offloaded):
            tracker.count([group.master for group in self._groups], "optimizer")
            if optimizer is not None:
                tracker.count(tree_leaves(list(optimizer.state.values())), "optimizer")
            if offloaded:
                self._host_gradients = [torch.empty_like(group.master) for group in self._groups]
                tracker.count(self._host_gradients, "gradients")
                for group in self._groups:
                    self._hold(tracker, [torch.empty_like(group.master, dtype=dtype)], "optimizer")
                self._hold(tracker, [torch.empty(largest, dtype=dtype)], "communication")
                if self.accumulates and self._partitions_gradients:
                    owned = [p for _, p in self.trained if id(p) in self._owned]
                    self._hold(tracker, map(torch.empty_like, owned), "gradients")
        if offloaded:
            self._hold(tracker, [torch.empty(largest, dtype=dtype)], "communication")
        if self.accumulates and self._partitions_gradients:
            if not offloaded:
                self._averaged = torch.empty(self._owned_numel, dtype=dtype)
                tracker.count([self._averaged], "gradients")
        elif self.accumulates:
            self._count_gradients(tracker, owner)
            self._make_buckets(tracker)  # since the first micro-batch
            tracker.count(self._buckets, "communication")

    def watch(self, tracker: StorageTracker, owner: Owner) -> Callable[[], None]:
        def hook(parameter):
            self._make_buckets(tracker)
            if self._partitions_gradients or self.sharding.zero.overlap_comm:
                self._put(parameter, tracker)

        handles = [parameter.register_post_accumulate_grad_hook(hook) for _, parameter in self.trained]

        return removal_of(handles)

    def _make_buckets(self, tracker: StorageTracker) -> None:
        if not self._buckets:
            with tracker.tagged("communication"):
                size = self.sharding.zero.reduce_bucket_size
                count = 2 if self.sharding.zero.overlap_comm else 1
                self._buckets = [torch.empty(size, dtype=self._dtype) for _ in range(count)]

    def _put(self, parameter: nn.Parameter, tracker: StorageTracker) -> None:
        """Put a gradient into the bucket, which is reduced first if it has no room."""
        size = self.sharding.zero.reduce_bucket_size
        if self._filled + parameter.numel() > size:
            self._reduce(tracker)
        if parameter.numel() <= size:
            parameter.grad = None  # now a view of the bucket
        self._filled += parameter.numel()
        self._in_bucket.append(parameter)

    @torch.no_grad()
    def _reduce(self, tracker: StorageTracker) -> None:
        """Average what is in the bucket, and keep this rank's part."""
        if not self._in_bucket:
            return
        merged: list[list[int]] = []
        for parameter in self._in_bucket:
            for rank, numel in self._slices(parameter):
                if merged and merged[-1][0] == rank:
                    merged[-1][1] += numel
                else:
                    merged.append([rank, numel])
        with tracker.tagged("communication"):
            count = numel = 0
            for index, (_, piece) in enumerate(merged):
                count, numel = count + 1, numel + piece
                if numel > self.sharding.zero.reduce_bucket_size or index == len(merged) - 1:
                    if count > 1:  # one piece is sent as it is
                        torch.empty(numel, dtype=self._dtype)
                    count = numel = 0
        for parameter in self._in_bucket:
            is_owned = id(parameter) in self._owned
            if is_owned and self.sharding.offload_optimizer:
                with tracker.tagged("communication"):  # in float32, on the way to the host
                    if self._dtype != torch.float32:
                        torch.empty(parameter.numel())
                parameter.grad = None
            elif is_owned:
                if self._kept is None:
                    with tracker.tagged("gradients"):
                        self._kept = torch.empty(self._owned_numel, dtype=self._dtype)
                parameter.grad = None
            elif self._partitions_gradients:
                parameter.grad = None
        self._in_bucket, self._filled = [], 0

    def end_backward(self, tracker: StorageTracker) -> None:
        if not (self._partitions_gradients or self.sharding.zero.overlap_comm):
            for group in self._groups:
                for parameter in group.parameters:
                    if parameter.grad is not None:
                        self._put(parameter, tracker)
        self._reduce(tracker)
        if self._averaged is None:
            self._averaged = self._kept
        self._kept, self._buckets = None, []
        for _, parameter in self.trained:
            parameter.grad = None

    @torch.no_grad()
    def step(self, tracker: StorageTracker, optimizer: torch.optim.Optimizer) -> None:
        groups, offloaded = optimizer.param_groups, self.sharding.offload_optimizer
        if self._dtype != torch.float32 and not offloaded:
            torch.empty(max((p.numel() for _, p in self.trained if id(p) in self._owned), default=0))  # for the norm
        for index, flat in enumerate(self._groups):
            with self._place(tracker, offloaded):
                if not offloaded:
                    gradient = torch.empty(flat.size, dtype=self._dtype)
                    flat.master.grad = gradient.to(torch.float32)
                    del gradient
                    if index == len(self._groups) - 1:
                        self._averaged = None
                else:
                    flat.master.grad = self._host_gradients[index]
                optimizer.param_groups = [groups[index]]
                optimizer.step()
                flat.master.grad = None
        optimizer.param_groups = groups

    def reset(self) -> None:
        super().reset()
        self._forget()
        for group in self._groups:
            group.master.grad = None
