"""The mean loss of several windows, weighted by their data: a mean over steps would weigh those of small k more."""

import torch


class MeanLoss:
    """Means since the last `take`, and over all windows; nothing waits for the device in between."""

    def __init__(self):
        self._sums: torch.Tensor | None = None
        self._sizes: set[int] = set()
        self._total, self._weight = 0.0, 0.0
        self._all_sizes: set[int] = set()

    def add(self, loss: torch.Tensor, num_micro_batches: int, planned: int, is_filtered: bool) -> None:
        """Take in a window.

        Args:
            loss: Its loss, a mean over its data.
            num_micro_batches: How many it had.
            planned: How many it was to have. The last window of an epoch may have fewer, and is a step like the others
                in stock.
            is_filtered: Whether a loss that is not finite is left out (`logging_nan_inf_filter`).
        """
        loss = loss.detach().float().reshape(())
        weight = torch.full_like(loss, num_micro_batches)
        if is_filtered:
            finite = torch.isfinite(loss)
            loss, weight = torch.where(finite, loss, 0.0), torch.where(finite, weight, 0.0)
        sums = torch.stack([loss * weight, weight])
        self._sums = sums if self._sums is None else self._sums + sums
        self._sizes.add(planned)

    def take(self) -> float | None:
        """Return the mean since the last call; `None` where all steps were of one size, so that stock's is right."""
        if self._sums is None:
            return None
        (total, weight), several = self._sums.tolist(), len(self._sizes) > 1
        self._total += total
        self._weight += weight
        self._all_sizes |= self._sizes
        self._sums, self._sizes = None, set()
        return total / weight if several and weight else None

    def overall(self) -> float | None:
        """Return the mean over all windows, or `None` as `take` does."""
        self.take()
        return self._total / self._weight if len(self._all_sizes) > 1 and self._weight else None
