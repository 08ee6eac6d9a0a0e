"""Ranks that do not have the same data or speed: nobody waits for ever; and how often ranks speak to each other."""

import itertools
from pathlib import Path

import pytest
from helpers import skip_below
from packaging.version import Version
from test_distributed import launch, launch_all

from hf_trainopt.core.versions import TRANSFORMERS


STREAMS = ["stream dispatched", "stream of each", "stream split"]
CASES = [*STREAMS, "stream shorter", "stream sized", "stream empty", "stream slow", "count ddp"]
CASES += ["count fsdp"] if Version("5.23") <= TRANSFORMERS else []


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[dict]]:
    """What each rank saw; a deadlock is a timeout of all of them."""
    return launch_all(CASES, tmp_path_factory.mktemp("uneven"))


def steps_of_both(records: list[dict]) -> list[dict]:
    first, second = (record["steps"] for record in records)
    assert first == second  # k, weights (bit-equal), noise scale, position, collectives
    return first


@pytest.mark.parametrize("case", STREAMS)
def test_streams_without_a_length(case, runs):
    """23 rows: the last batch is not whole; Accelerate fills it up, or takes it from the start."""
    steps = steps_of_both(runs[case])
    assert {step["k"] for step in steps} == {2, 3}
    assert steps[-1]["epoch"] > 1


@pytest.mark.parametrize("case", ["stream shorter", "stream sized"])
def test_the_first_rank_that_is_dry_ends_the_epoch_of_all(case, runs):
    """40 and 26 rows in micro-batches of 2: 13 on each rank are an epoch, 8 windows of 2 are asked for.

    The rest of an epoch counts as a whole window. A stream that says it has 20 micro-batches is asked for a single
    epoch, as by stock `Trainer`.
    """
    samples = [step["samples"] for step in steps_of_both(runs[case])]
    assert 2 * 2 * 13 in samples
    assert samples[-1] == 2 * 2 * (13 if case == "stream sized" else 15)


def test_a_rank_without_any_data_ends_all_of_them(runs):
    assert steps_of_both(runs["stream empty"]) == []


def test_a_slow_rank_and_measured_times_give_one_k(runs):
    steps = steps_of_both(runs["stream slow"])
    assert len(steps) > 3
    assert steps[-1]["noise"] is not None


def test_loaders_of_different_lengths_are_refused_before_training(tmp_path):
    launch("uneven lengths", tmp_path, fails_with="the ranks have 12 to 13 batches an epoch")


@pytest.mark.parametrize(("case", "name"), [("count ddp", "buckets"), ("count fsdp", "reduce_scatter")])
def test_gradients_are_reduced_once_per_window(case, name, runs):
    """Whatever k is: each bucket of DDP, each group of FSDP2, and one vector of statistics and decisions."""
    if case == "count fsdp":
        skip_below("transformers", "5.23", "sharding at load time")
    steps = steps_of_both(runs[case])
    assert [step["k"] for step in steps[:5]] == [1, 2, 3, 4, 2]
    counts = [step["collectives"] for step in steps[1:]]  # DDP sets up its buckets in the first one
    gradients, others = (
        {after[which] - before[which] for before, after in itertools.pairwise(counts)}
        for which in (name, "all_reduce")
    )
    assert len(gradients) == 1
    assert min(gradients) > 0
    # The hook that counts DDP's buckets reduces each with `all_reduce`.
    assert others == {min(gradients) + 1 if case == "count ddp" else 1}


def test_micro_batches_that_ranks_share_have_as_many_samples_as_they_have(tmp_path):
    """`split_batches`: per_device_train_batch_size is of all ranks together."""
    for record in launch("", tmp_path, worker=Path(__file__).with_name("split_worker.py")):
        assert record["samples"] == 3 * 2 * 4
        assert (record["samples_of_a_micro_batch"], record["micro_batch_size"]) == (4, 2)
        assert record["half_life_of_callback"] == pytest.approx(record["samples"])  # a share of 1 of the run
