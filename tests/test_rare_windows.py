"""Windows that a small k makes common: those without anything to predict."""

import math

import pytest
import torch
from helpers import AnyK, Rows, arguments, quiet, tiny_gpt2, weights_equal
from transformers import Trainer, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation.noise_scale import NoiseScaleTracker, WindowStatistics


class FullPrompts(Rows):
    """In most rows the prompt leaves no place for a target."""

    def __init__(self, *args, period: int = 4, **kwargs):
        super().__init__(*args, **kwargs)
        self.period = period

    def __getitem__(self, index):
        row = super().__getitem__(index)
        if index % self.period:
            row["labels"] = torch.full_like(row["labels"], -100)
        return row


def mean_loss_model():
    model = tiny_gpt2()
    model.accepts_loss_kwargs = False  # a mean of its own in each micro-batch
    return model


MODELS = {"divided by the items of the step": tiny_gpt2, "means": mean_loss_model}


def run(folder, trainer_class, args_class=None, model=None, rows=None, trainer_kwargs=None, **kwargs):
    kinds = {} if args_class is None else {"cls": args_class}
    settings = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    return quiet(
        trainer_class(
            model=tiny_gpt2() if model is None else model,
            args=arguments(folder, **kinds, **(settings | kwargs)),
            train_dataset=FullPrompts() if rows is None else rows,
            **(trainer_kwargs or {}),
        )
    )


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("k", [1, 2])
def test_fixed_does_what_stock_does(model, k, tmp_path):
    settings = {"gradient_accumulation_steps": k, "weight_decay": 0.1}  # steps without gradients move weights too
    stock = run(tmp_path, Trainer, TrainingArguments, model(), **settings)
    ours = run(tmp_path, EfficientTrainer, model=model(), accumulation_policy="fixed", **settings)
    stock.train()
    ours.train()
    assert weights_equal(ours.model, stock.model)
    assert [e["loss"] for e in ours.state.log_history[:-1]] == [e["loss"] for e in stock.state.log_history[:-1]]
    assert "skipped_windows" not in ours.state.log_history[-1]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("is_filtered", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_they_are_no_divergence_where_k_is_small(model, is_filtered, k, tmp_path):
    """Of 16 windows without a target one after the other, none counts, and each line of the log is finite."""
    trainer = run(
        tmp_path, AnyK, model=model(), rows=FullPrompts(period=17), trainer_kwargs={"sequence": [k]},
        logging_nan_inf_filter=is_filtered, max_skipped_windows=3,
    )  # fmt: skip
    trainer.train()
    lines = trainer.state.log_history
    assert all(math.isfinite(value) for line in lines for value in line.values()), lines
    assert "skipped_windows" not in lines[-1]
    # What the lines of windows with a target say is the loss of that target.
    assert all(line["loss"] > 1 for line in lines[:-1] if line["grad_norm"] > 0 and k == 1)


def test_a_micro_batch_without_targets_leaves_the_loss_of_the_others(tmp_path):
    """Means over two micro-batches, one of them empty: the loss is half of the other's, as its gradient is."""
    single = run(tmp_path, AnyK, model=mean_loss_model(), trainer_kwargs={"sequence": [1]}, max_steps=1)
    pair = run(tmp_path, AnyK, model=mean_loss_model(), trainer_kwargs={"sequence": [2]}, max_steps=2)
    for trainer in (single, pair):
        trainer.train()
    (first, *_), (other, *_) = single.state.log_history, pair.state.log_history
    assert other["loss"] == pytest.approx(first["loss"] / 2, abs=1e-4)
    assert other["grad_norm"] == pytest.approx(first["grad_norm"] / 2, rel=1e-4)


class BadGradient(EfficientTrainer):
    """A loss of one's own whose gradients are 0/0 where there is no target."""

    def compute_loss(self, model, inputs, *args, return_outputs=False, num_items_in_batch=None, **kwargs):
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
        labels = inputs["labels"][:, 1:]
        mask = (labels != -100).float()
        scores = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        return -(scores * mask).sum() / mask.sum()


def test_gradients_that_are_not_finite_are_left_out_but_no_divergence(tmp_path):
    model = mean_loss_model()
    trainer = run(
        tmp_path, BadGradient, model=model, rows=FullPrompts(period=9), accumulation_policy="fixed",
        max_skipped_windows=3,
    )  # fmt: skip
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert trainer.state.log_history[-1]["skipped_windows"] == 44  # of 50 rows 6 have targets


def test_bad_losses_between_them_still_end_the_run(tmp_path):
    """A window without targets neither counts as divergence nor ends a row of windows that diverge."""
    from hf_trainopt.reliability import TrainingDivergedError

    class Diverging(EfficientTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * math.inf

    trainer = run(tmp_path, Diverging, rows=FullPrompts(period=2), accumulation_policy="fixed", max_skipped_windows=4)
    with pytest.raises(TrainingDivergedError):
        trainer.train()
    assert trainer.state.global_step <= 8


def test_they_leave_the_noise_scale_alone():
    def statistics(scale):
        return WindowStatistics(3.0 * scale, 1.5 * scale, 2.0 * scale, 1.0, 0.5, 0.5, 2, 8.0, 4)

    plain, other = NoiseScaleTracker(1e9), NoiseScaleTracker(1e9)
    for _ in range(5):
        assert plain.update(statistics(1.0))
        assert other.update(statistics(1.0))
        assert not other.update(statistics(0.0))
    assert other.num_dropped == 0
    assert other.estimate().value == pytest.approx(plain.estimate().value)


def test_a_run_with_such_windows_measures_the_others(tmp_path):
    settings = {"optimizer_step_cost": 1.0, "train_sampling_strategy": "random"}
    trainer = run(tmp_path, EfficientTrainer, rows=FullPrompts(num_rows=64, period=2), **settings)
    trainer.train()
    tracker = trainer.trainopt.accumulation.controller.tracker
    assert tracker.num_windows >= 4
    assert math.isfinite(trainer.trainopt.accumulation.controller.noise.trace)
