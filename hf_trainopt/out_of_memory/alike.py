"""Splits micro-batches in the same way on all ranks of a sharded model, which communicate in every slice."""

from typing import Any

from accelerate.utils import gather_object

from ..core.batch import count_rows, split_evenly


def split_alike(micro_batches: list[Any], size: int) -> list[list[Any]]:
    """Return the slices of each micro-batch: at most `size` samples each, and equally many on every rank.

    Ranks may have different numbers of rows, at the end of an epoch or from streams of their own. The fullest rank
    decides how many slices there are; the others make theirs smaller. All ranks must call this together.

    Args:
        micro_batches: Those of a window; all ranks have equally many.
        size: Most samples of a slice.

    Raises:
        ValueError: On all ranks, if one can't split a micro-batch, or has fewer rows than there are slices.
    """
    rows, problem = [], None
    try:
        rows = [count_rows(micro_batch) for micro_batch in micro_batches]
    except ValueError as error:
        problem = f"the micro-batch cannot be split: {error}"
    gathered = gather_object([(rows, problem)])
    for rank, (_, other) in enumerate(gathered):
        if other is not None:
            raise ValueError(f"auto_micro_batch can't split the micro-batches of rank {rank}: {other}")
    counts = [
        max(-(-number // size) for number in of_ranks) for of_ranks in zip(*(r for r, _ in gathered), strict=True)
    ]
    for rank, (numbers, _) in enumerate(gathered):
        for number, count in zip(numbers, counts, strict=True):
            if number < count:
                raise ValueError(
                    f"auto_micro_batch splits a micro-batch into {count} slices on every rank, since the ranks of a "
                    f"sharded model communicate in each, but rank {rank} has only {number} rows of it. Drop the last "
                    "batches of an epoch (dataloader_drop_last=True), or set auto_micro_batch=False and lower "
                    f"per_device_train_batch_size to {size}."
                )
    return [split_evenly(micro_batch, count) for micro_batch, count in zip(micro_batches, counts, strict=True)]
