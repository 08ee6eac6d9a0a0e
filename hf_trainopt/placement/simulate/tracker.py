"""Counts the bytes of live storages, operator by operator: peak, by kind and by section of a training step."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...core.facts import DTensor, is_distributed
from ...machine.costs import Cost, op_cost
from ...machine.devices import DeviceSpec
from ..recompute.selective import is_compute_op


# What bytes are for.
KINDS = (
    "parameters", "buffers", "inputs", "optimizer", "gradients", "communication", "gathered", "activations", "loss",
    "workspace", "temporary",
)  # fmt: skip

Key = tuple[str, str]

_DEVICE_OF = torch.ops.prim.device.default


@dataclass
class Section:
    """A part of the step: the forward pass of a stage, the loss, the backward pass of a stage, ...

    Bytes do not contain the outputs of stages ("boundaries"), whose end depends on the neighbours.

    Args:
        phase: `"start"`, `"forward"`, `"between"`, `"head"`, `"backward"`, `"tail"`, `"step"`.
        stage: Which stage, or `""`.
        start_bytes: Live bytes when it began.
        peak_bytes: Most live bytes in it.
        end_bytes: Live bytes when it ended.
        cost: What ran in it.
        compute_ops: Names of the compute-bound operators that ran in it, in order.
    """

    phase: str
    stage: str
    start_bytes: int
    peak_bytes: int
    end_bytes: int = 0
    cost: Cost = field(default_factory=Cost)
    compute_ops: list[str] = field(default_factory=list)


class StorageTracker(TorchDispatchMode):
    """Context in which every new storage is counted until it dies.

    Works on real and on fake tensors: what is counted are the bytes of storages, as an allocator is asked for them.
    Rounding by the allocator and fragmentation are not seen. Views share storages, which count once.

    Args:
        spec: Device to compute costs for; `None`: no costs.
        counts_arguments: Whether tensors that were there before are counted once an operator takes them.
        scratch: Returns what an operator (func, args, out) allocates and frees within its kernel; `None`: not counted.

    Attributes:
        host_bytes: Most bytes at a time that were counted as the host's (see `on_host`).
    """

    def __init__(
        self,
        spec: DeviceSpec | None = None,
        scratch: Callable[..., int] | None = None,
        counts_arguments: bool = False,
    ):
        super().__init__()
        self.counts_arguments = counts_arguments
        self.spec = spec
        self.scratch = scratch
        self.current_bytes = 0
        self.peak_bytes = 0
        self.boundary_bytes = 0
        self.by_key: dict[Key, int] = {}
        self.peak_by_key: dict[Key, int] = {}
        self.sections: list[Section] = []
        self.kind, self.scope = "temporary", ""
        self.host_bytes = self._current_host_bytes = 0
        self._is_on_host = False
        self._live: dict[int, list[Any]] = {}
        self._boundaries: set[int] = set()
        self.is_active = False
        self.boundary_ends: list[tuple[str, Section]] = []
        self.begin("start")

    def __enter__(self):
        self.is_active = True
        if self.counts_arguments:
            self._stock_resize = torch.UntypedStorage.resize_
            torch.UntypedStorage.resize_ = self._resize()
        return super().__enter__()

    def __exit__(self, *exception):
        self.is_active = False
        if self.counts_arguments:
            torch.UntypedStorage.resize_ = self._stock_resize
        return super().__exit__(*exception)

    def _resize(self) -> Callable[..., Any]:
        """Return `UntypedStorage.resize_`, with which FSDP2 frees and allocates parameters, with a count."""
        stock, tracker = self._stock_resize, self

        def resize_(storage, size):
            out = stock(storage, size)
            entry = tracker._live.get(storage._cdata)
            if entry is not None and storage.device.type != "meta":
                tracker._add(entry[1], size - entry[0])
                tracker.current_bytes += size - entry[0]
                entry[0] = size
                tracker._peak(0)
            return out

        return resize_

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it comes back with the pieces that this rank holds
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # three of four calls under fake tensors: no need to go through their mode
        kwargs = kwargs or {}
        if self.counts_arguments:
            for leaf in args:
                for inner in leaf if isinstance(leaf, tuple | list) else (leaf,):
                    if isinstance(inner, torch.Tensor):
                        self._register(inner, ("inputs", ""))
        out = func(*args, **kwargs)
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, torch.Tensor):
                self._register(leaf)
            elif isinstance(leaf, tuple | list):
                for inner in tree_leaves(leaf):
                    if isinstance(inner, torch.Tensor):
                        self._register(inner)
        section = self.sections[-1]
        if is_compute_op(func):
            section.compute_ops.append(func._overloadpacket.__name__)
        if self.scratch is not None and (more := self.scratch(func, args, out)):
            self._peak(more)
        if self.spec is not None:
            section.cost = section.cost + op_cost(func, args, kwargs, out, self.spec)
        return out

    @property
    def inner_bytes(self) -> int:
        """Live bytes without boundaries."""
        return self.current_bytes - self.boundary_bytes

    def begin(self, phase: str, stage: str = "") -> Section:
        """End the section that runs and begin another one."""
        self.end()
        self.sections.append(Section(phase, stage, self.inner_bytes, self.inner_bytes))
        return self.sections[-1]

    def end(self) -> None:
        """End the last section."""
        if self.sections:
            self.sections[-1].end_bytes = self.inner_bytes

    def mark_boundary(self, tensor: torch.Tensor, stage: str) -> int:
        """Take the storage of a stage's output out of the bytes of sections; return how many bytes that are."""
        identity = storage_id(tensor)
        entry = self._live.get(identity)
        if entry is None or identity in self._boundaries:
            return 0
        entry[3] = stage
        self._boundaries.add(identity)
        self.boundary_bytes += entry[0]
        return entry[0]

    def charge(self, cost: Cost) -> None:
        """Add the cost of what is no operator of PyTorch to the section that runs."""
        self.sections[-1].cost = self.sections[-1].cost + cost

    def total_cost(self) -> Cost:
        """Return the cost of everything that ran."""
        return sum((section.cost for section in self.sections), Cost())

    def count(self, tensors: Iterable[Any], kind: str, scope: str = "") -> None:
        """Count tensors that exist already, or give those that are counted another kind."""
        for tensor in tensors:
            if is_distributed(tensor):
                tensor = tensor.to_local()
            if isinstance(tensor, torch.Tensor):
                entry = self._register(tensor, (kind, scope))
                if entry is not None and entry[1] != (kind, scope):
                    self._add(entry[1], -entry[0])
                    entry[1] = (kind, scope)
                    self._add(entry[1], entry[0])

    @contextmanager
    def tagged(self, kind: str, scope: str = ""):
        """Context in which new storages are of this kind and scope."""
        before = self.kind, self.scope
        self.kind, self.scope = kind, scope
        try:
            yield
        finally:
            self.kind, self.scope = before

    def exempt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors, and all that share their storages, as nothing: others stand in for them."""
        for tensor in tensors:
            self._register(tensor, num_bytes=0)

    @contextmanager
    def on_host(self):
        """Context in which new storages, and those that are counted first, are memory of the host."""
        before, self._is_on_host = self._is_on_host, True
        try:
            yield
        finally:
            self._is_on_host = before

    def _add(self, key: Key, num_bytes: int) -> None:
        self.by_key[key] = self.by_key.get(key, 0) + num_bytes

    def _register(
        self, tensor: torch.Tensor, key: Key | None = None, num_bytes: int | None = None
    ) -> list[Any] | None:
        storage = tensor.untyped_storage()
        if storage.device.type == "meta" and not isinstance(tensor, FakeTensor):
            return None
        identity = storage._cdata
        entry = self._live.get(identity)
        if entry is not None:
            return entry
        num_bytes = storage.nbytes() if num_bytes is None else num_bytes
        host_bytes = 0
        if self._is_on_host:
            num_bytes, host_bytes = 0, num_bytes
            self._current_host_bytes += host_bytes
            self.host_bytes = max(self.host_bytes, self._current_host_bytes)
        key = key or (self.kind, self.scope)
        live, entry = self._live, [num_bytes, key, None, None]

        def freed(_, self=self, identity=identity, entry=entry, host_bytes=host_bytes):
            if live.get(identity) is entry:
                del live[identity]
                self._current_host_bytes -= host_bytes
                self.current_bytes -= entry[0]
                self.by_key[entry[1]] -= entry[0]
                if identity in self._boundaries:
                    self._boundaries.discard(identity)
                    self.boundary_bytes -= entry[0]
                    self.boundary_ends.append((entry[3], self.sections[-1]))

        entry[2] = weakref.ref(storage, freed)
        live[identity] = entry
        self._add(key, num_bytes)
        self.current_bytes += num_bytes
        self._peak(0)
        return entry

    def _peak(self, scratch: int) -> None:
        """Take in that this much is allocated beside the live storages."""
        section = self.sections[-1]
        section.peak_bytes = max(section.peak_bytes, self.inner_bytes + scratch)
        if self.current_bytes + scratch > self.peak_bytes:
            self.peak_bytes = self.current_bytes + scratch
            self.peak_by_key = dict(self.by_key)
            if scratch:
                key = ("temporary", self.scope)
                self.peak_by_key[key] = self.peak_by_key.get(key, 0) + scratch


def merged_section(sections: Sequence[Section]) -> Section:
    """Return the sections of several calls of one stage as one: changes are added up, the largest peak is taken."""
    start = sections[0].start_bytes
    return Section(
        sections[0].phase,
        sections[0].stage,
        start,
        start + max(section.peak_bytes - section.start_bytes for section in sections),
        start + sum(section.end_bytes - section.start_bytes for section in sections),
        sum((section.cost for section in sections), Cost()),
        sections[0].compute_ops,
    )


def storage_id(tensor: torch.Tensor) -> int:
    """Return what names the storage of a tensor while it lives."""
    return tensor.untyped_storage()._cdata
