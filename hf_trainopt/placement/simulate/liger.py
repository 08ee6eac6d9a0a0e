"""Liger's kernels in a replay: what they do with values, and what their loss does on CUDA only."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .triton_kernels import Launched
from .values import UNKNOWN


_LOSS = "liger_kernel.ops.fused_linear_cross_entropy"
_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def liger_replayed(kind: str, launched: Launched) -> Iterator[None]:
    """Context in which a model with Liger's kernels can be replayed.

    Args:
        kind: `"cuda"` or `"cpu"`.
        launched: Called for each kernel that would run.
    """
    with ExitStack() as stack:
        stack.enter_context(_answers())
        loss = sys.modules.get(_LOSS)
        if kind == "cuda" and loss is not None:
            loss.torch = _TorchOnCuda(launched)
            stack.callback(setattr, loss, "torch", torch)
        yield


@contextmanager
def _answers() -> Iterator[None]:
    """Context in which what Liger's losses ask of values, which fake tensors lack, has an answer.

    They hand the number of labels on to kernels, and multiply gradients, in place, by one that isn't 1. Functions are
    patched, and not a mode used, because a mode is off within a backward pass that it sees.
    """
    stock = torch.equal
    torch.equal = lambda a, b: not isinstance(a, FakeTensor) and stock(a, b)
    FakeTensor.item = lambda self: UNKNOWN
    try:
        yield
    finally:
        torch.equal = stock
        del FakeTensor.item


class _TorchOnCuda:
    """`torch`, as the loss sees it, where the gradient of the head is added up in place.

    Liger does so for 16-bit numbers on CUDA from compute capability 8.0 on. On other devices the product for each
    chunk of logits is an array as large as the head in float32, which this leaves out.
    """

    def __init__(self, launched: Launched):
        self._launched = launched

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def mm(self, a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if kwargs or a.dtype not in _HALF:
            return torch.mm(a, b, **kwargs)
        (rows, inner), columns = a.shape, b.shape[1]
        moved = a.element_size() * (a.numel() + b.numel())
        self._launched(moved, 2 * rows * inner * columns, a.dtype)
        return torch.empty((), dtype=torch.float32).expand(rows, columns)
