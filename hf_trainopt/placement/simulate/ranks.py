"""The rank that a set-up asks for."""

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import PlacementError
from .fsdp2 import Fsdp2Rank
from .quantized import QuantizedLinear
from .rank import Rank, ZeroStage0
from .sharding import OFFLOADS_PARAMETERS, WORDS
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

    Raises:
        PlacementError: Quantized weights would be in pieces.
    """
    kind = setup.sharding.kind
    if kind in OFFLOADS_PARAMETERS and any(isinstance(module, QuantizedLinear) for module in model.modules()):
        # Accelerate shards packed weights or keeps them whole, depending on `bnb_4bit_quant_storage`.
        raise PlacementError(
            f"The memory of a rank isn't predicted for weights of 4 or 8 bits under {WORDS[kind]}; choose DDP, where "
            "all ranks hold them whole, or checkpoint_placement='all', 'every_n' or 'sqrt', which need no prediction, "
            "and no memory_budget."
        )
    if kind == "fsdp2":
        return Fsdp2Rank(model, mode, setup, stages, source)
    return _KINDS[kind](model, mode, setup)
