"""The example batch of a plan: what is copied for it, and what is not."""

import array
import collections
import functools
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from hf_trainopt.placement.example_batch import largest_batch


ROWS, WIDTH = 20_000, 64  # 10 MB


class Holder:
    def __init__(self, value):
        self.value = value


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Rows(Dataset):
    def __init__(self, data, row):
        self.data, self.row = data, row

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"input_ids": torch.as_tensor(np.asarray(self.row(self.data, index), dtype=np.int64))}


def numbers():
    return np.zeros((ROWS, WIDTH), np.int64)


def arrow():
    return pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(numbers().ravel()), WIDTH)})


def memory_map(folder):
    numbers().tofile(folder / "rows.bin")
    return np.memmap(folder / "rows.bin", np.int64, "r", shape=(ROWS, WIDTH))


def take(data, index):
    return data[index]


KINDS = {
    "array": lambda folder: (numbers(), take),
    "tensor": lambda folder: (torch.from_numpy(numbers()), take),
    "data frame": lambda folder: (pd.DataFrame(numbers()), lambda d, i: d.iloc[i].to_numpy()),
    "series of lists": lambda folder: (pd.Series([[1, 2]] * ROWS), lambda d, i: d.iloc[i]),
    "Arrow table": lambda folder: (arrow(), lambda d, i: d["input_ids"][i].as_py()),
    "memory map": lambda folder: (memory_map(folder), take),
    "object": lambda folder: (Holder(numbers()), lambda d, i: d.value[i]),
    "slots": lambda folder: (Slots(Holder(numbers())), lambda d, i: d.value.value[i]),
    "deep": lambda folder: ({"a": [Holder({"b": (numbers(),)})]}, lambda d, i: d["a"][0].value["b"][0][i]),
    "many arrays": lambda folder: (
        [np.zeros((40, WIDTH), np.int64) for _ in range(500)], lambda d, i: d[i // 40][i % 40],
    ),
    "deque": lambda folder: (collections.deque([[1, 2]] * ROWS), take),
    "bytes": lambda folder: (bytearray(ROWS * WIDTH), lambda d, i: list(d[i * WIDTH : (i + 1) * WIDTH])),
    "array of Python": lambda folder: (
        array.array("q", bytes(8 * ROWS * WIDTH)), lambda d, i: d[i * WIDTH : (i + 1) * WIDTH],
    ),
    "partial": lambda folder: (functools.partial(take, numbers()), lambda d, i: d(i)),
    "method": lambda folder: (Holder(numbers()).__getattribute__, lambda d, i: d("value")[i]),
    "module": lambda folder: (Holder(np), lambda d, i: d.value.zeros(3)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_large_is_copied(kind, tmp_path):
    dataset = Rows(*KINDS[kind](tmp_path))
    loader = DataLoader(Subset(ConcatDataset([dataset]), range(0, ROWS, 2)), batch_size=2)
    largest_batch(loader, 2)  # imports and caches
    tracemalloc.start()
    largest_batch(loader, 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 2**20


class Counting(Dataset):
    """Has a state of its own, which must stay where it is."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.numpy = np.random.default_rng(0)
        self.seen, self.last, self.held = 0, np.zeros(3), Holder([0])

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.seen += 1
        self.last[:] = index
        self.held.value[0] += 1
        noise = torch.rand(4, generator=self.generator).sum() + self.numpy.random()
        return {"x": noise.float()}


def test_state_is_copied():
    dataset = Counting()
    before = dataset.generator.get_state(), dataset.numpy.bit_generator.state
    largest_batch(DataLoader(dataset, batch_size=2), 2)
    assert (dataset.seen, dataset.last.tolist(), dataset.held.value) == (0, [0, 0, 0], [0])
    assert torch.equal(dataset.generator.get_state(), before[0])
    assert dataset.numpy.bit_generator.state == before[1]
