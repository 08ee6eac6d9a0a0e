"""What a rank of DeepSpeed's ZeRO-3 holds, and when: as `runtime/zero/stage3.py` does it (0.19).

Each parameter is a flat partition, padded to the same size on all ranks. The bucket for gradients, and the partitions
of all gradients, are there all the time, and so is a copy of the partitions in float32 (in float32 runs, too).
`zero3_gathering.py` has when parameters are whole.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .rank import Owner, Rank, ceil_div, removal_of
from .tracker import StorageTracker
from .zero import trained_groups
from .zero3_gathering import Gathering


class Zero3Rank(Rank):
    """A rank of ZeRO-3: all hold the same.

    Args:
        model: The whole model, with parameters in the type that DeepSpeed casts them to.
        mode: Its fake mode.
        setup: How the step is made.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._num = self.sharding.num_devices
        self._masters: list[nn.Parameter] = []
        self._gathering = Gathering(self.model, self.sharding, self._has_host)
        self._filled = 0
        self._in_bucket: list[nn.Parameter] = []

    def _partition(self, parameter: nn.Parameter) -> int:
        return ceil_div(parameter.numel(), self._num)

    # ---- The optimizer ---------------------------------------------------------------------------------------------

    def make_optimizer(self) -> torch.optim.Optimizer | None:
        """Return the optimizer of this rank's partitions, one for each group of at most `sub_group_size` numbers."""
        optimizer = self.setup.make_optimizer(self.model)
        self._masters, made = [], []
        for group, parameters in trained_groups(optimizer, [p for _, p in self.trained]):
            for members in self._sub_groups(parameters):
                self._masters.append(nn.Parameter(torch.zeros(sum(map(self._partition, members)))))
                made.append({**group, "params": self._masters[-1:]})
        if optimizer is not None:
            optimizer.param_groups[:] = made
        return optimizer

    def _sub_groups(self, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        members: list[nn.Parameter] = []
        for parameter in parameters:
            members.append(parameter)
            if sum(map(self._partition, members)) >= self.sharding.zero.sub_group_size:
                yield members
                members = []
        if members:
            yield members

    # ---- A step ----------------------------------------------------------------------------------------------------

    def count(self, tracker: StorageTracker, optimizer: torch.optim.Optimizer | None, owner: Owner) -> None:
        tracker.exempt(self.model.parameters())
        offloaded = self.sharding.offload_optimizer
        with self._place(tracker, self.sharding.offload_parameters):
            for name, parameter in self.model.named_parameters():
                shard = torch.empty(self._partition(parameter), dtype=parameter.dtype)
                self._hold(tracker, [shard], "parameters", owner(name))
        with self._place(tracker, offloaded):
            tracker.count(self._masters, "optimizer")
            if optimizer is not None:
                tracker.count(tree_leaves(list(optimizer.state.values())), "optimizer")
            if offloaded:
                self._hold(tracker, map(torch.empty_like, self._masters), "gradients")
            numel = sum(self._partition(parameter) for _, parameter in self.trained)
            self._hold(tracker, [torch.empty(numel, dtype=self._dtype)], "gradients")
        self._hold(tracker, [torch.empty(self.sharding.zero.reduce_bucket_size, dtype=self._dtype)], "communication")
        self._gathering.begin_step(tracker)

    def rehearse(self, run: Callable[[], None]) -> None:
        """Record the order of modules."""
        self._gathering.record()
        undo = self._gathering.watch()
        try:
            run()
        finally:
            undo()
            self._gathering.end_recording()
            for _, parameter in self.trained:
                parameter.grad = None

    def watch(self, tracker: StorageTracker, owner: Owner) -> Callable[[], None]:
        undo_gathering = self._gathering.watch()

        def hook(parameter):
            numel, size = parameter.numel(), self.sharding.zero.reduce_bucket_size
            if self._filled and self._filled + numel > size:
                self._reduce(tracker)
            if self._filled + numel <= size:
                parameter.grad = None  # now a view of the bucket
            self._filled += numel
            self._in_bucket.append(parameter)

        handles = [parameter.register_post_accumulate_grad_hook(hook) for _, parameter in self.trained]

        undo_reduction = removal_of(handles)

        def undo():
            undo_gathering()
            undo_reduction()

        return undo

    @torch.no_grad()
    def _reduce(self, tracker: StorageTracker) -> None:
        """Reduce-scatter what is in the bucket, through a copy, and add it to the partitions."""
        if not self._in_bucket:
            return
        with tracker.tagged("communication"):
            if len(self._in_bucket) > 1 or self._in_bucket[0].numel() % self._num:
                torch.empty(sum(self._num * self._partition(p) for p in self._in_bucket), dtype=self._dtype)
        for parameter in self._in_bucket:
            parameter.grad = None
        self._in_bucket, self._filled = [], 0

    def end_backward(self, tracker: StorageTracker) -> None:
        self._reduce(tracker)
        self._gathering.end_backward()

    @torch.no_grad()
    def step(self, tracker: StorageTracker, optimizer: torch.optim.Optimizer) -> None:
        self._gathering.release_all()
        groups, offloaded = optimizer.param_groups, self.sharding.offload_optimizer
        if self._dtype != torch.float32 and not offloaded:
            torch.empty(max(self._partition(p) for _, p in self.trained))  # for the norm
        with self._place(tracker, offloaded):
            for master, group in zip(self._masters, groups, strict=True):
                gradient = torch.empty(master.numel(), dtype=self._dtype)
                master.grad = gradient.to(torch.float32)
                del gradient
                optimizer.param_groups = [group]
                optimizer.step()
                master.grad = None
        optimizer.param_groups = groups
        self._gathering.gather_persistent()

    def reset(self) -> None:
        super().reset()
        self._gathering.forget()
        self._in_bucket, self._filled = [], 0
        for master in self._masters:
            master.grad = None
