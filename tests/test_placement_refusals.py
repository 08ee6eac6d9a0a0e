"""What a placement cannot be put beside is refused before training, with the reason and the remedy."""

import pytest
import timm
import torch
from helpers import Pictures, Rows, arguments, quiet
from peft import PrefixTuningConfig, get_peft_model
from placement_models import gpt2, llama
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from hf_trainopt import EfficientTrainer
from hf_trainopt.placement import PlacementError, apply_placement
from hf_trainopt.placement.plan.plan import PlacementPlan


def run(folder, model, data, cls=EfficientTrainer, **kwargs):
    args = arguments(
        folder, accumulation_policy="fixed", max_steps=2, remove_unused_columns=False, memory_rewrites="none", **kwargs
    )
    trainer = quiet(cls(model=model, args=args, train_dataset=data))
    trainer.train()
    return trainer


class Classify(EfficientTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return nn.functional.cross_entropy(model(inputs["pixel_values"]), inputs["labels"])


def timm_model(name):
    sizes = {"img_size": 32, "depth": 3, "embed_dim": 32, "num_heads": 4} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=4, **sizes)
    model.set_grad_checkpointing(True)
    return model


@pytest.mark.parametrize("placement", [{"memory_budget": "90%"}, {"checkpoint_placement": "all"}], ids=str)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "convnext_atto"])
def test_checkpointing_of_timm(name, placement, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"turn it off with model\.set_grad_checkpointing\(False\)"):
        run(tmp_path, timm_model(name), Pictures(), Classify, **placement)
    assert "cannot be replayed" not in caplog.text  # which would be another reason than the true one


class Checkpoints(nn.Module):
    """Calls PyTorch's function in its forward pass, as many models of the Hub do."""

    def __init__(self, use_reentrant, where):
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
        self.use_reentrant, self.where = use_reentrant, where

    def forward(self, input_ids, labels=None):
        x = self.first(input_ids.float())
        for block in self.blocks:
            own = self.where == "blocks"
            x = checkpoint(block, x, use_reentrant=self.use_reentrant) if own else block(x)
        if self.where == "head":
            return ModelOutput(loss=checkpoint(lambda y: y.square().mean(), x, use_reentrant=self.use_reentrant))
        return ModelOutput(loss=x.square().mean())


@pytest.mark.parametrize("where", ["blocks", "head"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_inside_a_forward_pass(use_reentrant, where, tmp_path):
    with pytest.raises(PlacementError, match=r"calls torch\.utils\.checkpoint.*turn its own checkpointing off"):
        run(tmp_path, Checkpoints(use_reentrant, where), Rows(12), memory_budget="90%")
    assert torch.utils.checkpoint.checkpoint is checkpoint


def test_flags_are_looked_at_when_a_plan_is_applied():
    model = timm_model("resnet10t")
    with pytest.raises(ValueError, match="set_grad_checkpointing"):
        apply_placement(model, PlacementPlan("mine", {}))
    model.set_grad_checkpointing(False)
    apply_placement(model, PlacementPlan("mine", {})).undo()


PLACEMENTS = [{"memory_budget": "90%"}, {"checkpoint_placement": "all"}, {"checkpoint_placement": "sqrt"}]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_prefix_tuning(placement, tmp_path):
    """Its prefix is in `past_key_values`, which recomputed layers would write to twice."""
    model = get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(PlacementError, match=r"past_key_values.*Prefix tuning.*checkpoint_placement='none'") as error:
        run(tmp_path, model, Rows(12), **placement)
    assert "'all'" not in str(error.value)  # which fails likewise


class Fragile(nn.Module):
    """A block that runs once only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.calls = 0

    def forward(self, x):
        from torch._C import _current_graph_task_id

        if _current_graph_task_id() != -1:
            raise RuntimeError("called in the backward pass")
        return self.linear(x).tanh()


class FragileModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Fragile() for _ in range(3))

    def forward(self, input_ids, labels=None):
        x = input_ids.float()
        for block in self.blocks:
            x = block(x)
        return ModelOutput(loss=x.square().mean())


@pytest.mark.parametrize("placement", [{"memory_budget": "70%"}, {"checkpoint_placement": "all"}], ids=str)
def test_the_remedy_is_none_that_fails_likewise(placement, tmp_path):
    settings = {"placement_stages": r"blocks\.\d"} | placement
    with pytest.raises(PlacementError, match=r"called in the backward pass.*though it can without") as error:
        run(tmp_path, FragileModel(), Rows(12), **settings)
    assert "'every_n'" not in str(error.value)


class Pairs(EfficientTrainer):
    """A batch that the model alone cannot take, and a loss that is judged."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(input_ids=inputs["chosen"]).logits.mean() - model(input_ids=inputs["rejected"]).logits.mean()
        return loss if loss.item() < 5 else loss / 2


class Preferences(Rows):
    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {"chosen": row["input_ids"], "rejected": row["input_ids"].flip(0)}


def test_the_reason_of_compute_loss_is_the_one_that_is_given(tmp_path):
    with pytest.raises(PlacementError, match=r"Pairs\.compute_loss cannot be replayed.*look at values") as error:
        run(tmp_path, gpt2(), Preferences(12), Pairs, memory_budget="90%")
    assert "chosen" not in str(error.value)  # the model's own loss, tried in its place, has failed for another reason
