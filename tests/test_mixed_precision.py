"""Under a gradient scaler and under autocast: correctness on tiny shapes (half precision is emulated on a CPU)."""

import pytest
import torch
from helpers import AnyK, Rows, arguments, quiet, tiny_gpt2, weights_equal
from transformers import Trainer, TrainingArguments


class Scaled(AnyK):
    """Accelerate refuses fp16 without a GPU: this puts its scaler in place, on fp32 gradients."""

    init_scale = 2.0**16

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=self.init_scale, backoff_factor=2.0**-100, growth_interval=10**6
        )


class Overflowing(Scaled):
    init_scale = 2.0**127


def train(cls, tmp_path, **kwargs):
    args = arguments(tmp_path, max_grad_norm=0.0, noise_scale_interval=1, gradient_accumulation_steps=3, **kwargs)
    trainer = quiet(cls(model=tiny_gpt2(), args=args, train_dataset=Rows(), sequence=[2, 3, 4, 2]))
    trainer.train()
    return trainer


def test_statistics_are_unscaled(tmp_path):
    plain, scaled = train(AnyK, tmp_path), train(Scaled, tmp_path)
    assert scaled.accelerator.scaler.get_scale() == 2.0**16
    for attribute in ("value", "trace", "gradient_square", "lower"):
        expected = getattr(plain.trainopt.accumulation.controller.noise, attribute)
        assert getattr(scaled.trainopt.accumulation.controller.noise, attribute) == pytest.approx(
            expected, rel=1e-3
        ), attribute


def test_windows_that_overflow_are_dropped_and_the_schedule_goes_on(tmp_path):
    trainer = train(Overflowing, tmp_path, warmup_steps=0)
    tracker = trainer.trainopt.accumulation.controller.tracker
    assert tracker.num_dropped == 1
    assert tracker.num_windows >= 2
    assert torch.isfinite(torch.tensor(trainer.trainopt.accumulation.controller.noise.gradient_square))
    # The data of skipped steps were used: the cosine ends at zero all the same.
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert trainer.state.log_history[-1]["samples_seen"] == 100


def test_bf16_autocast_at_constant_k_is_stock(tmp_path):
    common = {"bf16": True, "num_train_epochs": 1, "gradient_accumulation_steps": 3}
    stock = quiet(
        Trainer(model=tiny_gpt2(), args=arguments(tmp_path, TrainingArguments, **common), train_dataset=Rows(18))
    )
    stock.train()
    from hf_trainopt import EfficientTrainer

    args = arguments(tmp_path, accumulation_policy="fixed", measure_noise_scale=True, **common)
    ours = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(18)))
    ours.train()
    assert weights_equal(stock.model, ours.model)
    assert next(ours.model.parameters()).dtype == torch.float32  # master weights
    assert ours.trainopt.accumulation.controller.tracker.num_windows >= 1
