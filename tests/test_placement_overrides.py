"""A plan follows what a Trainer class of the user's does, not what the arguments say."""

import contextlib

import pytest
import torch
from helpers import Rows, arguments, quiet
from placement_models import gpt2
from torch.utils.data import DataLoader

from hf_trainopt import EfficientTrainer


SETTINGS = {
    "accumulation_policy": "fixed", "gradient_accumulation_steps": 2, "max_steps": 3, "per_device_train_batch_size": 4,
    "memory_budget": "90%", "memory_rewrites": "none",
}  # fmt: skip


class PlainSGD(EfficientTrainer):
    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


class SomeOnly(EfficientTrainer):
    """An optimizer with three states, for some of the parameters."""

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            some = [p for name, p in self.model.named_parameters() if "mlp" in name]
            self.optimizer = torch.optim.AdamW(some, lr=self.args.learning_rate, amsgrad=True)
        return self.optimizer


class LayerWise(EfficientTrainer):
    """Asks `super()`, and changes what it makes."""

    def create_optimizer(self, *args, **kwargs):
        super().create_optimizer(*args, **kwargs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] / 2
        return self.optimizer


class Momentum(EfficientTrainer):
    """Sets the optimizer and returns nothing."""

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2, momentum=0.9)


class HalfPrecision(EfficientTrainer):
    """Runs the loss under autocast of its own."""

    def compute_loss_context_manager(self):
        stack = contextlib.ExitStack()
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        return stack


class OwnLoader(EfficientTrainer):
    """Makes batches of 12 where the arguments say 4."""

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=12, collate_fn=self.data_collator))


class PlainLoader(EfficientTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=12, collate_fn=self.data_collator)


def run(folder, cls, make_optimizers=None, **kwargs):
    model = gpt2(width=64)
    extra = {} if make_optimizers is None else {"optimizers": (make_optimizers(model), None)}
    args = arguments(folder, **(SETTINGS | kwargs))
    trainer = quiet(cls(model=model, args=args, train_dataset=Rows(96, length=16), **extra))
    trainer.train()
    return trainer


OVERRIDES = [PlainSGD, SomeOnly, LayerWise, Momentum, HalfPrecision, OwnLoader, PlainLoader]


@pytest.mark.parametrize("cls", OVERRIDES)
def test_the_predicted_peak_is_that_of_the_override(cls, tmp_path):
    plan = run(tmp_path, cls).placement_plan
    assert plan.predicted_peak_bytes == pytest.approx(plan.measured_peak_bytes, rel=0.03)


PASSED = {
    "all": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2),
    "some": lambda model: torch.optim.Adam([p for n, p in model.named_parameters() if "mlp" in n], lr=1e-2),
    "groups": lambda model: torch.optim.SGD(
        [
            {"params": [p for n, p in model.named_parameters() if "mlp" in n], "momentum": 0.9},
            {"params": [p for n, p in model.named_parameters() if "mlp" not in n], "momentum": 0.0},
        ],
        lr=1e-2,
    ),
}


@pytest.mark.parametrize("make", PASSED.values(), ids=PASSED)
def test_the_predicted_peak_is_that_of_an_optimizer_that_is_passed(make, tmp_path):
    plan = run(tmp_path, EfficientTrainer, make).placement_plan
    assert plan.predicted_peak_bytes == pytest.approx(plan.measured_peak_bytes, rel=0.03)


def test_planning_leaves_the_trainer_without_an_optimizer(tmp_path):
    """`create_optimizer` is called once more for a copy, with parameters that are none of the model's."""
    trainer = run(tmp_path, PlainSGD)
    own = {id(parameter) for parameter in trainer.model.parameters()}
    groups = trainer.optimizer.param_groups
    assert all(id(parameter) in own for group in groups for parameter in group["params"])


def test_a_budget_that_fits_is_taken(tmp_path):
    fits = round(run(tmp_path, PlainSGD).placement_plan.measured_peak_bytes * 1.02)
    plan = run(tmp_path / "again", PlainSGD, memory_budget=str(fits)).placement_plan
    assert plan.measured_peak_bytes <= fits
