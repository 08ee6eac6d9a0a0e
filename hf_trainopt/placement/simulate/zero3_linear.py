"""`F.linear` as DeepSpeed replaces it under ZeRO-3: it keeps its input even where the weight is frozen.

`LinearFunctionForZeroStage3` of `runtime/zero/linear.py` (DeepSpeed 0.19). `zero.Init` puts it in place for the whole
process when the first engine is made, which is after the first plan.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F


class _Linear(torch.autograd.Function):
    """The same products and sums in the same order, so that temporaries and recomputed operators are the same."""

    @staticmethod
    def forward(ctx, input, weight, bias):
        ctx.autocasts, ctx.dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        ctx.save_for_backward(input, weight, bias)
        if input.dim() == 2 and bias is not None:
            return torch.addmm(bias, input, weight.t())
        output = input.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        grad_input = grad_weight = grad_bias = None
        with torch.autocast("cpu", enabled=ctx.autocasts, dtype=ctx.dtype):
            if needs_input:
                grad_input = grad.matmul(weight)
            if needs_weight:
                flat = grad.reshape(-1, grad.shape[-1])
                grad_weight = flat.t().matmul(input.reshape(-1, input.shape[-1]))
            if bias is not None and needs_bias:
                grad_bias = grad if grad.dim() == 1 else grad.sum(list(range(grad.dim() - 1)))
        return grad_input, grad_weight, grad_bias


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _Linear.apply(input, weight, bias)


@contextmanager
def zero3_linear() -> Iterator[None]:
    """Context in which `F.linear` is that of DeepSpeed."""
    stock, F.linear = F.linear, _linear
    try:
        yield
    finally:
        F.linear = stock
