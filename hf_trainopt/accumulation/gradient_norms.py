"""Square norms of the micro-batch gradients, read as they are produced."""

from collections.abc import Iterable

import torch


class MicroBatchNorms:
    """Sums |∂loss/∂θ|² of each micro-batch with hooks on the parameters.

    A tensor hook sees what one backward pass adds to `.grad`, before it is added and before DDP averages it over the
    ranks. Hooks sit on the parameters only inside `with`, so that windows that are not measured pay nothing. Squares
    are summed in fp32 whatever the gradients' type.

    Under re-entrant activation checkpointing a parameter that is used in several segments is reported in pieces, which
    cannot be put together again: such a micro-batch is reported as NaN, and the window is dropped.

    Args:
        model: Its parameters that require gradients when a window begins are measured.
        device: Where the sums are kept; nothing waits for the device until `finish`.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self._model = model
        self._parameters: list[torch.nn.Parameter] = []
        self._device = device
        self._norms: list[torch.Tensor] = []
        self._seen: set[int] = set()
        self._repeated = False
        self._micro_batches: list[torch.Tensor | None] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "MicroBatchNorms":
        self._micro_batches = []
        self._reset()
        # Anew each time: callbacks freeze and unfreeze.
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for index, parameter in enumerate(self._parameters):
            self._handles.append(parameter.register_hook(self._make_hook(index)))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _make_hook(self, index: int):
        def hook(gradient: torch.Tensor) -> None:
            self._repeated |= index in self._seen
            self._seen.add(index)
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            self._norms.append(torch.linalg.vector_norm(values.detach(), dtype=_norm_type(values)))

        return hook

    def _reset(self) -> None:
        self._norms = []
        self._seen = set()
        self._repeated = False

    def end_micro_batch(self) -> None:
        """Close the sum of one micro-batch: call after each backward pass."""
        self._micro_batches.append(None if self._repeated or not self._norms else _stack(self._norms, self._device))
        self._reset()

    def finish(self) -> list[float]:
        """Return the square norm of each micro-batch (waits for the device); NaN where it cannot be told."""
        return [float("nan") if norms is None else _square_sum(norms) for norms in self._micro_batches]

    def accumulated_square_norm(self) -> float:
        """Return |ĝ|² of what the same parameters hold in `.grad`."""
        return gradient_square_norm(self._parameters, self._device)


def gradient_square_norm(parameters: Iterable[torch.nn.Parameter], device: torch.device) -> float:
    """Return |ĝ|² of the accumulated (and, under DDP, averaged) gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    gradients = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    norms = []
    for dtype in {_norm_type(gradient) for gradient in gradients}:
        norms += torch._foreach_norm([g for g in gradients if _norm_type(g) == dtype], 2.0, dtype=dtype)
    return _square_sum(_stack(norms, device))


def _norm_type(gradient: torch.Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)


def _stack(norms: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack([norm.to(device, torch.promote_types(norm.dtype, torch.float32)) for norm in norms])


def _square_sum(norms: torch.Tensor) -> float:
    # Norms of single tensors are fp32; their squares are added in fp64 (on the CPU: not every device has fp64),
    # since tr Σ is a difference of two such sums.
    return norms.cpu().double().square().sum().item()
