"""Logging, evaluation, saving and the progress bar go by the data, whatever k does."""

from typing import ClassVar

import pytest
from helpers import AnyK, Rows, arguments, quiet, tiny_gpt2
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from hf_trainopt import EfficientTrainer
from hf_trainopt.engine.callbacks import DataFlowCallback, on_data_axis
from hf_trainopt.metrics import MemoryCallback, ThroughputCallback


class Events(TrainerCallback):
    """(event, position in micro-batches) of every log, evaluation and save."""

    def __init__(self):
        self.trainer = None
        self.events: list[tuple[str, int]] = []

    def _note(self, name):
        self.events.append((name, self.trainer.trainopt.accumulation.cursor.micro_batches_passed))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self._note("log")

    def on_evaluate(self, *args, **kwargs):
        self._note("evaluate")

    def on_save(self, *args, **kwargs):
        self._note("save")


def train(tmp_path, sequence, callbacks=(), **kwargs):
    events = Events()
    trainer = AnyK(
        model=tiny_gpt2(),
        args=arguments(tmp_path, **({"gradient_accumulation_steps": 4} | kwargs)),
        train_dataset=Rows(48),
        eval_dataset=Rows(6),
        callbacks=[events, *callbacks],
        sequence=sequence,
    )
    events.trainer = trainer
    quiet(trainer).train()
    return trainer, events


@pytest.mark.parametrize("sequence", [[4], [1], [2, 3, 7], [16]])
def test_intervals_are_in_reference_windows(tmp_path, sequence):
    """Two epochs of 16 micro-batches, k_ref = 4: 8 reference windows whatever k is."""
    _, events = train(
        tmp_path, sequence, logging_steps=2, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=4
    )
    for name, interval in (("log", 8), ("evaluate", 12), ("save", 16)):
        positions = [position for event, position in events.events if event == name]
        passed = [position // interval for position in positions]
        if max(sequence) <= 4:  # no window passes two multiples at once
            assert passed[: 32 // interval] == list(range(1, 32 // interval + 1)), name
        assert len(set(positions)) == len(positions)
        # At the first window that reaches the multiple, not later.
        assert all(position % interval < max(sequence) or position == 32 for position in positions)
    assert [position for event, position in events.events if event == "evaluate"][-1] == 32


def test_fractional_intervals(tmp_path):
    _, events = train(tmp_path, [2, 1, 3], eval_strategy="steps", eval_steps=0.5, logging_steps=0.25)
    assert [p // 8 for e, p in events.events if e == "log"] == [1, 2, 3, 4]
    assert len([p for e, p in events.events if e == "evaluate"]) == 2


def test_epoch_strategies(tmp_path):
    _, events = train(tmp_path, [3, 1], logging_strategy="epoch", eval_strategy="epoch", save_strategy="epoch")
    assert events.events == [(e, p) for p in (16, 32) for e in ("log", "evaluate", "save")]


def test_first_step_and_delay(tmp_path):
    _, events = train(
        tmp_path, [2], logging_first_step=True, logging_steps=100, eval_strategy="steps", eval_steps=1, eval_delay=5
    )
    assert events.events[0] == ("log", 2)
    assert [p for e, p in events.events if e == "evaluate"] == [20, 24, 28, 32]


def test_best_model_and_early_stopping_work(tmp_path):
    trainer, _ = train(
        tmp_path, [2, 1], eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=8)],
    )  # fmt: skip
    assert trainer.state.best_metric is not None
    assert trainer.state.best_model_checkpoint.startswith(str(tmp_path))


class Bar:
    """Stands in for tqdm: what a progress bar was told."""

    made: ClassVar[list["Bar"]] = []

    def __init__(self, total=None, **kwargs):
        self.total, self.shown = total, 0
        Bar.made.append(self)

    def update(self, count):
        assert count >= 0
        self.shown += count

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("sequence", [[4], [1, 3, 2], [9, 1]])
@pytest.mark.parametrize("budget", [{"num_train_epochs": 2}, {"max_steps": 7}])
def test_the_progress_bar_runs_from_0_to_100_percent_of_the_data(tmp_path, monkeypatch, sequence, budget):
    monkeypatch.setattr("transformers.trainer_callback.tqdm", Bar)
    Bar.made = []
    trainer, _ = train(tmp_path, sequence, disable_tqdm=False, **budget)
    bar = Bar.made[0]
    assert (
        bar.shown
        == bar.total
        == trainer.trainopt.accumulation.cursor.budget_micro_batches
        == (32 if "num_train_epochs" in budget else 28)
    )


def test_a_resumed_progress_bar_begins_where_it_was(tmp_path, monkeypatch):
    train(tmp_path, [2], save_strategy="steps", save_steps=3)
    monkeypatch.setattr("transformers.trainer_callback.tqdm", Bar)
    Bar.made = []
    args = arguments(tmp_path, gradient_accumulation_steps=4, disable_tqdm=False)
    trainer = quiet(AnyK(model=tiny_gpt2(), args=args, train_dataset=Rows(48), sequence=[2]))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert Bar.made[0].shown == Bar.made[0].total == 32


@pytest.mark.parametrize("policy", ["fixed", "goodput"])
def test_the_list_of_callbacks_is_stocks(policy, tmp_path):
    def kinds(trainer):
        return [type(callback) for callback in trainer.callback_handler.callbacks]

    stock = Trainer(model=tiny_gpt2(), args=arguments(tmp_path, TrainingArguments), train_dataset=Rows())
    args = arguments(tmp_path, accumulation_policy=policy, measurements=["throughput", "memory"], max_steps=2)
    trainer = EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows())
    assert kinds(trainer) == kinds(stock)
    trainer.train()
    assert kinds(trainer) == kinds(stock)
    assert "train_time_s" in trainer.state.log_history[-1]


def test_subclasses_of_stock_callbacks_are_left_alone(tmp_path):
    class Mine(DefaultFlowCallback):
        pass

    trainer, _ = train(tmp_path, [2])
    state, cursor = trainer.state, trainer.trainopt.accumulation.cursor
    assert type(on_data_axis(DefaultFlowCallback(), "on_step_end", state, cursor)[0]) is DataFlowCallback
    mine = Mine()
    assert on_data_axis(mine, "on_step_end", state, cursor) == (mine, state)


def test_our_measurements_give_way_to_the_users_and_can_be_removed(tmp_path):
    args = arguments(tmp_path, measurements=["throughput", "memory"], max_steps=2)
    trainer = EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows())
    mine = ThroughputCallback(warmup_steps=0)
    trainer.add_callback(mine)
    assert [callback for callback in trainer.measurements if isinstance(callback, ThroughputCallback)] == [mine]
    assert isinstance(trainer.pop_callback(MemoryCallback), MemoryCallback)
    assert trainer.measurements == [mine]
    trainer.train()
    assert not [key for key in trainer.state.log_history[-1] if key.startswith("peak_memory")]


def test_the_forecast_is_exact_at_constant_k_and_at_the_end(tmp_path):
    trainer, _ = train(tmp_path, [2])
    assert trainer.state.max_steps == trainer.state.global_step == 16
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == list(range(2, 17, 2))
