"""Reports: reading output folders, arms and seeds, thinning, targets."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_helpers import our_history, stock_history, write_run

from hf_trainopt.lab.report import make_report
from hf_trainopt.lab.report.arms import find_arm, group
from hf_trainopt.lab.report.charts import thinned
from hf_trainopt.lab.report.metrics import choose_target
from hf_trainopt.lab.report.reading import read_run
from hf_trainopt.lab.report.runs import Run
from hf_trainopt.lab.report.series import batch_curve, columns, curve, noise_curves
from hf_trainopt.lab.report.summary import summary_table
from hf_trainopt.metrics.targets import Target, curve_from_log, first_crossing
from hf_trainopt.placement import PlacementPlan
from hf_trainopt.placement.plan.plan import StageChoice


@pytest.fixture
def stock(tmp_path):
    return write_run(tmp_path / "stock", stock_history())


@pytest.fixture
def ours(tmp_path):
    return write_run(tmp_path / "ours", our_history())


# ---- Reading -------------------------------------------------------------------------------------------------------


def test_a_stock_folder(stock):
    run = read_run(stock)
    assert (run.name, run.model, run.plan, run.notes) == ("stock", None, None, ())
    assert run.last("loss") == pytest.approx(3 * math.exp(-1) + 1)
    assert run.end("time") == 15.0  # 20 s less five evaluations
    assert run.clock.is_uniform
    # 4 samples a step follow from rate and time of the whole run.
    assert run.samples_are_derived
    assert run.end("samples") == pytest.approx(40)


def test_our_folder(ours):
    run = read_run(ours)
    assert run.end("samples") == 50
    assert not run.samples_are_derived
    assert run.end("time") == 15.0
    assert run.last("samples_per_second") == 5.0


def test_the_state_of_the_last_checkpoint_stands_in(tmp_path):
    write_run(tmp_path / "run" / "checkpoint-4", stock_history(4))
    write_run(tmp_path / "run" / "checkpoint-10", stock_history(10))
    run = read_run(tmp_path / "run")
    assert run.end("steps") == 10
    assert "checkpoint-10" in run.notes[0]
    assert read_run(tmp_path / "run" / "checkpoint-4").name == "run/checkpoint-4"


def test_a_checkpoint_after_the_last_line(tmp_path):
    """Its steps are known, so its samples and seconds must be those of the same step."""
    own = {
        "measurements": {"callbacks": [{"name": "ThroughputCallback", "attributes": {"meter": {"seconds": 17.0}}}]},
        "accumulation": {"cursor": {"samples_seen": 55}},
    }
    lines = [line for line in our_history() if "train_runtime" not in line]
    place = write_run(tmp_path / "run" / "checkpoint-11", lines, global_step=11)
    (place / "trainopt_state.json").write_text(json.dumps({"version": 2, "parts": own}))
    run = read_run(tmp_path / "run")
    assert (run.steps, run.end("steps"), run.end("samples"), run.end("time")) == (11, 11, 55, 17.0)
    # Stock's: no more is known than that step.
    write_run(tmp_path / "stock" / "checkpoint-11", stock_history()[:-1], global_step=11)
    assert read_run(tmp_path / "stock").end("steps") == 11
    # Where the line at the end of `train` is there, all is known.
    write_run(tmp_path / "whole", our_history())
    assert len(read_run(tmp_path / "whole").history) == len(our_history())


def test_results_model_and_plan_are_read(stock):
    (stock / "all_results.json").write_text('{"eval_loss": 1.5, "perplexity": 4.5}')
    (stock / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "_name_or_path": "gpt2"}')
    figures = {"baseline_peak_bytes": 2**30, "predicted_peak_bytes": 2**29, "extra_time_ratio": 0.1}
    PlacementPlan("budget", {"h.0": StageChoice("full")}, **figures).save(stock / "placement.json")
    run = read_run(stock)
    assert run.last("perplexity") == 4.5
    assert run.last("eval_loss") != 1.5  # the log comes first
    assert run.model == "GPT2LMHeadModel (gpt2)"
    assert run.plan.predicted_peak_bytes == 2**29
    (stock / "placement.json").write_text("{}")
    assert "placement plan is left out" in read_run(stock).notes[0]


def test_only_results(tmp_path):
    (tmp_path / "eval_results.json").write_text('{"eval_loss": 2.5}')
    run = read_run(tmp_path)
    assert run.last("eval_loss") == 2.5
    assert "only the final results" in run.notes[0]


@pytest.mark.parametrize("with_state", [False, True])
def test_an_evaluation_after_training_is_in_the_table(tmp_path, with_state):
    """The scripts save the state before it; the results have it."""
    folder = tmp_path / "run"
    if with_state:
        write_run(folder, [line for line in stock_history() if "eval_loss" not in line])
    else:
        folder.mkdir()
    (folder / "all_results.json").write_text(json.dumps({"eval_loss": 2.5, "eval_accuracy": 0.25, "eval_runtime": 3}))
    report = make_report(folder)
    (table,) = report.contents.sections[1].tables
    rows = {row[0]: row[1] for row in table.rows}
    assert (rows["eval_loss, last"], rows["eval_accuracy, last"]) == ("2.5", "0.25")
    assert not any("eval_runtime" in name for name in rows)
    assert "evaluate during training" in dict(report.contents.absent)["Time to target"]


@pytest.mark.parametrize("text", ["{", "[]", "nonsense", "[" * 100_000])
def test_a_broken_state(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match="isn't the output folder of a run"):
        read_run(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="isn't a folder"):
        read_run(tmp_path / "nowhere")


def test_a_log_with_odd_lines(tmp_path):
    lines = [{"loss": "high", "step": 1}, {"loss": float("nan"), "step": 2}, 5, {"loss": True, "step": 3}, {"loss": 2}]
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": lines, "global_step": "x"}))
    run = read_run(folder)
    assert curve(run, 0, "steps", "loss") is None
    assert run.last("loss") == 2.0


# ---- Arms ----------------------------------------------------------------------------------------------------------


def record(folder) -> Run:
    return Run(folder.name, folder)


def names(arms) -> dict[str, list[str]]:
    return {arm.name: [run.name for run in arm.runs] for arm in arms}


def test_seeds_are_grouped_by_name(tmp_path):
    folders = ["a-seed0", "b_s1", "a-seed1", "b_s2", "plain", "ours.seed=3"]
    arms = group([record(tmp_path / name) for name in folders], [None] * len(folders))
    assert names(arms) == {"a": ["a-seed0", "a-seed1"], "b": ["b_s1", "b_s2"], "plain": ["plain"],
                           "ours": ["ours.seed=3"]}  # fmt: skip
    assert arms[0].label == "a (2 seeds)"


def test_folders_that_are_seeds_belong_to_the_folder_above(tmp_path):
    folders = [tmp_path / "x" / "seed0", tmp_path / "x" / "seed1", tmp_path / "y" / "seed0"]
    assert names(group(list(map(record, folders)), [None] * 3)) == {"x": ["seed0", "seed1"], "y": ["seed0"]}


def test_the_same_name_in_two_places_is_two_arms(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert list(names(group(list(map(record, folders)), [None] * 2))) == ["a/run", "b/run"]


def test_given_names(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    arms = group(list(map(record, folders)), [("", "ours"), ("", "ours"), None])
    assert names(arms) == {"ours": ["one", "two"], "three": ["three"]}
    assert find_arm(arms, str(tmp_path / "two")).name == "ours"
    with pytest.raises(ValueError, match="none of the runs; choose one of ours, three"):
        find_arm(arms, "four")


# ---- Curves --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [4, 5, 60, 999])
def test_thinning_keeps_ends_peaks_and_gaps(limit):
    generator = np.random.default_rng(0)
    ys = generator.normal(size=5000)
    ys[1234], ys[4321], ys[2000:3500] = 50.0, -50.0, np.nan
    kept = thinned(ys, limit)
    assert len(kept) <= limit
    assert (np.diff(kept) > 0).all()
    assert {0, 4999, 1234, 4321} <= set(kept.tolist()) or limit < 10
    assert {0, 4999} <= set(kept.tolist())
    if limit >= 60:
        assert np.isnan(ys[kept]).any()


def test_short_curves_stay_whole():
    assert thinned(np.zeros(50), 60).tolist() == list(range(50))


def test_noise_scale_is_open_where_there_is_no_upper_end(ours):
    lines, band = noise_curves(read_run(ours), 0, "steps")
    assert [line.style for line in lines] == ["line", "guess"]
    resolved = np.isfinite(band.high)
    assert (band.xs[resolved] <= 5).all()
    assert (band.xs[~resolved] > 5).all()
    assert np.isnan(lines[0].ys[~resolved]).all()
    guess, last = lines[1].ys, np.flatnonzero(resolved)[-1]
    assert not np.isnan(guess[~resolved]).any()
    assert guess[last] == lines[0].ys[last]  # the two curves meet: there is no gap between them
    assert np.isnan(guess[:last]).all()


def test_batches_of_stock_are_means_between_lines(stock):
    line = batch_curve(read_run(stock), 0, "steps")
    assert np.allclose(line.ys, 4.0)


def test_columns_are_in_order_of_the_axis():
    lines = ({"step": 2, "eval_loss": 1.0}, {"step": 1, "eval_loss": 3.0}, {"step": 3}, {"step": 4, "eval_loss": 2.0})
    xs, (ys,) = columns(Run("r", None, lines), "steps", ["eval_loss"])
    assert (xs.tolist(), ys.tolist()) == ([1, 2, 4], [3, 1, 2])


# ---- Targets -------------------------------------------------------------------------------------------------------


def test_a_target_of_the_runs_is_taken(tmp_path):
    args = {"metric": "eval_loss", "value": 2.5, "greater_is_better": False, "stop": False}
    state = {"stateful_callbacks": {"TargetCallback": {"args": args, "attributes": {}}}}
    folders = [write_run(tmp_path / name, our_history(), **state) for name in ("a", "b")]
    arms = group([read_run(folder) for folder in folders], [None] * 2)
    target, nothing = choose_target(arms, arms[0])
    assert (target, nothing) == (Target("eval_loss", 2.5, False), None)
    crossing = arms[0].runs[0].crossing(target)
    assert crossing.reached
    # Between the evaluations of steps 2 and 4, linear.
    above, below = (3 * math.exp(-0.2 * step) + 1.1 for step in (2, 4))
    assert crossing.steps == pytest.approx(2 + 2 * (above - 2.5) / (above - below))
    assert crossing.seconds == pytest.approx(1.5 * crossing.steps)


def test_without_a_target_the_baseline_sets_it(stock, ours):
    arms = group([read_run(stock), read_run(ours)], [None] * 2)
    target, _ = choose_target(arms, arms[0])
    assert target.value == pytest.approx(3 * math.exp(-1) + 1.1)
    assert choose_target(arms, None) == (None, choose_target(arms, None)[1])
    with pytest.raises(ValueError, match="No run has the target_metric 'eval_f1'; they have eval_loss"):
        choose_target(arms, None, Target.of("f1", 0.9))


def test_a_target_is_interpolated_from_step_0_on(tmp_path):
    start = {"eval_loss": 8.0, "step": 0, "epoch": 0.0}  # eval_on_start
    again = {"eval_loss": 0.5, "step": 10, "epoch": 1.0}  # after training, of the best model
    history = [start, *stock_history(), again]
    target = Target.of("loss", 5.0)
    crossing = read_run(write_run(tmp_path / "run", history)).crossing(target)
    expected = first_crossing(curve_from_log(history, "eval_loss"), 5.0, False)
    assert crossing == replace(expected, samples=crossing.samples, seconds=crossing.seconds)
    assert crossing.seconds == pytest.approx(1.5 * crossing.steps)
    assert 0 < crossing.steps < 2
    assert not read_run(tmp_path / "run").crossing(Target.of("loss", 1.0)).reached


@pytest.mark.parametrize("trained", [10, 2])
@pytest.mark.parametrize("max_steps", [10, 40])
def test_the_end_of_train_speaks_of_the_steps_since_the_last_resume(tmp_path, trained, max_steps):
    """As transformers 5 counts: of 10 steps of 4 samples, in a run that may have been stopped before `max_steps`."""
    history = stock_history()
    rates = {"train_samples_per_second": 4 * trained / 20, "train_steps_per_second": trained / 20}
    history[-1] |= {name: round(rate, 3) for name, rate in rates.items()}
    run = read_run(write_run(tmp_path / "run", history, max_steps=max_steps))
    assert run.samples_are_derived
    assert run.end("samples") == pytest.approx(40)
    assert run.is_resumed == (trained == 2)
    rows = {row[0]: row[1] for row in summary_table(group([run], [None]), None).rows}
    assert rows.get("whole run, evaluations and saves included") == (None if trained == 2 else "20 s")


def test_a_slow_run_is_not_taken_for_a_resumed_one(tmp_path):
    history = stock_history()
    history[-1] |= {"train_runtime": 7000.0, "train_samples_per_second": 0.006, "train_steps_per_second": 0.001}
    run = read_run(write_run(tmp_path / "run", history))
    assert not run.is_resumed  # 0.001 may be 10 / 7000


def test_what_has_diverged_is_said(tmp_path):
    history = stock_history()
    for line in history:
        if line["step"] > 5:
            line |= {key: math.nan for key in ("loss", "eval_loss") if key in line}
    steady, diverged = write_run(tmp_path / "a-seed0", stock_history()), write_run(tmp_path / "a-seed1", history)
    arms = group([read_run(steady), read_run(diverged)], [None] * 2)
    rows = {row[0]: row[1] for row in summary_table(arms, None).rows}
    assert rows["eval_loss, last"] == rows["train loss, last logged"] == "not finite in 1 of 2 seeds"
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", rows["eval_loss, best"])
    (alone,) = group([read_run(diverged)], [("", "alone")])
    target, reason = choose_target([*arms, alone], arms[0])
    assert target is None
    assert "not finite" in reason
    rows = {row[0]: row[1:] for row in summary_table([*arms, alone], arms[0]).rows}
    assert rows["eval_loss, last"] == ("not finite in 1 of 2 seeds", "not a number")


def test_a_baseline_may_be_named_by_any_path_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arms = group([read_run(write_run(Path(name), stock_history())) for name in ("./a", "b")], [None] * 2)
    assert [find_arm(arms, name).name for name in ("./b", "b/", str(tmp_path / "b"), "b")] == ["b"] * 4
    with pytest.raises(ValueError, match="none of the runs"):
        find_arm(arms, "c")


def test_names_of_metrics_say_their_direction():
    assert not Target.of("loss", 1.0).greater_is_better
    assert Target.of("eval_accuracy", 0.5).greater_is_better
    with pytest.raises(ValueError, match="finite"):
        Target.of("loss", math.nan)
