"""Pieces of a micro-batch, put together again, are the micro-batch."""

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from hf_trainopt.core.batch import split_evenly
from hf_trainopt.out_of_memory import alike, count_rows, split_batch


Pair = namedtuple("Pair", ["first", "second"])
MAPPINGS = (dict, UserDict, BatchEncoding)


def leaves(rows: int):
    """Values with a sample in each row, and values that belong to all of them."""
    shape = st.lists(st.integers(1, 3), max_size=2)
    tensor = shape.map(lambda rest: torch.arange(rows * int(np.prod(rest))).reshape(rows, *rest))
    each = st.one_of(
        tensor,
        tensor.map(lambda value: value.numpy()),
        st.just([f"text {row}" for row in range(rows)]),
        # Objects of each picture: numbers of them that differ.
        st.just([{"boxes": torch.full((row % 3, 4), row)} for row in range(rows)]),
    )
    shared = st.one_of(
        st.just(torch.tensor(3.5)), st.just(torch.arange(7)[None]), st.none(), st.integers(), st.just("name"),
        st.booleans(),
    )  # fmt: skip
    return each, shared


@st.composite
def batches(draw):
    rows = draw(st.integers(2, 9))
    each, shared = leaves(rows)
    leaf = st.one_of(each, shared)
    nested = st.one_of(
        leaf,
        st.dictionaries(st.sampled_from("abc"), leaf, max_size=2),
        st.tuples(leaf, leaf),
        st.builds(Pair, leaf, leaf),
    )
    content = draw(st.dictionaries(st.sampled_from("pqrst"), nested, max_size=4))
    content["input_ids"] = torch.arange(rows * 3).reshape(rows, 3)
    return rows, draw(st.sampled_from(MAPPINGS))(content)


def join(parts: list, rows: int):
    """Undo a split; `parts` are the values at one place."""
    first = parts[0]
    if all(part is first for part in parts):
        return first
    if isinstance(first, torch.Tensor | np.ndarray):
        assert sum(len(part) for part in parts) == rows
        return torch.cat(parts) if isinstance(first, torch.Tensor) else np.concatenate(parts)
    if hasattr(first, "items"):
        return {key: join([part[key] for part in parts], rows) for key in first}
    if isinstance(first, tuple):
        assert all(type(part) is type(first) for part in parts)
        entries = [join(list(pieces), rows) for pieces in zip(*parts, strict=True)]
        return type(first)(*entries) if hasattr(first, "_fields") else tuple(entries)
    if isinstance(first, list):
        return [entry for part in parts for entry in part]
    assert all(part == first for part in parts)
    return first


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if hasattr(a, "items"):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(deadline=None, max_examples=150)
@given(batches(), st.integers(1, 10))
def test_nothing_is_lost_and_nothing_comes_twice(found, size):
    rows, batch = found
    assert count_rows(batch) == rows
    parts = split_batch(batch, size)
    assert [count_rows(part) for part in parts] == [min(size, rows - start) for start in range(0, rows, size)]
    assert all(type(part) is type(batch) for part in parts)
    if len(parts) > 1:
        assert same(join(parts, rows), dict(batch.items()))
    else:
        assert parts[0] is batch


@settings(deadline=None, max_examples=60)
@given(batches(), st.data())
def test_even_parts_differ_by_one_sample_and_lose_nothing(found, data):
    rows, batch = found
    count = data.draw(st.integers(1, rows))
    parts = split_evenly(batch, count)
    sizes = [count_rows(part) for part in parts]
    assert len(parts) == count
    assert sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == -(-rows // count)
    if count > 1:
        assert same(join(parts, rows), dict(batch.items()))
        with pytest.raises(ValueError, match=f"too few for {rows + 1} parts"):
            split_evenly(batch, rows + 1)


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(rows)[:, None].expand(rows, 2)}


def test_every_rank_makes_as_many_slices_as_the_fullest(monkeypatch):
    others = [([8, 8, 3], None)]
    monkeypatch.setattr(alike, "gather_object", lambda own: own + others)
    slices = alike.split_alike([batch_of(8), batch_of(5), batch_of(1)], 3)
    assert [[count_rows(part) for part in parts] for parts in slices] == [[3, 3, 2], [2, 2, 1], [1]]
    with pytest.raises(ValueError, match=r"rank 0 has only 2 rows of it.*dataloader_drop_last=True"):
        alike.split_alike([batch_of(8), batch_of(2), batch_of(1)], 3)
    others[0] = ([8, 1], None)
    with pytest.raises(ValueError, match="rank 1 has only 1 rows"):
        alike.split_alike([batch_of(8), batch_of(5)], 3)


def test_what_one_rank_cannot_split_ends_all(monkeypatch):
    monkeypatch.setattr(alike, "gather_object", lambda own: [([4], None), *own])
    with pytest.raises(ValueError, match="rank 1: the micro-batch cannot be split: no tensor in it"):
        alike.split_alike([{"names": ["a", "b"]}], 2)
    monkeypatch.setattr(alike, "gather_object", lambda own: [*own, ([], "it is a riddle")])
    with pytest.raises(ValueError, match="rank 1: it is a riddle"):
        alike.split_alike([batch_of(4)], 2)


def test_pieces_are_views():
    batch = {"input_ids": torch.zeros(4, 2)}
    split_batch(batch, 2)[1]["input_ids"].fill_(1)
    assert batch["input_ids"].sum() == 4


def test_positions_of_several_axes_have_their_samples_in_the_second_dimension():
    batch = {"input_ids": torch.zeros(3, 5), "position_ids": torch.arange(45).reshape(3, 3, 5)}
    parts = split_batch(batch, 2)
    assert [part["position_ids"].shape for part in parts] == [(3, 2, 5), (3, 1, 5)]
    assert torch.equal(parts[1]["position_ids"], batch["position_ids"][:, 2:])
    shared = {"input_ids": torch.zeros(4, 5), "position_ids": torch.arange(5)[None]}
    assert all(part["position_ids"] is shared["position_ids"] for part in split_batch(shared, 1))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.zeros(1, 9), "cu_seq_lens_q": torch.tensor([0, 4, 9])}, "packed into one row"),
        ({"input_ids": torch.zeros(4, 9), "pixel_values": torch.zeros(100, 6)}, "input_ids 4, pixel_values 100"),
        ({"scale": torch.tensor(1.0), "names": ["a", "b"]}, "no tensor in it tells its samples"),
        ({"input_ids": torch.zeros(2, 3), "masks": [torch.zeros(2, 2)] * 2}, "list of 2 tensors of 2 rows"),
        ({"input_ids": torch.eye(3).to_sparse()}, "nested or sparse tensor"),
        ({"x": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}, "nested or sparse tensor"),
    ],
)
def test_what_cannot_be_split_is_said(batch, message):
    with pytest.raises(ValueError, match=message):
        split_batch(batch, 1)


def test_a_batch_may_be_a_tensor_or_a_tuple():
    assert [part.tolist() for part in split_batch(torch.arange(3), 2)] == [[0, 1], [2]]
    first, second = split_batch((torch.arange(3), torch.arange(3) + 5), 2)
    assert (first[1].tolist(), second[0].tolist()) == ([5, 6], [2])
