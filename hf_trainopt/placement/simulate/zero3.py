"""What a rank of DeepSpeed's ZeRO-3 holds, and when: as `runtime/zero/stage3.py` does it (0.19).

Each parameter is a flat partition, padded to the same size on all ranks. The bucket for gradients, and the partitions
of all gradients, are there all the time, and so is a copy of the partitions in float32 (in float32 runs, too).
`zero3_gathering.py` has when parameters are whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .rank import Owner, Rank, ceil_div
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

    is_traced = True

    def __init__(self, *args):
        super().__init__(*args)
        self._num = self.sharding.num_devices
        self._masters: list[tuple[nn.Parameter, list[nn.Parameter], int]] = []
        self._gathering = Gathering(self.model, self.sharding, self.setup.device.kind != "cpu")
        self._filled = 0
        self._in_bucket: list[nn.Parameter] = []

    def _partition(self, parameter: nn.Parameter) -> int:
        return ceil_div(parameter.numel(), self._num)

    # ---- The optimizer ---------------------------------------------------------------------------------------------

    def make_optimizer(self) -> torch.optim.Optimizer | None:
        """Return the optimizer of this rank's partitions, one for each group of at most `sub_group_size` numbers."""
        optimizer = self.setup.make_optimizer(self.model)
        groups = [] if optimizer is None else list(optimizer.param_groups)
        self._masters, made = [], []
        for index, parameters in enumerate(trained_groups(optimizer, [[p for _, p in self.trained]])):
            for members in self._sub_groups(parameters):
                master = nn.Parameter(torch.zeros(sum(map(self._partition, members))))
                self._masters.append((master, members, len(made)))
                if groups:
                    used = [g for g in groups if any(p.requires_grad for p in g["params"])]
                    made.append({**used[index], "params": [master]})
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

    @property
    def _dtype(self) -> torch.dtype:
        return self.trained[0][1].dtype

    def count(self, tracker: StorageTracker, optimizer: torch.optim.Optimizer | None, owner: Owner) -> None:
        tracker.exempt(self.model.parameters())
        offloaded = self.sharding.offload_optimizer
        with self._place(tracker, self.sharding.offload_parameters):
            for name, parameter in self.model.named_parameters():
                shard = torch.empty(self._partition(parameter), dtype=parameter.dtype)
                self._hold(tracker, [shard], "parameters", owner(name))
        with self._place(tracker, offloaded):
            tracker.count([master for master, _, _ in self._masters], "optimizer")
            if optimizer is not None:
                tracker.count(tree_leaves(list(optimizer.state.values())), "optimizer")
            if offloaded:
                self._hold(tracker, [torch.empty_like(master) for master, _, _ in self._masters], "gradients")
            numel = sum(self._partition(parameter) for _, parameter in self.trained)
            self._hold(tracker, [torch.empty(numel, dtype=self._dtype)], "gradients")
        self._hold(tracker, [torch.empty(self.sharding.zero.reduce_bucket_size, dtype=self._dtype)], "communication")
        self._gathering.begin_step(tracker)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context of a forward and backward pass, in which the order of modules is recorded."""
        self._gathering.record()
        undo = self._gathering.watch()
        try:
            yield
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

        def undo():
            undo_gathering()
            for handle in handles:
                handle.remove()

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
            for master, _, index in self._masters:
                gradient = torch.empty(master.numel(), dtype=self._dtype)
                master.grad = gradient.to(torch.float32)
                del gradient
                optimizer.param_groups = [groups[index]]
                optimizer.step()
                master.grad = None
        optimizer.param_groups = groups
        self._gathering.gather_persistent()

    def reset(self) -> None:
        super().reset()
        self._gathering.forget()
        self._in_bucket, self._filled = [], 0
        for master, _, _ in self._masters:
            master.grad = None
