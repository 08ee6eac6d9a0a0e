"""Splits a collated micro-batch into smaller ones, as a data loader of the smaller size would have made them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


# M-RoPE (Qwen2-VL and its kin): positions of shape [3, batch, length].
_ROWS_IN_SECOND = {"position_ids"}
# Padded length 1, the samples of the batch one behind the other: what varlen attention takes.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "seq_idx", "max_length_q")


def count_rows(batch: Any) -> int:
    """Return the number of samples in a micro-batch that can be split.

    They are the size of the first dimension that all its tensors have in common. Scalars and tensors whose first
    dimension is 1 (broadcast) belong to all samples.

    Args:
        batch: Tensors in mappings, lists and tuples.

    Raises:
        ValueError: Its tensors do not have the same first dimension, or it has none, or samples are packed.
    """
    if isinstance(batch, Mapping) and any(batch.get(name) is not None for name in _PACKED):
        raise ValueError("its samples are packed into one row (padding-free), which has no rows to split")
    sizes: dict[str, int] = {}
    _find_sizes(batch, "", sizes)
    if not sizes:
        raise ValueError("no tensor in it tells its samples")
    several = {name: size for name, size in sizes.items() if size != 1}
    if len(set(several.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in several.items())
        raise ValueError(f"its tensors differ in their first dimension ({found}), so that rows are not samples")
    return next(iter(several.values()), 1)


def split_batch(batch: Any, size: int) -> list[Any]:
    """Split a micro-batch into parts of `size` samples, the last of what is left.

    Tensors and arrays are split along their first dimension (views, nothing is copied), lists with one entry a sample
    likewise; what belongs to all samples goes into each part as it is.

    Args:
        batch: Tensors in mappings, lists and tuples.
        size: Samples of a part, at least 1.

    Returns:
        The parts in order; the batch itself if it is no larger than `size`.

    Raises:
        ValueError: The batch is larger and cannot be split.
    """
    rows = count_rows(batch)
    if rows <= size:
        return [batch]
    return [_part(batch, "", rows, start, min(start + size, rows)) for start in range(0, rows, size)]


def split_evenly(batch: Any, count: int) -> list[Any]:
    """Split a micro-batch into so many parts, whose sizes differ by one sample at most; the larger ones come first.

    Args:
        batch: As for `split_batch`.
        count: Parts; at most as many as the batch has rows.

    Raises:
        ValueError: The batch cannot be split, or has too few rows.
    """
    if count == 1:
        return [batch]
    rows = count_rows(batch)
    if rows < count:
        raise ValueError(f"it has {rows} rows, too few for {count} parts")
    ends = [-(-rows * number // count) for number in range(count + 1)]
    return [_part(batch, "", rows, start, stop) for start, stop in itertools.pairwise(ends)]


def copy_batch(batch: Any) -> Any:
    """Return a batch that can be taken apart or changed in place without a trace in this one.

    Containers, tensors and arrays are copied; other objects, which are the user's own, are shared.
    """
    if isinstance(batch, torch.Tensor):
        return batch.detach().clone().requires_grad_(batch.requires_grad)
    if isinstance(batch, np.ndarray):
        return batch.copy()
    if isinstance(batch, Mapping):
        return type(batch)({name: copy_batch(value) for name, value in batch.items()})
    if isinstance(batch, list | tuple):
        values = [copy_batch(value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray) and value.ndim > 0


def _row_dimension(value: Any, name: str) -> int:
    return 1 if name in _ROWS_IN_SECOND and value.ndim == 3 else 0


def _find_sizes(value: Any, name: str, sizes: dict[str, int]) -> None:
    """Note the first dimensions of all tensors but those in lists, which may hold a sample each."""
    if _has_rows(value):
        if isinstance(value, torch.Tensor) and (value.is_nested or value.layout != torch.strided):
            raise ValueError(f"{name or 'it'} is a nested or sparse tensor, which cannot be split into rows")
        sizes[name or "the batch"] = value.shape[_row_dimension(value, name)]
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _find_sizes(inner, str(key), sizes)
    elif isinstance(value, tuple):
        for index, inner in enumerate(value):
            _find_sizes(inner, f"{name}[{index}]", sizes)


def _part(value: Any, name: str, rows: int, start: int, stop: int) -> Any:
    if _has_rows(value):
        dimension = _row_dimension(value, name)
        if value.shape[dimension] != rows:
            return value
        return value[:, start:stop] if dimension else value[start:stop]
    if isinstance(value, Mapping):
        return type(value)({key: _part(inner, str(key), rows, start, stop) for key, inner in value.items()})
    if isinstance(value, list | tuple):
        return _part_of_sequence(value, name, rows, start, stop)
    return value


def _part_of_sequence(value: Sequence[Any], name: str, rows: int, start: int, stop: int) -> Any:
    in_tensors = [_has_rows(inner) and inner.shape[0] == rows for inner in value]
    a_sample_each = isinstance(value, list) and len(value) == rows
    if a_sample_each and not any(in_tensors):
        return value[start:stop]
    if a_sample_each and all(in_tensors):
        raise ValueError(f"{name or 'it'} is a list of {rows} tensors of {rows} rows: which of them are samples?")
    if a_sample_each:  # tensors of all kinds of sizes: objects of each picture, say
        return value[start:stop]
    parts = [_part(inner, f"{name}[{index}]", rows, start, stop) for index, inner in enumerate(value)]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
