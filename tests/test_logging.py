"""Each log line carries k, the batch, the noise scale and the samples; trackers plot them."""

import math

import pytest
from helpers import Rows, arguments, quiet, tiny_gpt2

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation.part import AccumulationPart


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    import os

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "board")
    args = arguments(
        folder, gradient_accumulation_steps=4, num_train_epochs=8, eval_strategy="epoch", report_to="tensorboard",
        optimizer_step_cost=1.0,
    )  # fmt: skip
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(6)))
    trainer.train()
    del os.environ["TENSORBOARD_LOGGING_DIR"]
    return trainer, folder


def test_every_line_carries_the_keys(run):
    trainer, _ = run
    history = trainer.state.log_history
    assert len(history) > 10
    assert {"loss", "eval_loss", "train_runtime"} <= {key for entry in history for key in entry}
    for entry in history:
        assert entry["accumulation_steps"] >= 1
        assert 1 <= entry["effective_batch_size"] <= 3 * entry["accumulation_steps"]
    samples = [entry["samples_seen"] for entry in history]
    assert samples == sorted(samples)
    assert samples[-1] == 400


def test_the_noise_scale_is_logged_with_its_interval_once_it_is_known(run):
    trainer, _ = run
    entries = [entry for entry in trainer.state.log_history if "noise_scale" in entry]
    assert entries
    for entry in entries:
        assert math.isfinite(entry["noise_scale"])
        assert entry["noise_scale"] > 0
        assert entry["noise_scale_low"] <= entry["noise_scale"]
        assert entry.get("noise_scale_high", math.inf) >= entry["noise_scale"]
    controller = trainer.trainopt.accumulation.controller
    noise, last = controller.noise, trainer.state.log_history[-1]
    held = max(controller.tracker.last_value, noise.lower)  # while there is no finite value
    assert last["noise_scale"] == pytest.approx(noise.value if math.isfinite(noise.value) else held)


def test_tensorboard_gets_them(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run[1] / "board"))
    board.Reload()
    tags = board.Tags()["scalars"]
    for key in ("accumulation_steps", "effective_batch_size", "samples_seen", "noise_scale"):
        assert f"train/{key}" in tags


def test_results_of_evaluations_hold_nothing_of_ours(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=4, eval_strategy="epoch")
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(6)))
    metrics = trainer.train().metrics
    assert "accumulation_steps" not in metrics
    results = trainer.evaluate()
    assert "accumulation_steps" not in results
    assert results["epoch"] == 2.0
    assert "accumulation_steps" in trainer.state.log_history[-1]


def test_the_model_card_lists_no_settings_as_results(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=4, eval_strategy="epoch")
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(6)))
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Loss" in card
    for key in AccumulationPart.logged_keys:
        assert key.replace("_", " ").title() not in card
    assert "accumulation_steps" in trainer.state.log_history[-1]  # the log is whole again


def test_the_range_of_k_is_told(tmp_path):
    ramp = {"accumulation_policy": "ramp", "accumulation_ramp": "0:2,0.5:5"}
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=arguments(tmp_path, **ramp), train_dataset=Rows()))
    assert trainer.accumulation_range is None
    trainer.train()
    assert trainer.accumulation_range == (2, 5, 5)


def test_evaluation_outside_training_logs_nothing_new(tmp_path):
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=arguments(tmp_path), eval_dataset=Rows(6)))
    assert "samples_seen" not in trainer.evaluate()
    assert "samples_seen" not in trainer.state.log_history[-1]
