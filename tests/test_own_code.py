"""What users override, set or do in callbacks means what it means in stock `Trainer`."""

import os
from dataclasses import fields

import pytest
import torch
from helpers import Recorder, Rows, arguments, quiet, tiny_gpt2, weights_equal
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments, EfficientTrainingArgumentsMixin
from hf_trainopt.reliability import find_last_complete


FIXED = {"accumulation_policy": "fixed", "lr_batch_scaling": "none"}


class OwnSchedule:
    """Makes a schedule without asking `super()`, which is how `Trainer` wants it to be overridden."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: max(0.0, 1 - step / num_training_steps)
        )
        return self.lr_scheduler


class OwnEfficient(OwnSchedule, EfficientTrainer):
    pass


def own_schedule(folder, resume=None, cls=OwnEfficient, **kwargs):
    recorder = Recorder()
    settings = {"gradient_accumulation_steps": 4, "lr_scheduler_type": "linear", "warmup_steps": 0, "max_steps": 6}
    args = arguments(
        folder, *([] if issubclass(cls, EfficientTrainer) else [TrainingArguments]), **(settings | kwargs)
    )
    trainer = quiet(cls(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=[recorder]))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder.learning_rates


@pytest.mark.parametrize("ramp", ["0:1", "0:4", "0:8"])
def test_a_schedule_that_is_made_without_super_follows_the_data(tmp_path, ramp):
    settings = {"accumulation_policy": "ramp", "accumulation_ramp": ramp, "lr_batch_scaling": "sqrt"}
    own, rates = own_schedule(tmp_path / "own", **settings)
    named, expected = own_schedule(tmp_path / "named", cls=EfficientTrainer, **settings)
    assert rates == pytest.approx(expected)
    assert weights_equal(own.model, named.model)
    assert own.callback_handler.lr_scheduler is own.lr_scheduler


def test_a_schedule_that_is_made_without_super_is_resumed(tmp_path):
    settings = {"accumulation_policy": "ramp", "accumulation_ramp": "0:1,0.4:3", "save_strategy": "steps",
                "save_steps": 3}  # fmt: skip
    whole, rates = own_schedule(tmp_path, **settings)
    checkpoint = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    resumed, rest = own_schedule(tmp_path / "resumed", resume=str(checkpoint), **settings)
    assert rest == rates[-len(rest) :]
    assert weights_equal(whole.model, resumed.model)


def test_a_schedule_of_ones_own_is_stock_under_fixed(tmp_path):
    class OwnStock(OwnSchedule, Trainer):
        pass

    ours, rates = own_schedule(tmp_path / "ours", **FIXED)
    stock, expected = own_schedule(tmp_path / "stock", cls=OwnStock)
    assert rates == expected
    assert weights_equal(ours.model, stock.model)


def test_that_a_loss_ignores_the_items_may_be_said_after_construction(tmp_path):
    weights = []
    for cls in (Trainer, EfficientTrainer):
        kwargs = FIXED if cls is EfficientTrainer else {}
        args = arguments(
            tmp_path / cls.__name__, *([TrainingArguments] if cls is Trainer else []), gradient_accumulation_steps=2,
            **kwargs,
        )  # fmt: skip
        trainer = quiet(cls(model=tiny_gpt2(), args=args, train_dataset=Rows()))
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
        assert trainer.model_accepts_loss_kwargs is False
        weights.append(trainer.model)
    assert weights_equal(*weights)


class Rewrites(TrainerCallback):
    """Makes something else of each checkpoint: weights, a file more, one less."""

    def on_save(self, args, state, control, **kwargs):
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        path = os.path.join(folder, "model.safetensors")
        save_file(
            {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}, path, {"format": "pt"}
        )
        os.remove(os.path.join(folder, "training_args.bin"))
        with open(os.path.join(folder, "notes.txt"), "w") as file:
            file.write("mine")


@pytest.mark.parametrize("settings", [FIXED, {}], ids=["fixed", "goodput"])
def test_a_checkpoint_that_a_callback_rewrites_can_be_resumed(tmp_path, settings):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4} | settings

    def train(resume=None):
        args = arguments(tmp_path, **settings)
        trainer = EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=[Rewrites()])
        quiet(trainer).train(resume_from_checkpoint=resume)
        return trainer

    step = train().state.global_step
    found, skipped = find_last_complete(str(tmp_path))
    assert (found.step, skipped) == (step, [])
    settings["max_steps"] = 6
    assert train(resume=True).state.global_step > step
    with open(os.path.join(found.path, "notes.txt"), "a") as file:
        file.write("later")  # nobody's callback: a fault
    _, skipped = find_last_complete(str(tmp_path), step)
    assert found.path in [checkpoint.path for checkpoint in skipped]


def test_what_is_pushed_has_the_users_arguments(tmp_path, monkeypatch):
    seen = []

    def push(self, checkpoint_folder):
        seen.append(self.args.gradient_accumulation_steps)

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, gradient_accumulation_steps=3)
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows()))
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    assert len(seen) >= 2
    assert set(seen) == {3}


class Removes(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        logs.pop("total_flos", None)
        logs.pop("eval_runtime", None)


def test_keys_that_a_callback_removes_are_gone(tmp_path):
    found = []
    for cls in (Trainer, EfficientTrainer):
        kwargs = {**FIXED, "measurements": []} if cls is EfficientTrainer else {}
        args = arguments(tmp_path / cls.__name__, *([TrainingArguments] if cls is Trainer else []), **kwargs)
        trainer = cls(model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(6), callbacks=[Removes()])
        found.append((set(quiet(trainer).train().metrics), set(trainer.evaluate())))
    assert found[0] == found[1]
    assert "total_flos" not in found[0][0]


class OnlyMethods(EfficientTrainingArguments):
    """As stock takes it: without a field of its own it needs no @dataclass."""

    def __post_init__(self):
        super().__post_init__()
        self.run_name = "mine"


def test_a_subclass_of_arguments_without_fields_needs_no_decorator(tmp_path):
    args = OnlyMethods(output_dir=str(tmp_path), accumulation_policy="fixed")
    assert (args.run_name, args.accumulation_policy) == ("mine", "fixed")
    with pytest.raises(TypeError, match="did you mean accumulation_policy"):
        OnlyMethods(output_dir=str(tmp_path), acumulation_policy="fixed")


def test_a_class_of_arguments_that_lacks_its_decorator_is_told_so():
    class Undecorated(EfficientTrainingArgumentsMixin, TrainingArguments):
        pass

    assert "output_dir" in {field.name for field in fields(TrainingArguments)}
    with pytest.raises(TypeError, match="Undecorated isn't a dataclass itself; put @dataclass before the class"):
        Undecorated(output_dir="x")
