"""Liger's losses in a replay: what they ask of values, and what one of them does on newer CUDA devices only."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from ...machine.devices import DeviceSpec
from .triton_kernels import Launched
from .values import UNKNOWN


_FUSED = "liger_kernel.ops.fused_linear_cross_entropy"
# Modules of Liger -> functions of theirs that ask for values.
_LOSSES = {
    _FUSED: ("fused_linear_cross_entropy_forward", "fused_linear_cross_entropy_backward"),
    "liger_kernel.ops.cross_entropy": ("cross_entropy_forward", "cross_entropy_backward"),
}
_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def liger_replayed(device: DeviceSpec, launched: Launched) -> Iterator[None]:
    """Context in which a model with Liger's kernels can be replayed.

    Args:
        device: Where the step runs.
        launched: Called for each product that isn't made.
    """
    with ExitStack() as stack:
        for name, functions in _LOSSES.items():
            module = sys.modules.get(name)
            for function in functions if module is not None else ():
                stock = getattr(module, function)
                setattr(module, function, _answered(stock))
                stack.callback(setattr, module, function, stock)
        fused = sys.modules.get(_FUSED)
        if fused is not None and device.kind == "cuda" and device.capability >= 8:
            fused.torch = _TorchOnCuda(launched)
            stack.callback(setattr, fused, "torch", torch)
        yield


def _answered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of Liger's within which questions about values, which fake tensors lack, have answers.

    The losses check that labels are within the vocabulary, hand the number of labels on to kernels, and multiply
    gradients, in place, by one that isn't 1.
    """
    stock_item, stock_bool = FakeTensor.item, FakeTensor.__bool__

    def item(tensor: torch.Tensor) -> Any:
        try:
            return stock_item(tensor)
        except DataDependentOutputException:
            return UNKNOWN

    def truth(tensor: torch.Tensor) -> bool:
        try:
            return stock_bool(tensor)
        except DataDependentOutputException:
            return True

    stock_equal = torch.equal

    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        return not isinstance(a, FakeTensor) and stock_equal(a, b)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        FakeTensor.item, FakeTensor.__bool__, torch.equal = item, truth, equal
        try:
            return function(*args, **kwargs)
        finally:
            FakeTensor.item, FakeTensor.__bool__, torch.equal = stock_item, stock_bool, stock_equal

    return run


class _TorchOnCuda:
    """`torch`, as the fused loss sees it, where the gradient of the head is added up in place.

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
