"""The rank that a set-up asks for."""

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .fsdp2 import Fsdp2Rank
from .rank import Rank, ZeroStage0
from .step_setup import StepSetup
from .zero import ZeroRank
from .zero3 import Zero3Rank


_KINDS = {"ddp": Rank, "zero0": ZeroStage0, "zero1": ZeroRank, "zero2": ZeroRank, "zero3": Zero3Rank}


def rank_of(model: nn.Module, mode: FakeTensorMode, setup: StepSetup, stages: list[str], source: nn.Module) -> Rank:
    """Return what follows a device in a replay.

    Args:
        model: The whole model as it runs, made of fake tensors of `mode`.
        mode: Their mode.
        setup: How the step is made.
        stages: Names of the stages.
        source: The model that it was copied from.
    """
    if setup.sharding.kind == "fsdp2":
        return Fsdp2Rank(model, mode, setup, stages, source)
    return _KINDS[setup.sharding.kind](model, mode, setup)
