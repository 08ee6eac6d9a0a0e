"""A memory budget for losses that the model alone does not have: preferences, rewards, two batches in one loss."""

import copy
import logging
from dataclasses import dataclass

import pytest
import torch
from helpers import Rows, arguments, quiet, weights_equal
from placement_models import gpt2
from test_placement_trainer import losses, measured
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, set_seed

from hf_trainopt import EfficientTrainer, EfficientTrainerMixin, EfficientTrainingArgumentsMixin
from hf_trainopt.placement.costs import DEVICES


BUDGET = {"memory_budget": "75%", "memory_rewrites": "none"}
SHORT = {
    "accumulation_policy": "fixed", "max_steps": 3, "per_device_train_batch_size": 4, "seed": 7,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch):
    """The CPU by its data sheet: the same times in every run, and none spent on measuring them."""
    monkeypatch.setattr("hf_trainopt.placement.trainer.device_spec", lambda device: DEVICES["cpu"])


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
    return LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=1, eos_token_id=1, pad_token_id=0, use_cache=False, **kwargs,
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
    settings = {"precompute_ref_log_probs": True, **kwargs.pop("settings", {})}
    ref_model = None
    return trained(
        trl, folder, "DPO", model=llama(), settings=settings, trainer_kwargs={"ref_model": ref_model}, **kwargs
    )


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
    print(run.__name__, plan.baseline_peak_bytes, plan.predicted_peak_bytes, plan.measured_peak_bytes, plan.summary())
    assert not plan.is_stock
    assert plan.predicted_peak_bytes <= 0.75 * plan.baseline_peak_bytes
    assert measured(planned) == pytest.approx(1, abs=0.03)
    assert losses(planned) == losses(plain)
    assert weights_equal(planned.model, plain.model)
    # What compute_loss keeps is what the steps of the run have put there.
    metrics = [{**line} for line in planned.state.log_history if "num_tokens" in line]
    expected = [{**line} for line in plain.state.log_history if "num_tokens" in line]
    assert len(metrics) == len(expected)
    for line, other in zip(metrics, expected, strict=True):
        assert {key: line[key] for key in other if key in METRICS} == {
            key: other[key] for key in other if key in METRICS
        }
    assert planned._total_train_tokens == plain._total_train_tokens


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


class Contrastive(EfficientTrainer):
    """As the losses of sentence-transformers: pooled, normalised, each anchor against all positives of the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pooled = [self.pooled(model, inputs[f"{n}_input_ids"], inputs[f"{n}_attention_mask"]) for n in self.names]
        scores = 20 * pooled[0] @ pooled[1].T
        loss = F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
        self.similarities = [*getattr(self, "similarities", []), scores.diagonal().mean().item()]
        return (loss, None) if return_outputs else loss

    names = ("anchor", "positive")

    @staticmethod
    def pooled(model, ids, mask):
        hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        weights = mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


def contrastive(folder, model=llama, cls=Contrastive, **kwargs):
    set_seed(7)
    args = arguments(folder, remove_unused_columns=False, **{**SHORT, "per_device_train_batch_size": 8, **kwargs})
    trainer = quiet(cls(model=model(), args=args, train_dataset=Pairs(32, length=48)))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "model", [llama, lambda: gpt2(num_layers=6, attn_implementation="eager")], ids=["llama", "gpt2"]
)
def test_a_loss_over_two_batches(tmp_path, caplog, model):
    with caplog.at_level(logging.INFO, logger="hf_trainopt"):
        planned = contrastive(tmp_path / "planned", model, **BUDGET)
    plan = planned.placement_plan
    print(
        plan.baseline_peak_bytes,
        plan.predicted_peak_bytes,
        plan.measured_peak_bytes,
        plan.summary(),
        plan.optimality_gap,
    )
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
