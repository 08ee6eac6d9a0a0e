"""Gradients of models that FSDP2 (`torch.distributed.fsdp.fully_shard`) has spread over the ranks.

Outside a forward or backward pass a rank holds pieces of parameters (`DTensor`s). During a pass FSDP2 gathers whole
ones, group by group, and puts them into the modules. These are plain leaf tensors, the same objects for the life of
the model, and autograd hands them the *local* gradient of this rank's micro-batch: before it is scattered, and whether
it is scattered after each micro-batch or added up until the last one (`set_requires_gradient_sync(False)`). So the
norms of micro-batch gradients are read where DDP's are, rank by rank, and the statistics are those of DDP to rounding.
The gradient of the window is read in pieces, each rank its own: what ranks exchange stays one vector.
"""

import math
from collections.abc import Callable, Iterator

import torch

from ..core.facts import is_distributed, is_fsdp_module


def local_piece(tensor: torch.Tensor, num_ranks: int) -> tuple[torch.Tensor, float]:
    """Return what this rank holds of a tensor, and the share of it that is this rank's to count.

    Added up over the ranks, a number that is a sum over elements is then right: a piece that r ranks hold (replicas of
    HSDP, parameters that are not sharded at all) is counted by each of them for 1/r.

    Args:
        tensor: A gradient, plain (the same on all ranks) or a `DTensor`.
        num_ranks: Of the sum.

    Returns:
        `(piece, share)`; the share is NaN where ranks hold terms of a sum that was not reduced.
    """
    if not is_distributed(tensor):
        return tensor, 1.0 / num_ranks
    if any(placement.is_partial() for placement in tensor.placements):
        return tensor.to_local(), math.nan
    sizes = tensor.device_mesh.shape
    pieces = math.prod(size for size, place in zip(sizes, tensor.placements, strict=True) if not place.is_replicate())
    return tensor.to_local(), pieces / num_ranks


def without_partial_sums(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient whose ranks hold pieces or copies; those that hold terms of a sum add them up together.

    Args:
        gradient: Plain or a `DTensor`. All ranks of its mesh call it.
    """
    if not is_distributed(gradient) or not any(placement.is_partial() for placement in gradient.placements):
        return gradient
    from torch.distributed.tensor import Replicate  # PyTorch may lack it where no tensor is a `DTensor`

    return gradient.redistribute(placements=[Replicate() if p.is_partial() else p for p in gradient.placements])


def fsdp_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Iterate over the modules that `fully_shard` was called with."""
    return filter(is_fsdp_module, model.modules())


def put_in_pieces(model: torch.nn.Module) -> None:
    """Let `model.parameters()` be what the optimizer has.

    Groups that are kept whole after the forward pass (`reshard_after_forward=False`) stay so after an evaluation, in
    which no backward pass puts them in pieces again.
    """
    for module in fsdp_modules(model):
        module.reshard()


class GatheredParameters:
    """Finds the whole parameters of an FSDP2 model as they come up, with hooks before forward passes.

    Args:
        model: Its `FSDPModule`s are listened to.
        known: Ids of the parameters of the model outside a pass, which are left out.
        found: Called once for each whole parameter that requires gradients, and returns what removes its hook.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        known: set[int],
        found: Callable[[torch.nn.Parameter], Callable[[], None]],
    ):
        self._known = known
        self._found = found
        # Parameters themselves, not only their ids, which might be given to others.
        self._seen: dict[int, torch.nn.Parameter] = {}
        # FSDP2 puts its own hook first, so that parameters are whole when ours is called.
        self._remove = [
            module.register_forward_pre_hook(self._before_forward).remove for module in fsdp_modules(model)
        ]

    def __len__(self) -> int:
        """Return how many whole parameters came up."""
        return len(self._seen)

    def _before_forward(self, module: torch.nn.Module, _: tuple) -> None:
        # Those of modules inside that are groups of their own are in pieces yet, and come up there. A whole one may
        # be a `DTensor`, too: a piece of tensor parallelism.
        for parameter in module.parameters():
            if not parameter.requires_grad or id(parameter) in self._known:
                continue
            if id(parameter) not in self._seen:
                self._seen[id(parameter)] = parameter
                self._remove.append(self._found(parameter))

    def close(self) -> None:
        """Remove all hooks."""
        for remove in self._remove:
            remove()
        self._remove = []
