"""Which errors say that memory has run out."""

import gc

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


# What the driver and the libraries say where PyTorch's allocator is not the one that failed.
_MESSAGES = ("CUDA error: out of memory", "HIP error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
             "CUDNN_STATUS_ALLOC_FAILED")  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory of a device or of the host has run out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(part in str(error) for part in _MESSAGES)


def first_line(error: BaseException) -> str:
    """Return what an error says in a line. The error itself holds the frames that hold the tensors."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def release_memory() -> None:
    """Hand back what nothing holds any more: garbage in cycles first, then the allocator's cache."""
    gc.collect()
    clear_device_cache()
