"""A memory budget for losses that the model alone does not have: preferences, rewards, two batches in one loss."""

import logging
from dataclasses import dataclass

import pytest
import torch
from helpers import Rows, arguments, quiet, weights_equal
from placement_models import gpt2
from test_placement_trainer import losses, measured
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, set_seed

from hf_trainopt import EfficientTrainer, EfficientTrainerMixin, EfficientTrainingArgumentsMixin
from hf_trainopt.machine.devices import DEVICES


BUDGET = {"memory_budget": "75%", "memory_rewrites": "none"}
SHORT = {
    "accumulation_policy": "fixed", "max_steps": 3, "per_device_train_batch_size": 4, "seed": 7,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch):
    """The CPU by its data sheet: the same times in every run, and none spent on measuring them."""
    monkeypatch.setattr("hf_trainopt.placement.plan.run_planner.device_spec", lambda device: DEVICES["cpu"])


# ---- TRL -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="trl is in the extra 'examples'")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(61)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def preferences(num_rows=24):
    """Pairs of different lengths."""
    from datasets import Dataset

    def words(count, first):
        return "".join(f" w{(first + 5 * i) % 61}" for i in range(count))

    return Dataset.from_list(
        [
            {"prompt": words(40 + i % 5, i)[1:], "chosen": words(50 + i % 7, i + 1), "rejected": words(36 + i, i + 2)}
            for i in range(num_rows)
        ]
    )


def config(**kwargs):
    # So wide that layers count beside the head of TRL, which takes 128 KiB a token whatever the vocabulary is.
    sizes = {"hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    return LlamaConfig(
        vocab_size=64, num_key_value_heads=4, bos_token_id=1, eos_token_id=1, pad_token_id=0, use_cache=False,
        **sizes | kwargs,
    )  # fmt: skip


def llama(cls=LlamaForCausalLM, **kwargs):
    torch.manual_seed(0)
    return cls(config(**kwargs))


def trained(trl, folder, kind, *, model, settings=None, trainer_kwargs=None, **kwargs):
    """Train a class of TRL with our mixins."""

    @dataclass
    class Config(EfficientTrainingArgumentsMixin, getattr(trl, f"{kind}Config")): ...

    class Efficient(EfficientTrainerMixin, getattr(trl, f"{kind}Trainer")): ...

    set_seed(7)
    own = {"bf16": False, "gradient_checkpointing": False, "measurements": "none", **(settings or {})}
    args = arguments(folder, Config, **{**SHORT, **own, **kwargs})
    trainer = quiet(
        Efficient(
            model=model, args=args, train_dataset=preferences(), processing_class=tokenizer(), **(trainer_kwargs or {})
        )
    )
    trainer.train()
    return trainer


def lora():
    peft = pytest.importorskip("peft", reason="peft is in the extra 'examples'")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def dpo(trl, folder, **kwargs):
    return trained(trl, folder, "DPO", model=llama(), trainer_kwargs={"ref_model": llama(hidden_act="relu")}, **kwargs)


def dpo_lora(trl, folder, **kwargs):
    return trained(trl, folder, "DPO", model=llama(), trainer_kwargs={"peft_config": lora()}, **kwargs)


def dpo_trained_lora(trl, folder, **kwargs):
    """An adapter that exists: the reference is a copy of it in the same model."""
    from peft import get_peft_model

    torch.manual_seed(1)
    return trained(trl, folder, "DPO", model=get_peft_model(llama(), lora()), **kwargs)


def dpo_precomputed(trl, folder, **kwargs):
    return trained(trl, folder, "DPO", model=llama(), settings={"precompute_ref_log_probs": True}, **kwargs)


def reward(trl, folder, **kwargs):
    model = llama(LlamaForSequenceClassification, num_labels=1)
    return trained(trl, folder, "Reward", model=model, **kwargs)


RUNS = {
    "DPO": dpo,
    "DPO, LoRA": dpo_lora,
    "DPO, a trained LoRA": dpo_trained_lora,
    "DPO, precomputed": dpo_precomputed,
    "Reward": reward,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_trl_trains_within_a_budget(trl, tmp_path, run):
    planned = run(trl, tmp_path / "planned", **BUDGET)
    plain = run(trl, tmp_path / "plain")
    plan = planned.placement_plan
    assert not plan.is_stock
    assert plan.predicted_peak_bytes <= 0.75 * plan.baseline_peak_bytes
    assert measured(planned) == pytest.approx(1, abs=0.03)
    assert losses(planned) == losses(plain)
    assert weights_equal(planned.model, plain.model)
    # What compute_loss keeps is what the steps of the run have put there, and nothing of the replays.
    kept, expected = (
        [{key: line[key] for key in METRICS & line.keys()} for line in trainer.state.log_history]
        for trainer in (planned, plain)
    )
    assert kept == expected
    assert any(kept)
    assert planned._total_train_tokens == plain._total_train_tokens > 0


METRICS = {
    "entropy", "num_tokens", "logits/chosen", "logits/rejected", "mean_token_accuracy", "rewards/chosen",
    "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "min_reward",
    "mean_reward", "max_reward", "accuracy", "margin",
}  # fmt: skip


# ---- Two batches in one loss ---------------------------------------------------------------------------------------


class Pairs(Rows):
    """Two texts a row, of different lengths, one of them padded."""

    def __getitem__(self, index):
        row = super().__getitem__(index)["input_ids"]
        other = row.flip(0)[: len(row) - 3].clone()
        mask = torch.ones_like(other)
        mask[len(other) - index % 3 :] = 0
        return {
            "anchor_input_ids": row, "anchor_attention_mask": torch.ones_like(row), "positive_input_ids": other,
            "positive_attention_mask": mask,
        }  # fmt: skip


class InBatch(torch.nn.Module):
    """Pooled, normalised, each anchor against all positives of the batch. It holds the model, as theirs do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def pooled(self, ids, mask):
        hidden = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        weights = mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)

    def forward(self, inputs):
        anchors, positives = (
            self.pooled(inputs[f"{name}_input_ids"], inputs[f"{name}_attention_mask"])
            for name in ("anchor", "positive")
        )
        return 20 * anchors @ positives.T


class Contrastive(EfficientTrainer):
    """As sentence-transformers' Trainer: the loss is a module that takes the model through two batches."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss = InBatch(self.model)
        self.similarities = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert self.loss.model is model
        scores = self.loss(inputs)
        self.similarities.append(scores.diagonal().mean().item())
        return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def contrastive(folder, model=llama, cls=Contrastive, **kwargs):
    set_seed(7)
    args = arguments(folder, remove_unused_columns=False, **{**SHORT, "per_device_train_batch_size": 8, **kwargs})
    trainer = quiet(cls(model=model(), args=args, train_dataset=Pairs(32, length=48)))
    trainer.train()
    return trainer


MODELS = {"llama": lambda: llama(num_hidden_layers=4, intermediate_size=256), "gpt2": lambda: gpt2(num_layers=5)}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_loss_over_two_batches(tmp_path, caplog, model):
    with caplog.at_level(logging.INFO, logger="hf_trainopt"):
        planned = contrastive(tmp_path / "planned", model, **BUDGET)
    plan = planned.placement_plan
    assert not plan.is_stock
    assert plan.predicted_peak_bytes <= 0.75 * plan.baseline_peak_bytes
    assert "Contrastive.compute_loss looks at values" in caplog.text
    assert "numbers that the model computes are recorded there as 1" in caplog.text
    assert measured(planned) == pytest.approx(1, abs=0.03)
    plain = contrastive(tmp_path / "plain", model)
    assert losses(planned) == losses(plain)
    assert weights_equal(planned.model, plain.model)
    assert planned.similarities == plain.similarities
    assert len(plain.similarities) == 3


# ---- Other modules of the trainer ----------------------------------------------------------------------------------


class Distilled(EfficientTrainer):
    """A student that learns from a teacher that the trainer holds, in a list."""

    teachers: list

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        with torch.no_grad():
            target = self.teachers[0](input_ids=inputs["input_ids"]).logits.softmax(-1)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))


def distilled(folder, teacher, **kwargs):
    set_seed(7)
    args = arguments(folder, **{**SHORT, "per_device_train_batch_size": 8, **kwargs})
    trainer = quiet(Distilled(model=gpt2(num_layers=6), args=args, train_dataset=Rows(32, length=48)))
    trainer.teachers = [teacher.eval()]
    trainer.train()
    return trainer


def test_a_teacher_is_in_memory(tmp_path):
    small, large = gpt2(), gpt2(width=64)
    before = {name: value.clone() for name, value in large.state_dict().items()}
    first = distilled(tmp_path / "small", small, **BUDGET)
    second = distilled(tmp_path / "large", large, **BUDGET)
    for trainer in (first, second):
        assert not trainer.placement_plan.is_stock
        assert measured(trainer) == pytest.approx(1, abs=0.01)
    more = sum(p.nbytes for p in large.parameters()) - sum(p.nbytes for p in small.parameters())
    difference = second.placement_plan.baseline_peak_bytes - first.placement_plan.baseline_peak_bytes
    assert difference >= more > 0.04 * second.placement_plan.measured_peak_bytes
    assert losses(second) == losses(distilled(tmp_path / "plain", large))
    assert all(torch.equal(before[name], value) for name, value in large.state_dict().items())
    assert all(parameter.grad is None for parameter in large.parameters())


def test_a_batch_that_is_made_within_the_step_is_refused_with_the_remedy(tmp_path):
    class Generates(EfficientTrainer):
        """As GRPO: the loader gives prompts, and the loss takes what was generated from them."""

        def _prepare_inputs(self, inputs):
            ids = super()._prepare_inputs(inputs)["input_ids"]
            return {"prompts": ids[:, :4], "completions": ids[:, 4:]}

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids = torch.cat([inputs["prompts"], inputs["completions"]], 1)
            return model(input_ids=ids, labels=ids).loss

    def trained(**kwargs):
        args = arguments(tmp_path, **SHORT, **kwargs)
        trainer = quiet(Generates(model=gpt2(), args=args, train_dataset=Rows(32)))
        trainer.train()
        return trainer

    with pytest.raises(ValueError, match=r"makes its batches within the step.*choose checkpoint_placement='all'"):
        trained(**BUDGET)
    assert trained(checkpoint_placement="all").placement_plan.counts() == {"full": 4}
