"""Square norms of the micro-batch gradients, read as they are produced."""

import math
from collections.abc import Iterable

import torch

from ..core.facts import is_distributed
from .sharded import GatheredParameters, local_piece, put_in_pieces, without_partial_sums
from .tensor_parallel import TensorParallelGroup


class MicroBatchNorms:
    """Sums |∂loss/∂θ|² of each micro-batch with hooks on the parameters.

    A tensor hook sees what one backward pass adds to `.grad`, before it is added and before DDP averages it over the
    ranks. Hooks sit on the parameters only inside `with`, so that windows that are not measured pay nothing. Squares
    are summed in fp32 or wider whatever the gradients' type.

    Under re-entrant activation checkpointing a parameter that is used in several segments is reported in pieces, which
    cannot be put together again: such a micro-batch is reported as NaN, and the window is dropped.

    Under FSDP2 the hooks sit on the whole parameters, which come up in the first forward pass (see `sharded`). Where a
    parameter in pieces has a gradient and no whole one came up, every micro-batch is reported as NaN.

    Under tensor parallelism each rank has its part of a square norm: added up over the group it is the whole.

    Args:
        model: Its parameters that require gradients when a window begins are measured.
        device: Where the sums are kept; nothing waits for the device until `finish`.
        group: Of tensor parallelism, if any.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, group: TensorParallelGroup | None = None):
        self._model = model
        self._group = group
        self._parameters: list[torch.nn.Parameter] = []
        self._device = device
        self._norms: list[torch.Tensor] = []
        self._terms: list[torch.Tensor] = []  # gradients of which each rank of the group has one
        self._seen: set[int] = set()
        self._whole: set[int] = set()  # parameters that autograd has given a gradient, of those that began the window
        self._repeated = False
        self._micro_batches: list[torch.Tensor | None] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._gathered: GatheredParameters | None = None

    def __enter__(self) -> "MicroBatchNorms":
        self._micro_batches = []
        self._reset()
        put_in_pieces(self._model)
        # Anew each time: callbacks freeze and unfreeze.
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        # Autograd never reaches those that FSDP2 has in pieces. Pieces of tensor parallelism it does.
        for parameter in self._parameters:
            self._handles.append(parameter.register_hook(self._make_hook(id(parameter))))
        self._whole = set()
        self._gathered = None
        if any(is_distributed(parameter) for parameter in self._parameters):
            known = {id(parameter) for parameter in self._model.parameters()}
            self._gathered = GatheredParameters(self._model, known, self._listen)
        return self

    def _listen(self, parameter: torch.nn.Parameter):
        return parameter.register_hook(self._make_hook(id(parameter))).remove

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are measured, since the window began."""
        return self._parameters

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._gathered is not None:
            self._gathered.close()

    def _make_hook(self, key: int):
        def hook(gradient: torch.Tensor) -> None:
            self._repeated |= key in self._seen
            self._seen.add(key)
            self._whole.add(key)
            if self._group is None:
                self._norms.append(_norm(gradient))
            elif self._group.sums_gradient_of(key):
                self._terms.append(gradient.detach().clone())  # upstream adds the others' to it in place
            else:
                piece, share = local_piece(without_partial_sums(gradient), self._group.size)
                self._norms.append(_norm(piece) * math.sqrt(share))

        return hook

    def _reset(self) -> None:
        self._norms, self._terms = [], []
        self._seen = set()
        self._repeated = False

    def end_micro_batch(self) -> None:
        """Close the sum of one micro-batch: call after each backward pass, on all ranks of a tensor-parallel group."""
        if self._terms:
            share = 1 / self._group.size
            self._norms += [_norm(gradient) * math.sqrt(share) for gradient in self._group.summed(self._terms)]
        self._micro_batches.append(None if self._repeated or not self._norms else _stack(self._norms, self._device))
        self._reset()

    def finish(self) -> list[float]:
        """Return the square norm of each micro-batch (waits for the device); NaN where it cannot be told."""
        if self._gathered is not None:
            in_pieces = [p for p in self._parameters if is_distributed(p) and id(p) not in self._whole]
            reduced = sum(p.grad is not None for p in in_pieces)
            if len(self._gathered) < reduced:
                return [float("nan")] * len(self._micro_batches)
        return [float("nan") if norms is None else _square_sum(norms) for norms in self._micro_batches]

    def accumulated_square_norm(self) -> float:
        """Return |ĝ|² of what the same parameters hold in `.grad`."""
        return gradient_square_norm(self._parameters, self._device)

    def square_norm_share(self, rank: int, num_ranks: int) -> float:
        """Return this rank's part of |ĝ|²: added up over the ranks it is the whole.

        Without sharding every rank holds the same gradient and the first one counts it; the others do no work.
        """
        if self._gathered is None:
            return self.accumulated_square_norm() if rank == 0 else 0.0
        pieces: dict[float, list[torch.Tensor]] = {}
        for parameter in self._parameters:
            if parameter.grad is not None:
                piece, share = local_piece(parameter.grad, num_ranks)
                pieces.setdefault(share, []).append(piece)
        return sum(share * _gradient_square_sum(group, self._device) for share, group in pieces.items())


def gradient_square_norm(parameters: Iterable[torch.nn.Parameter], device: torch.device) -> float:
    """Return |ĝ|² of the accumulated (and, under DDP, averaged) gradients."""
    return _gradient_square_sum((parameter.grad for parameter in parameters if parameter.grad is not None), device)


def _gradient_square_sum(gradients: Iterable[torch.Tensor], device: torch.device) -> float:
    gradients = [_values(gradient) for gradient in gradients]
    if not gradients:
        return 0.0
    norms = []
    for dtype in {_norm_type(gradient) for gradient in gradients}:
        norms += torch._foreach_norm([g for g in gradients if _norm_type(g) == dtype], 2.0, dtype=dtype)
    return _square_sum(_stack(norms, device))


def _values(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    values = _values(gradient).detach()
    return torch.linalg.vector_norm(values, dtype=_norm_type(values))


def _norm_type(gradient: torch.Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)


def _stack(norms: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack([norm.to(device) for norm in norms])


def _square_sum(norms: torch.Tensor) -> float:
    # Norms of single tensors are fp32; their squares are added in fp64 (on the CPU: not every device has fp64),
    # since tr Σ is a difference of two such sums.
    return norms.cpu().double().square().sum().item()
