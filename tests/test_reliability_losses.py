"""Windows whose loss or gradients are not finite: only the schedule and the data move on."""

import json

import pytest
import torch
from helpers import Pictures, Recorder, arguments, quiet, tiny_resnet, weights_equal
from precision_helpers import Points, pretend, scales_fp16
from precision_helpers import make as half_run
from reliability_helpers import GOODPUT, checkpoints, make

from hf_trainopt import EfficientTrainer
from hf_trainopt.reliability import TrainingDivergedError, inspect_checkpoint
from hf_trainopt.reliability.losses import last_good_step


class Poisoned(EfficientTrainer):
    """The loss of some micro-batches (counted from 1 over the run) is NaN, or its gradient alone is."""

    bad: set = frozenset()
    by_gradient = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.count = getattr(self, "count", 0) + 1
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.count not in self.bad:
            return loss
        if not self.by_gradient:
            return loss * float("nan")
        weight = next(model.parameters())
        return loss + (weight.flatten()[0] * 0.0).sqrt() * 0.0  # sqrt has an infinite slope at zero


def poisoned(folder, bad, by_gradient=False, callbacks=(), **kwargs):
    trainer = make(
        folder, Poisoned, callbacks=callbacks, **({"save_strategy": "no", "max_skipped_windows": 10} | kwargs)
    )
    trainer.bad, trainer.by_gradient = set(bad), by_gradient
    return trainer


def kept(trainer):
    """Weights and the whole state of the optimizer, copied."""
    state = trainer.optimizer.state_dict()["state"]
    return (
        [parameter.detach().clone() for parameter in trainer.model.parameters()],
        {i: {k: torch.as_tensor(v).clone() for k, v in entry.items()} for i, entry in state.items()},
    )


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True)) and all(
        torch.equal(first[1][i][k], second[1][i][k]) for i in second[1] for k in second[1][i] if i in first[1]
    )


class Snapshots(Recorder):
    def __init__(self):
        super().__init__()
        self.states, self.trainer = [], None

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.states.append(kept(self.trainer))


@pytest.mark.parametrize(
    ("optim", "by_gradient", "max_grad_norm"),
    [
        ("adamw_torch_fused", False, 1.0),
        ("adamw_torch_fused", True, 0.0),
        ("adamw_torch", True, 1.0),
        ("sgd", False, 0.0),
    ],
)
def test_a_bad_window_changes_nothing_but_the_schedule(optim, by_gradient, max_grad_norm, tmp_path):
    """Windows of 3: the 2nd and 5th are bad (the first of all too, where the optimizer has no state yet)."""
    snapshots, plain = Snapshots(), Recorder()
    settings = {"optim": optim, "max_grad_norm": max_grad_norm, "logging_nan_inf_filter": not by_gradient}
    trainer = poisoned(tmp_path, [1, 5, 15], by_gradient, callbacks=[snapshots], **settings)
    snapshots.trainer = trainer
    trainer.train()
    states = snapshots.states
    assert same(states[0], states[1])
    assert same(states[3], states[4])
    for step in (2, 3, 5):
        assert not same(states[step - 1], states[step]), step
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    poisoned(tmp_path, [], callbacks=[plain], **settings).train()
    assert snapshots.learning_rates == plain.learning_rates
    assert snapshots.epochs == plain.epochs
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_windows") for entry in log][:6] == [1, 2, 2, 2, 3, 3]
    assert trainer.state.log_history[-1]["skipped_windows"] == 3
    if not by_gradient:
        assert all(entry["loss"] == entry["loss"] for entry in log)


def test_in_a_row_they_end_the_run(tmp_path):
    trainer = poisoned(tmp_path, range(13, 1000), save_strategy="steps", max_skipped_windows=3, save_total_limit=1)
    with pytest.raises(TrainingDivergedError) as raised:
        trainer.train()
    # Steps 5, 6, 7 are bad. What step 4 left may be what broke them, and with it checkpoint-3 went.
    assert "of 3 optimizer steps in a row (max_skipped_windows) were not finite, since step 5" in str(raised.value)
    assert "there is no checkpoint from before the last good step (" in str(raised.value)

    trainer = poisoned(tmp_path / "all", range(13, 1000), save_strategy="steps", max_skipped_windows=3)
    with pytest.raises(TrainingDivergedError, match=r"the last good checkpoint is .*checkpoint-3: resume from it"):
        trainer.train()
    trainer = poisoned(tmp_path / "none", range(4, 1000), max_skipped_windows=4)
    with pytest.raises(TrainingDivergedError, match="since step 2; there is no complete checkpoint; lower"):
        trainer.train()


def test_the_good_checkpoint_is_not_pushed_out_by_those_between_bad_windows(tmp_path):
    trainer = poisoned(
        tmp_path, range(13, 1000), save_strategy="steps", max_skipped_windows=6, save_total_limit=2,
    )  # fmt: skip
    with pytest.raises(TrainingDivergedError, match=r"the last good checkpoint is .*checkpoint-3: resume from it"):
        trainer.train()
    assert "checkpoint-3" in checkpoints(tmp_path)
    assert len(checkpoints(tmp_path)) <= 3
    assert inspect_checkpoint(str(tmp_path / "checkpoint-3")).fault is None


def test_the_count_survives_a_resume(tmp_path):
    """4 bad ones, of which the last ones are trained again."""
    trainer = poisoned(tmp_path, [2, 8, 11, 14], save_strategy="steps", max_steps=10)
    trainer.train()
    assert trainer.state.log_history[-1]["skipped_windows"] == 4
    resumed = poisoned(tmp_path, [], max_steps=10)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.log_history[-1]["skipped_windows"] == 3
    saved = json.loads((tmp_path / "checkpoint-4" / "trainopt_state.json").read_text())
    assert saved["parts"]["skipped_steps"] == {"total": 3, "in_a_row": 2}


@pytest.mark.parametrize("limit", [10, 0])
def test_without_the_check_a_run_is_lost_as_in_stock(limit, tmp_path):
    """So that the tests above can fail."""
    trainer = poisoned(tmp_path, [5], max_skipped_windows=limit)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters()) == (limit > 0)
    assert ("skipped_windows" in trainer.state.log_history[-1]) == (limit > 0)


def listen(trainer):
    """Return what `update` of the noise scale returns in the run to come, and the samples of each window."""
    updates, skips = [], []
    begin = trainer.set_initial_training_values

    def set_initial_training_values(*args, **kwargs):
        values = begin(*args, **kwargs)
        tracker = trainer.trainopt.accumulation.controller.tracker
        update, skip = tracker.update, tracker.skip
        tracker.update = lambda statistics, **kwargs: updates.append(update(statistics, **kwargs))
        tracker.skip = lambda samples: (skips.append(samples), skip(samples))  # `update` calls it too
        return values

    trainer.set_initial_training_values = set_initial_training_values
    return updates, skips


def num_measurable(samples):
    """Windows of two micro-batches (of 3) at least: one cannot tell its noise, and the last of an epoch may be one."""
    return sum(number > 3 for number in samples)


@pytest.mark.parametrize("by_gradient", [False, True])
def test_adaptive_k_counts_the_samples_and_not_the_statistics(by_gradient, tmp_path):
    """Every window is measured; the bad ones are counted as samples, and left out of the running noise scale."""
    settings = GOODPUT | {"noise_scale_interval": 1}
    trainer = poisoned(tmp_path, [4, 15, 16], by_gradient, **settings)
    updates, skips = listen(trainer)
    trainer.train()
    count = trainer.state.log_history[-1]["skipped_windows"]
    assert count in (2, 3)
    assert len(skips) == trainer.state.global_step
    assert sum(skips) == trainer.state.log_history[-1]["samples_seen"] == 100
    assert (
        sum(updates) == trainer.trainopt.accumulation.controller.tracker.num_windows == num_measurable(skips) - count
    )
    noise = trainer.trainopt.accumulation.controller.noise
    assert noise is None or noise.value == noise.value
    assert trainer.state.epoch == 2.0
    assert trainer.state.log_history[-2]["learning_rate"] >= 0


def test_a_bad_loss_with_good_gradients_is_not_measured_either(tmp_path):
    class Shifted(Poisoned):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.count = getattr(self, "count", 0) + 1
            loss = EfficientTrainer.compute_loss(self, model, inputs, *args, **kwargs)
            return loss + float("inf") if self.count in self.bad else loss

    trainer = make(tmp_path, Shifted, save_strategy="no", **(GOODPUT | {"noise_scale_interval": 1}))
    trainer.bad = {4}
    _, skips = listen(trainer)
    trainer.train()
    assert trainer.state.log_history[-1]["skipped_windows"] == 1
    assert trainer.trainopt.accumulation.controller.tracker.num_windows == num_measurable(skips) - 1
    assert trainer.trainopt.accumulation.controller.tracker.num_dropped == 1


def test_batch_norm_stays_clean(tmp_path):
    class Rotten(Pictures):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item | {"pixel_values": item["pixel_values"] * float("nan")} if index == 5 else item

    buffers = []

    class Buffers(Recorder):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            buffers.append({name: value.clone() for name, value in model.named_buffers()})

    args = arguments(
        tmp_path, per_device_train_batch_size=4, remove_unused_columns=False,
        gradient_accumulation_steps=2, accumulation_policy="fixed", max_grad_norm=1.0, num_train_epochs=3,
        max_skipped_windows=10,
    )  # fmt: skip
    trainer = quiet(EfficientTrainer(model=tiny_resnet(), args=args, train_dataset=Rotten(), callbacks=[Buffers()]))
    trainer.train()
    assert trainer.state.log_history[-1]["skipped_windows"] == 3  # once an epoch
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    unchanged = [
        step
        for step in range(1, len(buffers))
        if all(torch.equal(buffers[step][name], buffers[step - 1][name]) for name in buffers[step])
    ]
    assert len(unchanged) >= 2
    # The number of batches that the statistics were made of lacks those of the bad windows.
    tracked = {int(v) for name, v in trainer.model.named_buffers() if name.endswith("num_batches_tracked")}
    assert max(tracked) < 3 * 6


def test_resumed_after_bad_windows_is_the_same_run(tmp_path):
    bad = [4, 16, 17]
    whole = poisoned(tmp_path / "whole", bad, save_strategy="steps", **GOODPUT)
    whole.train()
    for name in checkpoints(tmp_path / "whole")[1:6:2]:
        resumed = poisoned(tmp_path / "resumed", bad, **GOODPUT)
        state = json.loads((tmp_path / "whole" / name / "trainopt_state.json").read_text())["parts"]["accumulation"]
        resumed.count = state["cursor"]["samples_seen"] // 3
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / name))
        assert weights_equal(whole.model, resumed.model), name
        assert resumed.state.log_history[-1]["skipped_windows"] == whole.state.log_history[-1]["skipped_windows"]


def test_what_cannot_skip_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        "hf_trainopt.reliability.skipped_steps.obstacle_to_skipping", lambda *args: "its steps are not to be had"
    )
    poisoned(tmp_path, [5], max_steps=3).train()
    assert "max_skipped_windows has no effect: its steps are not to be had." in caplog.text


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="max_skipped_windows is -1; it must be at least 1, or 0 for no check"):
        arguments(tmp_path, max_skipped_windows=-1)
    assert last_good_step(6, 3) == 3


def test_under_a_gradient_scaler_a_bad_loss_is_a_skipped_window(tmp_path, monkeypatch):
    """fp16 on the CPU: the scaler skips what overflows in the backward pass; a loss that is NaN is more than that."""
    pretend(monkeypatch, scales_fp16())
    factors = [1.0] * 32
    factors[6], factors[17] = float("nan"), 1e9  # windows of 4 rows: the 2nd, the 5th
    trainer = half_run(tmp_path, Points(factors), precision="fp16", scaler={"init_scale": 2.0**8})
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_windows", 0) for entry in log] == [0] + [1] * 7
    assert [entry["skipped_steps"] for entry in log] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
