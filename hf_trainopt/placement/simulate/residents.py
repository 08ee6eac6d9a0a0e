"""Modules that a trainer holds beside its model: a reference model, a teacher, a reward model.

They are in memory all the time, and what they compute in `compute_loss` needs memory as well.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...core.shadow import held_modules
from .fake import fake_tensor


class ResidentModules:
    """The parameters and buffers of a trainer's other modules, real and fake.

    Args:
        trainer: The trainer. Its model is left out, and so is what does not lie on the device of the run.
    """

    def __init__(self, trainer: Any):
        own = {id(tensor) for tensor in _tensors_of(trainer.model)}
        kind = trainer.args.device.type
        found: dict[int, torch.Tensor] = {}
        for module in held_modules(trainer):
            for tensor in _tensors_of(module):
                if id(tensor) not in own and tensor.device.type == kind:
                    found[id(tensor)] = tensor
        self._real = list(found.values())
        self._fake: dict[int, torch.Tensor] = {}
        self._mode: FakeTensorMode | None = None

    def fakes(self, mode: FakeTensorMode) -> dict[int, torch.Tensor]:
        """Return the identity of each real tensor -> a fake one of `mode`."""
        if self._mode is not mode:
            self._mode = mode
            self._fake = {id(tensor): _fake(tensor, mode) for tensor in self._real}
        return self._fake

    def tensors(self, mode: FakeTensorMode) -> list[torch.Tensor]:
        """Return the fake tensors."""
        return list(self.fakes(mode).values())


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    fake = fake_tensor(tensor.detach(), mode)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
