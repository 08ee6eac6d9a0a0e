"""The benchmark of time to target runs from the sweep to the page, at toy sizes on random data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_program

from hf_trainopt.metrics.targets import Crossing


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from convergence_report import describe  # noqa: E402


def test_runs_that_never_get_there_are_not_left_out_of_a_ratio():
    there, slow, never = (Crossing(reached, n, n, n) for reached, n in ((True, 10.0), (True, 20.0), (False, 40.0)))
    assert describe([(slow, there)] * 3, "steps") == "2.00 (2.00 to 2.00)"
    # Of the pair that got there alone it would be 1.00.
    assert describe([(there, there), (never, there)], "steps") == "≥ 2.00; never by 1 of 2"
    assert describe([(there, never)], "steps") == "≤ 0.25; the other arm missed it in 1 of 1"
    assert describe([(never, there), (there, never)], "steps").startswith("–; never by 1 of 2")


def test_toy_sizes_do_not_go_among_the_real_records():
    command = [sys.executable, str(BENCHMARKS / "convergence.py"), "--quick", "sweep"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--results" in done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convergence")
    for part in ("all", "table"):
        done = run_program([BENCHMARKS / "convergence.py", "--quick", "--results", folder, part], timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_part_leaves_records_of_whole_runs(folder):
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert {(r["task"], r["policy"]) for r in records} >= {
        ("language", "fixed"), ("vision", "fixed"), ("language", "goodput"), ("vision", "goodput"),
        ("language", "noise_scale"),
    }  # fmt: skip
    assert {r["ranks"] for r in records} == {1, 2}
    for record in records:
        samples = 32 * 4 if record["task"] == "language" else 16 * 16
        assert record["curve"][-1]["samples"] == samples, record["command"]
        times = [point["cpu_s"] for point in record["curve"]]
        assert times == sorted(times)


def test_page_has_every_table(folder):
    page = (folder / "convergence.md").read_text()
    assert "@@" not in page
    assert page.count("| k | β2 | final loss by learning rate | best |") == 2
    assert page.count("stock, k = 8, 0.002 (its best rate)") == 1
    assert "ours, defaults, 0.002 (the rate of k = 8 on one rank)" in page
