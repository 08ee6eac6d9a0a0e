"""Batches, counts and steps of one's own: k is chosen as it is for the same data in plain form."""

import copy
import itertools

import pytest
import torch
from helpers import AnyK, Recorder, Rows, arguments, quiet, skip_below, tiny_gpt2
from transformers import (
    DataCollatorWithFlattening,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers import Trainer as StockTrainer

from hf_trainopt import EfficientTrainer, EfficientTrainerMixin
from hf_trainopt.accumulation.sums import with_counted_items


class Even(torch.utils.data.Dataset):
    """Rows in which every token is predicted: packed or not, gradients are the same."""

    def __init__(self, num_rows: int = 400):
        rows = torch.randint(0, 8, (num_rows, 4), generator=torch.Generator().manual_seed(0))
        rows[:, 1::2] = rows[:, ::2]
        self.rows = rows.tolist()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def doubled(samples):
    return {name: torch.cat([values, values]) for name, values in default_data_collator(samples).items()}


def lists(samples):
    return samples


class OfLists(EfficientTrainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = default_data_collator(inputs) if isinstance(inputs, list) else inputs
        return model(**{name: torch.as_tensor(value) for name, value in inputs.items()}).loss


class OwnLoader(OfLists):
    def get_train_dataloader(self):
        loader = torch.utils.data.DataLoader(
            self.train_dataset, batch_size=8, shuffle=True, collate_fn=default_data_collator,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        return self.accelerator.prepare(loader)


def run(tmp_path, cls=OfLists, collator=default_data_collator, model=None, data=None, **kwargs):
    if getattr(cls, "loss_is_scaled_for_ga", None) is not None:
        skip_below("transformers", "5.19", "loss_is_scaled_for_ga")
    defaults = {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "num_train_epochs": 1,
        "learning_rate": 1e-3, "accumulation_policy": "noise_scale", "remove_unused_columns": False,
    }  # fmt: skip
    trainer = cls(
        model=model if model is not None else tiny_gpt2(8), args=arguments(tmp_path, **(defaults | kwargs)),
        train_dataset=data or Even(), data_collator=collator,
    )  # fmt: skip
    quiet(trainer).train()
    return trainer


def chosen(trainer) -> list[int]:
    return [line["accumulation_steps"] for line in trainer.state.log_history if "loss" in line]


def noise_in_micro_batches(trainer) -> float:
    return (
        trainer.trainopt.accumulation.controller.tracker.estimate().value
        / trainer.trainopt.accumulation.controller.micro_batch_samples
    )


@pytest.mark.parametrize(
    ("collator", "rows"),
    [(DataCollatorWithFlattening(), 1), (doubled, 16), (lists, 1)],
    ids=["packed", "twice", "lists"],
)
def test_rows_that_are_no_samples(tmp_path, collator, rows):
    plain, found = run(tmp_path), run(tmp_path, collator=collator)
    assert len(set(chosen(plain))) > 1
    assert chosen(found) == chosen(plain)
    assert noise_in_micro_batches(found) == pytest.approx(noise_in_micro_batches(plain), rel=1e-3)
    assert found.trainopt.accumulation.controller.micro_batch_samples == rows
    assert found.trainopt.accumulation.controller.tracker.half_life == pytest.approx(
        plain.trainopt.accumulation.controller.tracker.half_life * rows / 8
    )
    last, runtime = found.state.log_history[-1], found.state.log_history[-1]["train_runtime"]
    assert last["samples_seen"] == 50 * rows
    assert last["train_samples_per_second"] == pytest.approx(400 / runtime, rel=0.02)


def test_a_loader_of_ones_own_has_its_own_batch_size(tmp_path):
    # The budget is the loader's: only the size of its batches is misstated.
    plain, found = (run(tmp_path, OwnLoader, per_device_train_batch_size=size) for size in (8, 2))
    assert chosen(found) == chosen(plain)
    assert noise_in_micro_batches(found) == noise_in_micro_batches(plain)


def test_the_size_of_micro_batches_is_resumed(tmp_path):
    settings = {"collator": doubled, "save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path, **settings)
    checkpoint = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    args = arguments(
        tmp_path / "again", per_device_train_batch_size=8, gradient_accumulation_steps=4, num_train_epochs=1,
        learning_rate=1e-3, accumulation_policy="noise_scale", remove_unused_columns=False,
    )  # fmt: skip
    resumed = quiet(OfLists(model=tiny_gpt2(8), args=args, train_dataset=Even(), data_collator=doubled))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert chosen(resumed) == chosen(whole)
    assert noise_in_micro_batches(resumed) == noise_in_micro_batches(whole)


class Buckets(OfLists):
    """Batches of 2 to 12 rows, as a sampler makes them that fills them up to a number of tokens."""

    def get_train_dataloader(self):
        sizes, rows, batches = itertools.cycle((2, 12, 7)), list(range(len(self.train_dataset))), []
        while rows:
            size = next(sizes)
            batches.append(rows[:size])
            rows = rows[size:]
        return self.accelerator.prepare(
            torch.utils.data.DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=default_data_collator)
        )


def test_the_size_of_batches_that_vary_is_their_mean(tmp_path):
    trainer = run(tmp_path, Buckets, per_device_train_batch_size=3, num_train_epochs=2)
    assert trainer.trainopt.accumulation.controller.micro_batch_samples == pytest.approx(7, rel=0.1)


class Popping(StockTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        inputs["labels"] = inputs.pop("labels")
        loss = super().training_step(model, dict(inputs), *args, **kwargs)
        inputs.clear()
        return loss


class OtherItems(StockTrainer):
    """Divides by all tokens, labelled or not: a constant."""

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        return batches, torch.tensor(sum(batch["input_ids"].numel() for batch in batches)) if batches else items


class WithoutLabels(StockTrainer):
    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            batch["target"] = batch.pop("labels")
        return batches, items

    def compute_loss(self, model, inputs, *args, **kwargs):
        labelled = {"labels" if name == "target" else name: value for name, value in inputs.items()}
        return super().compute_loss(model, labelled, *args, **kwargs)


@pytest.mark.parametrize("base", [Popping, OtherItems, WithoutLabels])
def test_steps_and_counts_of_ones_own_measure_the_same_noise(tmp_path, base):
    trainer = type("Efficient", (EfficientTrainerMixin, base), {})
    options = {"model": None, "data": Rows(60), "accumulation_policy": "fixed", "measure_noise_scale": True}
    found, plain = (
        run(tmp_path, cls, **(options | {"model": tiny_gpt2(), "per_device_train_batch_size": 3}))
        for cls in (trainer, EfficientTrainer)
    )
    # Losses that are divided by all tokens vary with how many have labels; without any labels micro-batches are taken
    # to weigh the same.
    tolerance = {Popping: 1e-6, OtherItems: 0.1, WithoutLabels: 0.5}[base]
    assert noise_in_micro_batches(found) == pytest.approx(noise_in_micro_batches(plain), rel=tolerance)


def test_statistics_with_weights_of_another_sum():
    """The slow twin: the same sums with weights that add up to 1 from the start."""
    from hf_trainopt.accumulation.noise_scale import WindowStatistics, estimate_noise
    from hf_trainopt.accumulation.sums import Proposal, local_sums, pack_sums, unpack_sums

    norms, items, divided_by = [4.0, 9.0, 1.0], [3, 5, 2], 37.0
    total = sum(items)
    # What a backward pass adds to a gradient is as much smaller as the losses are divided by more.
    given = local_sums(
        [norm * (total / divided_by) ** 2 for norm in norms], items, [n / divided_by for n in items], 1.0
    )
    expected = local_sums([norm * (total / divided_by) ** 2 for norm in norms], items, [n / total for n in items], 1.0)
    square = 5.0 * (total / divided_by) ** 2
    _, found = unpack_sums(pack_sums(Proposal(), 10, square, given).tolist())
    _, right = unpack_sums(pack_sums(Proposal(), 10, square, expected).tolist())
    corrected = with_counted_items(found, divided_by)
    for name in WindowStatistics.__dataclass_fields__:
        assert getattr(corrected, name) == pytest.approx(getattr(right, name), rel=1e-12), name
    assert estimate_noise(corrected) == pytest.approx(estimate_noise(right), rel=1e-9)
    assert with_counted_items(right, float(total)) is right


class TwoPasses(StockTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        for _ in range(2):
            loss = super().training_step(model, inputs, *args, **kwargs)
        return loss


def test_noise_that_cannot_be_measured_is_said(tmp_path, caplog):
    run(tmp_path, type("Efficient", (EfficientTrainerMixin, TwoPasses), {}), num_train_epochs=3)
    assert "The gradient noise of none of the first 16 measured optimizer steps is known" in caplog.text


def test_the_loss_of_a_router_is_said_to_follow_k(tmp_path, caplog):
    def make(**kwargs):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = MixtralConfig(num_hidden_layers=1, vocab_size=8, num_local_experts=4, **sizes, **kwargs)
        return EfficientTrainer(model=MixtralForCausalLM(config), args=arguments(tmp_path), train_dataset=Even())

    make()
    assert "router" not in caplog.text
    make(output_router_logits=True)
    assert "Raise router_aux_loss_coef" in caplog.text


class Tenth(TrainerCallback):
    def on_epoch_begin(self, args, state, control, optimizer=None, **kwargs):
        if round(state.epoch or 0) == 1:
            for group in optimizer.param_groups:
                group["lr"] *= 0.1


@pytest.mark.parametrize("schedule", ["ExponentialLR", "StepLR", "ConstantLR"])
def test_a_rate_that_a_callback_changes_stays_changed(tmp_path, schedule):
    def rates(make, cls):
        model, recorder = tiny_gpt2(), Recorder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        options = {"StepLR": {"step_size": 3, "gamma": 0.5}, "ExponentialLR": {"gamma": 0.9}, "ConstantLR": {}}
        scheduler = getattr(torch.optim.lr_scheduler, schedule)(optimizer, **options[schedule])
        args = arguments(tmp_path, cls, gradient_accumulation_steps=4, max_grad_norm=0.0)
        trainer = make(model=model, args=args, train_dataset=Rows(), optimizers=(optimizer, scheduler),
                       callbacks=[Tenth(), recorder])  # fmt: skip
        quiet(trainer).train()
        return recorder.learning_rates

    stock = rates(StockTrainer, TrainingArguments)
    found = rates(lambda **kwargs: AnyK(sequence=[4], **kwargs), type(arguments(tmp_path)))
    assert stock[-1] < 0.5 * stock[0]
    assert found == stock


def test_a_copy_of_a_trainer_is_on_its_own(tmp_path):
    first = quiet(AnyK(model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=Rows(), sequence=[2]))
    first.train()
    again = quiet(AnyK(model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=Rows(), sequence=[2]))
    copied = copy.deepcopy(again)
    again.train()
    copied.train()
    assert copied.state.global_step == again.state.global_step == first.state.global_step


def test_ignore_data_skip_allows_other_batches(tmp_path):
    """The run goes on after as many samples as it has seen."""
    settings = {"max_steps": 12, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    run(tmp_path, EfficientTrainer, data=Rows(96), model=tiny_gpt2(), save_strategy="steps", save_steps=6, **settings)
    checkpoint = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))

    def resume(**kwargs):
        args = arguments(tmp_path / "again", accumulation_policy="noise_scale", **kwargs)
        trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(96)))
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return trainer

    found = resume(max_steps=12, gradient_accumulation_steps=1, per_device_train_batch_size=4, ignore_data_skip=True)
    assert found.trainopt.accumulation._initial_micro_batches == pytest.approx(6, abs=1)  # half of the budget
    assert found.trainopt.accumulation.cursor.exhausted


def test_a_model_that_is_made_later_can_be_checked_for(tmp_path):
    """A search with Ray leaves `model` at `None` until `train` has called `model_init`."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=5)
    trainer = quiet(EfficientTrainer(model_init=lambda trial=None: tiny_gpt2(), args=args, train_dataset=Rows()))
    trainer.model = None
    trainer.train()
    assert trainer.state.global_step > 0
