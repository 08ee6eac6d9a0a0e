"""Where the parts meet `Trainer`: what a review of the redesign found, each as a test of its kind."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import Rows, arguments, quiet, tiny_gpt2
from transformers import Trainer, TrainerCallback
from transformers.optimization import get_scheduler

from hf_trainopt import EfficientTrainer, EfficientTrainerMixin
from hf_trainopt.accumulation.schedule import DataIndexedLR
from hf_trainopt.core.state import STATE_NAME
from hf_trainopt.metrics import MemoryCallback, TargetCallback, ThroughputCallback
from hf_trainopt.metrics.base import MeasurementCallback, MeteredCallback
from hf_trainopt.placement.part import PLAN_NAME
from hf_trainopt.reliability.manifest import MANIFEST_NAME


RAMP = {"accumulation_policy": "ramp", "accumulation_ramp": "0:1,0.5:3", "gradient_accumulation_steps": 2}
SAVING = {"save_strategy": "steps", "save_steps": 2}


def make(folder, cls=EfficientTrainer, callbacks=(), rows=None, **kwargs):
    args = arguments(folder, **{**RAMP, **kwargs})
    data = Rows() if rows is None else rows
    return quiet(cls(model=tiny_gpt2(), args=args, train_dataset=data, callbacks=list(callbacks)))


def last_checkpoint(folder: Path) -> str:
    return str(max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])))


# ---- Which checkpoint ----------------------------------------------------------------------------------------------


def test_a_class_below_may_choose_the_checkpoint(tmp_path):
    class Resuming(Trainer):
        chosen: str | None = None

        def train(self, resume_from_checkpoint=None, *args, **kwargs):
            return super().train(self.chosen or resume_from_checkpoint, *args, **kwargs)

    class Efficient(EfficientTrainerMixin, Resuming): ...

    whole = make(tmp_path / "a", **SAVING, num_train_epochs=3)
    whole.train()
    first = str(min((tmp_path / "a").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])))
    resumed = make(tmp_path / "b", cls=Efficient, num_train_epochs=3)
    resumed.chosen = first
    resumed.train()
    assert resumed.state.global_step == whole.state.global_step
    assert resumed.trainopt.accumulation.cursor.samples_seen == whole.trainopt.accumulation.cursor.samples_seen


def test_a_varied_k_is_refused_whatever_looks_for_the_batch_size(tmp_path):
    make(tmp_path, **SAVING).train()
    fixed = {"accumulation_policy": "fixed", "accumulation_ramp": None}
    with pytest.raises(ValueError, match="'fixed' cannot resume a checkpoint in which k has varied"):
        make(tmp_path, **fixed, auto_find_batch_size=True).train(resume_from_checkpoint=last_checkpoint(tmp_path))


@pytest.mark.parametrize("kind", ["lambda", "recursive"])
def test_a_schedule_can_be_put_back_within_a_run(kind):
    def fresh():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        if kind == "lambda":
            inner = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=20)
        else:
            inner = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return DataIndexedLR(inner)

    def go(schedule, *positions):
        for position in positions:
            schedule.set_position(position, 1.0)
            schedule.step()
        return schedule.get_last_lr()

    schedule = fresh()
    go(schedule, 1, 2.5, 4)
    kept = copy.deepcopy((schedule.state_dict(), schedule.optimizer.state_dict()))
    at = schedule.get_last_lr()
    go(schedule, 6, 9)
    schedule.optimizer.load_state_dict(kept[1])
    schedule.load_state_dict(kept[0])
    assert schedule.get_last_lr() == at
    assert go(schedule, 5, 7) == go(fresh(), 1, 2.5, 4, 5, 7)


# ---- Measurements --------------------------------------------------------------------------------------------------


def test_a_callback_of_the_users_goes_on_with_our_clock(tmp_path):
    make(tmp_path, **SAVING, measurements=["throughput", "memory"]).train()
    checkpoint = str(min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])))
    before = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["log_history"][-1]["train_time_s"]
    for own in (ThroughputCallback(), TargetCallback("loss", 1.0)):
        resumed = make(tmp_path / "again", callbacks=[own], measurements=["memory"])
        resumed.train(resume_from_checkpoint=checkpoint)
        assert not own.is_partial
        assert own.meter.reading.seconds > before


def test_lines_have_their_keys_in_one_order(tmp_path):
    trainer = make(tmp_path, measurements=["throughput", "memory"], max_steps=3)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "train_runtime" in line]
    keys = [key for key in line if key in ("train_time_s", "peak_memory_gib")]
    assert keys == ["train_time_s", "peak_memory_gib"]
    added = list(trainer.trainopt.measurements.log_values({"loss": 1.0}))
    each = [callback.values(trainer.args, trainer.state, {"loss": 1.0}) for callback in trainer.measurements]
    assert added == list(dict.fromkeys(key for values in each for key in values))


def test_a_measuring_callback_sees_the_users_accumulation(tmp_path):
    seen = []

    class Looks(MeasurementCallback):
        def begin(self, args, state, saved, **kwargs): ...

        def values(self, args, state, logs):
            seen.append(args.gradient_accumulation_steps)
            return {}

    make(tmp_path, callbacks=[Looks()], max_steps=2).train()
    assert set(seen) == {2}


def test_ours_are_added_and_removed_as_those_of_stock(tmp_path):
    class Mine(ThroughputCallback): ...

    trainer = make(tmp_path, measurements=["throughput", "memory"])
    trainer.add_callback(Mine())
    assert [type(callback) for callback in trainer.measurements] == [Mine, MemoryCallback]
    other = make(tmp_path, measurements=["throughput", "memory"])
    other.remove_callback(MeteredCallback)  # a base
    assert [type(callback) for callback in other.measurements] == [MemoryCallback]


def test_one_that_is_replaced_in_a_run_leaves_no_hook(tmp_path):
    class Replaces(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.add_callback(ThroughputCallback())

    trainer = make(tmp_path, callbacks=[Replaces()], measurements=["throughput"])
    trainer.train()
    assert not trainer.model._forward_pre_hooks
    assert not trainer.model._forward_hooks


# ---- Placement -----------------------------------------------------------------------------------------------------


def test_the_peaks_of_a_short_run_are_among_its_results(tmp_path):
    trainer = make(tmp_path, checkpoint_placement="all", max_steps=2, logging_steps=100)
    metrics = trainer.train().metrics
    assert metrics["measured_peak_gib"] == pytest.approx(metrics["predicted_peak_gib"], rel=0.2)


def test_a_plan_of_another_format_is_made_anew(tmp_path, caplog):
    options = {**SAVING, "checkpoint_placement": "all"}
    make(tmp_path, **options).train()
    checkpoint = Path(last_checkpoint(tmp_path))
    state = json.loads((checkpoint / STATE_NAME).read_text())
    state["parts"]["placement"]["plan"]["format"] = 99
    (checkpoint / STATE_NAME).write_text(json.dumps(state))
    (checkpoint / MANIFEST_NAME).unlink()
    (tmp_path / PLAN_NAME).unlink()
    trainer = make(tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "This plan differs from the resumed run's" in caplog.text
    assert trainer.placement_plan.policy == "all"


def test_a_class_may_set_the_schedule_before_our_constructor(tmp_path):
    class Early(EfficientTrainer):
        def __init__(self, *args, **kwargs):
            self.lr_scheduler = None
            super().__init__(*args, **kwargs)

    make(tmp_path, cls=Early, max_steps=2).train()
