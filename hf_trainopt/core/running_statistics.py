"""Running statistics of normalisation layers, saved and put back around a window that may not count."""

from collections.abc import Iterator

import torch


class RunningStatistics:
    """What a forward pass changes in normalisation layers, to undo it: one window with NaN would stay in it for ever.

    Args:
        model: Model, whose layers with running statistics (BatchNorm and its kin) are found once.
    """

    def __init__(self, model: torch.nn.Module):
        self._layers = [layer for layer in model.modules() if getattr(layer, "running_mean", None) is not None]
        self._saved: list[torch.Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._layers)

    def _buffers(self) -> Iterator[torch.Tensor]:
        for layer in self._layers:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                buffer = getattr(layer, name, None)
                if buffer is not None:
                    yield buffer

    @torch.no_grad()
    def save(self) -> None:
        """Keep the statistics as they are."""
        buffers = list(self._buffers())
        if len(self._saved) != len(buffers):
            self._saved = [torch.empty_like(buffer) for buffer in buffers]
        for saved, buffer in zip(self._saved, buffers, strict=True):
            saved.copy_(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        for saved, buffer in zip(self._saved, self._buffers(), strict=True):
            buffer.copy_(saved)
