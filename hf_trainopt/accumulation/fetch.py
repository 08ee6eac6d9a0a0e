"""Takes the micro-batches of a window from the data loader, as many on all ranks, and knows when an epoch is over."""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator


logger = logging.getLogger(__name__)

# `Trainer.get_batch_samples`: takes an iterator and a count, returns micro-batches and `num_items_in_batch`.
StockFetch = Callable[[Iterator, int], tuple[list[Any], Any]]


class WindowFetcher:
    """Fetches windows within epochs.

    Args:
        accelerator: Of the Trainer.
        fetches_together: Whether one rank may run out of data before another (see `checks.may_end_unevenly`).
        looks_ahead: Whether a loader that has read its last batch has no more micro-batches. Under sequence
            parallelism it has: DeepSpeed's adapter reads a batch on each rank, and hands them out one by one.

    Attributes:
        epoch_is_over: Whether the epoch has no more micro-batches, on any rank.
    """

    def __init__(self, accelerator: Accelerator, fetches_together: bool, looks_ahead: bool = True):
        self._accelerator = accelerator
        self._fetches_together = fetches_together
        self._looks_ahead = looks_ahead
        self._warned_of_uneven_ranks = False
        self.epoch_is_over = False
        self._loader: Any = None
        self._other_loader: Any = None

    def begin_epoch(self, dataloader: Any) -> None:
        """Begin an epoch over a loader."""
        self.epoch_is_over = False
        active = self._accelerator.gradient_state.active_dataloader
        self._loader, self._other_loader = None, active if active is not dataloader else None

    def end_epoch(self) -> None:
        """Let go of the loader."""
        self._loader = self._other_loader = None

    def fetch(self, stock_fetch: StockFetch, iterator: Iterator, wanted: int) -> tuple[list[Any], Any]:
        """Return up to `wanted` micro-batches and `num_items_in_batch` of them; all ranks get as many.

        Args:
            stock_fetch: Upstream's way to take micro-batches from an iterator.
            iterator: Over the epoch.
            wanted: Micro-batches that the window should have.
        """
        source: Any = iterator
        count = wanted
        if wanted and self._fetches_together:
            source = self._take_together(iterator, wanted)
            count = len(source)
        micro_batches, num_items = stock_fetch(iter(source), count)
        self.epoch_is_over |= len(micro_batches) < wanted or self._loader_is_dry()
        return micro_batches, num_items

    def _take_together(self, iterator: Iterator, wanted: int) -> list[Any]:
        """Take up to `wanted` micro-batches, as many as the rank that has the fewest left; all ranks call it.

        A rank that went on alone would wait forever for the others to reduce gradients. So would all of them if only
        one took the epoch for finished. The epoch ends on all ranks with the first that is dry.
        """
        micro_batches = list(itertools.islice(iterator, wanted))
        over = len(micro_batches) < wanted or self._loader_is_dry()
        own = torch.tensor([[len(micro_batches), over]], dtype=torch.int64, device=self._accelerator.device)
        counts, overs = self._accelerator.gather(own).T.tolist()
        self.epoch_is_over |= any(overs)
        if (min(counts) < max(counts) or min(overs) < max(overs)) and not self._warned_of_uneven_ranks:
            self._warned_of_uneven_ranks = True
            logger.warning(
                "Some ranks have more data than others: an epoch ends with the first rank that is dry, and what the "
                "others have left of it is not trained on. Data of the same length on all ranks avoids that."
            )
        return micro_batches[: min(counts)]

    def _loader_is_dry(self) -> bool:
        """Return whether the micro-batch fetched last is known to be the last of the epoch; call after each fetch.

        Accelerate's loaders look one batch ahead. Which of them is active is state of the process: it may be one that
        an earlier run or a callback has left halfway, and this run's loader may not be one of Accelerate's.
        """
        if not self._looks_ahead:
            return False
        if self._loader is None:
            active = self._accelerator.gradient_state.active_dataloader
            self._loader = active if active is not self._other_loader else False
        return self._loader not in (None, False) and self._loader.end_of_dataloader
