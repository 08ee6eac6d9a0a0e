"""The data cursor against a walk over a list of micro-batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import walk_the_data

from hf_trainopt.accumulation.cursor import DataCursor


def cursor_for(length: int | None, reference_steps: int, budget: int) -> DataCursor:
    return DataCursor(reference_steps, budget, length, epoch_length=length or reference_steps * budget)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=200, max_size=200),
    length=st.integers(1, 25),
    reference_steps=st.integers(1, 6),
    budget=st.integers(1, 20),
)
def test_cursor_equals_a_walk_over_the_data(sizes, length, reference_steps, budget):
    cursor = cursor_for(length, reference_steps, budget)
    for size, (epoch, taken, position) in zip(
        sizes, walk_the_data(sizes, length, reference_steps, budget), strict=False
    ):
        assert not cursor.exhausted
        assert cursor.epoch == epoch
        assert min(size, cursor.available()) == taken
        cursor.advance(taken)
        assert cursor.reference_position == pytest.approx(float(position), abs=1e-12)
        if position.denominator == 1:
            assert isinstance(cursor.reference_position, int)
            assert cursor.reference_position == position
    assert cursor.exhausted
    assert cursor.available() == 0
    assert cursor.progress == 1.0


@given(st.integers(1, 25), st.integers(1, 6), st.integers(1, 20), st.integers(1, 5))
def test_at_the_reference_size_intervals_are_those_of_stock(length, reference_steps, budget, interval):
    cursor = cursor_for(length, reference_steps, budget)
    step = 0
    while not cursor.exhausted:
        cursor.advance(min(reference_steps, cursor.available()))
        step += 1
        assert cursor.reference_position == step
        assert cursor.crossed(interval) == (step % interval == 0)
        assert cursor.remaining_windows(reference_steps) == budget - step
    assert step == budget


@given(st.lists(st.integers(1, 9), min_size=60, max_size=60), st.integers(1, 5))
def test_every_multiple_of_an_interval_is_crossed_once(sizes, interval):
    """However windows fall: as many crossings as intervals passed, at most one a window."""
    cursor = cursor_for(None, 3, 40)
    crossings = 0
    for size in sizes:
        if cursor.exhausted:
            break
        before = cursor.micro_batches_passed // (3 * interval)
        cursor.advance(min(size, cursor.available()))
        assert cursor.crossed(interval) == (cursor.micro_batches_passed // (3 * interval) > before)
        crossings += cursor.crossed(interval)
    assert crossings <= 40 // interval


def test_an_iterator_that_runs_dry_closes_the_epoch():
    cursor = cursor_for(None, 4, 10)
    cursor.advance(3, end_of_epoch=True)
    assert (cursor.epoch, cursor.micro_batch, cursor.reference_position) == (1, 0, 1)
    assert cursor.crossed(1)
