"""Plans for a model outside any Trainer."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ...machine.device_memory import memory_of_run
from ...machine.devices import device_spec
from ..simulate.step_setup import DEFAULT_SETUP, StepSetup
from .budget import parse_budget
from .plan import PlacementPlan
from .planner import PlacementPlanner


def _setup_for(model: nn.Module) -> StepSetup:
    parameter = next(model.parameters(), None)
    if parameter is None or isinstance(parameter, FakeTensor) or parameter.is_meta:
        return DEFAULT_SETUP
    device = parameter.device
    if device.type == "cpu" and torch.cuda.is_available():
        device = torch.device("cuda")
    memory = memory_of_run(device, model, DEFAULT_SETUP.sharding.num_devices)
    return dataclasses.replace(DEFAULT_SETUP, device=device_spec(device), memory=memory)


def plan_placement(
    model: nn.Module,
    batch: Any,
    *,
    checkpoint_placement: str = "budget",
    memory_budget: str | int | float | None = None,
    memory_rewrites: str = "auto",
    placement_stages: Iterable[str] | str | None = None,
    placement_offload: bool = False,
    setup: StepSetup | None = None,
    mode: Any = None,
    progress: Callable[[str], None] | None = None,
) -> PlacementPlan:
    """Plan which activations of a model are stored and which are recomputed.

    Args:
        model: A model of transformers or timm or any `nn.Module`; its parameters are not touched, and may be fake.
        batch: An example batch (a mapping of keyword arguments, or one positional argument), of the largest shapes
            that training will meet; its values do not matter.
        checkpoint_placement: `"budget"`, or a named policy: `"none"`, `"all"`, `"every_n"` (`"every_3"`), `"sqrt"`.
        memory_budget: For `"budget"`: `"12GiB"`, `"device"` (what tensors can take of the device), `"90% of
            device"`, `"75%"` (of the peak without recomputation) or bytes. The peak is that of all tensors in a
            training step: parameters, gradients, optimizer, activations, temporaries.
        memory_rewrites: `"auto"`, `"none"`, or names of `Rewrites` separated by commas. `"auto"` uses them only for a
            budget, where they are cheaper than recomputing more.
        placement_stages: Names of the stages or a regular expression for them.
        placement_offload: Whether a plan for a budget may keep inputs of recomputed stages on the host.
        setup: Device, optimizer, precision and loss of a training step; `None`: AdamW in the type of the parameters,
            on the GPU that is there, else on this processor (an A100 if the model is made of fake or meta tensors).
        mode: Mode of the model's fake tensors, if it has such.
        progress: Called with a line of text after each piece of work.

    Returns:
        The plan, with its replayed peak.

    Raises:
        ValueError: Something asked for is impossible; a budget below the floor names the floor.
    """
    if checkpoint_placement == "budget" and memory_budget is None:
        raise ValueError("checkpoint_placement='budget' needs memory_budget, such as '12GiB' or 'device'.")
    if checkpoint_placement != "budget" and memory_budget is not None:
        raise ValueError(
            f"memory_budget is set but checkpoint_placement is '{checkpoint_placement}'; set it to 'budget'."
        )
    if placement_offload and memory_budget is None:
        raise ValueError("placement_offload needs memory_budget: no other placement offloads anything.")
    if memory_budget is not None:
        parse_budget(memory_budget)
    if not isinstance(placement_stages, str) and placement_stages is not None:
        placement_stages = list(placement_stages)
    if setup is None:
        setup = _setup_for(model)
    planner = PlacementPlanner(
        model,
        batch,
        setup,
        stages=placement_stages,
        memory_rewrites=memory_rewrites,
        offload=placement_offload,
        mode=mode,
        progress=progress,
    )
    if checkpoint_placement == "budget":
        return planner.for_budget(memory_budget)
    return planner.named(checkpoint_placement)
