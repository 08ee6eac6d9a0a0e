"""Settings that cannot work are refused before training, with the remedy."""

import copy
import dataclasses
import pickle
from dataclasses import dataclass, fields

import pytest
import torch
from helpers import Rows, arguments, quiet, tiny_gpt2
from packaging.version import Version
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_trainopt import (
    EfficientTrainer,
    EfficientTrainerMixin,
    EfficientTrainingArguments,
    EfficientTrainingArgumentsMixin,
)
from hf_trainopt.accumulation import FixedPolicy, GoodputPolicy, NoiseScalePolicy, RampPolicy
from hf_trainopt.core.versions import ACTIVATION_CHECKPOINTING, TRANSFORMERS


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"accumulation_policy": "adaptive"}, "choose one of fixed, noise_scale, goodput, ramp"),
        ({"lr_batch_scaling": "cube"}, "choose one of auto, none, sqrt, linear, surge"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"min_accumulation_steps": 0}, "min_accumulation_steps is 0"),
        ({"min_accumulation_steps": 4, "max_accumulation_steps": 2}, "raise the one or lower the other"),
        ({"noise_scale_ratio": 0.0}, "must be positive"),
        ({"optimizer_step_cost": -1.0}, "must not be negative"),
        ({"noise_scale_interval": 0}, "must be at least 1"),
        ({"noise_scale_half_life": 0.0}, "must be positive"),
        ({"accumulation_policy": "ramp"}, "needs accumulation_ramp"),
        ({"accumulation_policy": "ramp", "accumulation_ramp": "1:1"}, "must begin at 0"),
        ({"accumulation_ramp": "0:1"}, "set it to 'ramp'"),
        ({"measure_noise_scale": False}, "leave it unset"),
        (
            {"accumulation_policy": "fixed", "max_accumulation_steps": 2, "gradient_accumulation_steps": 4},
            "leave these",
        ),
        (
            {"accumulation_policy": "fixed", "lr_batch_scaling": "surge", "measure_noise_scale": False},
            "leave it unset",
        ),
    ],
)
def test_bad_arguments(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        (
            {ACTIVATION_CHECKPOINTING: True, f"{ACTIVATION_CHECKPOINTING}_kwargs": {"use_reentrant": True}},
            "use_reentrant=True hands out gradients in pieces",
        ),
    ],
)
def test_what_cannot_work_with_varying_k(tmp_path, bad, message):
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(bad) <= names  # renamed upstream: our check would silently stop working
    trainer = EfficientTrainer(model=tiny_gpt2(), args=arguments(tmp_path, **bad), train_dataset=Rows())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    fixed = arguments(tmp_path, accumulation_policy="fixed", **bad)
    EfficientTrainer(model=tiny_gpt2(), args=fixed, train_dataset=Rows())


def test_ignored_settings_are_warned_of(tmp_path, caplog):
    arguments(tmp_path, accumulation_policy="fixed", noise_scale_ratio=0.5, optimizer_step_cost=0.1)
    assert "noise_scale_ratio is ignored" in caplog.text
    assert "optimizer_step_cost is ignored" in caplog.text
    caplog.clear()
    arguments(tmp_path, accumulation_policy="noise_scale", noise_scale_ratio=0.5)
    arguments(tmp_path, accumulation_policy="goodput", optimizer_step_cost=0.1)
    assert "ignored" not in caplog.text


def test_probes_of_a_fixed_policy_are_warned_of(tmp_path, caplog):
    args = arguments(tmp_path, accumulation_policy="fixed", measure_noise_scale=True, per_device_train_batch_size=1)
    EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows())
    assert "takes two" in caplog.text
    caplog.clear()
    args.gradient_accumulation_steps = 2
    EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows())
    assert "takes two" not in caplog.text


def test_a_model_whose_loss_may_be_scaled_twice_is_warned_of(tmp_path, caplog):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_gpt2()

        def forward(self, input_ids, labels, **kwargs):
            return {"loss": self.inner(input_ids=input_ids, labels=labels).loss}

    EfficientTrainer(model=Plain(), args=arguments(tmp_path), train_dataset=Rows())
    assert "accepts_loss_kwargs = False" in caplog.text


def test_a_loss_of_ones_own_that_does_not_read_the_items_is_warned_of(tmp_path, caplog):
    def mean(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())

    def scaled(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum() / num_items_in_batch

    class Mean(EfficientTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    class Scaled(EfficientTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Told(Mean):
        loss_is_scaled_for_ga = False

    def warnings(cls=EfficientTrainer, **kwargs):
        caplog.clear()
        cls(model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=Rows(), **kwargs)
        said = [record.getMessage() for record in caplog.records]
        return [text for text in said if "does not read num_items" in text or "ignores num_items" in text]

    assert "compute_loss_func=mean" in warnings(compute_loss_func=mean)[0]
    assert "Mean.compute_loss does not read" in warnings(Mean, compute_loss_func=scaled)[0]
    (divided,) = warnings(Mean)
    assert "Mean.compute_loss ignores num_items_in_batch" in divided
    assert "loss_is_scaled_for_ga = False" in divided
    assert not (warnings() + warnings(compute_loss_func=scaled) + warnings(Scaled))
    if Version("5.19") <= TRANSFORMERS:
        assert not warnings(Told)
    else:
        with pytest.raises(ValueError, match=r"loss_is_scaled_for_ga=False needs transformers >= 5\.19"):
            warnings(Told)


@pytest.mark.parametrize(
    ("settings", "own", "ignored"),
    [
        (
            {"accumulation_policy": "fixed", "noise_scale_interval": 4},
            False,
            "noise_scale_interval is ignored: nothing",
        ),
        ({"accumulation_policy": "fixed", "noise_scale_interval": 4}, True, None),
        ({"noise_scale_half_life": 1e3}, False, None),
        ({"optimizer_step_cost": 1.0}, True, "optimizer_step_cost is ignored: the Trainer is given a policy"),
    ],
)
def test_settings_without_effect_are_warned_of(tmp_path, caplog, settings, own, ignored):
    policy = {"accumulation_policy": lambda observation: 2.0} if own else {}
    EfficientTrainer(model=tiny_gpt2(), args=arguments(tmp_path, **settings), train_dataset=Rows(), **policy)
    warnings = [record.getMessage() for record in caplog.records if "is ignored" in record.getMessage()]
    assert len(warnings) == (ignored is not None)
    assert ignored is None or ignored in warnings[0]


def test_a_loss_function_that_is_not_told_the_items_is_warned_of(tmp_path, caplog):
    class Targets(Rows):
        def __getitem__(self, index):
            return {"input_ids": self.rows[index], "position_ids": torch.arange(12)}

    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean() / (num_items_in_batch or 1)

    args = arguments(tmp_path, max_steps=3)
    trainer = EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Targets(), compute_loss_func=loss)
    trainer.train()
    assert caplog.text.count("is not told it, since the batches have no `labels`") == 1


def test_stock_arguments_get_our_settings_at_their_defaults(tmp_path):
    ours = arguments(tmp_path)
    args = arguments(tmp_path, TrainingArguments, max_steps=2, report_to="none", save_strategy="steps", save_steps=2)
    before = dict(vars(args))
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows()))
    assert trainer.args is args  # as in stock: who holds them changes those of the Trainer
    assert {name: getattr(args, name) for name in before} == before
    for setting in fields(EfficientTrainingArguments):
        if setting.name not in before and setting.name != "measurements":
            assert getattr(args, setting.name) == getattr(ours, setting.name), setting.name
    trainer.train()
    assert trainer.state.log_history[-1]["accumulation_steps"]
    saved = torch.load(next(tmp_path.glob("checkpoint-*/training_args.bin")), weights_only=False)
    assert type(saved) is EfficientTrainingArguments


def test_no_arguments_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = EfficientTrainer(tiny_gpt2(), eval_dataset=Rows(6))
    assert trainer.args.output_dir == Trainer(tiny_gpt2(), eval_dataset=Rows(6)).args.output_dir
    assert trainer.evaluate()["eval_loss"] > 0


@dataclass
class OwnArguments(TrainingArguments):
    own: int = 3
    made: list = dataclasses.field(default_factory=lambda: [1])


class OwnTrainer(Trainer):
    """Makes arguments of its own class where it is given none, as the classes of TRL do."""

    def __init__(self, model=None, args=None, **kwargs):
        super().__init__(model, OwnArguments("own") if args is None else args, **kwargs)


class EfficientOwn(EfficientTrainerMixin, OwnTrainer):
    pass


@pytest.mark.parametrize("given", [True, False])
def test_arguments_of_another_class(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = OwnArguments("given", own=5, made=[2]) if given else None
    trainer = EfficientOwn(tiny_gpt2(), args, train_dataset=Rows())
    assert isinstance(trainer.args, OwnArguments)
    assert (trainer.args.own, trainer.args.made) == ((5, [2]) if given else (3, [1]))
    assert trainer.args.accumulation_policy == "goodput"
    assert "placement_stages" in trainer.args.to_dict()
    # Neither `training_args.bin` nor a copy depends on where the class was made.
    for copied in (pickle.loads(pickle.dumps(trainer.args)), copy.deepcopy(trainer.args)):
        assert type(copied) is type(trainer.args)
        assert copied.to_dict() == trainer.args.to_dict()


def test_metric_driven_schedules_set_the_rate_themselves(tmp_path, caplog):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "warmup_steps": 0}
    args = arguments(tmp_path, **plateau)
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(6)))
    trainer.train()
    assert "lr_batch_scaling='auto' is ignored" in caplog.text
    assert trainer.state.epoch == 2.0
    assert trainer.optimizer.param_groups[0]["lr"] == args.learning_rate


def test_defaults_of_training_arguments_are_not_changed(tmp_path):
    stock, ours = TrainingArguments(output_dir=str(tmp_path)), EfficientTrainingArguments(output_dir=str(tmp_path))
    for field in dataclasses.fields(TrainingArguments):
        if field.init and field.name not in ("accelerator_config",):
            assert getattr(stock, field.name) == getattr(ours, field.name), field.name


def test_arguments_are_flags(tmp_path):
    parser = HfArgumentParser(EfficientTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--accumulation_policy", "noise_scale", "--noise_scale_ratio", "0.5",
         "--max_accumulation_steps", "12", "--lr_batch_scaling", "surge", "--measure_noise_scale"]
    )  # fmt: skip
    assert args.make_accumulation_policy() == NoiseScalePolicy(0.5)
    assert args.accumulation_bounds == (1, 12)
    assert args.measure_noise_scale is True
    help_text = parser.format_help()
    for field in dataclasses.fields(EfficientTrainingArgumentsMixin):
        assert field.name in help_text
        assert field.metadata["help"]


def test_policies_by_name(tmp_path):
    make = lambda **kwargs: arguments(tmp_path, **kwargs).make_accumulation_policy()  # noqa: E731
    assert make(accumulation_policy="fixed") == FixedPolicy()
    assert make(accumulation_policy="goodput", optimizer_step_cost=0.5) == GoodputPolicy(0.5)
    assert make(lr_batch_scaling="none") == GoodputPolicy(None, anneals=False)
    assert make(accumulation_policy="ramp", accumulation_ramp="0:1,0.5:2") == RampPolicy((0.0, 0.5), (1, 2))


def test_arguments_survive_a_round_trip(tmp_path):
    args = arguments(tmp_path, accumulation_policy="ramp", accumulation_ramp="0:1,0.5:2")
    assert args.to_dict()["accumulation_ramp"] == "0:1,0.5:2"
    assert "accumulation_ramp" in args.to_json_string()
