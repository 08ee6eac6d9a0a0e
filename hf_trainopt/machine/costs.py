"""What an operator costs on a device: FLOPs, bytes moved, and the time that follows from both (a roofline)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .devices import HEAVY, HEAVY_OPS, DeviceSpec


@dataclass
class Cost:
    """Sum of what operators cost.

    Args:
        flops: Multiplications and additions of matrix products, convolutions and attention.
        num_bytes: Bytes read and written.
        device_seconds: Time on the device.
        host_seconds: Time that the host takes to issue them.
    """

    flops: int = 0
    num_bytes: int = 0
    device_seconds: float = 0.0
    host_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Time of a step that consists of these: the device waits for the host, or the host for the device."""
        return max(self.device_seconds, self.host_seconds)

    def mixed(self, share: float) -> float:
        """Return a mean of both times, which is never above `seconds`; `share` is the device's weight."""
        return share * self.device_seconds + (1 - share) * self.host_seconds

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.num_bytes + other.num_bytes,
            self.device_seconds + other.device_seconds,
            self.host_seconds + other.host_seconds,
        )

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops - other.flops,
            self.num_bytes - other.num_bytes,
            self.device_seconds - other.device_seconds,
            self.host_seconds - other.host_seconds,
        )


# Allocations and questions about tensors: no kernel runs.
_FREE = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh")
)


def _grouped_mm_flops(mat_a: torch.Tensor, mat_b: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the products of mixtures of experts: each row, column or term belongs to one expert."""
    groups = mat_a.shape[0] if mat_a.dim() == mat_b.dim() == 3 else 1
    return 2 * groups * mat_a.shape[-2] * mat_a.shape[-1] * mat_b.shape[-1]


def attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """FLOPs of scores and their product with the values.

    Args:
        query: Batch x heads x queries x width.
        key: Batch x heads, or fewer (grouped-query attention) x keys x width.
        value: Batch x heads of `key` x keys x width of the output.
        *args: Not needed.
        **kwargs: Not needed.
    """
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (width + value.shape[-1])


def attention_backward_flops(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> int:
    """FLOPs of the scores computed anew, and of the gradients of scores, queries, keys and values."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (3 * width + 2 * value.shape[-1])


# PyTorch's formulas, and ours where it lacks one.
FORMULAS = {
    **flop_registry,
    # PyTorch's refuse grouped-query attention before 2.14.
    torch.ops.aten._scaled_dot_product_flash_attention: attention_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention: attention_flops,
    torch.ops.aten._scaled_dot_product_cudnn_attention: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: attention_backward_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: attention_backward_flops,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward: attention_backward_flops,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
    torch.ops.aten._grouped_mm: _grouped_mm_flops,
    torch.ops.aten._int_mm: flop_registry[torch.ops.aten.mm],
}


def op_cost(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, spec: DeviceSpec) -> Cost:
    """Return the cost of one call of an aten operator.

    Args:
        func: Operator overload.
        args: Its arguments.
        kwargs: Its keyword arguments.
        out: What it returned.
        spec: The device.
    """
    packet = func._overloadpacket
    host = spec.host_s * (HEAVY if packet.__name__ in HEAVY_OPS else 1.0)
    if func.is_view or packet in _FREE or func.namespace == "prim":
        return Cost(host_seconds=host)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    num_bytes = sum(_nbytes(tensor) for tensor in tensors) + sum(_nbytes(tensor) for tensor in outputs)
    count = FORMULAS.get(packet)
    flops = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
    # Products of 8-bit numbers run at the rate of 16-bit ones at least.
    whole = torch.float16 if packet is torch.ops.aten._int_mm else torch.float32
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), whole)
    seconds = spec.measured.seconds(func, args, kwargs) if spec.measured is not None else None
    if seconds is None:
        aligned = packet not in _PRODUCTS or all(map(is_aligned, [*tensors, *outputs]))
        seconds = spec.seconds(flops, num_bytes, dtype, aligned)
    return Cost(flops, num_bytes, seconds, host)


_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_")
)


def is_aligned(matrix: torch.Tensor) -> bool:
    """Return whether the rows of a matrix of 16-bit numbers begin at multiples of 16 bytes; other types are fine."""
    if matrix.dim() < 2 or matrix.element_size() != 2:
        return True
    return all(stride % 8 == 0 for stride in matrix.stride()[-2:] if stride != 1)


def _nbytes(tensor: torch.Tensor) -> int:
    """Bytes that are touched: an expanded tensor is read once."""
    return tensor.element_size() * math.prod(
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride
    )
