"""The batch that a plan is made for: the largest that a run will meet, without touching its random numbers."""

import array
import collections
import copy
import functools
import itertools
import logging
import math
import mmap
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from ..errors import PlacementError


logger = logging.getLogger(__name__)

# Lengths are looked up in this many samples at most, evenly spaced: of columns, and of datasets that must be read.
_MOST_LENGTHS = 200_000
_MOST_READ = 1000

# So many samples of a stream are read, and of data that do not vary; where samples do not tell lengths, so many
# batches are collated.
_MOST_STREAMED = 100
_MOST_COLLATED = 4

# Tensors and arrays of a dataset are copied up to this size together; containers of up to `_MOST_READ` entries.
_MOST_COPIED = 2**20

# Objects of these are data, whatever they are made of.
_DATA_LIBRARIES = {
    "cudf", "dask", "duckdb", "fsspec", "h5py", "lmdb", "pandas", "PIL", "polars", "pyarrow", "scipy", "sqlite3",
    "tables", "vaex", "webdataset", "xarray", "zarr",
}  # fmt: skip

# What `copy.deepcopy` shares by itself.
_ATOMS = (
    int, float, complex, str, bytes, type, range, types.NoneType, types.FunctionType, types.BuiltinFunctionType,
)  # fmt: skip


def largest_batch(dataloader: DataLoader, batch_size: int) -> Any:
    """Return a collated batch of the `batch_size` longest samples.

    All that a sample holds tells how long it is: numbers first, texts second (a collator may tokenise them). Where
    samples do not differ, batches of samples from all over the data are collated and the largest is taken. A warning
    says where the longest are not known. The samples are read apart from the loader, whose samplers and workers are
    not started, from copies of the dataset and the collator, so that random generators of their own stay where they
    are (for those of Python, NumPy and torch see `forked_random_state`). An attention mask of ones only gets a zero
    where other batches of this size are padded: their masks need memory.

    Args:
        dataloader: The loader of the training run.
        batch_size: Samples of a micro-batch on one device.

    Raises:
        ValueError: The dataset is empty, is a stream that can be read once only, or cannot be copied.
    """
    dataset, collate = _apart(dataloader)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        found = list(itertools.islice(iter(dataset), max(batch_size, _MOST_STREAMED)))
        lengths = [_length(sample) for sample in found]
        order = sorted(range(len(found)), key=lambda place: lengths[place], reverse=True)  # stable
        groups, varied = [[found[place] for place in order[:batch_size]]], len(set(lengths)) > 1
        if len(found) == max(batch_size, _MOST_STREAMED):
            logger.warning(
                "The longest samples of a stream aren't known: memory is planned for the longest of its first %d. A "
                "longer batch may need more than planned.",
                len(found),
            )
    else:
        indices, varied = _longest(dataset, batch_size)
        groups = [[dataset[index] for index in indices]]
        if not varied and len(dataset) > batch_size:
            starts = _spread(len(dataset) - batch_size + 1, _MOST_COLLATED)
            groups += [[dataset[start + i] for i in range(batch_size)] for start in starts if start]
    if not groups[0]:
        raise PlacementError("train_dataset is empty, so that no placement can be planned; give it samples.")
    while len(groups[0]) < batch_size:
        groups[0].append(groups[0][0])
    # Copies: collators take labels out of samples, or augment them in place, and large data are shared with the run.
    batches = [collate(group) for group in copy.deepcopy(groups)]
    batch = max(batches, key=batch_elements)  # the first of several
    varied |= len(set(map(batch_elements, batches))) > 1
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.all() and (varied or _has_padding(dataset)):
        mask = mask.clone()
        mask[0, -1] = 0
        batch = {**batch, "attention_mask": mask}
    return batch


def batch_elements(batch: Any) -> int:
    """Return how many numbers the tensors of a batch hold: how large it is."""
    if isinstance(batch, torch.Tensor):
        return batch.numel()
    if isinstance(batch, Mapping):  # BatchEncoding as well, which is none of pytree's
        batch = batch.values()
    elif not isinstance(batch, list | tuple):
        return 0
    return sum(map(batch_elements, batch))


def _apart(dataloader: DataLoader) -> tuple[Any, Any]:
    """Return the dataset and the collator of a loader, copied since they may have a state of their own."""
    dataset, collate = getattr(dataloader, "dataset", None), getattr(dataloader, "collate_fn", None)
    makes_batches = getattr(dataloader, "batch_size", None) or getattr(dataloader, "batch_sampler", None)
    if dataset is None or collate is None or not makes_batches:
        raise PlacementError(
            "the training data are no DataLoader that makes batches of a dataset, so that there is no example batch; "
            "choose checkpoint_placement='all', 'every_n' or 'sqrt', or a plan file."
        )
    try:
        # First: what is one-shot cannot be copied.
        memo = _Shared(dataset, collate).memo
        return copy.deepcopy(dataset, memo), copy.deepcopy(collate, memo)
    except Exception as error:
        raise PlacementError(
            f"the training data cannot be copied ({error!r}), and reading them would change the run; choose "
            "checkpoint_placement='all', 'every_n' or 'sqrt', or a plan file."
        ) from error


class _Shared:
    """What deep copies are to share: what is large is data and no state.

    Args:
        *roots: What is copied; all that it holds is looked at.

    Attributes:
        memo: For `copy.deepcopy`.
    """

    def __init__(self, *roots: Any):
        self.memo: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._copied = 0
        waiting = list(roots)
        while waiting:  # and not recursion: what holds what may be deep
            value = waiting.pop()
            if id(value) in self._seen or isinstance(value, _ATOMS):
                continue
            self._seen.add(id(value))
            if self._is_data(value):
                self.memo[id(value)] = value
            else:
                waiting += _held_by(value)

    def _is_data(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor | np.ndarray | array.array | bytearray | memoryview):
            size = value.nbytes if hasattr(value, "nbytes") else len(value) * getattr(value, "itemsize", 1)
            # Many small ones are large together.
            if self._copied + size > _MOST_COPIED:
                return True
            self._copied += size
            return False
        if isinstance(value, list | tuple | dict | set | frozenset | collections.deque):
            return len(value) > _MOST_READ
        return (
            isinstance(value, mmap.mmap | types.ModuleType)
            or type(value).__module__.partition(".")[0] in _DATA_LIBRARIES
        )


def _held_by(value: Any) -> list[Any]:
    """Return what a deep copy of a value would copy with it."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset | collections.deque):
        return list(value)
    if isinstance(value, types.MethodType | types.MethodWrapperType):
        return [value.__self__]
    held = [value.func, value.args, value.keywords] if isinstance(value, functools.partial) else []
    held += getattr(value, "__dict__", {}).values()
    for owner in type(value).__mro__:
        slots = vars(owner).get("__slots__", ())
        held += [getattr(value, name, None) for name in ([slots] if isinstance(slots, str) else slots)]
    return held


def _length(sample: Any) -> tuple[int, int]:
    """Return how many numbers a sample holds, and how many characters of text."""
    numbers = characters = 0
    waiting = [sample]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str | bytes):
            characters += len(value)
        elif isinstance(value, torch.Tensor | np.ndarray):
            numbers += math.prod(value.shape) if value.ndim else 0
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            if value and isinstance(value[0], int | float):
                numbers += len(value)
            else:
                waiting += value
        elif isinstance(size := getattr(value, "size", None), tuple):  # a picture of PIL
            numbers += math.prod(size)
    return numbers, characters


def _has_padding(dataset: Any) -> bool:
    """Whether samples of one length are padded themselves."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return False
    samples = (dataset[index] for index in _spread(len(dataset), _MOST_READ))
    return any(not np.asarray(sample["attention_mask"]).all() for sample in samples if "attention_mask" in sample)


def _spread(size: int, most: int) -> list[int]:
    """Return at most `most` indices out of `size`, evenly spaced."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64)).tolist()


def _longest(dataset: Any, count: int) -> tuple[list[int], bool]:
    """Return the indices of the longest samples, and whether lengths vary."""
    size = len(dataset)
    if not size:
        return [], False
    lengths = None
    if getattr(dataset, "column_names", None) and hasattr(dataset, "with_format"):
        indices = _spread(size, _MOST_LENGTHS)
        lengths = _lengths_of_columns(dataset if len(indices) == size else dataset.select(indices))
    if lengths is None or not np.ptp(lengths, 0).any():  # columns do not tell: a transform may make the samples
        for most in (_MOST_STREAMED, _MOST_READ):  # pictures of one size take time to read
            indices = _spread(size, most)
            lengths = np.array([_length(dataset[index]) for index in indices])
            if not np.ptp(lengths, 0).any():
                break
    varied = bool(np.ptp(lengths, 0).any())
    if not varied:
        return list(range(min(count, size))), False
    if len(indices) < size:
        logger.warning(
            "The longest samples aren't known: memory is planned for the longest of %d out of %d. A longer batch may "
            "need more than planned.",
            len(indices),
            size,
        )
    order = np.lexsort((np.arange(len(lengths)), -lengths[:, 1], -lengths[:, 0]))[:count]
    return [indices[place] for place in order], True


def _lengths_of_columns(dataset: Any) -> np.ndarray:
    """Return, for each row, the summed lengths of lists and of texts; other columns count nothing."""
    import pyarrow.compute as pc

    lengths = np.zeros((len(dataset), 2), dtype=np.int64)
    table = dataset.with_format("arrow")
    for start in range(0, len(dataset), 10_000):
        part = table[start : start + 10_000]
        for name in part.column_names:
            for kind, length in ((0, pc.list_value_length), (1, pc.binary_length)):
                with suppress(TypeError, ValueError, NotImplementedError):
                    lengths[start : start + 10_000, kind] += length(part[name]).fill_null(0).to_numpy()
    return lengths
