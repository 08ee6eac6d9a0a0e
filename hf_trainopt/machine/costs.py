"""What an operator costs on a device: FLOPs, bytes moved, and the time that follows from both (a roofline)."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .measured_ops import MeasuredOps


@dataclass(frozen=True)
class DeviceSpec:
    """What a device can do at best, and how much of it is reached.

    Args:
        name: As in `hf-trainopt plan --device`.
        kind: `"cuda"` or `"cpu"`: which kernels run, and so what dropout and attention keep.
        flops: Type of the numbers -> FLOP/s of matrix products.
        bandwidth: Bytes/s to and from memory.
        launch_s: Seconds that an operator takes at least.
        efficiency: Share of `flops` that is reached.
        measured: Where operators are timed in place of the roofline.
        host_s: Seconds that the host takes to issue an operator; 0 where the host is the device.
        workspace: Bytes that cuBLAS takes from the allocator for each thread that multiplies matrices, and keeps. A
            training step has two: the backward pass runs on a thread of its own.
    """

    name: str
    kind: str
    flops: dict[torch.dtype, float] = field(hash=False)
    bandwidth: float
    launch_s: float = 4e-6
    efficiency: float = 0.75
    measured: MeasuredOps | None = field(default=None, compare=False, repr=False)
    host_s: float = 0.0
    workspace: int = 0

    def seconds(self, flops: float, num_bytes: float, dtype: torch.dtype, aligned: bool = True) -> float:
        """Return the time of an operator that is bound by arithmetic or by memory, whichever takes longer.

        Args:
            flops: Multiplications and additions.
            num_bytes: Read and written.
            dtype: Of the numbers.
            aligned: Whether tensor cores can load the matrices: each row begins at a multiple of 16 bytes.
        """
        peak = self.flops.get(dtype) or self.flops[torch.float32]
        efficiency = self.efficiency if aligned else self.efficiency / UNALIGNED
        return self.launch_s + max(flops / (efficiency * peak), num_bytes / self.bandwidth)


# On an H100, three products with GPT-2's vocabulary of 50257 ran at 95 to 146 TFLOP/s in bf16, where aligned ones
# reach three quarters of 989 (benchmarks/gpu.md, "Where the time goes").
UNALIGNED = 6.0
# The H100's host (a Xeon, one virtual machine): steps that the host limits took 14 to 17 µs for each operator.
HOST_S = 15e-6
# cuDNN's take the host longer: ResNet-50 took 33 µs for each of its operators.
HEAVY = 4.0
HEAVY_OPS = frozenset(
    {"convolution", "_convolution", "cudnn_convolution", "convolution_backward", "native_batch_norm",
     "cudnn_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update", "native_batch_norm_backward",
     "cudnn_batch_norm_backward", "batch_norm_backward"}
)  # fmt: skip


def _spec(name: str, fp32: float, half: float, bandwidth: float, workspace: int = 4096 * 2 + 16 * 8) -> DeviceSpec:
    # `workspace` is in KiB, as PyTorch has it by default: 32 MiB on Hopper, 8.1 MiB elsewhere.
    rates = {torch.float32: fp32 * 1e12, torch.float16: half * 1e12, torch.bfloat16: half * 1e12}
    return DeviceSpec(name, "cuda", rates, bandwidth * 1e9, host_s=HOST_S, workspace=workspace * 1024)


# Dense tensor-core rates, float32 without TF32 as PyTorch's default has it (vendors' data sheets; TFLOP/s, GB/s).
DEVICES: dict[str, DeviceSpec] = {
    spec.name: spec
    for spec in (
        _spec("t4", 8.1, 65, 320),
        _spec("v100", 15.7, 125, 900),
        _spec("a10", 31.2, 125, 600),
        _spec("a100", 19.5, 312, 2039),
        _spec("l4", 30.3, 121, 300),
        _spec("l40s", 91.6, 362, 864),
        _spec("h100", 66.9, 989, 3350, 32768),
        _spec("h200", 66.9, 989, 4800, 32768),
        _spec("rtx3090", 35.6, 71, 936),
        _spec("rtx4090", 82.6, 165, 1008),
        DeviceSpec(
            "cpu",
            "cpu",
            {torch.float32: 50e9, torch.bfloat16: 0.5e9, torch.float16: 0.5e9, torch.float64: 25e9},
            10e9,
            launch_s=5e-6,
            efficiency=1.0,
        ),
    )
}


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
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
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


def device_spec(device: torch.device) -> DeviceSpec:
    """Return what a device does: the processor measured, a GPU looked up by its name (an A100 if it is not known)."""
    if device.type == "cpu":
        return measured_cpu()
    name = ""
    if device.type == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    # The longest name first: an L40S is no L4.
    known = sorted((key for key, spec in DEVICES.items() if spec.kind == "cuda"), key=len, reverse=True)
    return DEVICES[next((key for key in known if key in name), "a100")]


def measured_cpu() -> DeviceSpec:
    """Return this machine's processor: operators are timed; the roofline of the rest is measured too (0.2 s)."""

    def best(run, repeats: int = 3) -> float:
        run()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    a = torch.randn(512, 512)
    flops = 2 * 512**3 / best(lambda: a @ a)
    big = torch.randn(4 * 2**20)
    other = torch.empty_like(big)
    bandwidth = 2 * 4 * big.numel() / best(lambda: torch.add(big, 1.0, out=other))
    reference = DEVICES["cpu"]
    rates = {dtype: flops * rate / reference.flops[torch.float32] for dtype, rate in reference.flops.items()}
    return DeviceSpec("cpu", "cpu", rates, bandwidth, reference.launch_s, 1.0, MeasuredOps())
