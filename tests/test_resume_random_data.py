"""Runs that resume within an epoch get the rows that they would have had, whatever draws them."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Rows, arguments, quiet, tiny_gpt2, weights_equal
from torch.utils.data import DataLoader, IterableDataset, Sampler, WeightedRandomSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments


class Masked(Rows):
    """Rows of which one token is replaced as they are read, each time another."""

    def __init__(self, draw, **kwargs):
        super().__init__(num_rows=24, numbered=True, **kwargs)
        self.draw = draw

    def __getitem__(self, index):
        row = super().__getitem__(index)
        row["input_ids"] = row["input_ids"].clone()
        row["input_ids"][1 + self.draw()] = 63
        return row


DRAWS = {
    "torch": lambda: int(torch.randint(0, 10, ())),
    "numpy": lambda: int(np.random.randint(0, 10)),
    "python": lambda: random.randrange(10),
}


class Lazy(Sampler):
    """Draws row by row, between the rows of other draws."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return (int(torch.randint(0, self.size, ())) for _ in range(self.size))

    def __len__(self):
        return self.size


SAMPLERS = {
    "stock": None,
    "weighted": lambda size: WeightedRandomSampler(torch.ones(size), size, replacement=False),
    "lazy": Lazy,
}


class Run(EfficientTrainer):
    """Notes the rows that it trains on; `make_sampler` and `own_loader` are set after the constructor."""

    make_sampler = None
    own_loader = False

    def _get_train_sampler(self, dataset=None):
        if self.make_sampler is None:
            return super()._get_train_sampler(dataset)
        return self.make_sampler(len(self.train_dataset))

    def get_train_dataloader(self):
        if not self.own_loader:
            return super().get_train_dataloader()
        sampler = WeightedRandomSampler(torch.ones(24), 24, replacement=False)
        return DataLoader(self.train_dataset, batch_size=3, sampler=sampler, collate_fn=self.data_collator)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append(inputs["input_ids"].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def make(folder, data=None, sampler=None, own_loader=False, **kwargs):
    settings = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    trainer = quiet(
        Run(
            model=tiny_gpt2(dropout=0.1),  # draws from the same generator, in turns with the rows
            args=arguments(folder, **(settings | kwargs)),
            train_dataset=Masked(DRAWS["torch"]) if data is None else data,
        )
    )
    trainer.seen, trainer.own_loader = [], own_loader
    if sampler is not None:
        trainer.make_sampler = sampler
    return trainer


def checkpoints(folder):
    return sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[:-1]


def resumes_exactly(folder, **kwargs):
    whole = make(folder / "whole", **kwargs)
    whole.train()
    found = checkpoints(folder / "whole")
    assert len(found) >= 6
    for checkpoint in found:
        resumed = make(folder / "resumed", **kwargs)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], checkpoint.name
        assert weights_equal(resumed.model, whole.model), checkpoint.name
    return whole


ADAPTIVE = {"accumulation_policy": "goodput", "optimizer_step_cost": 0.5, "noise_scale_interval": 2}
FIXED = {"accumulation_policy": "fixed"}


@pytest.mark.parametrize("draw", DRAWS)
def test_rows_that_draw(draw, tmp_path):
    resumes_exactly(tmp_path, data=Masked(DRAWS[draw]), **ADAPTIVE)


@pytest.mark.parametrize("policy", [FIXED, ADAPTIVE], ids=["fixed", "goodput"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_and_rows_that_draw(sampler, policy, tmp_path):
    resumes_exactly(tmp_path, sampler=SAMPLERS[sampler], **policy)


def test_a_loader_that_does_not_look_ahead(tmp_path):
    resumes_exactly(tmp_path, own_loader=True, **FIXED)


def test_a_run_that_is_resumed_twice(tmp_path):
    whole = make(tmp_path / "whole", sampler=SAMPLERS["weighted"], **FIXED)
    whole.train()
    for first, second in ((1, 2), (2, 3), (4, 6)):  # the fourth is the end of an epoch
        folder = tmp_path / f"{first}"
        once = make(folder, sampler=SAMPLERS["weighted"], **FIXED)
        once.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{first}"))
        twice = make(tmp_path / "twice", sampler=SAMPLERS["weighted"], **FIXED)
        twice.train(resume_from_checkpoint=str(folder / f"checkpoint-{second}"))
        assert weights_equal(twice.model, whole.model), (first, second)


def test_the_loader_is_left_as_it_was(tmp_path):
    trainer = make(tmp_path, **FIXED)
    loader = trainer.get_train_dataloader()
    trainer.get_train_dataloader = lambda: loader
    before = loader.batch_sampler
    trainer.train()
    assert loader.batch_sampler is before


class MaskedStream(IterableDataset):
    def __iter__(self):
        rows = Masked(DRAWS["torch"])
        return (rows[index] for index in range(24))


@pytest.mark.parametrize(
    ("kwargs", "step", "reason"),
    [
        ({"dataloader_num_workers": 1}, 2, "workers of the data loader"),
        ({"dataloader_num_workers": 1}, 4, None),  # at the end of an epoch they get their seeds
        ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, 4, "persistent_workers"),
        ({"data": MaskedStream(), "max_steps": 4}, 2, "stream"),
        ({}, 2, None),
    ],
)
def test_what_cannot_be_the_same_is_said(kwargs, step, reason, tmp_path, caplog):
    make(tmp_path, **FIXED, **kwargs).train()
    with caplog.at_level(logging.WARNING):
        make(tmp_path / "other", **FIXED, **kwargs).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    said = [r.getMessage() for r in caplog.records if "draw others than in the run" in r.getMessage()]
    assert len(said) == (reason is not None)
    assert reason is None or reason in said[0]


def test_what_callbacks_set_on_the_batch_sampler_counts(tmp_path):
    class Smaller(TrainerCallback):
        def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
            if state.global_step == 1:
                inner = getattr(train_dataloader, "base_dataloader", train_dataloader)
                inner.batch_sampler.batch_size = 2

    def sizes(cls, arguments_class, **kwargs):
        seen = []

        class Sized(cls):
            def compute_loss(self, model, inputs, *args, **kwargs):
                seen.append(len(inputs["input_ids"]))
                return super().compute_loss(model, inputs, *args, **kwargs)

        args = arguments(
            tmp_path, arguments_class, gradient_accumulation_steps=1, per_device_train_batch_size=4,
            num_train_epochs=2, **kwargs,
        )  # fmt: skip
        quiet(Sized(model=tiny_gpt2(), args=args, train_dataset=Rows(16), callbacks=[Smaller()])).train()
        return seen

    stock = sizes(Trainer, TrainingArguments)
    assert 2 in stock
    assert sizes(EfficientTrainer, EfficientTrainingArguments, accumulation_policy="fixed") == stock
