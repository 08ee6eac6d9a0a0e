"""Any sequence of k: each sample once an epoch, gradients of one big batch, schedules that end where they should."""

import math

import pytest
import torch
from helpers import AnyK, Recorder, Rows, Stream, arguments, quiet, tiny_gpt2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from hf_trainopt import EfficientTrainer


sequences = st.lists(st.integers(1, 7), min_size=40, max_size=40)
relaxed = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Spy(AnyK):
    """Records what runs in each window (micro-batches, or the halves of one that is measured), and its k."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.windows: list[list[dict]] = [[]]
        self.sizes: list[int] = []

    def training_step(self, model, inputs, *args, **kwargs):
        self.sizes.append(len(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.windows[-1].append({key: value.clone() for key, value in inputs.items()})
        if self.accelerator.sync_gradients:
            self.windows.append([])
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(tmp_path, sequence, dataset=None, model=None, **kwargs):
    recorder = Recorder()
    trainer = quiet(
        Spy(
            model=model or tiny_gpt2(dtype=torch.float64),
            args=arguments(tmp_path, **({"gradient_accumulation_steps": 4, "max_grad_norm": 0.0} | kwargs)),
            train_dataset=dataset or Rows(numbered=True),
            callbacks=[recorder],
            sequence=sequence,
        )
    )
    trainer.train()
    assert trainer.windows.pop() == []
    return trainer, recorder


def samples_of(windows) -> list[int]:
    return [int(i) for window in windows for batch in window for i in batch["input_ids"][:, 0]]


@given(sequences)
@relaxed
def test_each_sample_once_an_epoch(tmp_path, sequence):
    trainer, recorder = train(tmp_path, sequence)
    seen = samples_of(trainer.windows)
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50))
    assert seen[:50] != seen[50:]  # shuffled anew
    assert recorder.epochs[-1] == trainer.state.epoch == 2.0
    assert recorder.epochs == sorted(recorder.epochs)
    assert trainer.state.global_step == trainer.state.max_steps == len(trainer.windows)
    assert sum(trainer.sizes) == 34
    assert recorder.substeps == sum(map(len, trainer.windows)) - len(trainer.windows)
    assert trainer.state.log_history[-1]["samples_seen"] == 100


@given(sequences)
@relaxed
def test_a_window_has_the_gradient_of_one_big_batch(tmp_path, sequence):
    """Weights change from step to step: the reference repeats each step from the gradients of the whole window."""
    for gradients, expected in window_gradients(tmp_path, sequence):
        for found, gradient in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-12)


def window_gradients(tmp_path, sequence, **kwargs):
    """Gradients of each window of a run, and those of one big batch of the same rows. `benchmarks/gpu` uses it too."""
    trainer, recorder = train(tmp_path, sequence, num_train_epochs=1, learning_rate=0.0, weight_decay=0.0, **kwargs)
    model = tiny_gpt2(dtype=torch.float64).to(trainer.args.device)
    for window, gradients in zip(trainer.windows, recorder.gradients, strict=True):
        whole = {key: torch.cat([batch[key] for batch in window]) for key in window[0]}
        model.zero_grad()
        model(**whole).loss.backward()
        yield gradients, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_trainer_takes_the_statistics_of_its_slow_twin(tmp_path, k):
    """tr Σ and |G|² from the real loop with unequal token counts, against all gradients one by one.

    They are those of micro-batches, or of the halves of the only one.
    """
    from hf_trainopt.accumulation.noise_scale import estimate_noise

    compared, unequal = 0, 0
    for statistics, window, expected, counts in statistics_and_twin(tmp_path, k):
        assert estimate_noise(statistics) == pytest.approx(expected, rel=2e-4)
        assert statistics.num_items == sum(counts)
        assert statistics.num_samples == sum(len(batch["labels"]) for batch in window)
        compared, unequal = compared + 1, unequal + (len(set(counts)) > 1)
    assert compared > 4
    assert unequal > 3


def statistics_and_twin(tmp_path, k, **kwargs):
    """Statistics of each window of a run, its micro-batches, what the twin says, and the tokens that count.

    `benchmarks/gpu` uses it too.
    """
    from reference import estimate_noise_by_pairs

    found = []

    class Listening(Spy):
        def set_initial_training_values(self, *args, **kwargs):
            values = super().set_initial_training_values(*args, **kwargs)
            update = self.trainopt.accumulation.controller.tracker.update
            self.trainopt.accumulation.controller.tracker.update = lambda statistics, **kwargs: (
                found.append(statistics),
                update(statistics, **kwargs),
            )[1]
            return values

    args = arguments(
        tmp_path, num_train_epochs=1, learning_rate=0.0, weight_decay=0.0, max_grad_norm=0.01, noise_scale_interval=1,
        **kwargs,
    )  # fmt: skip
    trainer = quiet(Listening(model=tiny_gpt2(), args=args, train_dataset=Rows(numbered=True), sequence=[k]))
    trainer.train()
    assert trainer.trainopt.accumulation.measures
    model = tiny_gpt2(dtype=torch.float64).to(trainer.args.device)
    windows = [window for window in trainer.windows if len(window) >= 2]
    assert len(found) == len(windows)
    for statistics, window in zip(found, windows, strict=True):
        gradients, counts = [], []
        for batch in window:
            model.zero_grad()
            model(**batch).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).cpu())
            counts.append(int((batch["labels"][:, 1:] != -100).sum()))
        expected = estimate_noise_by_pairs(torch.stack(gradients).numpy(), torch.tensor(counts).numpy())
        yield statistics, window, expected, counts


@given(sequences)
@relaxed
def test_the_schedule_follows_the_data(tmp_path, sequence):
    trainer, recorder = train(tmp_path, sequence, warmup_steps=0, lr_batch_scaling="none")
    budget = 2 * math.ceil(17 / 4) * 4
    position, in_epoch = 0, 0
    for size, rate in zip(trainer.sizes, recorder.learning_rates, strict=True):
        assert rate == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * position / budget)), abs=1e-12)
        position, in_epoch = position + size, in_epoch + size
        if in_epoch == 17:
            position, in_epoch = budget // 2, 0  # a short reference window counts as a whole one
    # The rate that the next step would have: zero, the end of the cosine.
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(("rule", "exponent"), [("sqrt", 0.5), ("linear", 1.0)])
def test_the_rate_is_scaled_by_the_window_it_is_used_for(tmp_path, rule, exponent):
    trainer, recorder = train(
        tmp_path, [4, 2, 2, 6, 3, 8, 3, 6], lr_batch_scaling=rule, lr_scheduler_type="constant", warmup_steps=0
    )
    assert [len(window) for window in trainer.windows] == [4, 2, 2, 6, 3, 8, 3, 6]
    for window, rate in zip(trainer.windows, recorder.learning_rates, strict=True):
        assert rate == pytest.approx(1e-2 * (len(window) / 4) ** exponent)


def test_max_steps_is_a_budget_of_reference_windows(tmp_path):
    for sequence in ([4], [1], [7, 2, 5]):
        trainer, _ = train(tmp_path, sequence, max_steps=6)
        assert sum(trainer.sizes) == 4 * 6 - (4 - 17 % 4)  # one short window, as in stock
        assert trainer.state.global_step == trainer.state.max_steps == len(trainer.windows)


@pytest.mark.parametrize("length", [50, 24])
def test_streams_without_a_length(tmp_path, length):
    """A stream that ends is begun again until the budget is used up; windows never cross its end."""
    stream = Stream(length, numbered=True)
    trainer, _ = train(tmp_path, [3, 5, 2], dataset=stream, max_steps=9)
    taken = samples_of(trainer.windows)
    micro_batches = math.ceil(length / 3)
    short = 0 if length == 50 else -micro_batches % 4
    whole_epochs = (9 * 4) // (micro_batches + short)
    expected = []
    budget = 9 * 4
    while budget > 0:
        count = min(budget, micro_batches)
        expected += list(range(min(length, count * 3)))
        budget -= -(-count // 4) * 4
    assert taken == expected
    assert whole_epochs >= 1


def test_drop_last(tmp_path):
    trainer, _ = train(tmp_path, [3, 1, 4, 2], dataloader_drop_last=True, num_train_epochs=1)
    seen = samples_of(trainer.windows)
    assert len(seen) == len(set(seen)) == 48
    assert trainer.state.epoch == 1.0


def test_throughput_counts_samples_not_steps(tmp_path):
    trainer, _ = train(tmp_path, [1, 7, 3])
    entry = trainer.state.log_history[-1]
    assert entry["train_samples_per_second"] == pytest.approx(100 / entry["train_runtime"], rel=0.01)


def test_tokens_and_flops_are_counted_once(tmp_path):
    trainer, _ = train(tmp_path, [1, 5, 2], include_num_input_tokens_seen="all")
    assert trainer.state.num_input_tokens_seen == 100 * 12
    single, _ = train(tmp_path, [4], include_num_input_tokens_seen="all")
    assert trainer.state.total_flos == single.state.total_flos > 0


def test_a_callback_sees_the_reference_steps(tmp_path):
    _, recorder = train(tmp_path, [1, 5, 2])
    assert recorder.accumulation_steps_seen == {4}


def test_a_callback_can_stop_the_epoch_and_the_training(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = quiet(
        AnyK(model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=Rows(), callbacks=[Stop()], sequence=[2, 3, 1])
    )
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("policy", ["noise_scale", "goodput"])
def test_the_built_in_policies_train(tmp_path, policy):
    args = arguments(tmp_path, accumulation_policy=policy, gradient_accumulation_steps=4, num_train_epochs=6)
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows()))
    trainer.train()
    assert trainer.state.log_history[-1]["samples_seen"] == 300
    assert trainer.trainopt.accumulation.controller.tracker.num_windows > 4
