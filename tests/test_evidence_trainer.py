"""Measurements in `EfficientTrainer`: on or off nothing else changes, and what is logged stands in the docs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import AnyK, Rows, arguments, quiet, tiny_gpt2, weights_equal
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.accumulation.part import AccumulationPart
from hf_trainopt.core.versions import ACTIVATION_CHECKPOINTING
from hf_trainopt.metrics import GradientStatisticsCallback, MemoryCallback, TargetCallback, ThroughputCallback
from hf_trainopt.metrics.base import MeasurementCallback
from hf_trainopt.metrics.keys import EVIDENCE_KEYS, is_evidence_key


DOCS = (Path(__file__).resolve().parent.parent / "docs" / "evidence.md").read_text(encoding="utf-8")
EVERYTHING = {"measurements": "throughput,memory", "target_metric": "eval_loss", "target_value": 4.1}


def train(folder, cls=EfficientTrainer, callbacks=(), dropout=0.0, resume=None, **kwargs):
    settings = {
        "gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
        "save_steps": 4,
    } | kwargs  # fmt: skip
    args = arguments(folder, *([TrainingArguments] if cls is Trainer else []), **settings)
    data = {"train_dataset": Rows(), "eval_dataset": Rows(6)}
    trainer = quiet(cls(model=tiny_gpt2(dropout=dropout), args=args, callbacks=[*callbacks], **data))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def measuring(trainer):
    return [c for c in trainer.measurements if isinstance(c, MeasurementCallback)]


def without_times(line):
    return {key: value for key, value in line.items() if not re.search("runtime|per_second|_time_s", key)}


@pytest.mark.parametrize(
    "policy",
    [
        {"accumulation_policy": "fixed"},
        {"accumulation_policy": "goodput", "optimizer_step_cost": 1.0},
        {"accumulation_policy": "fixed", ACTIVATION_CHECKPOINTING: True, "bf16": True},
    ],
)
def test_with_and_without_are_the_same_run(tmp_path, policy):
    plain = train(tmp_path / "a", dropout=0.1, **policy)
    measured = train(tmp_path / "b", dropout=0.1, **policy, **EVERYTHING)
    assert weights_equal(plain.model, measured.model)
    for a, b in zip(plain.state.log_history, measured.state.log_history, strict=True):
        assert without_times(a) == {key: value for key, value in without_times(b).items() if key in a}
        assert all(is_evidence_key(key) for key in b.keys() - a.keys())
    if policy["accumulation_policy"] == "fixed":
        stock = train(tmp_path / "c", Trainer, dropout=0.1, **{k: v for k, v in policy.items() if "policy" not in k})
        assert weights_equal(stock.model, measured.model)
        assert [line["loss"] for line in stock.state.log_history if "loss" in line] == [
            line["loss"] for line in measured.state.log_history if "loss" in line
        ]
        assert [line.keys() for line in stock.state.log_history] == [line.keys() for line in plain.state.log_history]


def test_every_key_stands_in_the_table_of_the_docs(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_trainopt.metrics.throughput.device_peak_flops", lambda device, flops: 1e12)
    settings = {"num_train_epochs": 10, "measure_noise_scale": True, "noise_scale_interval": 1}
    ours = train(
        tmp_path / "a", accumulation_policy="noise_scale", memory_budget="95%", **{**settings, **EVERYTHING}
    )  # fmt: skip
    callbacks = [
        ThroughputCallback(), MemoryCallback(), TargetCallback("loss", 4.1), GradientStatisticsCallback(interval=1),
    ]  # fmt: skip
    others = train(tmp_path / "b", Trainer, callbacks, num_train_epochs=10)
    stock = train(tmp_path / "c", Trainer)
    known = {key for line in stock.state.log_history for key in line}
    logged = {key for trainer in (ours, others) for line in trainer.state.log_history for key in line} - known
    table = set(re.findall(r"^`(\w+)` \|.*\|.*\|", DOCS.split("## Logged keys")[1], flags=re.MULTILINE))
    assert set(EVIDENCE_KEYS) <= logged <= table
    assert set(AccumulationPart.logged_keys) <= table


def test_trackers_get_them(tmp_path):
    class Tracker(TrainerCallback):
        """Before ours, as those of `report_to`."""

        lines = []  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.lines.append(dict(logs))

    train(tmp_path, callbacks=[Tracker()], **EVERYTHING)
    assert all("train_time_s" in line for line in Tracker.lines)
    assert "target_reached" in Tracker.lines[-1]


def test_model_cards_hold_results_only(tmp_path):
    trainer = train(tmp_path, accumulation_policy="fixed", **EVERYTHING)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Validation Loss" in card
    for word in ("Time", "Seen", "Gib", "Target", "Peak"):
        assert word not in card.split("### Training results")[1].split("### Framework")[0]
    assert "train_time_s" in trainer.state.log_history[0]


def test_a_resumed_run_counts_on_under_varying_k(tmp_path):
    def run(folder, resume=None):
        args = arguments(
            folder, gradient_accumulation_steps=2, num_train_epochs=3, eval_strategy="steps", eval_steps=2,
            save_strategy="steps", save_steps=4, **EVERYTHING,
        )  # fmt: skip
        data = {"train_dataset": Rows(), "eval_dataset": Rows(6)}
        trainer = quiet(AnyK(model=tiny_gpt2(), args=args, sequence=[1, 3, 2, 2, 4, 1, 2], **data))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "a")
    checkpoint = sorted((tmp_path / "a").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    resumed = run(tmp_path / "b", str(checkpoint))
    for a, b in zip(measuring(whole), measuring(resumed), strict=True):
        if not isinstance(a, MemoryCallback):
            assert (
                a.meter.reading.samples
                == b.meter.reading.samples
                == whole.trainopt.accumulation.cursor.samples_seen
                == 150
            )
    curves = [[(e.value, e.steps, e.samples) for e in measuring(t)[-1].curve] for t in (whole, resumed)]
    assert curves[0] == curves[1]
    keys = ("samples_to_target", "steps_to_target")
    assert [whole.state.log_history[-1][key] for key in keys] == [resumed.state.log_history[-1][key] for key in keys]


def test_one_s_own_callback_takes_the_place_of_ours(tmp_path):
    class Mine(ThroughputCallback):
        pass

    own = [Mine(warmup_steps=5), TargetCallback("loss", 1.0)]
    trainer = train(tmp_path, callbacks=own, max_steps=2, **EVERYTHING)
    kinds = [type(callback) for callback in measuring(trainer)]
    assert kinds == [Mine, TargetCallback, MemoryCallback]


def test_a_search_begins_each_trial_anew(tmp_path):
    """As `hyperparameter_search` does: new model, other arguments, `train` again."""
    trainer = train(tmp_path, num_train_epochs=1, **EVERYTHING)
    trainer.args.learning_rate = 1e-3
    trainer.model = trainer.model_wrapped = tiny_gpt2()
    trainer.train()
    last = trainer.state.log_history[-1]
    assert last["samples_seen"] == 50
    assert [e.steps for e in measuring(trainer)[-1].curve] == [
        line["step"] for line in trainer.state.log_history if "eval_loss" in line
    ]
    assert not trainer.model._forward_pre_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"measurements": "throughput,mfu"}, "measurements has 'mfu'"),
        ({"target_metric": "eval_loss"}, "target_metric is set without target_value"),
        ({"target_value": 1.0}, "target_value is set without target_metric"),
        ({"stop_at_target": True}, "needs target_metric"),
        ({"target_metric": "eval_loss", "target_value": float("inf")}, "finite"),
        ({"target_metric": "eval_loss", "target_value": 1.0, "eval_strategy": "no"}, "set eval_strategy"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, kwargs, said):
    with pytest.raises(ValueError, match=said):
        arguments(tmp_path, **({"eval_strategy": "steps", "eval_steps": 1} | kwargs))


@pytest.mark.parametrize(("metric", "greater"), [("accuracy", True), ("eval_accuracy", True), ("eval_loss", False)])
def test_the_direction_is_that_of_the_best_model(tmp_path, metric, greater):
    args = arguments(
        tmp_path, eval_strategy="epoch", metric_for_best_model="eval_accuracy", greater_is_better=True,
        target_metric=metric, target_value=0.5,
    )  # fmt: skip
    (target,) = args.make_measurements()
    assert target.greater_is_better is greater


def test_by_default_throughput_and_memory_are_measured(tmp_path):
    args = EfficientTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert [type(callback) for callback in args.make_measurements()] == [ThroughputCallback, MemoryCallback]


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        (["throughput", "memory"], [ThroughputCallback, MemoryCallback]),
        (("memory",), [MemoryCallback]),
        ("memory, throughput,memory", [MemoryCallback, ThroughputCallback]),
        ("none", []),
        (["none"], []),
        ([], []),
        (None, []),
    ],
)
def test_measurements_are_a_list_or_names_with_commas(tmp_path, given, kinds):
    args = arguments(tmp_path, measurements=given)
    assert [type(callback) for callback in args.make_measurements()] == kinds


def test_a_logged_value_that_is_no_json_does_not_end_a_run_that_saves_nothing(tmp_path, caplog):
    class Logs(EfficientTrainer):
        def compute_loss(self, *args, **kwargs):
            self.state.log_history.append({"aux": np.float32(1.5), "step": self.state.global_step})
            return super().compute_loss(*args, **kwargs)

    args = arguments(tmp_path, accumulation_policy="fixed", save_strategy="no", max_steps=2, measurements="throughput")
    output = quiet(Logs(model=tiny_gpt2(), args=args, train_dataset=Rows())).train()
    assert output.global_step == 2
    assert "could not be saved" in caplog.text
