"""The example batch of a plan: what is copied for it, and what is not."""

import array
import collections
import functools
import logging
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import arguments, quiet
from placement_models import gpt2
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset
from transformers import BatchEncoding

from hf_trainopt import EfficientTrainer
from hf_trainopt.placement.simulate.example_batch import batch_elements, largest_batch


datasets = pytest.importorskip("datasets")  # which brings the other two
pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")


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


# ---- The longest samples -------------------------------------------------------------------------------------------


LENGTHS = [5, 7, 40, 6, 3, 39, 8, 4]


class Samples(Dataset):
    def __init__(self, make, lengths=LENGTHS):
        self.make, self.lengths = make, lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return self.make(self.lengths[index])


def padded(samples, name):
    width = max(len(sample[name]) for sample in samples)
    rows = [torch.as_tensor(sample[name]) for sample in samples]
    return {name: torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])}


def tokenised(samples):
    return padded([{"input_ids": torch.tensor([ord(c) for c in sample["text"]])} for sample in samples], "input_ids")


WHERE = {
    "audio": (lambda n: {"input_values": torch.ones(n), "labels": 1}, lambda s: padded(s, "input_values")),
    "nested": (lambda n: {"audio": {"array": np.ones(n)}}, lambda s: padded([x["audio"] for x in s], "array")),
    "lists": (lambda n: {"values": [1.0] * n}, lambda s: padded(s, "values")),
    "tuples": (lambda n: (torch.ones(n), 1), lambda s: padded([{"x": x[0]} for x in s], "x")),
    "text": (lambda n: {"text": "a" * n, "label": 1}, tokenised),
    "pixels": (
        lambda n: {"pixel_values": torch.ones(n, 3)},
        lambda s: {"p": max((x["pixel_values"] for x in s), key=len)[None]},
    ),
    "conversation": (
        lambda n: {"messages": [{"role": "user", "content": "b" * n}]},
        lambda s: tokenised([{"text": x["messages"][0]["content"]} for x in s]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", WHERE)
def test_the_longest_samples_are_found_wherever_their_length_is(where):
    make, collate = WHERE[where]
    (batch,) = largest_batch(DataLoader(Samples(make), batch_size=2, collate_fn=collate), 2).values()
    assert batch.shape[1] == 40


@pytest.mark.parametrize(("column", "collate"), [("text", tokenised), ("values", lambda s: padded(s, "values"))])
def test_the_longest_rows_of_columns_are_found(column, collate):
    make = {"text": lambda n: "a" * n, "values": lambda n: [1.0] * n}[column]
    data = datasets.Dataset.from_dict({column: [make(n) for n in LENGTHS * 300], "label": [0] * len(LENGTHS) * 300})
    (batch,) = largest_batch(DataLoader(data, batch_size=2, collate_fn=collate), 2).values()
    assert batch.shape == (2, 40)


def test_lengths_that_the_collator_alone_knows():
    """Samples are names of files, say; batches from all over the data tell."""
    files = [f"{index:04}" for index in range(40)]

    def read(names):
        return padded([{"x": torch.ones(100 if int(name) >= 30 else 10)} for name in names], "x")

    (batch,) = largest_batch(DataLoader(files, batch_size=2, collate_fn=read), 2).values()
    assert batch.shape == (2, 100)


class Stream(IterableDataset):
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return ({"x": torch.ones(90 if index == 60 else 5)} for index in range(self.size))


@pytest.mark.parametrize(("size", "is_known"), [(80, True), (1000, False)])
def test_streams_are_looked_into(size, is_known, caplog):
    loader = DataLoader(Stream(size), batch_size=2, collate_fn=lambda s: padded(s, "x"))
    assert largest_batch(loader, 2)["x"].shape == (2, 90)
    assert ("aren't known" in caplog.text) is not is_known


def test_that_the_longest_are_not_known_is_said(caplog):
    lengths = [5 + index % 3 for index in range(3000)]
    largest_batch(DataLoader(Samples(WHERE["audio"][0], lengths), batch_size=2, collate_fn=WHERE["audio"][1]), 2)
    assert "the longest of 1000 out of 3000" in caplog.text


# ---- Batches that are larger than planned --------------------------------------------------------------------------


def test_a_step_above_the_budget_is_said(tmp_path, caplog):
    """The collator makes the 14th batch much longer, which nothing tells before."""
    rows = [{"number": torch.tensor(index)} for index in range(40)]

    def collate(samples):
        length = 24 if any(int(sample["number"]) == 27 for sample in samples) else 4
        ids = torch.ones(len(samples), length, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}

    args = arguments(
        tmp_path, accumulation_policy="fixed", per_device_train_batch_size=2, num_train_epochs=1, memory_budget="100%",
        train_sampling_strategy="sequential", memory_rewrites="none", remove_unused_columns=False,
    )  # fmt: skip
    trainer = quiet(EfficientTrainer(model=gpt2(), args=args, train_dataset=rows, data_collator=collate))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "above memory_budget" in record.getMessage()]
    assert len(said) == 1
    assert "of step 14 is above memory_budget" in said[0]
    assert "'input_ids': [2, 4]" in said[0]


# ---- What collators return and change ------------------------------------------------------------------------------


def test_batches_of_any_mapping_have_a_size():
    tensors = {"input_ids": torch.ones(2, 5), "more": [torch.ones(3), {"labels": torch.ones(2)}], "text": "abc"}
    assert batch_elements(tensors) == batch_elements(BatchEncoding(tensors)) == 15


def test_lengths_that_only_a_collator_with_encodings_knows():
    def encoded(samples):
        return BatchEncoding(tokenised(samples))

    data = [{"text": "a" * (3 + (index == 7) * 40)} for index in range(12)]
    found = [largest_batch(DataLoader(data, batch_size=2, collate_fn=collate), 2) for collate in (tokenised, encoded)]
    assert batch_elements(found[0]) == batch_elements(found[1])


@pytest.mark.parametrize("size", [900, 1100])
def test_collators_that_change_rows_do_not_change_the_data(size):
    rows = [{"input_ids": [1] * 4, "labels": [1] * 4} for _ in range(size)]

    def popping(samples):
        return {"labels": torch.tensor([sample.pop("labels") for sample in samples])}

    largest_batch(DataLoader(rows, batch_size=4, collate_fn=popping), 4)
    assert all("labels" in row for row in rows)
