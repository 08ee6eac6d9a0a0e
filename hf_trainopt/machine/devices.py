"""What the devices that people train on can do: rates and memory of the data sheets, and this machine's processor."""

import dataclasses
import time
from dataclasses import dataclass, field

import torch

from .measured_ops import MeasuredOps


@dataclass(frozen=True)
class DeviceSpec:
    """What a device can do at best, and how much of it is reached.

    Args:
        name: As in `hf-trainopt plan --device`.
        kind: `"cuda"`, `"mps"` (Apple) or `"cpu"`: which kernels run, and so what dropout and attention keep.
        flops: Type of the numbers -> FLOP/s of matrix products.
        bandwidth: Bytes/s to and from memory.
        launch_s: Seconds that an operator takes at least.
        efficiency: Share of `flops` that is reached.
        measured: Where operators are timed in place of the roofline.
        host_s: Seconds that the host takes to issue an operator; 0 where the host is the device.
        workspace: Bytes that cuBLAS takes from the allocator for each thread that multiplies matrices, and keeps. A
            training step has two: the backward pass runs on a thread of its own.
        memory: Bytes of the device; 0 where that isn't known.
        link: Bytes/s between device and host, in either direction; 0 where the host is the device.
        capability: CUDA's compute capability.
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
    memory: int = 0
    link: float = 0.0
    capability: float = 8.0

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


# Workspaces of cuBLAS in KiB, as PyTorch has them by default: 32 MiB from Hopper on, 8.1 MiB before.
_HOPPER, _OLDER = 32768, 4096 * 2 + 16 * 8
# A driver shows less than the data sheet's memory: the firmware takes some, error correction of GDDR a sixteenth.
_SHOWN, _SHOWN_ECC = 0.985, 0.985 * 15 / 16


# GB/s one way over 16 lanes of PCI Express by its generation, and the share that copies to page-locked memory reach.
_PCIE, _REACHED = {3: 15.75, 4: 31.5, 5: 63.0}, 0.8


def _spec(
    name: str,
    fp32: float,
    half: float,
    bandwidth: float,
    memory: float,
    workspace: int = _OLDER,
    ecc: bool = False,
    pcie: int = 4,
    lanes: int = 16,
    capability: float = 8.0,
) -> DeviceSpec:
    """Return the spec of a GPU from its data sheet: TFLOP/s in fp32 and 16 bits, GB/s, GiB, PCI Express.

    The compute capability matters only where it is below 8.0.
    """
    rates = {torch.float32: fp32 * 1e12, torch.float16: half * 1e12, torch.bfloat16: half * 1e12}
    shown = int(memory * 2**30 * (_SHOWN_ECC if ecc else _SHOWN))
    return DeviceSpec(
        name,
        "cuda",
        rates,
        bandwidth * 1e9,
        host_s=HOST_S,
        workspace=workspace * 1024,
        memory=shown,
        link=_REACHED * _PCIE[pcie] * 1e9 * lanes / 16,
        capability=capability,
    )


# From the vendors' data sheets and architecture white papers: float32 without TF32, as PyTorch's default has it, and
# dense 16-bit products with float32 sums, which GeForce cards do at half the rate of 16-bit sums.
DEVICES: dict[str, DeviceSpec] = {
    spec.name: spec
    for spec in (
        _spec("rtx3060", 12.7, 25.5, 360, 12),
        _spec("rtx3070", 20.3, 40.6, 448, 8),
        _spec("rtx3080", 29.8, 59.5, 760, 10),
        _spec("rtx3090", 35.6, 71, 936, 24),
        _spec("rtx4060", 15.1, 30.2, 272, 8, lanes=8),
        _spec("rtx4070", 29.1, 58.3, 504, 12),
        _spec("rtx4080", 48.7, 97.5, 717, 16),
        _spec("rtx4090", 82.6, 165, 1008, 24),
        _spec("rtx5060", 19.2, 38.4, 448, 8, pcie=5, lanes=8),
        _spec("rtx5070", 30.9, 61.7, 672, 12, pcie=5),
        _spec("rtx5080", 56.3, 112.6, 960, 16, pcie=5),
        _spec("rtx5090", 104.8, 209.5, 1792, 32, pcie=5),
        _spec("t4", 8.1, 65, 320, 16, ecc=True, pcie=3, capability=7.5),
        _spec("v100", 15.7, 125, 900, 16, pcie=3, capability=7.0),
        _spec("v100-32gb", 15.7, 125, 900, 32, pcie=3, capability=7.0),
        _spec("a10", 31.2, 125, 600, 24, ecc=True),
        _spec("a6000", 38.7, 154.8, 768, 48),
        _spec("a100-40gb", 19.5, 312, 1555, 40),
        _spec("a100", 19.5, 312, 2039, 80),
        _spec("l4", 30.3, 121, 300, 24, ecc=True),
        _spec("l40", 90.5, 181, 864, 48, ecc=True),
        _spec("l40s", 91.6, 362, 864, 48, ecc=True),
        _spec("rtx6000ada", 91.1, 364, 960, 48),
        _spec("h100", 66.9, 989, 3350, 80, _HOPPER, pcie=5),
        _spec("h200", 66.9, 989, 4800, 141, _HOPPER, pcie=5),
        _spec("b200", 75, 2250, 7700, 180, _HOPPER, pcie=5),
        _spec("mi300x", 163.4, 1307, 5300, 192, pcie=5),
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


# What a GPU that isn't in `DEVICES` is taken for.
UNKNOWN = "a100"


def custom_device(memory: int, bandwidth: float, tflops: float, tflops_fp32: float | None = None) -> DeviceSpec:
    """Return the spec of a GPU that isn't in `DEVICES`.

    Args:
        memory: Bytes.
        bandwidth: GB/s to and from memory.
        tflops: TFLOP/s of dense 16-bit matrix products with float32 sums.
        tflops_fp32: The same in float32; `None`: a quarter of that in 16 bits.
    """
    fp32 = tflops / 4 if tflops_fp32 is None else tflops_fp32
    return dataclasses.replace(_spec("custom", fp32, tflops, bandwidth, 0), memory=memory)


def apple_device(memory: int, bandwidth: float, tflops: float) -> DeviceSpec:
    """Return the spec of an Apple GPU, which computes in 16 bits as fast as in 32 and shares the processor's memory.

    Args:
        memory: Bytes of the machine.
        bandwidth: GB/s, as Apple states it for the chip.
        tflops: TFLOP/s of its GPU.
    """
    rates = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), tflops * 1e12)
    return DeviceSpec("apple", "mps", rates, bandwidth * 1e9, host_s=HOST_S, memory=memory)


def device_spec(device: torch.device) -> DeviceSpec:
    """Return what a device does: the processor measured, a GPU looked up by its name (an A100 if it is not known)."""
    if device.type == "cpu":
        return measured_cpu()
    if device.type != "cuda" or not torch.cuda.is_available():
        return DEVICES[UNKNOWN]
    total = torch.cuda.get_device_properties(device).total_memory
    major, minor = torch.cuda.get_device_capability(device)
    spec = named_spec(torch.cuda.get_device_name(device))
    return dataclasses.replace(spec, memory=total, capability=major + minor / 10)


def named_spec(name: str, default: str = UNKNOWN) -> DeviceSpec:
    """Return the spec of a GPU by the name that its driver gives, such as "NVIDIA A100-SXM4-40GB".

    Args:
        name: That name.
        default: Key of `DEVICES` for a GPU that isn't among them.
    """
    words = name.lower().replace(" ", "")
    # The longest name first: "l4" is part of "l40s".
    known = sorted((key for key, spec in DEVICES.items() if spec.kind == "cuda"), key=len, reverse=True)
    return DEVICES[next((key for key in known if all(part in words for part in key.split("-"))), default)]


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
