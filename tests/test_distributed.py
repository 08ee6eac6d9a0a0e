"""Two ranks (gloo, CPU)."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_program


WORKER = Path(__file__).parent / "distributed_worker.py"


def launch(
    case: str, folder: Path, num_processes: int = 2, fails_with: str | None = None, worker: Path = WORKER
) -> list[dict]:
    """Run a worker; return what each rank wrote. `fails_with`: it ends with this error instead."""
    folder.mkdir(parents=True, exist_ok=True)
    done = run_program([worker, folder, case], ranks=num_processes, cwd=worker.parent, timeout=600)
    if fails_with is not None:
        assert done.returncode != 0
        assert fails_with in done.stderr
        return []
    assert done.returncode == 0, done.stderr[-3000:]
    return [] if ";" in case else read(folder, num_processes)


def read(folder: Path, num_processes: int = 2) -> list[dict]:
    records = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_processes)]
    assert all(record["world_size"] == num_processes for record in records)
    return records


def launch_all(cases: list[str], folder: Path, num_processes: int = 2, worker: Path = WORKER) -> dict[str, list[dict]]:
    """Run several cases one after the other in the same processes; starting them takes longer than most runs."""
    launch(";".join(cases), folder, num_processes, worker=worker)
    return {case: read(folder / case, num_processes) for case in cases}


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


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[dict]]:
    """All cases of two ranks, in one launch."""
    cases = [
        # First: they look at the memory of the process.
        "evidence stock", "evidence efficient",
        "sequence", "buckets", "goodput", "resnet", "statistics", "stock", "constant", "stock corruption",
        "placement none", "placement 90%", "policy fails",
        # Last: the process goes on as if its CPU were another device.
        "fp16",
    ]  # fmt: skip
    return launch_all(cases, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("case", ["sequence", "buckets"])
def test_two_ranks_equal_one_with_the_same_global_batches(case, runs, tmp_path):
    """`buckets`: the loss of each rank is divided by its own tokens, so only the ranks' agreement is exact."""
    from distributed_worker import K_SEQUENCE

    two = runs[case]
    assert_ranks_agree(two)
    sizes = [step["k"] for step in two[0]["steps"]]
    assert sizes[: len(K_SEQUENCE) - 1] == K_SEQUENCE[:-1]
    assert two[0]["steps"][-1]["samples"] == 96
    if case == "sequence":
        (one,) = launch(case, tmp_path / "one", num_processes=1)
        assert [step["k"] for step in one["steps"]] == sizes
        assert_close_weights(two[0], one)


@pytest.mark.parametrize("case", ["goodput", "resnet"])
def test_measured_decisions_are_the_same_on_all_ranks(case, runs):
    records = runs[case]
    assert_ranks_agree(records)
    assert case == "resnet" or len({step["k"] for step in records[0]["steps"]}) > 1
    assert records[0]["steps"][-1]["noise"] is not None


def test_statistics_over_ranks_equal_their_slow_twin(runs):
    """Micro-batches of both ranks, gradients averaged by DDP: against every gradient by itself."""
    from helpers import tiny_gpt2
    from reference import estimate_noise_by_pairs

    from hf_trainopt.accumulation import WindowStatistics, estimate_noise

    records = runs["statistics"]
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


def test_constant_k_is_stock_on_two_ranks(runs):
    stock, ours = runs["stock"], runs["constant"]
    assert [s["checksum"] for s in stock[0]["steps"]] == [s["checksum"] for s in ours[0]["steps"]]
    assert stock[0]["weights"] == ours[0]["weights"]


def test_stock_ranks_drift_apart_when_a_callback_changes_k(runs):
    """Documents why k is not simply changed in a callback: ranks step on gradients that were never reduced.

    Stock decides where to step from a running count modulo k, and where to reduce from the end of the fetched window.
    """
    first, second = ([step["checksum"] for step in r["steps"]] for r in runs["stock corruption"])
    assert first != second


def test_a_policy_that_fails_ends_all_ranks(runs):
    """Rank 0 alone asks the policy; the others would wait for its answer until the launcher gives up."""
    first, second = runs["policy fails"]
    assert first["ended"] == "ZeroDivisionError: division by zero"
    assert second["ended"] == "RuntimeError: accumulation_policy has failed on rank 0, which says how."


def test_placement_on_two_ranks_is_exact_and_the_same(runs, tmp_path):
    """Under DDP, with accumulation windows and gradient statistics; a plan that cannot be made ends all ranks."""
    plain, placed = runs["placement none"], runs["placement 90%"]
    assert_ranks_agree(placed)
    assert [step["checksum"] for step in placed[0]["steps"]] == [step["checksum"] for step in plain[0]["steps"]]
    peaks = {"measured_peak_gib", "predicted_peak_gib"}
    assert [{k: v for k, v in line.items() if k not in peaks} for line in placed[0]["log"]] == plain[0]["log"]
    assert sum(peaks <= line.keys() for line in placed[0]["log"]) == 1
    assert placed[0]["plan"] == placed[1]["plan"]
    assert any(choice["recompute"] != "none" for choice in placed[0]["plan"]["stages"].values())
    assert placed[0]["plan"]["details"]["num_devices"] == 2
    launch("placement 1%", tmp_path / "floor", fails_with="no placement needs less than")


def test_measurements_on_two_ranks(runs):
    """Sums of samples, maxima of memory, one noise scale; nobody waits for a rank that logs by itself."""
    stock, ours = runs["evidence stock"], runs["evidence efficient"]
    assert stock[0]["weights"] == ours[0]["weights"]
    agreed = ("samples_seen", "steps_to_target", "samples_to_target", "target_reached", "noise_scale")
    for records in (stock, ours):
        first, second = ([line for line in record["history"] if "mine" not in line] for record in records)
        assert len(records[0]["history"]) > len(first) == len(records[1]["history"])
        for a, b in zip(first, second, strict=True):
            for key in {*a, *b}:
                if key in agreed or key.startswith("peak_memory"):
                    assert a[key] == b[key], key
        assert first[-1]["samples_seen"] == 2 * 52  # 50 rows are filled up to 13 pairs of micro-batches
        assert first[-1]["target_reached"]
        assert first[-1]["samples_per_second"] > 0
        assert first[-1]["tokens_per_second"] == pytest.approx(12 * first[-1]["samples_per_second"])
        if "peak_memory_evaluation_gib" in first[-1]:  # where the high-water mark can be reset
            gap = first[-1]["peak_memory_evaluation_gib"] - first[-1]["peak_memory_forward_backward_gib"]
            assert 0.1 < gap < 0.3
    lines = [[line for line in records[0]["history"] if "mine" not in line] for records in (stock, ours)]
    for a, b in zip(*lines, strict=True):
        assert a.get("steps_to_target") == b.get("steps_to_target")
        for key in ("noise_scale", "noise_scale_low", "noise_scale_high"):
            assert a.get(key) == (pytest.approx(b[key], rel=1e-6) if key in b else None)
    assert any("noise_scale" in line for line in lines[0])


def test_ranks_skip_and_leave_fp16_together(runs):
    """The second rank overflows; gradients are averaged before the scaler looks at them."""
    records = runs["fp16"]
    assert_ranks_agree(records)
    for record in records:
        assert record["precision"] == "no"
        assert [line["skipped_steps"] for line in record["log"]] == [0, 0, *range(1, 10), *[9] * 13]
        assert ["loss_scale" in line for line in record["log"]] == [True] * 10 + [False] * 14
    checksums = [step["checksum"] for step in records[0]["steps"]]
    assert len(set(checksums[1:11])) == 1  # skipped
    assert len(set(checksums[10:])) == 14
