"""Random numbers that the data draw: a run that is resumed within an epoch gets the rows that it would have had.

Samplers without a generator of their own and rows that are masked or augmented draw from the global generators of
Python, NumPy and PyTorch, in turns with the model. A checkpoint holds the state of these generators at its own time
(`rng_state.pth`). To find the same rows, the resumed run needs two earlier states: that of the start of the epoch,
from which the sampler has drawn its order, and that in which the batch was read that the loader holds ready
(Accelerate's loaders look one batch ahead).
"""

import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ..core.facts import data_parallel_size, rank_batch_size
from ..core.part import Part


logger = logging.getLogger(__name__)

FILE_NAME = "data_rng_state"


class HostGenerators:
    """The states of the global generators of Python, NumPy and PyTorch (on the CPU), in a form that can be saved."""

    @staticmethod
    def read() -> dict[str, Any]:
        """Return the states: numbers, tuples and tensors only."""
        kind, keys, *rest = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
            "torch": torch.get_rng_state(),
        }

    @staticmethod
    def write(states: dict[str, Any]) -> None:
        """Set the generators to what `read` has returned."""
        random.setstate(states["python"])
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(states["torch"])


class WatchedBatches:
    """A batch sampler that says which batch is asked for next; in all else it is the one inside.

    Without workers the loader reads the rows of a batch right after it has asked for it.

    Args:
        inside: Batch sampler.
        before: Called with the index of a batch in its epoch before it is asked for, the end of the epoch included.
    """

    def __init__(self, inside: Any, before: Callable[[int], None]):
        vars(self).update(inside=inside, before=before)

    def __iter__(self) -> Iterator[Any]:
        batches, index = iter(self.inside), 0
        while True:
            self.before(index)
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch
            index += 1

    def __len__(self) -> int:
        return len(self.inside)

    def __getattr__(self, name: str) -> Any:
        if name == "inside":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.inside, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inside, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.inside, name)


class RandomDataPart(Part):
    """Random numbers that the data draw, in a run that is resumed within an epoch."""

    name = "random_data"  # in files of its own, one a rank: states of generators aren't JSON

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self._epoch_start: dict[str, Any] | None = None
        self._before_reading: dict[int, dict[str, Any]] = {}
        self._random_state_is_loaded = self._is_at_epoch_start = False

    @contextlib.contextmanager
    def epoch(
        self,
        *,
        train_dataloader: Any,
        epoch: int,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
        resume_from_checkpoint: str | None = None,
        **loop: Any,
    ) -> Iterator[None]:
        inner = getattr(train_dataloader, "base_dataloader", train_dataloader)  # inside Accelerate's
        batches = getattr(inner, "batch_sampler", None)
        checkpoint = resume_from_checkpoint
        is_resumed = checkpoint is not None and epoch == epochs_trained
        first = steps_trained_in_current_epoch if is_resumed and not self.trainer.args.ignore_data_skip else 0
        saved = self._saved_data_state(checkpoint) if first else None
        if is_resumed:
            self._say_what_differs(train_dataloader, epoch, first)
        self._random_state_is_loaded, self._before_reading = False, {}
        if saved is not None:
            HostGenerators.write(saved["epoch_start"])
        # Else it isn't known, or what upstream loads next.
        self._epoch_start = HostGenerators.read() if not is_resumed or saved is not None else None
        self._is_at_epoch_start = is_resumed and not first
        reads_here = batches is not None and not getattr(inner, "num_workers", 0)
        if not reads_here:
            yield
            return

        pending = self._states_to_put_back(saved, first, checkpoint) if saved is not None else {}

        def before(index: int) -> None:
            if index in pending:
                pending.pop(index)()
            self._before_reading[index] = HostGenerators.read()
            self._before_reading.pop(index - 2, None)

        # `DataLoader` lets nobody set it; Accelerate looks for methods of what is inside.
        vars(inner)["batch_sampler"] = WatchedBatches(batches, before)
        try:
            yield
        finally:
            vars(inner)["batch_sampler"] = batches

    def _states_to_put_back(self, saved: dict[str, Any], first: int, checkpoint: str) -> dict[int, Callable[[], None]]:
        """What to do before which batch is read, so that all rows are those of the run that is resumed."""

        def go_on() -> None:
            self.trainer._load_rng_state(checkpoint)
            self._random_state_is_loaded = True

        if saved["batch"] != self._batch:
            return {}  # rows are read in other groups: their order is known, what they drew is not
        if first in saved["before_reading"]:  # it was read before the checkpoint was written
            return {first: lambda: HostGenerators.write(saved["before_reading"][first]), first + 1: go_on}
        return {first: go_on}

    def load(self, stock_load: Callable[[], None]) -> None:
        """Load the state of the generators, unless that was done where the loader had come to.

        Args:
            stock_load: Upstream's `_load_rng_state`. Rows have drawn since.
        """
        if self._random_state_is_loaded:
            self._random_state_is_loaded = False
            return
        stock_load()
        if self._is_at_epoch_start:
            self._epoch_start, self._is_at_epoch_start = HostGenerators.read(), False

    def save(self, folder: str) -> None:
        """Save, beside upstream's state of the generators, the earlier states that a resumed run needs."""
        if self._epoch_start is not None:
            state = {
                "epoch_start": self._epoch_start,
                "before_reading": self._before_reading,
                "batch": self._batch,
            }
            torch.save(state, self._data_state_path(folder))

    @property
    def _batch(self) -> tuple[int, int]:
        """What batches are counted in."""
        return rank_batch_size(self.trainer), data_parallel_size(self.trainer.args)

    def _data_state_path(self, folder: str) -> str:
        rank = f"_{self.trainer.args.process_index}" if self.trainer.args.world_size > 1 else ""
        return os.path.join(folder, f"{FILE_NAME}{rank}.pth")

    def _saved_data_state(self, checkpoint: str) -> dict[str, Any] | None:
        # Written by another number of ranks, all of which began the epoch in the order of the first.
        others = [os.path.join(checkpoint, f"{FILE_NAME}{rank}.pth") for rank in ("", "_0")]
        paths = [path for path in (self._data_state_path(checkpoint), *others) if os.path.isfile(path)]
        return torch.load(paths[0], weights_only=True) if paths else None

    def _say_what_differs(self, dataloader: Any, epoch: int, first: int) -> None:
        """Warn once where rows that draw random numbers cannot get the same ones again."""
        what = None
        if getattr(dataloader, "num_workers", 0):
            if epoch and getattr(dataloader, "persistent_workers", False):
                what = "dataloader_persistent_workers=True: the workers start anew, with other seeds"
            elif first:
                what = "the workers of the data loader do not read the rows again that were trained on"
        elif first and isinstance(getattr(dataloader, "dataset", None), IterableDataset):
            what = "the rows of a stream are read again without the model in between"
        if what is not None and self.trainer.args.should_log:
            logger.warning(
                "Rows that draw random numbers (masking, augmentation) draw others than in the run that is resumed, "
                "since %s. Rows that draw none are the same.",
                what,
            )
