"""Placement in the Trainer: the same run with less memory; what is refused; what is logged and kept."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import AnyK, Pictures, Recorder, Rows, Stream, arguments, quiet, table, weights_equal
from placement_models import gpt2, llama, timm_model
from transformers import set_seed

from hf_trainopt import EfficientTrainer
from hf_trainopt.core.state import STATE_NAME
from hf_trainopt.core.versions import ACTIVATION_CHECKPOINTING
from hf_trainopt.placement.part import PLAN_NAME
from hf_trainopt.placement.plan.plan import PlacementPlan
from hf_trainopt.placement.simulate.example_batch import largest_batch
from hf_trainopt.reliability.manifest import MANIFEST_NAME


FIXED = {
    "accumulation_policy": "fixed",
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "per_device_train_batch_size": 12,
}


def run(output_dir, *, model=gpt2, data=None, cls=EfficientTrainer, trainer_kwargs=None, resume=None, **kwargs):
    set_seed(7)
    trainer = quiet(
        cls(
            model=model(),
            args=arguments(output_dir, **({"seed": 7} | kwargs)),
            train_dataset=data if data is not None else Rows(48, length=24),
            **(trainer_kwargs or {}),
        )
    )
    trainer.train(resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measured(trainer):
    return trainer.placement_plan.measured_peak_bytes / trainer.placement_plan.predicted_peak_bytes


PLACEMENTS = [
    {"checkpoint_placement": "all"},
    {"checkpoint_placement": "every_n"},
    {"checkpoint_placement": "every_3"},
    {"checkpoint_placement": "sqrt"},
    {"memory_budget": "70%", "memory_rewrites": "none"},
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return run(tmp_path_factory.mktemp("stock"), **FIXED)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: "-".join(p.values()))
def test_a_placed_run_is_the_stock_run(tmp_path, stock, placement):
    trainer = run(tmp_path, **FIXED, **placement)
    assert losses(trainer) == losses(stock)
    assert weights_equal(trainer.model, stock.model)
    assert not trainer.placement_plan.is_stock
    assert measured(trainer) == pytest.approx(1, abs=0.01)
    assert trainer.placement_plan.measured_peak_bytes < 0.9 * trainer.placement_plan.baseline_peak_bytes
    assert not getattr(trainer.model, f"is_{ACTIVATION_CHECKPOINTING}")  # undone


def test_nothing_is_in_play_without_placement(tmp_path, stock):
    assert stock.placement_plan is None
    assert [type(callback).__name__ for callback in stock.callback_handler.callbacks].count("PeakMeasurement") == 0
    explicit = run(tmp_path, **FIXED, checkpoint_placement="none", memory_rewrites="none")
    assert explicit.placement_plan is None
    assert losses(explicit) == losses(stock)


def test_with_rewrites_the_loss_differs_by_rounding_only(tmp_path, stock):
    trainer = run(tmp_path, **FIXED, memory_budget="45%")
    assert trainer.placement_plan.rewrites.names()
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(losses(stock)), rtol=1e-5, atol=0)
    assert measured(trainer) == pytest.approx(1, abs=0.01)
    named = run(tmp_path, **FIXED, memory_rewrites="chunked_loss, fused_activations")
    assert named.placement_plan.counts() == {"none": 4}
    assert named.placement_plan.rewrites.names() == ["fused_activations", "chunked_loss"]
    torch.testing.assert_close(torch.tensor(losses(named)), torch.tensor(losses(stock)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("model", [llama, lambda: timm_model("resnet10t")], ids=["llama", "resnet"])
def test_other_models(tmp_path, model):
    data = Rows(48, length=24) if model is llama else Pictures(48)
    expected = run(tmp_path, model=model, data=data, **FIXED)
    budget = "80%" if model is llama else "97%"
    found = run(tmp_path, model=model, data=data, **FIXED, memory_budget=budget, memory_rewrites="none")
    assert not found.placement_plan.is_stock
    assert losses(found) == losses(expected)
    assert weights_equal(found.model, expected.model)  # BatchNorm's statistics among them
    assert measured(found) == pytest.approx(1, abs=0.03)


def test_with_adaptive_k_and_its_statistics(tmp_path):
    """Every window measured, k varying: the same gradients, noise scales and weights."""

    def adaptive(placement):
        recorder = Recorder()
        trainer = run(
            tmp_path,
            cls=AnyK,
            trainer_kwargs={"sequence": [1, 3, 2, 4, 2], "callbacks": [recorder]},
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            measure_noise_scale=True,
            noise_scale_interval=1,
            **placement,
        )
        noise = [entry.get("noise_scale") for entry in trainer.state.log_history]
        return trainer, recorder.gradients, noise

    plain, gradients, noise = adaptive({})
    placed, found, found_noise = adaptive({"memory_budget": "70%", "memory_rewrites": "none"})
    assert placed.placement_plan.details["accumulation_steps"] == 32
    assert noise == found_noise
    assert any(value is not None for value in noise)
    assert all(torch.equal(a, b) for x, y in zip(gradients, found, strict=True) for a, b in zip(x, y, strict=True))
    assert weights_equal(plain.model, placed.model)


def test_a_plan_file(tmp_path, stock):
    first = run(tmp_path / "a", **FIXED, memory_budget="70%", memory_rewrites="none")
    path = tmp_path / "a" / PLAN_NAME
    kept = json.loads(path.read_text())
    assert kept["measured_peak_bytes"] == first.placement_plan.measured_peak_bytes
    assert kept["details"]["request"]["memory_budget"] == "70%"
    second = run(tmp_path / "b", **FIXED, checkpoint_placement=str(path))
    assert second.placement_plan.stages == first.placement_plan.stages
    assert losses(second) == losses(stock)
    with pytest.raises(ValueError, match="plan was made for another model"):
        run(tmp_path / "c", model=llama, **FIXED, checkpoint_placement=str(path))
    with pytest.raises(ValueError, match="no placement plan can be read"):
        arguments(tmp_path, checkpoint_placement=str(tmp_path / "none.json"))


def mark_plan(checkpoint: Path, plan: PlacementPlan) -> None:
    """Put another plan into a checkpoint."""
    path = checkpoint / STATE_NAME
    state = json.loads(path.read_text())
    state["parts"]["placement"]["plan"] = plan.to_dict()
    path.write_text(json.dumps(state))
    (checkpoint / MANIFEST_NAME).unlink()  # which says that it was changed


def test_a_resumed_run_keeps_its_plan_and_its_bits(tmp_path):
    options = {**FIXED, "memory_budget": "45%", "save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    plan = whole.placement_plan
    # A plan that planning would not find shows that it was read, not made.
    marked = PlacementPlan(**{**plan.__dict__, "policy": "marked"})
    mark_plan(tmp_path / "again" / "checkpoint-2", marked)
    resumed = run(tmp_path / "again", resume=str(tmp_path / "again" / "checkpoint-2"), **options)
    assert resumed.placement_plan.policy == "marked"
    assert weights_equal(whole.model, resumed.model)
    other = run(
        tmp_path / "again", resume=str(tmp_path / "again" / "checkpoint-2"), **{**options, "memory_budget": "50%"}
    )
    assert other.placement_plan.policy == "budget"


def test_what_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_trainopt"):
        trainer = run(tmp_path, **FIXED, checkpoint_placement="all")
    assert "Checkpoint placement: all (full: transformer.h.0-3); predicted peak" in caplog.text
    (logged,) = [entry for entry in trainer.state.log_history if "measured_peak_gib" in entry]
    assert logged["measured_peak_gib"] == pytest.approx(logged["predicted_peak_gib"], abs=1e-4)
    assert "Measured peak of an optimizer step" in caplog.text
    assert (tmp_path / PLAN_NAME).exists()
    assert trainer.placement_plan.extra_time_ratio > 0


def test_a_budget_that_was_too_low_in_truth_is_said(tmp_path, caplog):
    trainer = run(tmp_path, **FIXED, memory_budget="70%")
    caplog.clear()
    trainer.trainopt.placement._peak_measured(trainer.placement_plan.budget_bytes + 8)  # a step counter
    assert "above memory_budget" not in caplog.text
    trainer.trainopt.placement._peak_measured(trainer.placement_plan.budget_bytes + 8192)
    assert "above memory_budget" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": "75%", "checkpoint_placement": "all"}, "set it to 'budget'"),
        ({"checkpoint_placement": "budget"}, "needs memory_budget"),
        ({"checkpoint_placement": "some"}, "choose one of none, all"),
        ({"checkpoint_placement": "every_0"}, "must be at least 1"),
        ({"memory_budget": "much"}, "give '12GiB'"),
        ({"memory_rewrites": "gelu"}, "memory_rewrites is 'gelu'"),
        ({"checkpoint_placement": "all", ACTIVATION_CHECKPOINTING: True}, "both choose the activations to recompute"),
        ({"memory_budget": "75%", "torch_compile": True}, "eager models only"),
    ],
)
def test_contradictions_are_refused_by_the_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_what_the_trainer_refuses(tmp_path):
    with pytest.raises(ValueError, match="no placement needs less than"):
        run(tmp_path, **FIXED, memory_budget="2MiB")
    options = {f"{ACTIVATION_CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="remove use_reentrant"):
        run(tmp_path, **FIXED, checkpoint_placement="all", **options)
    with pytest.raises(ValueError, match="placement_stages"):
        run(tmp_path, model=lambda: torch.nn.Linear(3, 3), **FIXED, checkpoint_placement="all")
    with pytest.raises(ValueError, match="does not allow"):
        run(tmp_path, model=llama, **FIXED, memory_rewrites="fused_activations")


def test_every_n_layers_of_transformers_is_n(tmp_path):
    options = {"checkpoint_placement": "every_n", f"{ACTIVATION_CHECKPOINTING}_kwargs": {"every_n_layers": 4}}
    trainer = run(tmp_path, **FIXED, **options)
    assert [choice.recompute for choice in trainer.placement_plan.stages.values()] == ["full", "none", "none", "none"]


class Softcap(type(gpt2())):
    """A head that is not the plain one."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        outputs.logits = 5 * torch.tanh(outputs.logits / 5)
        outputs["loss"] = self.loss_function(outputs.logits, labels, vocab_size=211)
        return outputs


def softcap():
    model = gpt2()
    model.__class__ = Softcap
    return model


def test_a_loss_head_that_is_not_plain_is_found_out(tmp_path, caplog):
    trainer = run(tmp_path, model=softcap, **FIXED, memory_budget="62%")
    assert not trainer.placement_plan.rewrites.chunked_loss
    with pytest.raises(ValueError, match="not the plain one"):
        run(tmp_path, model=softcap, **FIXED, memory_rewrites="chunked_loss")


def test_label_smoothing_computes_its_own_loss(tmp_path):
    expected = run(tmp_path, **FIXED, label_smoothing_factor=0.1)
    found = run(tmp_path, **FIXED, label_smoothing_factor=0.1, memory_budget="75%", memory_rewrites="none")
    assert losses(found) == losses(expected)
    assert measured(found) == pytest.approx(1, abs=0.01)


def test_own_compute_loss_that_cannot_be_replayed(tmp_path, caplog):
    class Judges(EfficientTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.best = min(getattr(self, "best", 1e9), loss.item())
            return loss

    trainer = run(tmp_path, cls=Judges, **FIXED, memory_budget="75%")
    assert "Judges.compute_loss cannot be replayed" in caplog.text
    assert "a number that the model computes decides" in caplog.text
    assert measured(trainer) == pytest.approx(1, abs=0.01)


def test_own_optimizer(tmp_path):
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = run(
        tmp_path, model=lambda: model, trainer_kwargs={"optimizers": (optimizer, None)}, **FIXED, memory_budget="75%"
    )
    assert trainer.placement_plan.details["optimizer"] == "SGD"
    assert measured(trainer) == pytest.approx(1, abs=0.01)


def test_streams_are_read_from_their_beginning(tmp_path):
    expected = run(tmp_path, data=Stream(48, length=24), **FIXED)
    found = run(tmp_path, data=Stream(48, length=24), **FIXED, checkpoint_placement="all")
    assert losses(found) == losses(expected)


def test_bf16_autocast(tmp_path):
    options = {**FIXED, "max_steps": 2, "bf16": True, "gradient_accumulation_steps": 1}
    expected = run(tmp_path, **options)
    found = run(tmp_path, **options, memory_budget="75%", memory_rewrites="none")
    assert found.placement_plan.details["precision"] == "bfloat16"
    assert losses(found) == losses(expected)
    assert measured(found) == pytest.approx(1, abs=0.02)


def test_the_longest_samples_make_the_batch():
    lengths = [3, 9, 4, 8, 2, 7]
    data = table({"input_ids": [[1] * n for n in lengths], "labels": [[1] * n for n in lengths]})

    def collate(samples):
        longest = max(len(sample["input_ids"]) for sample in samples)
        return torch.tensor([sample["input_ids"] + [0] * (longest - len(sample["input_ids"])) for sample in samples])

    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=collate)
    assert largest_batch(loader, 2).shape == (2, 9)
    assert (largest_batch(loader, 2) != 0).sum() == 17
    assert largest_batch(torch.utils.data.DataLoader(data.select([0]), collate_fn=collate), 4).shape == (4, 3)
    with pytest.raises(ValueError, match="train_dataset is empty"):
        largest_batch(torch.utils.data.DataLoader(data.select([]), collate_fn=collate), 2)


def test_placement_alone(tmp_path, stock):
    """Without any of the rest: all else is stock."""
    set_seed(7)
    args = arguments(
        tmp_path,
        seed=7,
        gradient_accumulation_steps=2,
        max_steps=4,
        per_device_train_batch_size=12,
        accumulation_policy="fixed",
        checkpoint_placement="all",
    )
    trainer = quiet(EfficientTrainer(model=gpt2(), args=args, train_dataset=Rows(48, length=24)))
    trainer.train()
    assert trainer.trainopt.accumulation.cursor is None
    assert losses(trainer) == losses(stock)
    assert measured(trainer) == pytest.approx(1, abs=0.01)


def test_evaluation_in_between_is_untouched(tmp_path):
    options = {**FIXED, "eval_strategy": "steps", "eval_steps": 2, "memory_budget": "45%"}
    trainer = run(tmp_path, **options, trainer_kwargs={"eval_dataset": Rows(8, length=24)})
    assert [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] > 0
    outputs = trainer.predict(Rows(8, length=24))
    assert outputs.predictions.shape == (8, 24, 211)


def test_a_placement_that_is_asked_for_after_the_trainer_was_made(tmp_path):
    trainer = quiet(
        EfficientTrainer(model=gpt2(), args=arguments(tmp_path, **FIXED), train_dataset=Rows(48, length=24))
    )
    trainer.args.checkpoint_placement = "all"
    trainer.train()
    assert trainer.placement_plan.measured_peak_bytes > 0
