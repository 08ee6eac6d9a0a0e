"""Any plan without rewrites is exact: ten steps of four kinds of models, bit for bit; with rewrites, to rounding."""

import random
from collections.abc import Iterable

import pytest
import torch
from placement_models import MODELS

from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.placement.plan.chain import choices_of
from hf_trainopt.placement.plan.plan import PlacementPlan, StageChoice
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.plan.policies import named_choices
from hf_trainopt.placement.plan.stages import find_stages
from hf_trainopt.placement.recompute.apply import apply_placement
from hf_trainopt.placement.simulate.step_setup import StepSetup


STEPS = 10
CPU = StepSetup(device=DEVICES["cpu"])


def ten_steps(name: str, plan: PlacementPlan | None):
    """Losses, gradients of each step, and at the end parameters, buffers and the random state."""
    make, make_batch = MODELS[name]
    model = make().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(1)
    losses, gradients = [], []
    placement = apply_placement(model, plan) if plan is not None else None
    for step in range(STEPS):
        loss = model(**make_batch(seed=step)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
    if placement is not None:
        placement.undo()
    return losses, gradients, model.state_dict(), torch.get_rng_state()


def plans_of(name: str) -> list[PlacementPlan]:
    """Named ones, those of a planner for two budgets, and one of random choices out of all that there are."""
    make, make_batch = MODELS[name]
    model = make()
    stages = find_stages(model)
    plans = [PlacementPlan(policy, named_choices(policy, stages)) for policy in ("all", "sqrt")]
    planner = PlacementPlanner(model, make_batch(rows=8), CPU, memory_rewrites="none")
    floor, baseline = planner.floor.peak_bytes, planner.baseline.peak_bytes
    plans.append(planner.for_budget(max(2**20, floor + (baseline - floor) // 3)))
    ((rewrites, profile),) = planner.profiles.items()
    chain, rng, path = planner.chains()[rewrites], random.Random(0), []
    while not path or path[-1].stop < chain.num_stages:
        start = path[-1].stop if path else 0
        path.append(rng.choice([s for s in chain.segments if s.start == start and s.stop <= start + 3]))
    plans.append(PlacementPlan("random", choices_of(profile, path)))
    offered = kinds_of(choice for segment in chain.segments for choice in choices_of(profile, [segment]).values())
    assert offered == kinds_of(choice for plan in plans for choice in plan.stages.values())
    return plans


def kinds_of(choices: Iterable[StageChoice]) -> set[tuple[str, bool]]:
    """What is recomputed, and whether in a run."""
    return {(choice.recompute, choice.run is not None) for choice in choices}


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_are_bit_equal(name):
    losses, gradients, state, generator = ten_steps(name, None)
    for plan in plans_of(name):
        assert not plan.is_stock
        found = ten_steps(name, plan)
        assert all(torch.equal(a, b) for a, b in zip(losses, found[0], strict=True)), plan
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[1], strict=True)), plan
        assert state.keys() == found[2].keys()
        assert all(torch.equal(state[key], found[2][key]) for key in state), plan
        assert torch.equal(generator, found[3]), plan


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_with_rewrites_the_loss_is_equal_to_rounding(name):
    make, make_batch = MODELS[name]
    rewrites = "fused_activations,chunked_loss" if name == "gpt2" else "chunked_loss"
    planner = PlacementPlanner(make(), make_batch(rows=8), CPU, memory_rewrites=rewrites)
    losses = torch.stack(ten_steps(name, None)[0])
    for plan in (planner.named("none"), planner.named("every_2")):
        assert plan.rewrites.names() == rewrites.split(",")
        found = torch.stack(ten_steps(name, plan)[0])
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=0)
