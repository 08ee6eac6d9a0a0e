"""Losses that are logged are means over equal data, whatever k was."""

import math

import pytest
import torch
from helpers import AnyK, Rows, arguments, quiet, tiny_gpt2
from transformers import Trainer, TrainingArguments

from hf_trainopt.accumulation.mean_loss import MeanLoss


def test_windows_weigh_as_much_as_they_have_data():
    mean = MeanLoss()
    for loss, size in ((4.0, 1), (2.0, 3), (math.nan, 2)):
        mean.add(torch.tensor(loss), size, size, is_filtered=True)
    assert mean.take() == pytest.approx((4 + 2 * 3) / 4)
    mean.add(torch.tensor(1.0), 4, 4, is_filtered=True)
    assert mean.take() is None  # a single size: the mean over steps is right
    assert mean.overall() == pytest.approx((4 + 2 * 3 + 4) / 8)
    assert math.isnan(_after(MeanLoss(), (math.nan, 1.0)).overall())
    assert _after(MeanLoss(), ()).overall() is None


def _after(mean, losses):
    for size, loss in enumerate(losses, 1):
        mean.add(torch.tensor(loss), size, size, is_filtered=False)
    return mean


class Remembers(AnyK):
    """The loss and the number of micro-batches of each window."""

    def training_step(self, model, inputs, *args, **kwargs):
        size = len(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.__dict__.setdefault("windows", []).append((loss.item(), size))
        return loss


def make(folder, sequence, **kwargs):
    args = arguments(folder, gradient_accumulation_steps=3, num_train_epochs=2, **kwargs)
    return quiet(Remembers(model=tiny_gpt2(), args=args, train_dataset=Rows(48), sequence=sequence))


@pytest.mark.parametrize("logging_steps", [1, 2, 100])
def test_a_run_whose_k_grows(logging_steps, tmp_path):
    trainer = make(tmp_path, [2, 2, 2, 3, 3, 4, 4, 5], logging_steps=logging_steps)
    output = trainer.train()
    by_data = sum(loss * size for loss, size in trainer.windows) / sum(size for _, size in trainer.windows)
    by_steps = sum(loss for loss, _ in trainer.windows) / len(trainer.windows)
    assert output.training_loss == pytest.approx(by_data, rel=1e-5)
    assert output.metrics["train_loss"] == pytest.approx(by_data, rel=1e-5)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(by_data, rel=1e-5)
    assert abs(by_data - by_steps) > 1e-3
    done = 0
    for line in [line for line in trainer.state.log_history if "loss" in line]:
        windows = trainer.windows[done : line["step"]]
        done = line["step"]
        expected = sum(loss * size for loss, size in windows) / sum(size for _, size in windows)
        assert line["loss"] == pytest.approx(expected, rel=1e-3)  # upstream rounds no more, trackers may


def test_at_constant_k_they_are_stocks(tmp_path):
    """To the bit, the short last window of an epoch included."""
    ours = make(tmp_path, [3])
    args = arguments(tmp_path, TrainingArguments, gradient_accumulation_steps=3, num_train_epochs=2)
    stock = quiet(Trainer(model=tiny_gpt2(), args=args, train_dataset=Rows(48)))
    assert ours.train().training_loss == stock.train().training_loss
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (ours, stock)]
    assert losses[0] == losses[1]
