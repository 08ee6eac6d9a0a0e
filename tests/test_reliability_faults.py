"""The quick form of `benchmarks/faults.py`: real SIGKILLs, of one process and of one of two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import skip_below
from scripts_helpers import ENVIRONMENT, REPOSITORY


sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import faults


@pytest.mark.parametrize(("ranks", "kills"), [(1, 5), (2, 2)])
def test_killed_at_random_moments(ranks, kills, tmp_path):
    if ranks > 1:
        skip_below("transformers", "5.18", "resuming on several CPU ranks (stock Trainer cannot either)")
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "faults.py"), f"--ranks={ranks}", f"--kills={kills}",
         "--epochs=1", f"--results={tmp_path}"],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["kills"] == kills
    assert record["weights_equal"]
    assert record["same_windows"]
    assert record["each_sample_once_an_epoch"]
    if ranks == 2:
        assert record["survivors"] == {"by itself": kills}


def test_what_the_script_calls_committed():
    """Its checks see a window that is lost, and one that is trained twice."""

    def attempt(start, *steps):
        events = [{"event": "begun", "step": start}]
        return events + [{"event": "window", "step": step, "samples": [step]} for step in steps]

    assert faults.committed([attempt(0, 1, 2, 3), [], attempt(2, 3, 4)]) == [(n, [n]) for n in (1, 2, 3, 4)]
    assert faults.committed([attempt(0, 1), attempt(2, 3)]) == [(1, [1]), (3, [3])]
    rows = list(range(faults.NUM_ROWS))
    assert faults.each_sample_once([[(1, rows[::-1]), (2, rows)]], epochs=2)
    assert faults.each_sample_once([[(1, rows[::2])], [(1, rows[1::2])]], epochs=1)
    assert not faults.each_sample_once([[(1, [*rows[:-1], 0])]], epochs=1)
    assert not faults.each_sample_once([[(1, rows[:-1])]], epochs=1)


def test_committed_records_show_what_is_claimed():
    for name, least in (("kills_1_rank", 50), ("kills_2_ranks", 10), ("kills_2_ranks_zero2", 10)):
        record = json.loads(Path(faults.RESULTS / f"{name}.json").read_text())
        assert faults.holds(record)
        assert record["kills"] >= least
        assert min(record["met"].get(moment, 0) for moment in ("setting up", "save", "window")) >= 1
