"""The input of a recomputed region on the host: copied there in the forward pass, and back for the recomputation.

Both copies run on the stream that computes, in turn with its kernels, as in `offload` of transformers. So no kernel
can meet half a copy, and memory that is freed isn't used before it has been read. Copies on a stream of their own
would run beside the computation; there such mistakes are common (torchtune#1867, axolotl#3833), and only a GPU shows
them.
"""

from collections.abc import Iterable, Sequence

import torch

from hf_trainopt.core.facts import is_distributed


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in memory of the host, which is page-locked, so that the host needn't wait for the copy."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")
    return host.copy_(tensor, non_blocking=True)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on a device."""
    return torch.empty_like(host, device=device).copy_(host, non_blocking=True)


def first_computed(tensors: Iterable[torch.Tensor]) -> int | None:
    """Return the place of the first tensor that an operator has made, for which gradients are needed.

    In a stage that is what the stage before has returned. Others aren't worth a copy: masks and positions, or what an
    encoder has returned for all layers of a decoder, stay on the device for other stages.
    """
    return next((place for place, tensor in enumerate(tensors) if tensor.grad_fn is not None), None)


class InputOnHost:
    """One of several inputs, kept on the host.

    Args:
        inputs: Inputs of a region.

    Attributes:
        others: Those that stay where they are.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]):
        self.others = list(inputs)
        self._place = first_computed(inputs)
        if self._place is None or is_distributed(inputs[self._place]):
            self._place = None
            return
        moved = self.others.pop(self._place)
        self._device = moved.device
        self._host = to_host(moved.detach())

    def with_others(self, others: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the inputs in their order, the moved one on its device again."""
        inputs = list(others)
        if self._place is not None:
            inputs.insert(self._place, to_device(self._host, self._device).requires_grad_())
        return inputs
