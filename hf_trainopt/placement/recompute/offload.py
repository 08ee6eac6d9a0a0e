"""The input of a recomputed region on the host: copied there in the forward pass, and back for the recomputation.

Both copies run on the stream that computes, in turn with its kernels, as in `offload` of transformers. So no kernel
can meet half a copy, and memory that is freed isn't used before it has been read. Copies on a stream of their own
would run beside the computation; there such mistakes are common (torchtune#1867, axolotl#3833), and only a GPU shows
them.
"""

from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from hf_trainopt.core.facts import is_distributed


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in memory of the host, which is page-locked, so that the host needn't wait for the copy."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")
    return host.copy_(tensor, non_blocking=True)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on a device."""
    return torch.empty_like(host, device=device).copy_(host, non_blocking=True)


class InputOnHost(saved_tensors_hooks):
    """Context in which the first of the saved tensors that has been computed is kept on the host.

    That is what the stage before has returned. Others aren't worth a copy: masks and positions, or what an encoder has
    returned for all layers of a decoder, stay on the device for other stages.
    """

    def __init__(self):
        super().__init__(self._pack, self._unpack)
        self._moved = False

    def _pack(self, tensor: torch.Tensor) -> Any:
        is_computed = tensor.requires_grad and not tensor.is_leaf
        if self._moved or not is_computed or is_distributed(tensor):
            return tensor
        self._moved = True
        return to_host(tensor.detach()), tensor.device

    @staticmethod
    def _unpack(kept: Any) -> torch.Tensor:
        return to_device(*kept) if isinstance(kept, tuple) else kept
