"""The GPU script: its orchestrator with stages that go wrong, its page, and the whole of it rehearsed on this CPU."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "gpu" / "run.py"
sys.path[:0] = [str(SCRIPT.parent), str(BENCHMARKS)]
import arm_list  # noqa: E402
import merge  # noqa: E402
import run as gpu_run  # noqa: E402


sys.path.remove(str(SCRIPT.parent))

READS = (
    "import json, sys, time, pathlib\n"
    "word, _, until = sys.stdin.readline().strip().partition(' '); seconds = float(until) - time.monotonic()\n"
)
OK = '{"stage": "x", "status": "ok", "checks": {}, "errors": {}}'


def session(folder: Path, programs: dict[str, str], seconds: float = 60.0, limits: float = 20.0, background=()):
    """A session whose stages are small programs; each gets `PATH`, where its record belongs."""
    stages = [gpu_run.Stage(name, limits, background=name in background) for name in programs]

    def command(stage, _):
        path = folder / f"{stage.name}.json"
        return [sys.executable, "-c", f"PATH = {str(path)!r}\n{READS}{programs[stage.name]}"]

    return gpu_run.Session(stages, folder, seconds, command, {"rehearsal": True})


def writes(text: str) -> str:
    return f"pathlib.Path(PATH).write_text({text!r})\n"


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


# ---- Stages that go wrong -----------------------------------------------------------------------------------------


def test_a_stage_that_goes_wrong_takes_no_other_down(tmp_path):
    programs = {
        "before": writes(OK),
        "crashes": writes('{"status": "running", "parts": {"first": 1}}')
        + "print('the last words'); import os; os.abort()",
        "raises": "raise RuntimeError('no such kernel')",
        "half": writes('{"status": "ok", "par'),
        "nothing": "pass",
        "unfinished": writes('{"status": "running", "parts": {"first": 1}}'),
        "false": writes('{"status": "failed", "checks": {"bits are equal": false}, "errors": {}, "parts": {"a": 2}}'),
        "after": writes(OK),
    }
    summary = session(tmp_path, programs).run()
    status = {name: entry["status"] for name, entry in summary["stages"].items()}
    assert status == dict.fromkeys(programs, "failed") | {"before": "ok", "after": "ok"}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    crashed = read(tmp_path, "crashes")
    assert crashed["parts"] == {"first": 1}
    assert crashed["reason"].startswith("its process ended with code -")
    assert "the last words" in crashed["end_of_log"]
    assert "no such kernel" in read(tmp_path, "raises")["end_of_log"]
    assert read(tmp_path, "half")["unreadable"] == '{"status": "ok", "par'
    assert "has left no record" in read(tmp_path, "nothing")["reason"]
    assert read(tmp_path, "unfinished")["reason"] == "its record has no result"
    assert read(tmp_path, "false")["parts"] == {"a": 2}
    assert summary["stages"]["false"]["reason"] == "bits are equal: false"
    assert all(read(tmp_path, name)["rehearsal"] for name in programs)


def test_a_stage_that_hangs_is_ended_with_what_it_has_started(tmp_path):
    left = tmp_path / "left running"
    child = f"import time, pathlib; time.sleep(8); pathlib.Path({str(left)!r}).write_text('')"
    programs = {
        "hangs": writes('{"status": "running", "parts": {"first": 1}}')
        + f"import subprocess; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)",
        "after": writes(OK),
    }
    started = time.monotonic()
    # 540 s are what limits are stated for: those of a session of 12 s are a forty-fifth.
    one = session(tmp_path, programs, seconds=12.0, limits=270.0)
    summary = one.run()
    assert time.monotonic() - started < 13
    assert [entry["status"] for entry in summary["stages"].values()] == ["failed", "ok"]
    record = read(tmp_path, "hangs")
    assert record["reason"] == "ended after its limit of 6 s"
    assert record["parts"] == {"first": 1}
    time.sleep(max(0.0, 9 - (time.monotonic() - started)))
    assert not left.exists()


def test_a_stage_waits_for_its_turn_and_gets_what_the_one_before_left(tmp_path):
    told = "json.dump({'status': 'ok', 'started': time.time(), 'told': float(seconds)}, open(PATH, 'w')); "
    programs = {
        "first": told + "time.sleep(1.5)",
        "second": told,
        "beside": writes(OK),
    }
    started = time.time()
    summary = session(tmp_path, programs, seconds=30.0, limits=180.0, background=["beside"]).run()
    assert {entry["status"] for entry in summary["stages"].values()} == {"ok"}
    first, second = read(tmp_path, "first"), read(tmp_path, "second")
    assert second["started"] - first["started"] > 1.4  # though it was started with the first one
    # 20 s for each of three, of which the one in the background needs none.
    assert first["told"] == pytest.approx(20 * 0.94, abs=2)
    assert second["told"] > 0.8 * (30 - (second["started"] - started))


def test_what_a_stage_still_prepares_comes_off_its_time(tmp_path):
    told = writes(OK) + "json.dump({'status': 'ok', 'told': seconds}, open(PATH, 'w'))"
    one = session(tmp_path, {"slow": told}, seconds=20.0, limits=540.0)
    command = one.command
    one.command = lambda *given: [*command(*given)[:2], "import time; time.sleep(3)\n" + command(*given)[2]]
    assert one.run()["stages"]["slow"]["status"] == "ok"
    assert read(tmp_path, "slow")["told"] < 20 * 0.94 - 2.5


def test_seconds_that_are_named_are_neither_scaled_nor_added_to(tmp_path):
    told = "json.dump({'status': 'ok', 'told': float(seconds)}, open(PATH, 'w'))"
    one = session(tmp_path, {"first": told, "second": told}, seconds=30.0)
    one.stages[0] = dataclasses.replace(one.stages[0], exact_seconds=8.0)
    assert {entry["status"] for entry in one.run()["stages"].values()} == {"ok"}
    assert read(tmp_path, "first")["told"] <= 8 * 0.94
    assert read(tmp_path, "second")["told"] > 15  # all that is left


def test_without_time_a_stage_is_skipped(tmp_path):
    programs = {"first": writes(OK) + "time.sleep(3)", "second": writes(OK)}
    summary = session(tmp_path, programs, seconds=7.0, limits=180.0).run()
    assert summary["stages"]["second"] == {"status": "skipped", "seconds": 0, "reason": "no time was left"}
    assert not (tmp_path / "second.json").exists()


def test_records_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path):
    (tmp_path / "silent.json").write_text(OK)
    summary = session(tmp_path, {"silent": "pass"}).run()
    assert summary["stages"]["silent"]["status"] == "failed"


# ---- What is refused before anything starts -------------------------------------------------------------------------


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_missing_data_are_an_error_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_run, "has_gpu", lambda: True)
    monkeypatch.setenv("HF_TRAINOPT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="2"):
        gpu_run.main(["--output", str(tmp_path / "records")])
    assert "lacks wikitext-2/train.txt" in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


def test_a_missing_gpu_and_an_unknown_stage_are_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_run, "has_gpu", lambda: False)
    for arguments, text in (
        (["--output", str(tmp_path / "records")], "no NVIDIA GPU"),
        (["--output", str(tmp_path / "records"), "--stages", "speed"], "--stages: speed; choose out of"),
        (["--output", str(tmp_path / "records"), "--stages", "time:long"], "'long' is no number of seconds"),
        (["--output", str(tmp_path / "records"), "--arms", "language=ours"], "there is no 'ours'; choose out of"),
        (["--output", str(tmp_path / "records"), "--arms", "speech=0"], "--arms: speech; write TASK=NAME;NAME"),
    ):
        with pytest.raises(SystemExit, match="2"):
            gpu_run.main(arguments)
        assert text in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


def test_the_most_files_that_come_back():
    stages = gpu_run.chosen_stages(None, rehearse=False)
    assert len(stages) + 1 <= 8  # and summary.json
    assert sum(stage.seconds for stage in stages if not stage.background) <= 540
    with pytest.raises(ValueError, match="only 8 files come back"):
        gpu_run.chosen_stages(",".join(stage.name for stage in gpu_run.STAGES), rehearse=False)


def test_stages_and_arms_come_in_the_order_in_which_they_are_named():
    stages = gpu_run.chosen_stages("vision:45, time ,exactness:60.5", rehearse=False)
    assert [(stage.name, stage.exact_seconds) for stage in stages] == [
        ("vision", 45.0), ("time", None), ("exactness", 60.5), ("plans", None)
    ]  # fmt: skip
    asked = gpu_run.chosen_arms(["language=stock, k = 1; ours, defaults, seed 1; 0"], rehearse=False)
    assert asked == {"language": ["stock, k = 1", "ours, defaults, seed 1", "0"]}
    chosen = arm_list.choose(arm_list.arms_for("language", rehearse=False), asked["language"])
    assert [arm.label for arm in chosen] == ["stock, k = 1, seed 0", "ours, defaults, seed 1", "stock, k = 8, seed 0"]
    every = arm_list.choose(arm_list.arms_for("vision", rehearse=False), ["ours, defaults"])
    assert [arm.seed for arm in every] == [0, 1]


def test_nobody_waits_for_plans_that_will_not_come(tmp_path):
    program = (
        "import pathlib, types; from cases import wait_for_plans\n"
        f"context = types.SimpleNamespace(folder=pathlib.Path({str(tmp_path)!r}))\n"
        "wait_for_plans(context, 'gpt2', 600)"
    )
    (tmp_path / "plans.ended").touch()
    paths = [str(folder) for folder in (BENCHMARKS.parent, SCRIPT.parent, BENCHMARKS, BENCHMARKS.parent / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, timeout=120,
    )  # fmt: skip
    assert "no plans for gpt2, planning has ended" in done.stderr


# ---- A second run ---------------------------------------------------------------------------------------------------


def record(**values) -> dict:
    return {"stage": "exactness", "rehearsal": False, "status": "ok", "date": "first", "checks": {}, "errors": {},
            "skipped": [], "parts": {}, "versions": {"commit": "aaa"},
            "device": {"name": "a card"}} | values  # fmt: skip


def test_a_second_run_replaces_what_it_has_measured_and_nothing_else():
    first = record(
        status="failed", reason="ended after its limit of 9 s", checks={"a": True, "b": False, "c": True},
        parts={"a": {"part_s": 1, "old": 1}, "b": {"part_s": 1}, "c": {"part_s": 1, "old": 1}, "d": {"half": 1}},
        errors={"b": "broken"}, skipped=["e: no time is left", "x: y: 3 s are left"],
    )  # fmt: skip
    second = record(
        date="second", versions={"commit": "bbb"}, checks={"b": True, "e": True},
        parts={"b": {"part_s": 2}, "c": {"half": 1}, "d": {"half": 2}, "e": {"part_s": 2}},
        skipped=["f: 1 s are left"],
    )  # fmt: skip
    both = merge.merged(first, second)
    assert both["checks"] == {"a": True, "b": True, "c": True, "e": True}
    assert both["parts"] == first["parts"] | {"b": {"part_s": 2}, "d": {"half": 1}, "e": {"part_s": 2}}
    assert both["errors"] == {}
    assert both["skipped"] == ["x: y: 3 s are left", "f: 1 s are left"]
    assert both["status"] == "ok"
    assert "reason" not in both
    assert [(run["date"], run["commit"], run["card"]) for run in both["runs"]] == [
        ("first", "aaa", "a card"), ("second", "bbb", "a card")
    ]  # fmt: skip
    assert both["runs"][0]["reason"] == "ended after its limit of 9 s"
    third = record(date="third", checks={"a": False}, parts={"a": {"part_s": 3}})
    again = merge.merged(both, third)
    assert (again["status"], again["checks"]["a"], len(again["runs"])) == ("failed", False, 3)
    assert again["parts"]["e"] == {"part_s": 2}
    for other, text in ((third, "already"), (record(stage="time"), "stage"), (record(rehearsal=True), "rehearsal")):
        with pytest.raises(ValueError, match=text):
            merge.merged(again, other)


def test_a_failed_part_does_not_replace_a_whole_one():
    first = record(checks={"a": True}, parts={"a": {"part_s": 1, "value": 5}})
    second = record(date="second", status="failed", errors={"a": "out of memory"}, parts={"a": {"part_s": 2}})
    both = merge.merged(first, second)
    assert both["parts"] == first["parts"]
    assert both["status"] == "failed"
    assert both["errors"] == {"a": "out of memory"}


def test_arms_of_both_runs_have_one_target(tmp_path):
    committed = json.loads((BENCHMARKS / "results" / "gpu" / "language.json").read_text())
    stock, ours = (next(arm for arm in committed["arms"] if arm["name"] == name and arm["seed"] == 0)
                   for name in ("stock, k = 8", "ours, defaults"))  # fmt: skip
    results, new = tmp_path / "results", tmp_path / "new"
    for folder, arm, date in ((results, stock, "first"), (new, ours, "second")):
        folder.mkdir()
        alone = record(
            stage="language", date=date, status="failed", arms=[arm], targets=[], title="a task",
            checks={"stock and ours have run": False} if arm is stock else {"an arm has run": True},
            skipped=["ours, defaults, seed 0: 3 s are left, 50 s needed"] if arm is stock else [],
            parts={f"{arm['name']}, seed 0": {"part_s": 1}},
        )  # fmt: skip
        (folder / "language.json").write_text(json.dumps(alone))
        (folder / "summary.json").write_text(json.dumps({"date": date, "rehearsal": False, "stages": {}}))
    assert merge.main([str(new), "--results", str(results)]) == 0
    both = read(results, "language")
    assert [arm["name"] for arm in both["arms"]] == ["stock, k = 8", "ours, defaults"]
    assert both["targets"][0]["seconds_ratio"] == 1
    assert both["targets"][1]["samples_ratio"] < 1
    assert both["checks"]["stock and ours have run"] is True
    assert both["skipped"] == []
    assert both["status"] == "ok"
    assert [run["date"] for run in read(results, "summary")["runs"]] == ["first", "second"]
    with pytest.raises(SystemExit, match="2"):  # twice is once too often, and nothing is written
        merge.main([str(new), "--results", str(results)])
    assert read(results, "language") == both


# ---- The page -------------------------------------------------------------------------------------------------------


def page(results: Path, output: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, str(SCRIPT.parent / "report.py"), "--results", str(results), "--output", str(output)]
    return subprocess.run(words, capture_output=True, text=True)


def test_what_never_ran_is_marked_so(tmp_path):
    assert page(tmp_path / "none", tmp_path / "gpu.md").returncode == 0
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("**Not run yet.**") == len(gpu_run.STAGES)
    assert "Nothing here ran on a GPU yet" in text


def test_the_committed_page_is_that_of_the_committed_records(tmp_path):
    assert page(BENCHMARKS / "results" / "gpu", tmp_path / "gpu.md").returncode == 0
    assert (tmp_path / "gpu.md").read_text() == (BENCHMARKS / "gpu.md").read_text()


# ---- The rehearsal --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Path:
    """Records of the whole script at toy size, without data beside it."""
    folder = tmp_path_factory.mktemp("gpu") / "records"
    # Two minutes on two idle cores; no stage is to fail because something else runs beside it.
    done = call("--rehearse", "--minutes", "25", "--output", str(folder), HF_TRAINOPT_DATA=str(folder / "nowhere"))
    assert (folder / "summary.json").exists(), done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", [stage.name for stage in gpu_run.STAGES])
def test_every_stage_is_ok(rehearsal, name):
    entry, record = read(rehearsal, "summary")["stages"][name], read(rehearsal, name)
    assert entry["status"] == "ok", (entry, record["errors"], record.get("end_of_log"))
    assert record["rehearsal"] is True
    assert record["device"]["type"] == "cpu"
    assert {"torch", "transformers", "accelerate", "python"} <= set(record["versions"])
    assert record["skipped"] == []
    assert all(record["checks"].values())


def test_only_the_records_are_left(rehearsal):
    files = {path.name for path in rehearsal.iterdir()}
    assert files == {f"{name}.json" for name in ("summary", *(stage.name for stage in gpu_run.STAGES))}


def test_exactness_has_checked_what_it_is_for(rehearsal):
    checks = read(rehearsal, "exactness")["checks"]
    for what in ("fixed is stock, gpt2, fp16", "fixed is stock, resnet, fp32", "slow twin", "killed and resumed",
                 "out of memory", "is left for bf16", "SyncBatchNorm", "gloo", "one big batch"):  # fmt: skip
        assert [name for name in checks if what in name], what
    placed = [name for name in checks if "is none to the bit" in name]
    for model in ("gpt2 with dropout, fp32", "gpt2 with dropout, bf16", "BatchNorm", "llama", "vit"):
        assert len([name for name in placed if model in name]) >= 3, model
    out = next(
        part for name, part in read(rehearsal, "exactness")["parts"].items() if name.startswith("out of memory")
    )
    assert out["errors"] > 0
    assert out["micro_batch"] < 8


def test_memory_and_time_have_all_models_and_plans(rehearsal):
    memory, times = read(rehearsal, "memory")["parts"], read(rehearsal, "time")["parts"]
    models = {name for name, part in memory.items() if "plans" in part}
    expandable = read(rehearsal, "memory_expandable")["parts"]
    assert {name for name, part in expandable.items() if "plans" in part} == set(list(memory)[1:4])
    assert all(len(part["plans"]) >= 3 for part in expandable.values() if "plans" in part)
    assert len(models) == 5
    for name in models:
        ratios = [plan["measured_over_predicted"] for plan in memory[name]["plans"]]
        assert len(ratios) >= 4
        assert ratios == pytest.approx([1.0] * len(ratios), abs=0.05)
    timed = {name for name, part in times.items() if "predicted_seconds" in part}
    assert len(timed) == 3
    for name in timed:
        where = times[f"{name}: where the time goes"]["plans"]
        assert [plan["placement"] for plan in where][:2] == ["none", "all"]
        for plan in where:
            assert plan["host_seconds"] <= plan["step_seconds"]
            assert 0 < plan["device_seconds"] <= plan["span_seconds"]
            assert min(plan["kernels"], plan["operators"], plan["predicted_seconds"]) > 0
        assert 1 < len(where[0]["longest"]) <= 25
        assert sum(kernel["milliseconds"] for kernel in where[0]["longest"]) <= 1.001e3 * where[0]["device_seconds"]
        assert where[1]["operators"] > where[0]["operators"]  # it recomputes
        assert all(plan["seconds"]["median"] > 0 for plan in times[name]["plans"])
        assert times[name]["stock checkpointing"]["seconds"]["median"] > 0
    assert times["torch.compile"]["values"][0]["peak_bytes"] > 0
    assert times["loops of the Trainer"]["windows"]["median"] > 0


@pytest.mark.parametrize("name", [stage.name for stage in gpu_run.STAGES])
def test_every_part_of_a_second_run_replaces_that_of_the_first(rehearsal, name):
    later = read(rehearsal, name)
    earlier = later | {"date": "first", "parts": {part: {"part_s": 0, "old": True} for part in later["parts"]}}
    both = merge.merged(earlier, later)
    assert both["parts"] == later["parts"]
    assert (both["status"], len(both["runs"])) == ("ok", 2)


@pytest.mark.parametrize("task", ["language", "vision"])
def test_arms_have_losses_and_a_target(rehearsal, task):
    record = read(rehearsal, task)
    assert "made up" in record["data"]
    names = [arm["name"] for arm in record["arms"]]
    assert names[:2] == ["stock, k = 8", "ours, defaults"]
    assert "memory_budget" in names[2]
    assert names[3:] == ["stock, k = 2", "stock, k = 1"]
    for arm in record["arms"]:
        assert arm["final_loss"] > 0
        assert len(arm["curve"]) >= 2
        assert arm["curve"][-1]["samples"] == record["arms"][0]["curve"][-1]["samples"]  # the same data
    assert record["arms"][2]["plan"]["measured_peak_bytes"] <= 1.05 * record["arms"][2]["plan"]["budget_bytes"]
    assert record["targets"][0]["seconds_ratio"] == record["targets"][0]["samples_ratio"] == 1


def test_a_rehearsal_is_refused_by_the_page_and_a_gpus_record_is_not(rehearsal, tmp_path):
    done = page(rehearsal, tmp_path / "gpu.md")
    assert done.returncode == 2
    assert "is the record of a rehearsal" in done.stderr
    assert not (tmp_path / "gpu.md").exists()
    # As if they were of a GPU: every table can be made of what the stages write.
    results = tmp_path / "results"
    results.mkdir()
    for path in rehearsal.iterdir():
        record = json.loads(path.read_text()) | {"rehearsal": False}
        if record.get("device"):
            record["device"] |= {"type": "cuda", "name": "a card", "total_bytes": 2**36, "driver": "1"}
        (results / path.name).write_text(json.dumps(record))
    assert page(results, tmp_path / "gpu.md").returncode == 0
    text = (tmp_path / "gpu.md").read_text()
    assert "incomplete" not in text
    assert "Not run yet" not in text
    assert "| ours, defaults | 1 |" in text
