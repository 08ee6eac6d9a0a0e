"""Runs of little or no data: what stock takes, `"fixed"` takes; k varies over less than a window too."""

import pytest
from helpers import AnyK, Rows, arguments, quiet, tiny_gpt2, weights_equal
from transformers import Trainer, TrainingArguments

from hf_trainopt import EfficientTrainer


LITTLE = {
    "no epochs": (20, {"num_train_epochs": 0}),
    "no steps": (20, {"max_steps": 0}),
    "less than a window": (5, {"gradient_accumulation_steps": 8}),
    "no batch, but steps": (2, {"dataloader_drop_last": True, "max_steps": 2}),
    "no rows, but steps": (0, {"max_steps": 2, "train_sampling_strategy": "sequential"}),
}


def make(folder, cls, rows, **kwargs):
    kinds = [TrainingArguments] if cls is Trainer else []
    return quiet(cls(model=tiny_gpt2(), args=arguments(folder, *kinds, **kwargs), train_dataset=Rows(rows)))


@pytest.mark.parametrize("case", LITTLE)
def test_fixed_takes_what_stock_takes(case, tmp_path, caplog):
    rows, options = LITTLE[case]
    stock = make(tmp_path / "stock", Trainer, rows, **options)
    ours = make(tmp_path / "ours", EfficientTrainer, rows, accumulation_policy="fixed", **options)
    assert ours.train().global_step == stock.train().global_step
    assert weights_equal(ours.model, stock.model)
    assert "nothing" in caplog.text or "fewer than one window" in caplog.text


POLICIES = {
    "goodput": {"accumulation_policy": "goodput", "optimizer_step_cost": 1.0},
    "noise_scale": {"accumulation_policy": "noise_scale"},
    "ramp": {"accumulation_policy": "ramp", "accumulation_ramp": "0:1,0.5:4"},
    "measured": {"accumulation_policy": "fixed", "measure_noise_scale": True},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_k_varies_over_less_than_a_window(policy, rows, tmp_path):
    settings = {"gradient_accumulation_steps": 8, "num_train_epochs": 3}
    trainer = make(tmp_path, EfficientTrainer, rows, **POLICIES[policy], **settings)
    trainer.train()
    last = trainer.state.log_history[-1]
    assert last["samples_seen"] == 3 * rows
    assert trainer.state.epoch == 3
    assert trainer.lr_scheduler.position == 3  # each epoch counts as one reference window


def test_one_short_window_is_stocks(tmp_path):
    stock = make(tmp_path / "stock", Trainer, 5, gradient_accumulation_steps=8)
    args = arguments(tmp_path, gradient_accumulation_steps=8)
    ours = quiet(AnyK(model=tiny_gpt2(), args=args, train_dataset=Rows(5), sequence=[8]))
    stock.train()
    ours.train()
    assert weights_equal(ours.model, stock.model)


@pytest.mark.parametrize("options", [{"num_train_epochs": 0}, {"max_steps": 0}])
def test_varying_k_needs_something_to_count(options, tmp_path):
    with pytest.raises(ValueError, match="nothing is trained"):
        make(tmp_path, EfficientTrainer, 20, **options).train()
