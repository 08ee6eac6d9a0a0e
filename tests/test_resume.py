"""A run that is killed and resumed ends with the weights of one that was never stopped, to the bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import Pictures, Recorder, Rows, arguments, quiet, tiny_gpt2, tiny_resnet, weights_equal
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.core.state import STATE_NAME
from hf_trainopt.reliability.manifest import MANIFEST_NAME


# k varies in every one of them, and none depends on the clock.
POLICIES = {
    "goodput": {"accumulation_policy": "goodput", "optimizer_step_cost": 2.0, "noise_scale_interval": 2},
    "noise_scale": {"accumulation_policy": "noise_scale", "noise_scale_interval": 1, "lr_batch_scaling": "surge"},
    "ramp": {"accumulation_policy": "ramp", "accumulation_ramp": "0:2,0.2:1,0.5:5,0.8:3"},
}


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    """Raises in the n-th micro-batch of the run, wherever in a window that is."""

    def __init__(self, micro_batch: int):
        self.left = micro_batch

    def _count(self):
        self.left -= 1
        if self.left == 0:
            raise Killed

    def on_substep_end(self, *args, **kwargs):
        self._count()

    def on_pre_optimizer_step(self, *args, **kwargs):
        self._count()


class EveryStep(TrainerCallback):
    """Logs and saves at every optimizer step (`logging_steps` and `save_steps` count reference windows).

    A logged loss is a mean since the last log, and what was not logged before a checkpoint is lost, as in stock.
    """

    def __init__(self, saves: bool):
        self.saves = saves

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log, control.should_save = True, self.saves


def make(output_dir, policy: str, saves: bool = True, callbacks=(), **kwargs):
    args = arguments(output_dir, **({"gradient_accumulation_steps": 3} | POLICIES[policy] | kwargs))
    callbacks = [EveryStep(saves), *callbacks]
    # Dropout: the random state is part of what must come back.
    return quiet(EfficientTrainer(model=tiny_gpt2(dropout=0.1), args=args, train_dataset=Rows(), callbacks=callbacks))


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """The runs that are never stopped, one a policy."""
    runs = {}
    for policy in POLICIES:
        trainer = make(tmp_path_factory.mktemp(policy), policy)
        trainer.train()
        runs[policy] = trainer
    return runs


def loss_history(trainer) -> list[tuple]:
    keys = ("step", "loss", "grad_norm", "learning_rate", "epoch", "accumulation_steps", "samples_seen", "noise_scale")
    return [tuple(entry.get(key) for key in keys) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("policy", POLICIES)
def test_k_varies_in_these_runs(whole_runs, policy):
    sizes = [entry["accumulation_steps"] for entry in whole_runs[policy].state.log_history if "loss" in entry]
    assert len(set(sizes)) >= (4 if policy == "ramp" else 2)
    if policy != "ramp":
        assert whole_runs[policy].trainopt.accumulation.controller.was_resolved


@pytest.mark.parametrize("policy", POLICIES)
def test_resume_from_every_checkpoint(whole_runs, policy, tmp_path):
    """From each optimizer step, in the middle of epochs and at their ends."""
    whole = whole_runs[policy]
    checkpoints = sorted(Path(whole.args.output_dir).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert len(checkpoints) >= 7
    for checkpoint in checkpoints[:-1]:
        trainer = make(tmp_path, policy, saves=False)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert weights_equal(trainer.model, whole.model), checkpoint.name
        assert loss_history(trainer) == loss_history(whole)
        assert trainer.state.global_step == whole.state.global_step == trainer.state.max_steps


@pytest.mark.parametrize("micro_batch", [2, 5, 17, 18, 23, 30])
def test_kill_at_any_micro_batch(whole_runs, micro_batch, tmp_path):
    with pytest.raises(Killed):
        make(tmp_path, "goodput", callbacks=[Kill(micro_batch)]).train()
    resumed = make(tmp_path, "goodput")
    # Killed before the first step was taken: there is nothing to resume.
    resumed.train(resume_from_checkpoint=True if any(tmp_path.glob("checkpoint-*")) else None)
    assert weights_equal(resumed.model, whole_runs["goodput"].model)
    assert loss_history(resumed) == loss_history(whole_runs["goodput"])


@pytest.mark.parametrize("schedule", ["constant", "reduce_lr_on_plateau", "greedy"])
def test_the_rate_follows_a_k_that_the_bounds_of_the_resumed_run_exclude(schedule, tmp_path):
    """Where evaluations drive the rate no k does."""
    by_metric = schedule != "constant"
    settings = {"gradient_accumulation_steps": 4, "lr_batch_scaling": "none" if by_metric else "sqrt",
                "lr_scheduler_type": schedule, "eval_strategy": "steps" if by_metric else "no", "eval_steps": 2,
                "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}  # fmt: skip

    def train(policy, resume=None, **kwargs):
        recorder = Recorder()
        args = arguments(tmp_path, **(settings | kwargs))
        trainer = EfficientTrainer(
            model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[recorder],
            accumulation_policy=policy,
        )  # fmt: skip
        quiet(trainer).train(resume_from_checkpoint=resume)
        return recorder.learning_rates

    rates = train(lambda observation: 4, max_steps=4)
    base = rates[-1]
    bounded = train(lambda observation: 4, str(tmp_path / "checkpoint-2"), max_steps=4, max_accumulation_steps=1)
    assert bounded[0] == pytest.approx(base if by_metric else base * (1 / 4) ** 0.5)
    unbounded = train(lambda observation: 4, str(tmp_path / "checkpoint-2"), max_steps=4)
    assert unbounded[0] == base


def test_batch_norm_statistics_come_back(tmp_path):
    def run(**kwargs):
        args = arguments(
            tmp_path, per_device_train_batch_size=4, remove_unused_columns=False, save_strategy="steps", save_steps=1,
            gradient_accumulation_steps=2, **POLICIES["ramp"], **kwargs,
        )  # fmt: skip
        return quiet(EfficientTrainer(model=tiny_resnet(), args=args, train_dataset=Pictures()))

    whole = run()
    whole.train()
    resumed = run()
    in_mid_run = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[2]
    resumed.train(resume_from_checkpoint=str(in_mid_run))
    assert weights_equal(whole.model, resumed.model)


def test_data_skip_can_be_ignored_as_in_stock(whole_runs, tmp_path):
    checkpoint = Path(whole_runs["ramp"].args.output_dir) / "checkpoint-3"
    trainer = make(tmp_path, "ramp", ignore_data_skip=True, saves=False)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.epoch > 0


def test_throughput_counts_this_call_only(whole_runs, tmp_path):
    checkpoint = Path(whole_runs["ramp"].args.output_dir) / "checkpoint-4"
    seen = json.loads((checkpoint / STATE_NAME).read_text())["parts"]["accumulation"]["cursor"]["samples_seen"]
    trainer = make(tmp_path, "ramp", saves=False)
    metrics = trainer.train(resume_from_checkpoint=str(checkpoint)).metrics
    assert metrics["train_samples_per_second"] == pytest.approx((100 - seen) / metrics["train_runtime"], rel=0.01)


def test_a_checkpoint_of_stock_trainer_can_be_taken_on(tmp_path):
    """Same data from there, then k varies; at constant k the end is that of stock."""

    def args(cls=None, **kwargs):
        common = {"gradient_accumulation_steps": 3, "save_strategy": "steps", "save_steps": 1}
        return arguments(tmp_path, **({"cls": cls} if cls else {}), **(common | kwargs))

    stock = quiet(Trainer(model=tiny_gpt2(dropout=0.1), args=args(TrainingArguments), train_dataset=Rows()))
    stock.train()
    for step in (2, 6, 8):  # in the first epoch, at its end, in the second
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        ours = quiet(
            EfficientTrainer(
                model=tiny_gpt2(dropout=0.1), train_dataset=Rows(),
                args=args(accumulation_policy="ramp", accumulation_ramp="0:3", save_strategy="no"),
            )
        )  # fmt: skip
        ours.train(resume_from_checkpoint=checkpoint)
        assert weights_equal(stock.model, ours.model), step
        varied = quiet(
            EfficientTrainer(
                model=tiny_gpt2(dropout=0.1), train_dataset=Rows(), args=args(**POLICIES["ramp"], save_strategy="no")
            )
        )
        varied.train(resume_from_checkpoint=checkpoint)
        assert varied.state.log_history[-1]["samples_seen"] == 100


def test_another_setup_is_refused(whole_runs, tmp_path):
    checkpoint = str(Path(whole_runs["ramp"].args.output_dir) / "checkpoint-3")
    # Another split of the batch is not refused: tests/test_resume_split.py.
    with pytest.raises(ValueError, match="'fixed' cannot resume a checkpoint in which k has varied"):
        make(tmp_path, "ramp", accumulation_policy="fixed", accumulation_ramp=None).train(checkpoint)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken, ignore=shutil.ignore_patterns(MANIFEST_NAME))
    state = json.loads((broken / STATE_NAME).read_text())
    (broken / STATE_NAME).write_text(json.dumps(state | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        make(tmp_path, "ramp").train(resume_from_checkpoint=str(broken))


def test_saved_arguments_hold_the_reference(whole_runs):
    saved = Path(whole_runs["ramp"].args.output_dir) / "checkpoint-3" / "training_args.bin"
    assert torch.load(saved, weights_only=False).gradient_accumulation_steps == 3
