"""The benchmark of weak scaling runs to its page, at toy sizes."""

import json
import sys
from pathlib import Path

import pytest
from processes import run_program


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import scaling_report  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scaling")
    done = run_program([BENCHMARKS / "scaling.py", "--quick", "--rounds=1", f"--results={folder}"], timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_all_arms_of_all_settings_are_in_the_record(folder):
    record = json.loads((folder / "scaling.json").read_text())
    (found,) = record["rounds"]
    assert {name: len(arms["1"]) for name, arms in found.items()} == {"one": 1, "two": 2, "control": 2}
    for name, arms in found.items():
        assert list(arms) == ["1", "4", "16", "adaptive"]
        for arm, records in arms.items():
            for run in records:
                assert run["ranks"] == (2 if name == "two" else 1)
                # The toy data end in the middle of a window of 16 on two ranks.
                assert arm in ("adaptive", "16") or run["mean_k"] == int(arm)
                assert (run["shares"]["statistics"] > 0) == (arm == "adaptive")
                # With a constant k, and nothing saved, ranks agree on nothing: the loop is stock's.
                assert (run["shares"]["agreement"] > 0) == (name == "two" and arm == "adaptive")
    first, second = found["two"]["adaptive"]
    assert first["optimizer_steps"] == second["optimizer_steps"]


def test_shares_add_up_and_the_page_has_them(folder):
    (found,) = json.loads((folder / "scaling.json").read_text())["rounds"]
    for arm in found["two"]:
        assert sum(scaling_report.shares(found, arm).values()) == pytest.approx(1.0)
    page = (folder / "scaling.md").read_text()
    assert "@@" not in page
    assert page.count("| adaptive (mean ") == 2


def test_throughput_of_ranks_and_of_runs_apart():
    ranks = [{"ranks": 2, "samples": 10, "seconds": 2.0}, {"ranks": 2, "samples": 10, "seconds": 2.5}]
    apart = [{"ranks": 1, "samples": 10, "seconds": 2.0}, {"ranks": 1, "samples": 10, "seconds": 2.5}]
    assert scaling_report.throughput(ranks) == 8.0
    assert scaling_report.throughput(apart) == 9.0
    rounds = [{"one": {"4": apart[:1]}, "two": {"4": ranks}, "control": {"4": apart}}]
    assert scaling_report.efficiencies(rounds, "4")["efficiency"] == [0.8]
