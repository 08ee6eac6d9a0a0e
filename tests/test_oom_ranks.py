"""Out of memory on one of two ranks: both repeat the window together, and nobody waits for ever."""

import json
import random
from pathlib import Path

import pytest
import torch
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from oom_helpers import Recording, make
from test_distributed import assert_ranks_agree, launch

from hf_trainopt import EfficientTrainingArguments
from hf_trainopt.out_of_memory.checks import check_auto_micro_batch, find_ddp
from hf_trainopt.out_of_memory.ranks import BUCKET_BYTES, buckets


WORKER = Path(__file__).parent / "oom_worker.py"

ADAPTIVE = {
    "accumulation_policy": "goodput", "optimizer_step_cost": 2.0, "noise_scale_interval": 2, "batch": 16, "k": 2,
    "num_rows": 320, "num_train_epochs": 3,
}  # fmt: skip


def run(folder, **cases) -> list[dict]:
    """Run the cases; return what each rank wrote of each."""
    return launch(json.dumps(cases), folder, worker=WORKER)


def of(records: list[dict], case: str) -> list[dict]:
    return [record[case] for record in records]


def checksums(records: list[dict]) -> list[float]:
    """Weights after each step."""
    return [step["checksum"] for step in records[0]["steps"]]


@pytest.fixture(scope="module")
def fails_at() -> dict[str, list[int]]:
    first, second, both = sorted(random.Random(1).sample(range(2, 18), 3))
    return {"0": [first, both], "1": [second, both]}


@pytest.fixture(scope="module")
def records(fails_at, tmp_path_factory):
    """All runs in one launch, which takes far longer than they do."""
    once = {"num_train_epochs": 1}
    return run(
        tmp_path_factory.mktemp("oom"),
        plain={"auto_micro_batch": False},
        enough={},
        adaptive=ADAPTIVE | {"fails_at": fails_at},
        adaptive_switched=ADAPTIVE | {"switches": "adaptive"},
        last_of_first=once | {"fails_at": {"0": [2]}, "seed": 0},
        last_of_second=once | {"fails_at": {"1": [2]}, "seed": 1},
        first_of_second=once | {"fails_at": {"1": [1]}, "seed": 5},
        switched=once | {"switches": [(0, 2)]},
        normed_plain=once | {"model": "normed"},
        normed_enough=once | {"model": "normed", "auto_micro_batch": True},
        normed=once | {"model": "normed", "auto_micro_batch": True, "fails_at": {"1": [3]}},
        normed_first=once | {"model": "normed", "auto_micro_batch": True, "fails_at": {"0": [1]}},
        normed_switched=once | {"model": "normed", "auto_micro_batch": True, "switches": [(1, 2)]},
        normed_first_switched=once | {"model": "normed", "auto_micro_batch": True, "switches": [(0, 2)]},
    )


def test_random_micro_steps_of_either_rank_leave_no_trace(records, fails_at):
    """Adaptive k, statistics, dropout; failures at random places of either rank, and of both at once."""
    ours = of(records, "adaptive")
    assert_ranks_agree(ours)
    assert [record["failures"] for record in ours] == [fails_at["0"], fails_at["1"]]
    theirs = of(records, "adaptive_switched")
    assert [record["size"] for record in ours + theirs] == [2] * 4
    assert theirs[0]["failures"] == []
    assert checksums(ours) == checksums(theirs)
    assert ours[0]["weights"] == theirs[0]["weights"]
    assert ours[0]["log"] == theirs[0]["log"]
    assert ours[0]["steps"][-1]["samples"] == 960
    assert any("noise_scale" in line for line in ours[0]["log"])


@pytest.mark.parametrize("case", ["last_of_first", "last_of_second", "first_of_second"])
def test_where_ddp_would_reduce(records, case):
    """One rank fails in the last micro-step of a window or before it, the other finishes its own."""
    ours = of(records, case)
    assert_ranks_agree(ours)
    assert sorted(len(record["failures"]) for record in ours) == [0, 1]
    assert [record["size"] for record in ours] == [2, 2]
    assert checksums(ours) == checksums(of(records, "switched"))
    assert {line["effective_batch_size"] for line in ours[0]["log"]} == {16}


def test_with_enough_memory_nothing_changes(records):
    """Our reduction is DDP's, to the bit on two ranks; a layer that a rank or a window leaves out included."""
    for plain, ours in (("plain", "enough"), ("normed_plain", "normed_enough")):
        assert checksums(of(records, plain)) != checksums(of(records, "switched"))
        assert [record["weights"] for record in of(records, plain)] == [r["weights"] for r in of(records, ours)]


@pytest.mark.parametrize("case", ["normed", "normed_first"])
def test_running_statistics_on_two_ranks(records, case):
    """DDP broadcasts buffers in the first forward pass of a window, where a rank may be missing."""
    ours, theirs = of(records, case), of(records, f"{case}_switched")
    assert sorted(len(record["failures"]) for record in ours) == [0, 1]
    assert [record["weights"] for record in ours] == [record["weights"] for record in theirs]
    assert ours[0]["weights"] != of(records, "normed_plain")[0]["weights"]


def test_all_ranks_end_with_the_same_error(tmp_path):
    cases = json.dumps({"one": {"most_rows": {"1": 0}}})
    launch(cases, tmp_path, worker=WORKER, fails_with="ran out of memory on rank 1 with micro-batches of 1 samples")


def test_gradients_are_sent_in_buckets_of_one_kind():
    shapes = [(3,), (BUCKET_BYTES // 8,), (BUCKET_BYTES // 8,), (BUCKET_BYTES // 2,), (5, 2)]
    gradients = [torch.empty(shape) for shape in shapes] + [torch.empty(7, dtype=torch.bfloat16), torch.empty(1)]
    found = [[gradient.shape for gradient in bucket] for bucket in buckets(gradients, BUCKET_BYTES)]
    assert found == [
        [(3,), (BUCKET_BYTES // 8,)], [(BUCKET_BYTES // 8,)], [(BUCKET_BYTES // 2,)], [(5, 2), (1,)], [(7,)],
    ]  # fmt: skip
    assert list(buckets([], 1)) == []


# ---- What cannot work with several ranks, told to one rank that takes itself for two -------------------------


class Communicating(Recording):
    """What TRL's trainers do."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.accelerator.gather_for_metrics(inputs["input_ids"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


class Gathering(Recording):
    """What the losses of DPO do."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs["input_ids"].gather(-1, inputs["labels"].clamp_min(0))
        return super().compute_loss(model, inputs, *args, **kwargs)


def add_sync_batch_norm(trainer):
    trainer.model.extra = torch.nn.SyncBatchNorm(4)


def make_sparse(trainer):
    trainer.model.extra = torch.nn.Embedding(4, 4, sparse=True)


def compress(trainer):
    trainer.accelerator.ddp_handler = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)


def sync_each_batch(trainer):
    trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def set_static_graph(trainer):
    trainer.args.ddp_static_graph = True


@pytest.mark.parametrize(
    ("change", "cls", "message"),
    [
        (add_sync_batch_norm, Recording, "extra is a SyncBatchNorm, .* use BatchNorm, or leave auto_micro_batch out"),
        (make_sparse, Recording, "extra has sparse gradients"),
        (compress, Recording, "runs no comm_hook; remove it"),
        (sync_each_batch, Recording, "sync_each_batch reduces gradients in each backward pass"),
        (set_static_graph, Recording, "ddp_static_graph .* set it to False"),
        (None, Communicating, r"Communicating\.compute_loss communicates in each micro-batch"),
    ],
)
def test_what_cannot_work_on_several_ranks(change, cls, message, tmp_path, monkeypatch):
    trainer = make(tmp_path, cls=cls)
    if change is not None:
        change(trainer)
    check_auto_micro_batch(trainer)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match=message):
        check_auto_micro_batch(trainer)


def test_what_can_work_on_several_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(EfficientTrainingArguments, "world_size", 2)
    check_auto_micro_batch(make(tmp_path, cls=Gathering))
    with pytest.raises(ValueError, match="works with DistributedDataParallel only"):
        find_ddp(torch.nn.Linear(1, 1))
