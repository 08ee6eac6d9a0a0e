"""Runs that resume with the batch split in another way: into micro-batches, accumulation, ranks."""

import logging
from pathlib import Path

import pytest
import torch
from helpers import AnyK, Rows, arguments, quiet, tiny_gpt2
from transformers import TrainerCallback

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation.checkpoint import restore, run_state
from hf_trainopt.accumulation.controller import AccumulationController
from hf_trainopt.accumulation.cursor import DataCursor
from hf_trainopt.accumulation.policy import NoiseScalePolicy


class Watched:
    """Notes the rows that are trained on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).extend(inputs["input_ids"][:, 0].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


class Windows(TrainerCallback):
    """Counts the micro-batches of each optimizer step."""

    def __init__(self):
        self.sizes, self.passed = [], 0

    def on_substep_end(self, *args, **kwargs):
        self.passed += 1

    def on_step_end(self, *args, **kwargs):
        self.sizes.append(self.passed + 1)
        self.passed = 0


class Fixed(Watched, EfficientTrainer):
    pass


class Varying(Watched, AnyK):
    pass


def make(folder, batch, k, cls=Fixed, rows=50, **kwargs):
    extra = {"sequence": kwargs.pop("sequence")} if cls is Varying else {}
    policy = {"accumulation_policy": "fixed"} if cls is Fixed else {}
    args = arguments(
        folder, per_device_train_batch_size=batch, gradient_accumulation_steps=k, save_strategy="steps", save_steps=1,
        **policy, **kwargs,
    )  # fmt: skip
    data = Rows(rows, numbered=True)
    return quiet(cls(model=tiny_gpt2(), args=args, train_dataset=data, **extra))


def checkpoint(folder, step):
    return str(Path(folder) / f"checkpoint-{step}")


@pytest.mark.parametrize(("batch", "k"), [(4, 2), (8, 1), (1, 8)])
@pytest.mark.parametrize("step", [2, 7, 9])
def test_fixed_goes_on_at_the_same_sample(batch, k, step, tmp_path):
    """Within an epoch of seven steps, at its end, and in the next."""
    whole = make(tmp_path, 2, 4)
    whole.train()
    resumed = make(tmp_path / "resumed", batch, k)
    resumed.train(resume_from_checkpoint=checkpoint(tmp_path, step))
    assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
    assert resumed.state.global_step == whole.state.global_step
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


# k in micro-batches of 4 samples.
SEQUENCE = [3, 2, 2, 4, 2, 2, 3, 2]


@pytest.mark.parametrize(("batch", "k"), [(2, 4), (1, 8), (4, 4), (2, 2)])
@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_a_varying_k_goes_on_at_the_same_sample(batch, k, step, tmp_path, caplog):
    whole = make(tmp_path, 4, 2, Varying, rows=48, sequence=SEQUENCE)
    whole.train()
    resumed = make(tmp_path / "resumed", batch, k, Varying, rows=48, sequence=[3])
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=checkpoint(tmp_path, step))
    assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
    assert resumed.state.log_history[-1]["samples_seen"] == 96
    assert resumed.lr_scheduler.position == resumed.trainopt.accumulation.cursor.budget
    assert "are trained on again" not in caplog.text


def test_a_place_within_a_micro_batch_is_said(tmp_path, caplog):
    whole = make(tmp_path, 4, 2, Varying, rows=48, sequence=SEQUENCE)
    whole.train()
    resumed = make(tmp_path / "resumed", 8, 1, Varying, rows=48, sequence=[1])
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=checkpoint(tmp_path, 1))  # after 12 samples
    assert "4 samples into a micro-batch of this run (8 samples over all ranks): these 4 are" in caplog.text
    assert resumed.seen == whole.seen[8:]
    assert resumed.state.log_history[-1]["samples_seen"] == 100


def test_the_rate_is_that_of_the_place_in_the_data(tmp_path):
    """Steps of half the samples: twice as many of them make the run."""
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 0, "lr_batch_scaling": "none"}
    make(tmp_path, 4, 2, Varying, rows=48, sequence=[2], **settings).train()
    resumed = make(tmp_path / "resumed", 2, 2, Varying, rows=48, sequence=[2], **settings)
    resumed.train(resume_from_checkpoint=checkpoint(tmp_path, 3))
    first = next(line for line in resumed.state.log_history if line.get("samples_seen", 0) > 24 and "loss" in line)
    assert first["learning_rate"] == pytest.approx(1e-2 * (1 - 24 / 96))


def controller(reference, world_size, batch):
    return AccumulationController(
        policy=NoiseScalePolicy(), reference_steps=reference, minimum=1, maximum=32, world_size=world_size,
        micro_batch_size=batch, tracker=None, measure_interval=8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "batch", "k", "place"), [(2, 4, 4, 3), (4, 2, 4, 3), (2, 8, 2, 1), (8, 1, 1, 3)]
)
def test_other_numbers_of_ranks(world_size, batch, k, place):
    """Written by one rank with micro-batches of 8 after 24 samples of the second epoch of 100."""
    cursor = DataCursor(reference_steps=4, budget=12, micro_batches_per_epoch=13, epoch_length=13)
    cursor.epoch, cursor.finished_windows, cursor.micro_batch, cursor.samples_seen = 1, 4, 3, 124
    setup = {"per_device_train_batch_size": 8, "world_size": 1, "gradient_accumulation_steps": 4}
    old = controller(4, 1, 8)
    old.accumulation_steps = 6
    state = run_state(setup, cursor, old)
    per_epoch = -(-100 // (batch * world_size))
    made = DataCursor(reference_steps=k, budget=12, micro_batches_per_epoch=per_epoch, epoch_length=per_epoch)
    now = {"per_device_train_batch_size": batch, "world_size": world_size, "gradient_accumulation_steps": k}
    chosen = controller(k, world_size, batch)
    restore(state, made, chosen, now)
    assert (made.epoch, made.micro_batch, made.samples_seen) == (1, place, 124)
    assert made.finished_windows == -(-per_epoch // k)
    assert chosen.accumulation_steps == round(6 * 8 / (batch * world_size))


@pytest.mark.parametrize(("batch", "k"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("policy", [{"accumulation_policy": "fixed"},
                                    {"accumulation_policy": "ramp", "accumulation_ramp": "0:{k}"}])  # fmt: skip
def test_a_schedule_of_k_is_that_of_the_resumed_run_at_once(batch, k, policy, tmp_path):
    """Not the k of the checkpoint for one more window."""

    def trainer(folder, batch, k):
        named = {name: value.format(k=k) for name, value in policy.items()}
        args = arguments(
            folder, per_device_train_batch_size=batch, gradient_accumulation_steps=k, save_strategy="steps",
            save_steps=1, measure_noise_scale=True, **named,
        )  # fmt: skip
        return quiet(Fixed(model=tiny_gpt2(), args=args, train_dataset=Rows(64, numbered=True)))

    trainer(tmp_path, 2, 8).train()
    resumed, windows = trainer(tmp_path / "resumed", batch, k), Windows()
    resumed.add_callback(windows)
    resumed.train(resume_from_checkpoint=checkpoint(tmp_path, 2))
    assert set(windows.sizes[:4]) == {k}
