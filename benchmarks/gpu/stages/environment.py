"""What the device is and what it can do at best: the two ceilings, start-up, what the context takes."""

import time
from typing import Any

import torch
from common import Context, Record, spread, synchronize, timed
from torch.utils._python_dispatch import TorchDispatchMode


def run(context: Context, record: Record, prepared: Any) -> None:
    device = context.device
    with record.part("matrix products") as part:
        part["teraflops"] = {}
        for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
            part["teraflops"][name] = matrix_rate(context, dtype)
            record.save()
        if context.on_gpu:
            torch.backends.cuda.matmul.allow_tf32 = True
            part["teraflops"]["tf32"] = matrix_rate(context, torch.float32)
            torch.backends.cuda.matmul.allow_tf32 = False
    with record.part("copies") as part:
        part["gigabytes_per_second"] = copy_rate(context)
    with record.part("launches") as part:
        part["microseconds"] = launch_time(context)
    with record.part("from the host") as part:
        part["gigabytes_per_second"] = host_rate(context)
    with record.part("attention") as part:
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            part[name] = attention_kernel(device, dtype)
    record.check("products are right", products_are_right(device))
    record.check("bf16 rate was measured", "bfloat16" in record.values["parts"]["matrix products"]["teraflops"])


def matrix_rate(context: Context, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of products of random matrices (products of zeros run faster than real ones)."""
    size = context.pick(8192, 128)
    a, b = (torch.randn(size, size, device=context.device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=context.device, dtype=dtype)
    for _ in range(3):
        torch.mm(a, b, out=out)
    seconds = timed(lambda: torch.mm(a, b, out=out), context.pick(15, 3), context.device)
    return {"size": size, **spread([2 * size**3 / value / 1e12 for value in seconds])}


def copy_rate(context: Context) -> dict[str, float]:
    """GB/s of copies on the device, bytes read and bytes written both counted."""
    count = context.pick(2 * 2**30, 2**20)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = timed(lambda: target.copy_(source), context.pick(20, 3), context.device)
    return {"bytes": count, **spread([2 * count / value / 1e9 for value in seconds])}


def launch_time(context: Context) -> dict[str, float]:
    """Microseconds of a small operator, one after the other: what planning takes as the least of each."""
    x = torch.zeros(1024, device=context.device)
    repeats = context.pick(2000, 50)
    found = []
    for _ in range(4):
        synchronize(context.device)
        started = time.perf_counter()
        for _ in range(repeats):
            x.add_(1.0)
        synchronize(context.device)
        found.append(1e6 * (time.perf_counter() - started) / repeats)
    return spread(found[1:])


def host_rate(context: Context) -> dict[str, float]:
    """GB/s from the host's memory (pinned) to the device."""
    count = context.pick(2**28, 2**18)
    source = torch.empty(count, dtype=torch.uint8, pin_memory=context.on_gpu)
    target = torch.empty(count, dtype=torch.uint8, device=context.device)
    target.copy_(source)
    seconds = timed(lambda: target.copy_(source, non_blocking=True), context.pick(5, 3), context.device)
    return {"bytes": count, **spread([count / value / 1e9 for value in seconds])}


class _Names(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Return which operator causal attention with dropout runs by default; plans count on flash in half precision."""
    query, key, value = (torch.randn(2, 4, 256, 64, device=device).to(dtype).requires_grad_() for _ in range(3))
    with _Names() as names:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.1, is_causal=True)
    return ", ".join(dict.fromkeys(name for name in names.found if "attention" in name)) or "separate operators"


def products_are_right(device: torch.device) -> bool:
    """Whether a bf16 product agrees with that of the CPU in fp64, to bf16's rounding."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator).bfloat16() for _ in range(2))
    reference = a.double() @ b.double()
    found = (a.to(device) @ b.to(device)).cpu().double()
    return ((found - reference).norm() / reference.norm()).item() < 1e-2
