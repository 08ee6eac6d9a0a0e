"""Buffers that a forward pass changes (running statistics) are changed once, not again by the recomputation.

A batch norm that trains never reads its running statistics, so its recomputation runs with others in their place, and
nothing is copied: a convolutional network has hundreds of them, and copying them takes the host longer than the GPU
takes to recompute.

Which other buffers change can't be told from the class: there are timm's EvoNorm, spectral normalization, codebooks,
and modules of users. So all of them are copied before the region's forward pass, and the recomputation runs with
copies of these copies in their place. It starts from the same values as the forward pass did, which matters where the
output depends on them (spectral normalization iterates from its buffers), and what it changes is dropped.

Copies of norm layers are some KiB. A causal mask or a codebook can be large, and the version counter of a tensor,
which is free to read, tells whether it changed: large buffers are copied in the first call, and from then on only if
they changed in it.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hf_trainopt.placement.recompute.frame import kind_of


# Elements up to which a buffer is always copied: far above the channels of any norm, far below a causal mask.
SMALL_BUFFER = 65536


@dataclass
class _Copied:
    """One buffer of one module, as it was before the forward pass."""

    owner: nn.Module
    name: str
    buffer: torch.Tensor
    version: int | None
    copy: torch.Tensor | None

    @property
    def changed(self) -> bool:
        """Whether the buffer was replaced or written to since then."""
        return self.owner._buffers.get(self.name) is not self.buffer or _version(self.buffer) != self.version


# Batch norms whose output doesn't depend on their buffers while they train. By name: timm is no requirement.
_BATCH_NORMS = {
    *(f"torch.nn.modules.batchnorm.{name}" for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")),
    "timm.layers.norm_act.BatchNormAct2d",
}


def only_writes(module: nn.Module) -> bool:
    """Return whether a module that trains writes its buffers and never reads them for what it returns."""
    cls = type(module)
    return (
        f"{cls.__module__}.{cls.__qualname__}" in _BATCH_NORMS
        and module.track_running_stats
        and "forward" not in module.__dict__
    )


class BufferKeeper:
    """Takes snapshots of the buffers of a region, and remembers which large ones never change."""

    def __init__(self):
        self._constant: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
        self._others: weakref.WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict) -> "BufferKeeper":
        return BufferKeeper()

    def take(self, module: nn.Module) -> "BufferSnapshot | None":
        """Copy the buffers of `module` and what is inside it: call just before its forward pass.

        Returns:
            `None` if there are no buffers.
        """
        owners = [owner for owner in module.modules() if any(b is not None for b in owner._buffers.values())]
        if not owners:
            return None
        written = [owner for owner in owners if owner.training and only_writes(owner)]
        entries = [
            _Copied(owner, name, buffer, _version(buffer), None)
            for owner in owners
            if owner not in written
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        changing = [
            entry
            for entry in entries
            if entry.buffer.numel() <= SMALL_BUFFER or entry.name not in self._constant.get(entry.owner, ())
        ]
        copies = copies_of(entry.buffer for entry in changing)
        for entry in changing:
            entry.copy = copies[id(entry.buffer)]
        return BufferSnapshot(self, entries, written)

    def prepare(self, module: nn.Module) -> None:
        """Make what recomputations write to, so that the first one takes no more memory than the others."""
        for owner in filter(only_writes, module.modules()):
            self.others(owner)

    def others(self, owner: nn.Module) -> dict[str, torch.Tensor]:
        """Return buffers that a module can write to in place of its own; always the same ones."""
        found = self._others.setdefault(owner, {})
        for name, buffer in owner._buffers.items():
            if buffer is not None and (name not in found or kind_of(found[name]) != kind_of(buffer)):
                found[name] = torch.zeros_like(buffer)
        return found

    def _sort(self, entries: list[_Copied]) -> list[_Copied]:
        """Return the entries that a recomputation must start from."""
        kept = []
        for entry in entries:
            large = entry.buffer.numel() > SMALL_BUFFER
            if entry.copy is None and entry.changed:
                raise RuntimeError(
                    f"the buffer '{entry.name}' ({entry.buffer.numel()} elements) of a {type(entry.owner).__name__} "
                    "changed in a forward pass, but not in earlier ones, so no copy was kept to recompute from; "
                    "choose recompute='none' for the stage that holds it."
                )
            if large and not entry.changed:
                self._constant.setdefault(entry.owner, set()).add(entry.name)
            else:
                kept.append(entry)
        return kept


class BufferSnapshot:
    """The buffers of a region before one forward pass."""

    def __init__(self, keeper: BufferKeeper, entries: list[_Copied], written: list[nn.Module]):
        self._keeper = keeper
        self._entries = entries
        self._written = written

    def finish(self) -> None:
        """Drop the copies of large buffers that did not change: call after the forward pass.

        Raises:
            RuntimeError: A large buffer changed that never did before, so that no copy was made.
        """
        self._entries = self._keeper._sort(self._entries)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run the block with the buffers of the snapshot; put back the present ones whatever happens in it.

        Early stopping ends a recomputation with an exception, and a region can be recomputed more than once (two
        backward passes over a retained graph), so the copies are copied again.
        """
        fresh = copies_of(entry.copy for entry in self._entries)
        others = {owner: self._keeper.others(owner) for owner in self._written}
        present = [(entry.owner, entry.name, entry.owner._buffers[entry.name]) for entry in self._entries]
        present += [(owner, name, owner._buffers[name]) for owner, found in others.items() for name in found]
        try:
            for owner, found in others.items():
                owner._buffers.update(found)
            for entry in self._entries:
                entry.owner._buffers[entry.name] = fresh[id(entry.copy)]
            yield
        finally:
            for owner, name, buffer in present:
                owner._buffers[name] = buffer


def copies_of(tensors: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return copies by the identity of the tensors: buffers that modules share stay shared."""
    return {key: tensor.detach().clone() for key, tensor in {id(tensor): tensor for tensor in tensors}.items()}


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
