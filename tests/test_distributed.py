"""Two ranks under `accelerate launch` (gloo, CPU)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch


WORKER = Path(__file__).parent / "distributed_worker.py"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(case: str, folder: Path, num_processes: int = 2) -> list[dict]:
    """Run the worker; return what each rank wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    # `--multi_gpu` is how `accelerate launch` starts several processes, on the CPU too (the worker sets `use_cpu`).
    kind = "--multi_gpu" if num_processes > 1 else "--cpu"
    command = [sys.executable, "-m", "accelerate.commands.launch", kind, "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
               "--main_process_port", str(free_port()), "--num_processes", str(num_processes)]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(WORKER), str(folder), case],
        capture_output=True, text=True, timeout=240, cwd=WORKER.parent, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_processes)]
    assert all(record["world_size"] == num_processes for record in records)
    return records


def assert_ranks_agree(records: list[dict]) -> None:
    first, second = records
    assert len(first["steps"]) == len(second["steps"]) > 4
    for a, b in zip(first["steps"], second["steps"], strict=True):
        assert a == b  # k, weights (bit-equal), noise scale, position, forecast


def assert_close_weights(first: dict, second: dict) -> None:
    for name, value in first["weights"].items():
        torch.testing.assert_close(
            torch.tensor(value), torch.tensor(second["weights"][name]), rtol=2e-4, atol=2e-6, msg=name
        )


@pytest.mark.parametrize("case", ["sequence", "buckets"])
def test_two_ranks_equal_one_with_the_same_global_batches(case, tmp_path):
    """`buckets`: the loss of each rank is divided by its own tokens, so only the ranks' agreement is exact."""
    from distributed_worker import K_SEQUENCE

    two = launch(case, tmp_path / "two")
    assert_ranks_agree(two)
    sizes = [step["k"] for step in two[0]["steps"]]
    assert sizes[: len(K_SEQUENCE) - 1] == K_SEQUENCE[:-1]
    assert two[0]["steps"][-1]["samples"] == 96
    if case == "sequence":
        (one,) = launch(case, tmp_path / "one", num_processes=1)
        assert [step["k"] for step in one["steps"]] == sizes
        assert_close_weights(two[0], one)


@pytest.mark.parametrize("case", ["goodput", "resnet"])
def test_measured_decisions_are_the_same_on_all_ranks(case, tmp_path):
    records = launch(case, tmp_path)
    assert_ranks_agree(records)
    assert case == "resnet" or len({step["k"] for step in records[0]["steps"]}) > 1
    assert records[0]["steps"][-1]["noise"] is not None


def test_statistics_over_ranks_equal_their_slow_twin(tmp_path):
    """Micro-batches of both ranks, gradients averaged by DDP: against every gradient by itself."""
    from helpers import tiny_gpt2
    from reference import estimate_noise_by_pairs

    from hf_trainopt.accumulation import WindowStatistics, estimate_noise

    records = launch("statistics", tmp_path)
    assert records[0]["statistics"] == records[1]["statistics"]
    model = tiny_gpt2(dtype=torch.float64)
    assert len(records[0]["statistics"]) > 4
    for statistics, *windows in zip(
        records[0]["statistics"], records[0]["windows"], records[1]["windows"], strict=False
    ):
        gradients, counts = [], []
        for batch in windows[0] + windows[1]:
            batch = {key: torch.tensor(value) for key, value in batch.items()}
            model.zero_grad()
            model(**batch).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            counts.append(int((batch["labels"][:, 1:] != -100).sum()))
        expected = estimate_noise_by_pairs(torch.stack(gradients).numpy(), torch.tensor(counts).numpy())
        assert estimate_noise(WindowStatistics(**statistics)) == pytest.approx(expected, rel=5e-4)
        assert statistics["num_micro_batches"] == len(windows[0]) + len(windows[1])


def test_constant_k_is_stock_on_two_ranks(tmp_path):
    stock, ours = launch("stock", tmp_path / "stock"), launch("constant", tmp_path / "ours")
    assert [s["checksum"] for s in stock[0]["steps"]] == [s["checksum"] for s in ours[0]["steps"]]
    assert stock[0]["weights"] == ours[0]["weights"]


def test_stock_ranks_drift_apart_when_a_callback_changes_k(tmp_path):
    """Documents why k is not simply changed in a callback: ranks step on gradients that were never reduced.

    Stock decides where to step from a running count modulo k, and where to reduce from the end of the fetched window.
    """
    first, second = ([step["checksum"] for step in r["steps"]] for r in launch("stock corruption", tmp_path))
    assert first != second
