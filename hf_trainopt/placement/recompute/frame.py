"""A checkpointed region in autograd: keeps inputs in place of saved tensors, and computes these again when asked.

This is `torch.utils.checkpoint` without re-entrance, reduced to what a placement needs. PyTorch's own takes one
function, so a run of stages could only be put together from its private parts; and it spends more time on the host
for each saved tensor than many a kernel takes on the device (`benchmarks/recompute_overhead.py` measures both).
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from hf_trainopt.placement.recompute.offload import InputOnHost


Kind = tuple[torch.Size, torch.dtype, torch.device]


def kind_of(tensor: torch.Tensor) -> Kind:
    """Return what tensors that stand for each other have in common."""
    return tensor.shape, tensor.dtype, tensor.device


class _Kept(torch.autograd.Function):
    """Keeps tensors as autograd keeps them: with a check of their versions, and through hooks of the user's."""

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return anchor.clone()

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> None:
        raise AssertionError("nothing is computed from a frame's inputs")


class _Holder:
    """Stands in autograd's graph for a saved tensor, and holds it between the recomputation and its use.

    Only the graph holds it. Once it is gone, nobody needs the tensor any more.
    """

    __slots__ = ("__weakref__", "tensor")

    def __init__(self):
        self.tensor: torch.Tensor | None = None


class _Stop(Exception):
    """Ends a recomputation: the tensors that are left are of no use to anyone."""


class Frame:
    """What a region keeps.

    Args:
        stage: Name of the region, for errors.
        recompute: Computes the region again from its inputs. It must not refer to the frame.
        inputs: Inputs of the region.
        offload: Whether the first that was computed is kept on the host.
    """

    def __init__(
        self, stage: str, recompute: Callable[..., Any], inputs: Sequence[torch.Tensor], offload: bool = False
    ):
        self._stage = stage
        self._recompute = recompute
        self._on_host = InputOnHost(inputs) if offload else None
        kept = inputs if self._on_host is None else self._on_host.others
        self._kept = _Kept.apply(torch.empty(0, requires_grad=True), *kept)  # its node lives as long as the tensor
        self._holders: list[weakref.ref[_Holder]] = []
        self._kinds: list[Kind] = []

    def storing(self) -> saved_tensors_hooks:
        """Return the context of the region's forward pass. It can be entered several times, for pieces of it."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> _Holder:
        holder = _Holder()
        self._holders.append(weakref.ref(holder))
        self._kinds.append(kind_of(tensor))
        return holder

    def _unpack(self, holder: _Holder) -> torch.Tensor:
        # Nothing is found the first time, or if a graph that was retained is run backward again.
        if holder.tensor is None:
            self._compute()
        tensor, holder.tensor = holder.tensor, None
        return tensor

    def _compute(self) -> None:
        """Compute the region again, as far as tensors of it are still needed.

        Raises:
            RuntimeError: It did not save the same tensors again.
        """
        last = max(index for index, holder in enumerate(self._holders) if holder() is not None)
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            index, count = count, count + 1
            # An operator that saves what it returns would hold itself: a cycle that nobody frees.
            tensor = tensor.detach() if tensor.requires_grad else tensor
            if (holder := self._holders[index]()) is not None:
                kind = kind_of(tensor)
                if kind != self._kinds[index]:
                    raise RuntimeError(self._differs(f"tensor {index} was {self._kinds[index]}, and is {kind} now"))
                holder.tensor = tensor
            if index >= last:
                raise _Stop
            return tensor

        try:
            with saved_tensors_hooks(pack, _same), torch.enable_grad():
                self._recompute(*self._inputs())
        except _Stop:
            return
        raise RuntimeError(self._differs(f"it saved {last + 1} tensors or more, and {count} now"))

    def _inputs(self) -> Sequence[torch.Tensor]:
        kept = self._kept.grad_fn.saved_tensors
        return kept if self._on_host is None else self._on_host.with_others(kept)

    def _differs(self, how: str) -> str:
        return (
            f"the recomputation of stage '{self._stage}' differs from its forward pass: {how}. Choose "
            "recompute='none' for a stage whose operators depend on outside state."
        )


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
