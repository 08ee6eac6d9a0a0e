"""What single architectures need of placement: shapes that PyTorch has wrong, assertions, caches, odd stages."""

import pytest
import torch
from placement_models import tokens
from test_placement_replay import CPU, real_peak
from torch import nn
from transformers import (
    FlaubertConfig,
    FlaubertWithLMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from transformers.utils import ModelOutput, torch_compilable_check

from hf_trainopt.placement.plan.plan import PlacementPlan
from hf_trainopt.placement.plan.plan_model import plan_placement
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.plan.policies import named_choices
from hf_trainopt.placement.plan.stages import find_stages
from hf_trainopt.placement.recompute.apply import apply_placement
from hf_trainopt.placement.simulate.replay import StepReplayer


class Recurrent(nn.Module):
    def __init__(self, width: int = 48):
        super().__init__()
        self.layer, self.linear = nn.LSTM(width, width, batch_first=True), nn.Linear(width, width)

    def forward(self, x):
        return self.linear(self.layer(x)[0])


class Recurrents(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(Recurrent() for _ in range(3)))

    def forward(self, x):
        return ModelOutput(loss=self.layers(x).square().mean())


def test_the_workspace_of_an_lstm_is_in_the_predicted_peak():
    batch = {"x": torch.randn(32, 50, 48)}
    stages = find_stages(Recurrents())
    replayer = StepReplayer(Recurrents(), batch, CPU, stages)
    for policy in ("none", "all"):
        plan = PlacementPlan(policy, named_choices(policy, stages))
        assert replayer.replay(plan).peak_bytes == pytest.approx(real_peak(Recurrents(), batch, plan), rel=0.03), (
            policy
        )


def flaubert():
    torch.manual_seed(0)
    config = FlaubertConfig(emb_dim=32, n_layers=3, n_heads=4, vocab_size=211, use_cache=False)
    return FlaubertWithLMHeadModel(config).train()


def test_lists_side_by_side_are_no_stages_but_what_they_hold():
    """XLM keeps attentions, norms and feed-forward layers in a list each, and makes a cache whatever it is told."""
    stages = find_stages(flaubert())
    assert stages == [f"transformer.{kind}.{i}" for kind in ("attentions", "ffns") for i in range(3)]

    def gradients(plan):
        model = flaubert()
        torch.manual_seed(1)
        applied = apply_placement(model, plan) if plan else None
        loss = model(**tokens()).loss
        loss.backward()
        if applied:
            applied.undo()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    found = gradients(PlacementPlan("all", named_choices("all", stages)))
    for one, other in zip(found, gradients(None), strict=True):
        # They have a cache in training, too. Recomputations leave it out, so sums are rounded differently.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_stages_that_are_never_called_are_left_out_of_plans(caplog):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4))

        def forward(self, x):
            for block in self.blocks[:3]:
                x = block(x)
            return ModelOutput(loss=x.square().mean())

    planner = PlacementPlanner(Unused(), {"x": torch.randn(4, 8)}, CPU)
    assert planner.stages == ["blocks.0", "blocks.1", "blocks.2"]
    assert "Not planned: blocks.3" in caplog.text


def test_assertions_on_values_do_not_stop_a_replay():
    """LLaVA and others compare the number of image tokens with that of image features."""

    class Asserting(Recurrents):
        def forward(self, x):
            torch_compilable_check((x > -100).all(), "small")
            return super().forward(x)

    with pytest.raises(ValueError, match="large"):
        torch_compilable_check(torch.tensor(False), "large", ValueError)
    planner = PlacementPlanner(Asserting(), {"x": torch.randn(4, 5, 48)}, CPU)
    assert len(planner.stages) == 3
    with pytest.raises(ValueError, match="large"):  # put back
        torch_compilable_check(torch.tensor(False), "large", ValueError)


def test_states_that_are_no_buffers_are_copied():
    """RecurrentGemma keeps what it has computed as an attribute, with its graph."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "lru_width": 32}
    config = RecurrentGemmaConfig(num_hidden_layers=3, vocab_size=211, attention_window_size=16, **sizes)
    model = RecurrentGemmaForCausalLM(config).train()
    model.config.use_cache = False
    replayer = StepReplayer(model, tokens(), CPU, find_stages(model))
    fresh = replayer.replay_choices({}).peak_bytes
    model(**tokens()).loss.backward()
    model.zero_grad()
    again = StepReplayer(model, tokens(), CPU, find_stages(model)).replay_choices({}).peak_bytes
    assert again == pytest.approx(fresh, rel=0.01)


def test_products_that_are_modified_in_place_are_not_kept_and_the_others_are():
    """The experts of GPT-OSS have biases, which are added in place to what `grouped_mm` returns."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = GptOssForCausalLM(
        GptOssConfig(
            num_hidden_layers=2, vocab_size=211, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
            use_cache=False, sliding_window=16, layer_types=["full_attention"] * 2, **sizes,
        )
    )  # fmt: skip
    plan = plan_placement(model, tokens(rows=8), memory_budget="90%", memory_rewrites="none", setup=CPU)
    (choice,) = {choice for choice in plan.stages.values() if choice.recompute != "none"}
    assert choice.recompute == "selective"
    with apply_placement(model.train(), plan):
        model(**tokens(rows=8)).loss.backward()  # nothing that is kept has changed
