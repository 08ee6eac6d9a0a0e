"""How much of a device's memory tensors can take: its size less what no plan sees."""

import os
from dataclasses import dataclass, replace

import torch
from torch import nn

from .devices import DeviceSpec


# Measured on an H100 with torch 2.11 (benchmarks/gpu.md): the CUDA context, and by how much what the allocator
# reserved, or the smallest limit under which a plan ran, was above the plan's peak.
CONTEXT_BYTES = int(0.75 * 2**30)
# (expandable segments, convolutions) -> that share, rounded up.
_ABOVE_PLAN = {(True, False): 0.10, (False, False): 0.25, (True, True): 0.20, (False, True): 0.60}
# Buffers of NCCL, where there are several ranks. Not measured.
_NCCL_BYTES = 2**29
# What macOS lets the GPU of an Apple chip use of its memory, at least (Metal's recommendedMaxWorkingSetSize).
_APPLE_SHARE = 2 / 3


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of a device, and the part that a plan may use.

    Args:
        total_bytes: All of it.
        usable_bytes: What the tensors of a plan may take.
        reserve: What the rest is for, in words.
    """

    total_bytes: int
    usable_bytes: int
    reserve: str


def allocator_settings() -> str:
    """Return the settings of PyTorch's CUDA allocator, by either name of the variable."""
    return ",".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))


def uses_expandable_segments() -> bool:
    """Return whether the allocator grows its segments, so that it reserves little more than tensors take."""
    return "expandable_segments:True" in allocator_settings().replace(" ", "")


def has_convolutions(model: nn.Module) -> bool:
    """Return whether a model convolves in its layers, for which cuDNN takes workspaces that no plan sees.

    One convolution, as at the input of a vision transformer, doesn't count.
    """
    return sum(isinstance(module, nn.Conv2d | nn.Conv3d) for module in model.modules()) > 1


def device_memory(
    total_bytes: int,
    *,
    is_expandable: bool,
    convolves: bool = False,
    world_size: int = 1,
    taken_bytes: int | None = None,
) -> DeviceMemory:
    """Return what tensors can take of a device.

    Args:
        total_bytes: Memory of the device.
        is_expandable: As `uses_expandable_segments` has it.
        convolves: As `has_convolutions` has it.
        world_size: Ranks, which need buffers to communicate.
        taken_bytes: What is taken already by others than PyTorch's allocator; `None`: a CUDA context will be.
    """
    context = CONTEXT_BYTES if taken_bytes is None else taken_bytes
    outside = context + (_NCCL_BYTES if world_size > 1 else 0)
    share = _ABOVE_PLAN[is_expandable, convolves]
    usable = int((total_bytes - outside) / (1 + share))
    words = [f"{outside / 2**30:.2f} GiB for the CUDA context{' and NCCL' if world_size > 1 else ''}"]
    if taken_bytes is not None:
        words = [f"{outside / 2**30:.2f} GiB taken outside PyTorch"]
    words.append(
        f"room for the allocator to reserve {share:.0%} more than tensors take"
        + (" (and cuDNN's workspaces)" if convolves else "")
        + ("" if is_expandable else ", less with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    )
    return DeviceMemory(total_bytes, max(0, usable), " and ".join(words))


def stated_memory(device: DeviceSpec, model: nn.Module, world_size: int) -> DeviceMemory:
    """Return the memory of a device by its data sheet, with segments that expand.

    Args:
        device: The device; its memory is known.
        model: What is trained.
        world_size: Ranks.
    """
    if device.kind == "mps":  # how its allocator fragments wasn't measured
        usable = int(_APPLE_SHARE * device.memory)
        return DeviceMemory(device.memory, usable, "the third that macOS keeps from the GPU")
    memory = device_memory(device.memory, is_expandable=True, convolves=has_convolutions(model), world_size=world_size)
    reserve = f"{memory.reserve}, with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    return replace(memory, reserve=reserve)


def memory_of_run(device: torch.device, model: nn.Module, world_size: int) -> DeviceMemory | None:
    """Return the memory of the device of a run as it is now; `None` where it has no size of its own (CPUs).

    Args:
        device: Of this rank.
        model: What is trained.
        world_size: Ranks.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    return device_memory(
        total,
        is_expandable=uses_expandable_segments(),
        convolves=has_convolutions(model),
        world_size=world_size,
        taken_bytes=max(taken, CONTEXT_BYTES),
    )
