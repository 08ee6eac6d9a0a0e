"""The benchmarks of checkpoint placement run: every subcommand on tiny models, with no timing asserted."""

import json
import os
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
DATA = Path(os.environ.get("HF_TRAINOPT_DATA", BENCHMARKS.parent.parent / "shared" / "data"))


def run(folder: Path, *arguments: str) -> None:
    """Run a subcommand in this process: importing transformers takes longer than all of them."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from placement import main

        main([*arguments, "--results", str(folder)])
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    for command in (
        ["predict", "--case", "tiny-resnet"],
        ["flops", "--case", "tiny-resnet"],
        ["time", "--case", "tiny-resnet", "--rounds", "1"],
        ["frontier", "--case", "tiny-gpt2", "--points", "1"],
        ["budgets", "--case", "tiny-gpt2"],
        ["knob", "--case", "tiny-gpt2", "--rounds", "1", "--values", "0.5", "--points", "1"],
        ["effort", "--model", "--depths", "1", "2"],
    ):
        run(folder, *command)
    return folder


def read(folder: Path, name: str) -> dict:
    record = json.loads((folder / f"{name}.json").read_text())
    assert {"command", "machine", "versions", "seed", "date"} <= set(record)
    return record


def test_predictions_are_those_of_real_tensors(folder):
    plans = read(folder, "predict-tiny-resnet")["plans"]
    assert {"none", "all"} <= {plan["placement"] for plan in plans}
    for plan in plans:
        assert plan["tracker_bytes"] == plan["replayed_bytes"]
        assert plan["profiler_bytes"] > plan["resident_bytes"]
        assert plan["process_bytes"] > plan["resident_bytes"]


def test_flops_are_exact(folder):
    assert all(plan["exact"] for plan in read(folder, "flops-tiny-resnet")["plans"])


def test_times_have_ratios_to_none(folder):
    plans = read(folder, "time-tiny-resnet")["plans"]
    assert plans[0]["placement"] == "none"
    assert plans[0]["cpu_ratio"]["median"] == 1


def test_frontier_and_knob(folder):
    record = read(folder, "frontier-tiny-gpt2")
    assert min(point["peak_bytes"] for point in record["none"]) <= min(p["peak_bytes"] for p in record["named"])
    assert [entry["knob"] for entry in read(folder, "knob-tiny-gpt2")["knob"]] == [0.5]


def test_effort_is_counted_for_each_depth(folder):
    depths = read(folder, "effort-planning")["depths"]
    assert [(row["layers"], row["stages"]) for row in depths] == [(1, 1), (2, 2)]
    assert all(row["replays"] > 1 and row["plan_cpu_s"] > row["first_answer_cpu_s"] > 0 for row in depths)


def test_plans_for_round_budgets_fit(folder):
    record = read(folder, "budgets-tiny-gpt2")
    for rewrites in ("none", "auto"):
        shares = {"75%": 0.75, "50%": 0.5, "35%": 0.35, "25%": 0.25}
        for budget, plan in record[rewrites].items():
            limit = shares.pop(budget) * record["baseline_bytes"]
            assert limit < record[f"{rewrites} floor_bytes"] if plan is None else plan["peak_bytes"] <= limit
        assert not shares


def test_page_is_made_from_the_records(folder, tmp_path):
    run(folder, "table", "--output", str(tmp_path))
    page = (tmp_path / "placement.md").read_text()
    assert "@@" not in page
    assert "tiny GPT-2" in page
    assert (tmp_path / "figures" / "placement-tiny-gpt2.png").stat().st_size > 1000


@pytest.mark.skipif(not (DATA / "wikitext-2").exists(), reason="needs the data of the benchmarks")
def test_overhead(tmp_path):
    run(tmp_path, "overhead", "--task", "language", "--rounds", "1", "--steps", "8")
    assert read(tmp_path, "overhead-language")["ratio"]["median"] > 0
