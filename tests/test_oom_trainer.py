"""Out of memory in training on one rank: the window is repeated in smaller pieces, and nothing else changes."""

import random
import weakref

import numpy as np
import pytest
import torch
from helpers import Pictures, Rows, arguments, quiet, tiny_gpt2, tiny_resnet, weights_equal
from oom_helpers import PLACES, Memory, Recording, Seen, SwitchAt, make
from test_parity import CLOCK_KEYS
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_trainopt import EfficientTrainer
from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.metrics import GradientStatisticsCallback
from hf_trainopt.placement.errors import PlacementError


def train(trainer, **kwargs):
    trainer.train(**kwargs)
    return trainer


def lines(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """The run that begins with the smaller micro-batch, of stock `Trainer`."""
    args = arguments(
        tmp_path_factory.mktemp("smaller"), TrainingArguments, per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    return train(quiet(Trainer(model=tiny_gpt2(), args=args, train_dataset=Rows(50, numbered=True))))


# ---- Weights --------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_it_ends_like_a_run_that_began_with_the_smaller_micro_batch(smaller, place, tmp_path, caplog):
    trainer = make(tmp_path)
    memory = Memory(trainer.model, most_rows=2, places=[place])
    train(trainer)
    assert len(memory.failures) == 1
    assert weights_equal(trainer.model, smaller.model)
    for ours, theirs in zip(lines(trainer), lines(smaller), strict=True):
        # Two rows at the end of an epoch are a micro-batch of it, one of 13 or one of 25.
        assert {key: ours[key] for key in theirs if key != "epoch"} == {
            k: v for k, v in theirs.items() if k != "epoch"
        }
        assert ours["accumulation_steps"] == 4  # doubled
        assert ours["micro_batch_size"] == 2
        assert ours["effective_batch_size"] in (8, 2)
    assert "Step 1 ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)" in caplog.text
    assert "micro-batches of 2 samples instead of 4, now 2 for each of" in caplog.text


@pytest.mark.parametrize("micro_step", [1, 2])
def test_any_micro_step_of_the_first_window(smaller, micro_step, tmp_path):
    trainer = make(tmp_path)
    Memory(trainer.model, fails_at=[micro_step], seed=micro_step)
    assert weights_equal(train(trainer).model, smaller.model)


@pytest.mark.parametrize("seed", range(6))
def test_random_micro_steps_leave_no_trace(seed, tmp_path):
    """Up to two failures anywhere, dropout on: as if the size had been changed between two steps by hand."""
    fails_at = sorted(random.Random(seed).sample(range(1, 25), 2))
    settings = {"batch": 8, "k": 2, "dropout": 0.1, "rows": Rows(48, numbered=True), "num_train_epochs": 4}
    trainer = make(tmp_path, callbacks=[seen := Seen()], **settings)
    memory = Memory(trainer.model, fails_at=fails_at, seed=seed)
    train(trainer)
    assert memory.failures == fails_at
    sizes = [line.get("micro_batch_size", 8) for line in lines(trainer)]
    assert sizes[-1] == 2
    # Both may be in one window.
    switches = [SwitchAt(sizes.index(size), size) for size in (4, 2) if size in sizes]
    again = make(tmp_path, callbacks=[seen_again := Seen(), *switches], **settings)
    train(again)
    assert weights_equal(trainer.model, again.model)
    assert all(torch.equal(a, b) for a, b in zip(seen.weights, seen_again.weights, strict=True))
    for ours, theirs in zip(lines(trainer), lines(again), strict=True):
        assert ours == theirs


def test_every_sample_once_and_the_same_global_batches(tmp_path):
    whole = train(make(tmp_path, batch=8, k=1))
    trainer = make(tmp_path, batch=8, k=1)
    memory = Memory(trainer.model, fails_at=[2, 6, 18], seed=3)
    train(trainer)
    assert len(memory.failures) == 3
    flat = [[row for part in window for row in part] for window in trainer.windows]
    assert flat == [[row for part in window for row in part] for window in whole.windows]
    for epoch in (flat[:7], flat[7:]):
        assert sorted(row for window in epoch for row in window) == list(range(50))
    assert {max(map(len, window)) for window in trainer.windows} == {8, 4, 2, 1}
    for key in ("effective_batch_size", "samples_seen", "epoch", "step", "learning_rate"):
        assert [line[key] for line in lines(trainer)] == [line[key] for line in lines(whole)]
    for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_odd_micro_batches_and_mean_losses(tmp_path):
    """3 become 2 and 1, weighted by their samples: the gradient is that of the whole, whatever the loss is."""

    class Mean(torch.nn.Module):
        accepts_loss_kwargs = False

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(3 * 32 * 32, 8), torch.nn.Linear(8, 4)

        def forward(self, pixel_values, labels):
            logits = self.second(torch.tanh(self.first(pixel_values.flatten(1))))
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    def run(limit, **kwargs):
        args = arguments(
            tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2, remove_unused_columns=False,
            optim="sgd", auto_micro_batch=True, accumulation_policy="fixed", **kwargs,
        )  # fmt: skip
        trainer = quiet(EfficientTrainer(model=Mean().double(), args=args, train_dataset=Doubles()))
        Memory(trainer.model, most_rows=limit, layer="second", first="first")
        return train(trainer)

    class Doubles(Pictures):
        def __getitem__(self, index):
            return {"pixel_values": self.pixels[index].double(), "labels": self.labels[index]}

    whole, split = run(None), run(2)
    assert split.micro_batch_size == 2
    for a, b in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_running_statistics_are_put_back(tmp_path):
    """BatchNorm: the failed try must not be in its averages; the pieces are the batches that it sees from then on."""

    def run(batch, k, limit=None, **kwargs):
        args = arguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=k, remove_unused_columns=False,
            accumulation_policy="fixed", num_train_epochs=1, **kwargs,
        )  # fmt: skip
        trainer = quiet(EfficientTrainer(model=tiny_resnet(), args=args, train_dataset=Pictures(24)))
        memory = Memory(
            trainer.model, fails_at=limit or (), places=["backward"],
            layer="timm_model.layer4", first="timm_model.conv1.0",
        )  # fmt: skip
        return train(trainer), memory

    ours, memory = run(4, 2, limit=[2], auto_micro_batch=True)
    theirs, _ = run(2, 4)
    assert memory.failures == [2]
    assert ours.micro_batch_size == 2
    assert weights_equal(ours.model, theirs.model)  # buffers included
    unchecked, _ = run(4, 2, limit=[2], auto_micro_batch=True, max_skipped_windows=0)
    assert weights_equal(unchecked.model, theirs.model)


def test_with_a_placement_plan(smaller, tmp_path):
    """Recomputation is exact, and what it keeps of a failed pass is dropped: also where the recomputation fails."""
    for place in PLACES:
        trainer = make(tmp_path / place, memory_budget="85%", memory_rewrites="none")
        memory = Memory(trainer.model, fails_at=[2], places=[place])
        train(trainer)
        assert any(choice.recompute != "none" for choice in trainer.placement_plan.stages.values())
        assert memory.failures
        assert weights_equal(trainer.model, smaller.model)


def planned(folder, **kwargs):
    """Plan as a run would, and end it before its first step."""
    trainer = make(folder, memory_rewrites="none", max_steps=1, **kwargs)
    return train(trainer).placement_plan


def test_a_micro_batch_is_planned_for_a_budget(smaller, tmp_path, monkeypatch, caplog):
    """Where the whole one doesn't fit with everything recomputed, half of it is run from the start."""
    monkeypatch.setattr("hf_trainopt.placement.plan.run_planner.device_spec", lambda device: DEVICES["cpu"])
    stock = planned(tmp_path / "stock", auto_micro_batch=False, memory_budget="99.9%")
    budget = f"{stock.floor_peak_bytes - 1}B"
    with pytest.raises(PlacementError, match="no placement needs less"):
        planned(tmp_path / "refused", auto_micro_batch=False, memory_budget=budget)
    caplog.set_level("INFO", logger="hf_trainopt")
    args = {"memory_rewrites": "none", "memory_budget": budget, "save_strategy": "steps", "save_steps": 5}
    trainer = train(make(tmp_path / "ours", **args))
    assert trainer.micro_batch_size == 2
    assert trainer.placement_plan.predicted_peak_bytes < stock.floor_peak_bytes
    assert trainer.placement_plan.details["micro_batch_size"] == 2
    assert weights_equal(trainer.model, smaller.model)
    assert "Micro-batches of 2 samples are planned: 2 for each batch of the data loader" in caplog.text
    assert all(line["accumulation_steps"] == 4 for line in lines(trainer))
    # A resumed run goes on with it, and its plan is not made anew.
    caplog.clear()
    resumed = train(make(tmp_path / "ours", **args), resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-5"))
    assert "The placement is the resumed run's" in caplog.text
    assert resumed.micro_batch_size == 2
    # With more memory it isn't split any more, for nothing ran out.
    start = str(tmp_path / "ours" / "checkpoint-5")
    roomy = train(make(tmp_path / "ours", **{**args, "memory_budget": "1GiB"}), resume_from_checkpoint=start)
    assert roomy.micro_batch_size == 4
    assert roomy.trainopt.out_of_memory.state_dict() is None  # nor does a run resumed from this one split it
    caplog.clear()
    train(make(tmp_path / "ours", auto_micro_batch=False), resume_from_checkpoint=start)
    assert "had come down to" not in caplog.text
    assert weights_equal(resumed.model, trainer.model)


def test_a_micro_batch_that_fits_is_not_split(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_trainopt.placement.plan.run_planner.device_spec", lambda device: DEVICES["cpu"])
    plan = planned(tmp_path, memory_budget="1GiB")
    assert plan.is_stock
    assert plan.details["micro_batch_size"] == 4


def test_no_micro_batch_is_planned_where_it_would_be_another_step(tmp_path, monkeypatch):
    """A share of the peak is of the whole micro-batch's; a loss of the user's may do anything with a part."""
    monkeypatch.setattr("hf_trainopt.placement.plan.run_planner.device_spec", lambda device: DEVICES["cpu"])

    class Own(Recording):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    assert "micro_batch_size" not in planned(tmp_path / "share", memory_budget="95%").details
    assert "micro_batch_size" not in planned(tmp_path / "own", memory_budget="1GiB", cls=Own).details


@pytest.mark.parametrize("policy", ["all", "sqrt"])
def test_in_a_recomputation(smaller, policy, tmp_path):
    """It runs inside the backward pass."""
    trainer = make(tmp_path, checkpoint_placement=policy)
    calls = []

    def count(module, args, output):
        if isinstance(output, FakeTensor):
            return
        calls.append(torch._C._current_graph_task_id() >= 0)
        if calls[-1] and calls.count(True) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.model.transformer.h[0].mlp.c_fc.register_forward_hook(count)  # mlp itself is not run to its end
    train(trainer)
    assert trainer.micro_batch_size == 2
    assert weights_equal(trainer.model, smaller.model)


def test_random_numbers_of_all_kinds_are_drawn_again(tmp_path):
    drawn = []

    class Draws(Recording):
        def compute_loss(self, *args, **kwargs):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
            return super().compute_loss(*args, **kwargs)

    trainer = make(tmp_path, cls=Draws, num_train_epochs=1)
    Memory(trainer.model, fails_at=[2], places=["inputs"])
    train(trainer)
    assert drawn[0] == drawn[2]
    assert drawn[1] == drawn[3]
    assert len(set(drawn)) == len(drawn) - 2


# ---- What goes on around --------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        {"accumulation_policy": "fixed"},
        {"accumulation_policy": "goodput", "optimizer_step_cost": 2.0, "noise_scale_interval": 2},
    ],
)
def test_with_enough_memory_nothing_changes(policy, tmp_path):
    plain = train(make(tmp_path, dropout=0.1, auto_micro_batch=False, **policy))
    ours = train(make(tmp_path, dropout=0.1, **policy))
    assert weights_equal(plain.model, ours.model)
    added = {"accumulation_steps", "effective_batch_size", "samples_seen"}
    for a, b in zip(plain.state.log_history, ours.state.log_history, strict=True):
        keys = a.keys() - set(CLOCK_KEYS)
        assert {key: b[key] for key in keys} == {key: a[key] for key in keys}
        assert b.keys() - a.keys() <= added
    assert ours.trainopt.accumulation.controller is not None


def test_statistics_are_those_of_the_smaller_micro_batches(tmp_path):
    """Each piece counts with its own items and weight; the failed try does not count at all."""
    measured = {"measure_noise_scale": True, "noise_scale_interval": 1, "measurements": "throughput"}
    trainer = make(tmp_path, **measured)
    Memory(trainer.model, fails_at=[2])
    train(trainer)
    theirs = train(make(tmp_path, batch=2, k=4, **measured))
    assert weights_equal(trainer.model, theirs.model)
    for ours, other in zip(lines(trainer), lines(theirs), strict=True):
        for key in ("noise_scale", "noise_scale_low", "noise_scale_high", "samples_seen"):
            assert ours.get(key) == other.get(key), key
    assert "noise_scale" in lines(trainer)[-1]
    assert trainer.state.num_input_tokens_seen == theirs.state.num_input_tokens_seen
    assert trainer.state.total_flos == theirs.state.total_flos


def test_statistics_of_mean_losses_in_uneven_pieces(tmp_path):
    """Against the slow twin: 3 rows in pieces of 2 and 1 have twice the weight of one another."""
    from reference import estimate_noise_by_pairs

    from hf_trainopt.accumulation import estimate_noise
    from hf_trainopt.accumulation.sums import Proposal, local_sums, micro_batch_weights, pack_sums, unpack_sums

    rows, shares = [2, 1, 2, 1], [2 / 3, 1 / 3, 2 / 3, 1 / 3]
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 30, generator=generator, dtype=torch.float64) + 0.3
    weights = micro_batch_weights(rows, 1, False, shares=shares)
    assert weights == pytest.approx([1 / 3, 1 / 6, 1 / 3, 1 / 6])
    pieces = [weight * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    sums = local_sums([float(piece.square().sum()) for piece in pieces], rows, weights, 1.0)
    _, statistics = unpack_sums(pack_sums(Proposal(), 6, float(sum(pieces).square().sum()), sums).tolist())
    expected = estimate_noise_by_pairs(gradients.numpy(), np.array(rows))
    assert estimate_noise(statistics) == pytest.approx(expected)


def test_a_run_is_resumed_with_the_smaller_micro_batch(tmp_path):
    whole = make(tmp_path / "run", dropout=0.1, save_strategy="steps", save_steps=4)
    memory = Memory(whole.model, fails_at=[5])
    train(whole)
    assert memory.failures == [5]
    resumed = make(tmp_path / "resumed", dropout=0.1)
    memory = Memory(resumed.model, most_rows=2)
    train(resumed, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert memory.failures == []
    assert memory.steps > 20
    assert weights_equal(whole.model, resumed.model)
    assert [line["micro_batch_size"] for line in lines(resumed)[4:]] == [2] * 10


def test_resuming_without_it_is_warned_of(tmp_path, caplog):
    whole = make(tmp_path / "run", save_strategy="steps", save_steps=4, num_train_epochs=1)
    Memory(whole.model, fails_at=[1])
    train(whole)
    resumed = make(tmp_path / "resumed", auto_micro_batch=False, num_train_epochs=1)
    train(resumed, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert "had come down to micro-batches of 2 to fit into memory" in caplog.text


def test_another_run_of_the_same_trainer_begins_anew(tmp_path):
    trainer = make(tmp_path, num_train_epochs=1)
    memory = Memory(trainer.model, fails_at=[1])
    train(trainer)
    assert trainer.micro_batch_size == 2
    train(trainer)
    assert trainer.micro_batch_size == 4
    assert memory.failures == [1]


def test_activations_are_let_go_before_the_next_try(tmp_path):
    """The error, its frames and what they hold are gone."""
    trainer = make(tmp_path, num_train_epochs=1)
    alive: list[weakref.ref] = []
    at_begin: list[int] = []

    def begin(model, args):
        at_begin.append(sum(ref() is not None for ref in alive))

    trainer.model.register_forward_pre_hook(begin)
    Memory(trainer.model, fails_at=[1, 5], places=["backward"])
    trainer.model.transformer.h[0].register_forward_hook(
        lambda module, args, output: alive.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
    )
    train(trainer)
    assert len(alive) > 20
    assert set(at_begin) == {0}


def test_times_of_a_repeated_window_do_not_count(tmp_path):
    trainer = make(tmp_path, accumulation_policy="goodput", num_train_epochs=4)
    Memory(trainer.model, fails_at=[20])
    timer_entries = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            timer_entries.append(
                (trainer.micro_batch_size, len(trainer.trainopt.accumulation.controller.timer._plain))
            )

    trainer.add_callback(Look())
    train(trainer)
    first = next(index for index, (size, _) in enumerate(timer_entries) if size == 2)
    assert timer_entries[first - 1][1] > 0
    assert timer_entries[first][1] == 0
    assert timer_entries[-1][1] > 0


def test_a_loss_scale_is_not_touched(tmp_path, monkeypatch):
    from precision_helpers import Network, Points, pretend, scales_fp16
    from precision_helpers import make as make_half

    pretend(monkeypatch, scales_fp16())
    scaler = {"init_scale": 2.0**12, "growth_interval": 3}

    def run(batch, k, fails_at=(), **kwargs):
        model = Network()
        trainer = make_half(
            tmp_path, Points([1.0] * 48), model=model, scaler=scaler, precision="fp16",
            per_device_train_batch_size=batch, gradient_accumulation_steps=k, **kwargs,
        )  # fmt: skip
        memory = Memory(model, fails_at=fails_at, layer="inner", first="inner", places=["last gradient"])
        return train(trainer), memory

    ours, memory = run(4, 2, fails_at=[2], auto_micro_batch=True)
    theirs, _ = run(2, 4)
    assert memory.failures == [2]
    assert [line["loss_scale"] for line in lines(ours)] == [line["loss_scale"] for line in lines(theirs)]
    assert lines(ours)[-1]["loss_scale"] > 2.0**12
    assert weights_equal(ours.model, theirs.model)


# ---- What it cannot help with --------------------------------------


def test_a_single_sample_that_does_not_fit(tmp_path):
    trainer = make(tmp_path)
    memory = Memory(trainer.model, most_rows=0)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB.*\n.*with micro-batches of 1 samples.*single sample"):
        train(trainer)
    assert len(memory.failures) == 3


def test_packed_samples_cannot_be_split(tmp_path):
    class Packs(Recording):
        def get_batch_samples(self, *args, **kwargs):
            windows, items = super().get_batch_samples(*args, **kwargs)
            for micro_batch in windows[0].micro_batches if windows else ():
                micro_batch["cu_seq_lens_q"] = torch.arange(5)
            return windows, items

    trainer = make(tmp_path, cls=Packs)
    Memory(trainer.model, most_rows=2, places=["inputs"])
    with pytest.raises(torch.OutOfMemoryError, match="cannot be split: its samples are packed"):
        train(trainer)


def test_a_loader_that_makes_more_rows_than_it_was_told_to(tmp_path):
    trainer = make(tmp_path, batch=2)
    trainer.data_collator = lambda samples: default_data_collator(samples * 4)
    Memory(trainer.model, most_rows=4)
    with pytest.raises(torch.OutOfMemoryError, match="makes 8 rows where per_device_train_batch_size says 2"):
        train(trainer)


def test_a_loss_that_says_it_is_scaled_but_has_no_items(tmp_path):
    class Unnamed(Pictures):
        def __getitem__(self, index):
            return {"pixel_values": self.pixels[index], "target": self.labels[index]}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3 * 32 * 32, 4)

        def forward(self, pixel_values, target):
            return self.layer(pixel_values.flatten(1)), target

    args = arguments(
        tmp_path, auto_micro_batch=True, accumulation_policy="fixed", remove_unused_columns=False,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = quiet(
        EfficientTrainer(
            model=Model(), args=args, train_dataset=Unnamed(),
            compute_loss_func=lambda out, labels, num_items_in_batch: torch.nn.functional.cross_entropy(*out),
        )
    )  # fmt: skip
    Memory(trainer.model, most_rows=2, layer="layer", first="layer")
    with pytest.raises(torch.OutOfMemoryError, match="divided by the items of the step, but these are not known"):
        train(trainer)


def test_evaluation_is_not_confused_with_training(tmp_path):
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8)

    def fail(model, args, kwargs):
        if not model.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
        train(trainer)
    assert str(caught.value) == "CUDA out of memory."
    (note,) = caught.value.__notes__
    assert "lower per_device_eval_batch_size (8)" in note
    assert trainer.micro_batch_size == 4
    assert trainer.state.global_step == 2


def test_the_optimizer_step_is_not_confused_with_a_micro_batch(tmp_path):
    trainer = make(tmp_path)

    class Fails(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            optimizer.optimizer.register_step_pre_hook(self.fail)

        @staticmethod
        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.add_callback(Fails())
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(trainer)
    assert "The optimizer step ran out of memory" in caught.value.__notes__[0]
    assert trainer.micro_batch_size == 4


def test_other_errors_are_none_of_its_business(tmp_path):
    trainer = make(tmp_path)
    memory = Memory(trainer.model, fails_at=[2], error=lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        train(trainer)
    assert memory.failures == [2]


def test_without_the_argument_the_error_is_raised(tmp_path):
    trainer = make(tmp_path, auto_micro_batch=False)
    Memory(trainer.model, fails_at=[2])
    with pytest.raises(torch.OutOfMemoryError):
        train(trainer)


@pytest.mark.parametrize(
    "error",
    [
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        MemoryError,
    ],
)
def test_other_ways_to_say_it(smaller, error, tmp_path):
    trainer = make(tmp_path)
    Memory(trainer.model, fails_at=[2], error=error)
    assert weights_equal(train(trainer).model, smaller.model)


def test_a_real_allocation_that_fails(smaller, tmp_path):
    """Of the CPU's allocator, in the backward pass."""
    trainer = make(tmp_path)
    failed = []

    def too_much(gradient):
        if gradient.shape[0] > 2:
            failed.append(True)
            torch.empty(2**60, dtype=torch.uint8)

    trainer.model.transformer.h[1].register_forward_hook(
        lambda module, args, output: (
            (output[0] if isinstance(output, tuple) else output).register_hook(too_much) and None
        )
    )
    train(trainer)
    assert failed == [True]
    assert weights_equal(trainer.model, smaller.model)


# ---- Settings --------------------------------------


def test_two_answers_to_the_same_question(tmp_path):
    with pytest.raises(ValueError, match="set auto_find_batch_size=False"):
        arguments(tmp_path, auto_micro_batch=True, auto_find_batch_size=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("is_deepspeed_enabled", True, "can't repeat a step of a sharded model.*set memory_budget to 'device'"),
        ("is_fsdp_enabled", True, "can't repeat a step of a sharded model.*or leave auto_micro_batch out"),
        ("args._n_gpu", 2, "start one process per GPU"),
        ("args.optim", "lomo", "takes a step in the backward pass of every micro-batch"),
    ],
)
def test_what_cannot_be_repeated_is_refused(name, value, message, tmp_path):
    trainer = make(tmp_path)
    owner, _, attribute = name.rpartition(".")
    setattr(trainer.args if owner else trainer, attribute, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_samplers_that_a_varying_k_refuses(tmp_path):
    train(make(tmp_path, train_sampling_strategy="group_by_length", num_train_epochs=1))


def test_a_callback_that_cannot_follow_is_told(tmp_path, caplog):
    train(make(tmp_path, callbacks=[GradientStatisticsCallback()], num_train_epochs=1))
    assert "it cannot follow auto_micro_batch; set measure_noise_scale=True" in caplog.text
