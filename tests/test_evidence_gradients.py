"""The noise scale under a plain `Trainer` is that of `EfficientTrainer`, measured from callbacks alone."""

import json
from typing import ClassVar

import pytest
import torch
from helpers import Pictures, Rows, Stream, arguments, measuring, quiet, tiny_gpt2, tiny_resnet, weights_equal
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.core.versions import ACTIVATION_CHECKPOINTING
from hf_trainopt.metrics import GradientStatisticsCallback


NOISE = ("noise_scale", "noise_scale_low", "noise_scale_high")


class Mean(torch.nn.Module):
    """A model whose loss is a mean of its own: micro-batches weigh the same whatever their labels."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.model = tiny_gpt2()

    def forward(self, input_ids, labels):
        return self.model(input_ids=input_ids, labels=labels)


def run(folder, cls, model=None, data=None, callbacks=(), **kwargs):
    settings = {"gradient_accumulation_steps": 3, "num_train_epochs": 3, "remove_unused_columns": False} | kwargs
    if issubclass(cls, EfficientTrainer):
        settings = {"accumulation_policy": "fixed", "noise_scale_interval": 2} | settings
        args = arguments(folder, **settings)
    else:
        args = arguments(folder, TrainingArguments, **settings)
        callbacks = [GradientStatisticsCallback(interval=2), *callbacks]
    trainer = quiet(cls(model=model or tiny_gpt2(), args=args, train_dataset=data or Rows(), callbacks=[*callbacks]))
    trainer.train()
    return trainer


def noise_of(trainer):
    return [tuple(line.get(key) for key in NOISE) for line in trainer.state.log_history]


def callback_of(trainer):
    return next(c for c in measuring(trainer) if isinstance(c, GradientStatisticsCallback))


@pytest.mark.parametrize(
    ("model", "data", "kwargs"),
    [
        (tiny_gpt2, Rows, {}),  # weighted by labels; clipped; a short last window and micro-batch
        (tiny_gpt2, Rows, {"max_grad_norm": 0.0}),
        (tiny_gpt2, Rows, {"max_grad_norm": 0.01, ACTIVATION_CHECKPOINTING: True}),
        (tiny_gpt2, Rows, {"average_tokens_across_devices": False}),
        (lambda: tiny_gpt2(dropout=0.1), Rows, {"bf16": True}),
        (Mean, Rows, {}),
        (tiny_resnet, lambda: Pictures(24), {}),
    ],
)
def test_it_is_that_of_the_efficient_trainer(tmp_path, model, data, kwargs):
    ours = run(tmp_path / "a", EfficientTrainer, model(), data(), measure_noise_scale=True, **kwargs)
    stock = run(tmp_path / "b", Trainer, model(), data(), **kwargs)
    assert weights_equal(ours.model, stock.model)
    found, expected = noise_of(stock), noise_of(ours)
    assert sum(value is not None for line in expected for value in line) > 10
    for a, b in zip(found, expected, strict=True):
        assert [v is None for v in a] == [v is None for v in b]
        assert [v for v in a if v is not None] == pytest.approx([v for v in b if v is not None], rel=1e-6)
    controller = callback_of(stock)._controller
    assert controller.tracker.num_windows == ours.trainopt.accumulation.controller.tracker.num_windows
    assert controller.tracker.num_dropped == 0


def test_labels_that_are_not_shifted_before_they_are_counted(tmp_path):
    """Stock `Trainer` counts them by the name of the loss; here that is seen by what adds up."""

    def model():
        made = tiny_gpt2()
        made.loss_type = None
        return made

    ours = run(tmp_path / "a", EfficientTrainer, model(), measure_noise_scale=True)
    assert not ours._loss_shifts_labels
    stock = run(tmp_path / "b", Trainer, model())
    assert callback_of(stock).noise.value == pytest.approx(ours.trainopt.accumulation.controller.noise.value, rel=1e-6)


def test_training_is_not_touched_and_nothing_is_left_behind(tmp_path):
    class Hooks(TrainerCallback):
        counts: ClassVar[set[int]] = set()

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.counts.add(len(model.lm_head.weight._backward_hooks or ()))

    hooks = Hooks()
    measured = run(tmp_path / "a", Trainer, tiny_gpt2(dropout=0.1), callbacks=[hooks])
    args = arguments(
        tmp_path / "b", TrainingArguments, gradient_accumulation_steps=3, num_train_epochs=3,
        remove_unused_columns=False,
    )  # fmt: skip
    plain = quiet(Trainer(model=tiny_gpt2(dropout=0.1), args=args, train_dataset=Rows()))
    plain.train()
    assert weights_equal(plain.model, measured.model)
    assert min(hooks.counts) == 0 < max(hooks.counts)  # not in every step
    assert not measured.model._forward_pre_hooks
    assert not any(parameter._backward_hooks for parameter in measured.model.parameters())


def test_scaled_gradients_are_measured_unscaled(tmp_path):
    class Scaled(Trainer):
        """Accelerate refuses fp16 without a GPU: this puts its scaler in place, on fp32 gradients."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10**6)

    scaled, plain = (run(tmp_path, cls, max_grad_norm=0.0) for cls in (Scaled, Trainer))
    assert scaled.optimizer.scaler.get_scale() == 2.0**16
    for attribute in ("value", "trace", "gradient_square"):
        expected = getattr(callback_of(plain).noise, attribute)
        assert getattr(callback_of(scaled).noise, attribute) == pytest.approx(expected, rel=1e-3)


def test_gradients_that_stock_carries_over_the_end_of_a_stream_are_left_out(tmp_path):
    """17 micro-batches in windows of 3: the last two of each epoch wait for a step in the next."""
    trainer = run(tmp_path, Trainer, data=Stream(50), max_steps=12)
    tracker = callback_of(trainer)._controller.tracker
    assert trainer.state.global_step == 12
    assert tracker.num_dropped == 0
    assert 4 < tracker.num_windows < 12


@pytest.mark.parametrize("restores", [False, True])
def test_a_resumed_run_has_the_same_noise_scale(tmp_path, restores):
    whole = run(tmp_path / "a", Trainer, save_strategy="steps", save_steps=7, num_train_epochs=6)
    state = json.loads((tmp_path / "a" / "checkpoint-7" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["GradientStatisticsCallback"]["args"] == {"interval": 2, "half_life": 0.05}
    args = arguments(
        tmp_path / "b", TrainingArguments, gradient_accumulation_steps=3, num_train_epochs=6,
        remove_unused_columns=False, restore_callback_states_from_checkpoint=restores,
    )  # fmt: skip
    callbacks = [GradientStatisticsCallback(interval=2)]
    resumed = quiet(Trainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=callbacks))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-7"))
    assert noise_of(resumed)[7:] == noise_of(whole)[7:]


# ---- Where it cannot measure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"gradient_accumulation_steps": 1}, "one micro-batch on one device cannot tell its own noise"),
        (
            {ACTIVATION_CHECKPOINTING: True, f"{ACTIVATION_CHECKPOINTING}_kwargs": {"use_reentrant": True}},
            "use_reentrant=False",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_once(tmp_path, caplog, kwargs, said):
    trainer = run(tmp_path, Trainer, max_steps=4, **kwargs)
    assert caplog.text.count(said) == 1
    assert not any("noise" in key for line in trainer.state.log_history for key in line)
    assert callback_of(trainer).noise is None


def test_labels_that_the_model_does_not_see(tmp_path, caplog):
    """With label smoothing Trainer keeps them to itself, and only the number of items comes through."""
    trainer = run(tmp_path, Trainer, label_smoothing_factor=0.1, num_train_epochs=8)
    assert caplog.text.count("is not the number of labels") == 1
    tracker = callback_of(trainer)._controller.tracker
    assert tracker.num_windows == 0
    assert 16 <= tracker.num_dropped < trainer.state.global_step  # not at each step for ever
    assert not any("noise" in key for line in trainer.state.log_history for key in line)


def test_beside_a_trainer_that_measures_it_does_nothing(tmp_path, caplog):
    callback = GradientStatisticsCallback()
    trainer = run(tmp_path, EfficientTrainer, callbacks=[callback], measure_noise_scale=True)
    assert "EfficientTrainer already does" in caplog.text
    assert callback.noise is None
    assert noise_of(trainer)[-1][0] is not None


def test_beside_a_trainer_that_does_not(tmp_path):
    """Windows of varying k; one micro-batch on one device is passed over."""
    callback = GradientStatisticsCallback(interval=1)
    ramp = {"accumulation_policy": "ramp", "accumulation_ramp": "0:1,0.3:3,0.6:2", "gradient_accumulation_steps": 1}
    trainer = run(tmp_path, EfficientTrainer, callbacks=[callback], **ramp)
    assert 0 < callback._controller.tracker.num_windows < trainer.state.global_step
    assert callback._controller.tracker.num_dropped == 0
    assert noise_of(trainer)[-1][1] is not None


@pytest.mark.parametrize(
    ("kwargs", "said"), [({"interval": 0}, "interval is 0"), ({"half_life": 0}, "half_life is 0")]
)
def test_settings_out_of_range(kwargs, said):
    with pytest.raises(ValueError, match=said):
        GradientStatisticsCallback(**kwargs)
