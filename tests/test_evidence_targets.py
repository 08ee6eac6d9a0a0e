"""Time, samples and steps to a target: the curve by hand, and what a run logs of it."""

import json
import math

import pytest
from helpers import Rows, arguments, measuring, quiet, tiny_gpt2
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.metrics import Crossing, TargetCallback, ThroughputCallback, curve_from_log, first_crossing
from hf_trainopt.metrics.targets import Evaluation


def curve(*values, every=10):
    """Evaluations every 10 steps of 4 samples and 2 s."""
    steps = [(i + 1) * every for i in range(len(values))]
    return [Evaluation(value, s, 4 * s, 2.0 * s) for value, s in zip(values, steps, strict=True)]


@pytest.mark.parametrize(
    ("values", "target", "greater", "steps"),
    [
        ((4.0, 3.0, 2.0), 2.5, False, 25),
        ((4.0, 3.0, 2.0), 3.0, False, 20),  # met exactly
        ((4.0, 3.0, 2.0), 4.5, False, 10),  # by the first of all
        ((4.0, 2.0, 3.0, 1.0), 2.5, False, 17.5),  # the first time counts
        ((0.1, 0.5, 0.9), 0.6, True, 22.5),
        ((float("nan"), 2.0), 2.5, False, 20),  # nothing to interpolate from
        ((4.0, float("-inf"), 2.0), 3.0, False, 30),
        ((3.0, 3.0, 3.0), 3.0, False, 10),
    ],
)
def test_a_crossing_by_hand(values, target, greater, steps):
    found = first_crossing(curve(*values), target, greater)
    assert found == Crossing(True, pytest.approx(steps), pytest.approx(4 * steps), pytest.approx(2 * steps))


def test_a_target_that_is_not_met_is_censored():
    assert first_crossing(curve(4.0, 3.0), 2.0, False) == Crossing(False, 20, 80, 40.0)
    assert first_crossing([], 2.0, False) is None


def test_what_is_not_known_is_not_invented():
    without_time = [Evaluation(4.0, 10), Evaluation(2.0, 20, 80, None)]
    assert first_crossing(without_time, 3.0, False) == Crossing(True, 15, 80, None)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.floats(0, 10))
def test_a_crossing_lies_between_its_neighbours(values, target):
    found = first_crossing(curve(*values), target, False)
    reached = [i for i, value in enumerate(values) if value <= target]
    assert found.reached == bool(reached)
    if reached:
        assert 10 * reached[0] <= found.steps <= 10 * (reached[0] + 1) or found.steps == 10
        # A mirrored metric that rises gives the same.
        assert first_crossing(curve(*(-v for v in values)), -target, True) == found


@pytest.mark.parametrize(
    ("metric", "greater"), [("loss", False), ("eval_accuracy", True), ("eval_perplexity", False), ("eval_wer", False)]
)
def test_the_direction_goes_by_the_name(metric, greater):
    callback = TargetCallback(metric, 1.0)
    assert callback.greater_is_better is greater
    assert callback.metric.startswith("eval_")
    assert TargetCallback(metric, 1.0, greater_is_better=not greater).greater_is_better is not greater


def test_a_target_must_be_a_number():
    with pytest.raises(ValueError, match="finite"):
        TargetCallback("loss", math.nan)


# ---- Runs -----------------------------------------------------------------------------------------------------------


def train(folder, *callbacks, cls=Trainer, eval_dataset=None, resume=None, **kwargs):
    settings = {
        "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
        "save_steps": 4, "num_train_epochs": 3,
    } | kwargs  # fmt: skip
    args = arguments(folder, *([TrainingArguments] if cls is Trainer else []), **settings)
    trainer = cls(
        model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=eval_dataset or Rows(6),
        callbacks=list(callbacks),
    )  # fmt: skip
    quiet(trainer).train(resume_from_checkpoint=resume)
    return trainer


def evaluations(trainer, key="eval_loss"):
    return [line for line in trainer.state.log_history if key in line]


KEYS = {"time_to_target_s", "samples_to_target", "steps_to_target"}


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Evaluation losses of the run that the tests below repeat."""
    return [line["eval_loss"] for line in evaluations(train(tmp_path_factory.mktemp("run")))]


def between(losses, index):
    """A target half-way between two evaluations, the second of which is the best so far."""
    assert losses[index] < min(losses[:index])
    return (losses[index] + min(losses[:index])) / 2


@pytest.mark.parametrize("cls", [Trainer, EfficientTrainer])
def test_the_log_tells_where_the_target_was_met(tmp_path, losses, cls):
    index = losses.index(min(losses))
    settings = {"cls": cls, "accumulation_policy": "fixed"} if cls is EfficientTrainer else {}
    trainer = train(tmp_path, ThroughputCallback(), TargetCallback("loss", between(losses, index)), **settings)
    lines = evaluations(trainer)
    assert [line["target_reached"] for line in lines] == [i >= index for i in range(len(lines))]
    assert not any(KEYS & line.keys() for line in lines[:index])
    expected = first_crossing(curve_from_log(trainer.state.log_history, "eval_loss"), between(losses, index), False)
    for line in [*lines[index:], trainer.state.log_history[-1]]:
        assert line["steps_to_target"] == expected.steps
        assert line["samples_to_target"] == expected.samples
        assert line["time_to_target_s"] == expected.seconds
    assert lines[index - 1]["step"] < expected.steps < lines[index]["step"]


def test_stop_ends_training_at_the_first_evaluation_that_meets_it(tmp_path, losses):
    trainer = train(tmp_path, TargetCallback("loss", between(losses, 5), stop=True))
    assert trainer.state.global_step == evaluations(trainer)[5]["step"] < trainer.state.max_steps
    trainer.evaluate()  # does not set anything in motion
    assert not trainer.control.should_evaluate


def test_a_target_that_is_missed_is_said_on_the_last_line(tmp_path):
    trainer = train(tmp_path, TargetCallback("loss", 0.1))
    assert trainer.state.log_history[-1]["target_reached"] is False
    assert not KEYS & trainer.state.log_history[-1].keys()


def test_an_unknown_metric_is_said_with_those_that_there_are(tmp_path, caplog):
    train(tmp_path, TargetCallback("accuracy", 0.1))
    said = [record.message for record in caplog.records if "No evaluation had the target_metric" in record.message]
    assert len(said) == 1  # once, after the first evaluation and not when all is over
    assert "'eval_accuracy'; they had eval_loss" in said[0]


def test_lines_of_training_with_a_runtime_are_not_the_last(tmp_path, caplog):
    """`include_num_input_tokens_seen` puts one on every line."""
    trainer = train(tmp_path, TargetCallback("loss", 100.0), logging_steps=1, include_num_input_tokens_seen=True,
                    eval_steps=4)  # fmt: skip
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all("train_runtime" in line for line in lines)
    assert not any("target_reached" in line for line in lines)
    assert trainer.state.log_history[-1]["target_reached"]
    assert "No evaluation had" not in caplog.text


def test_an_unknown_metric_is_said_early(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, TargetCallback("accuracy", 0.1), Stop())
    assert "No evaluation had the target_metric 'eval_accuracy'" in caplog.text


def test_several_data_sets_have_metrics_of_their_own(tmp_path):
    data = {"near": Rows(6), "far": Rows(9)}
    trainer = train(tmp_path, TargetCallback("far_loss", 100.0), eval_dataset=data, max_steps=6)
    lines = evaluations(trainer, "eval_far_loss")
    assert len(lines) == len(evaluations(trainer, "eval_near_loss")) == 3
    assert all(line["steps_to_target"] == 2 for line in lines)
    assert not any(KEYS & line.keys() for line in evaluations(trainer, "eval_near_loss"))
    (callback,) = (c for c in measuring(trainer) if isinstance(c, TargetCallback))
    assert len(callback.curve) == 3


def test_evaluation_at_the_start_is_where_the_curve_begins(tmp_path, losses):
    trainer = train(tmp_path, TargetCallback("loss", 100.0), eval_on_start=True)
    assert trainer.state.log_history[-1]["steps_to_target"] == 0
    assert trainer.state.log_history[-1]["time_to_target_s"] == 0.0
    first = evaluations(trainer)[0]["eval_loss"]
    trainer = train(tmp_path, TargetCallback("loss", (first + losses[0]) / 2), eval_on_start=True)
    assert trainer.state.log_history[-1]["steps_to_target"] == pytest.approx(1)


def test_the_best_model_that_is_evaluated_after_training_is_no_point_of_the_curve(tmp_path):
    trainer = train(tmp_path, TargetCallback("loss", 0.1), eval_delay=100, num_train_epochs=1)
    assert "eval_loss" in trainer.evaluate()
    (callback,) = (c for c in measuring(trainer) if isinstance(c, TargetCallback))
    assert callback.curve == []
    log = [{"step": 2, "eval_loss": 3.0}, {"step": 4, "eval_loss": 4.0}, {"step": 4, "eval_loss": 3.0}]
    assert [e.value for e in curve_from_log(log, "eval_loss")] == [3.0, 4.0]


def test_several_targets(tmp_path, losses):
    best = losses.index(min(losses))
    callbacks = [TargetCallback("loss", value) for value in (between(losses, best), 100.0, 0.1)]
    trainer = train(tmp_path / "a", *callbacks)
    last = trainer.state.log_history[-1]
    assert (last["target_reached"], last["target_reached_2"], last["target_reached_3"]) == (True, True, False)
    assert last["steps_to_target_2"] == 2 < last["steps_to_target"]
    # Each has its own state in a checkpoint, once, however many were saved before.
    state = json.loads((tmp_path / "a" / "checkpoint-16" / "trainer_state.json").read_text())
    assert len(state["stateful_callbacks"]["TargetCallback"]) <= 2 * len(callbacks)
    resumed = train(
        tmp_path / "b", *(TargetCallback("loss", callback.value) for callback in callbacks),
        resume=str(tmp_path / "a" / "checkpoint-16"),
    )  # fmt: skip
    steps = {key: value for key, value in last.items() if "steps_to" in key or "samples_to" in key}
    assert {key: resumed.state.log_history[-1][key] for key in steps} == steps


@pytest.mark.parametrize("restores", [False, True])
@pytest.mark.parametrize("cls", [Trainer, EfficientTrainer])
def test_a_resumed_run_has_the_curve_of_one_that_was_not(tmp_path, losses, cls, restores):
    target = between(losses, losses.index(min(losses)))
    if cls is EfficientTrainer:
        settings = {"accumulation_policy": "ramp", "accumulation_ramp": "0:2", "cls": cls}
    else:
        settings = {}
    whole = train(tmp_path / "a", TargetCallback("loss", target), **settings)
    for step in (4, 12):
        resumed = train(
            tmp_path / "b", TargetCallback("loss", target), resume=str(tmp_path / "a" / f"checkpoint-{step}"),
            restore_callback_states_from_checkpoint=restores, **settings,
        )  # fmt: skip
        a, b = (next(c for c in measuring(t) if isinstance(c, TargetCallback)) for t in (whole, resumed))
        assert [(e.value, e.steps, e.samples) for e in a.curve] == [(e.value, e.steps, e.samples) for e in b.curve]
        assert (a.crossing.steps, a.crossing.samples) == (b.crossing.steps, b.crossing.samples)
        at = step // 2
        assert [e.seconds for e in a.curve[:at]] == [e.seconds for e in b.curve[:at]]
        seconds = [e.seconds for e in b.curve]
        assert seconds == sorted(seconds)


def test_a_resumed_run_may_have_another_target(tmp_path, losses):
    train(tmp_path / "a", ThroughputCallback(), TargetCallback("loss", 0.1))
    other = TargetCallback("loss", between(losses, 5))
    trainer = train(tmp_path / "b", ThroughputCallback(), other, resume=str(tmp_path / "a" / "checkpoint-8"))
    last = trainer.state.log_history[-1]
    lines = evaluations(trainer)
    assert lines[4]["step"] < last["steps_to_target"] < lines[5]["step"]
    assert lines[4]["train_time_s"] < last["time_to_target_s"] < lines[5]["train_time_s"]
    assert (tmp_path / "b" / "checkpoint-16").exists()


def test_a_second_run_begins_a_new_curve(tmp_path):
    callback = TargetCallback("loss", 0.1)
    trainer = train(tmp_path, callback, max_steps=4)
    trainer.train()
    assert [e.steps for e in callback.curve] == [2, 4]
