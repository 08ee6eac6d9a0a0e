"""How a training step is made, apart from the placement."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...machine.device_memory import DeviceMemory
from ...machine.devices import DEVICES, DeviceSpec
from .sharding import ONE_DEVICE, Sharding


def model_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the loss that a model of transformers computes itself: `model(**batch).loss`, or its first output."""
    outputs = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if isinstance(outputs, torch.Tensor):
        return outputs if outputs.dim() == 0 else outputs.float().mean()
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return the default optimizer of `Trainer` (fused AdamW) over the parameters that are trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


@dataclass(frozen=True)
class StepSetup:
    """How a training step is made, apart from the placement.

    Args:
        device: Where it runs.
        compute_loss: Loss of a model on a batch.
        make_optimizer: The optimizer of a model.
        autocast_dtype: Type of mixed-precision compute; `None`: none.
        accumulation_steps: Micro-batches in a step, at most: with more than one, gradients of earlier ones are there,
            and all their inputs are held.
        max_grad_norm: Clipping, 0 for none.
        sharding: How the run is spread over devices; all that is counted is what one of them holds.
        follows_values: Whether `compute_loss` may look at values: those that follow from the batch are known, and
            numbers that the model computes may be recorded (see `values.py`).
        residents: Returns, for a fake mode, what is in memory all the time besides the model: fake tensors of a
            reference model.
        memory: Of the device of a run; `None`: the data sheet's, with expandable segments.
    """

    device: DeviceSpec = DEVICES["a100"]
    compute_loss: Callable[[nn.Module, Any], torch.Tensor] = model_loss
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer | None] = adamw
    autocast_dtype: torch.dtype | None = None
    accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    sharding: Sharding = ONE_DEVICE
    follows_values: bool = False
    residents: Callable[[FakeTensorMode], Sequence[torch.Tensor]] = lambda mode: ()
    memory: DeviceMemory | None = None


DEFAULT_SETUP = StepSetup()
