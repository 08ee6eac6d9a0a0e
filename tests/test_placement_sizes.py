"""Which sizes fit: the search against a scan, and what a step of several micro-batches takes."""

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement_models import gpt2, tokens
from reference import largest_size_by_scan

from hf_trainopt.machine.costs import Cost
from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.placement.errors import PlacementError
from hf_trainopt.placement.plan.plan import FULL, STORE, PlacementPlan
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.plan.sizes import fastest_micro_batch, largest_size, step_seconds
from hf_trainopt.placement.simulate.step_setup import StepSetup


@given(
    fixed=st.integers(0, 500), slope=st.integers(1, 60), bend=st.integers(0, 3), budget=st.integers(0, 3000),
    limit=st.integers(1, 90), first=st.integers(1, 100), unit=st.integers(1, 7),
)  # fmt: skip
def test_search_finds_what_a_scan_finds(fixed, slope, bend, budget, limit, first, unit):
    tried = []

    def peak(size):
        tried.append(size)
        return fixed + slope * size + bend * size * size

    found = largest_size(peak, limit, budget, first=first, unit=unit)
    assert found == largest_size_by_scan(peak, limit, budget, unit)


@given(fixed=st.integers(0, 10**6), slope=st.integers(1, 10**5), budget=st.integers(1, 10**8))
def test_a_straight_line_takes_few_tries(fixed, slope, budget):
    tried = []

    def peak(size):
        tried.append(size)
        return fixed + slope * size

    largest_size(peak, 2**14, budget, first=8)
    assert len(tried) == len(set(tried)) <= 8


def planner_for(size, k, like=None, device="a100"):
    setup = StepSetup(device=DEVICES[device], accumulation_steps=k)
    return PlacementPlanner(gpt2(), tokens(size, 32), setup, memory_rewrites="none", like=like)


def test_a_step_of_several_micro_batches_steps_once():
    planner = planner_for(4, 3)
    replay = planner.baseline
    assert step_seconds(replay, 1) == replay.cost.seconds
    micro = replay.cost - replay.section("step").cost
    three = step_seconds(replay, 3)
    assert abs(three - replay.cost.seconds - 2 * micro.seconds) < 1e-9
    assert three < 3 * replay.cost.seconds


def test_the_fastest_micro_batch_beats_every_other_with_any_uniform_placement():
    """Against each micro-batch with each choice of store or recompute for each layer."""
    planners = {size: planner_for(size, 12 // size) for size in (1, 2, 3, 4, 6, 12)}
    budget = f"{planners[3].baseline.peak_bytes - 1}B"
    found = fastest_micro_batch(planners.get, {size: 12 // size for size in planners}, budget)
    others = []
    for size, planner in planners.items():
        for choices in itertools.product((STORE, FULL), repeat=len(planner.stages)):
            replay = planner.replay(dict(zip(planner.stages, choices, strict=True)))
            if replay.peak_bytes <= planner.bytes_of(budget):
                others.append(step_seconds(replay, 12 // size))
    assert found[0].seconds <= min(others) + 1e-9
    assert found[0].samples_per_second == 12 / found[0].seconds


class Timed:
    """A planner on a device, whose plans recompute this share; a step of this micro-batch takes so many seconds."""

    def __init__(self, seconds, kind, recomputed=0.0):
        stages = {"a": FULL if recomputed else STORE}
        plan = PlacementPlan(
            "budget", stages, baseline_peak_bytes=2, predicted_peak_bytes=1, extra_time_ratio=recomputed
        )
        self.setup, self.baseline = SimpleNamespace(device=SimpleNamespace(kind=kind)), SimpleNamespace(peak_bytes=1)
        once = SimpleNamespace(cost=Cost())
        replay = SimpleNamespace(cost=Cost(device_seconds=seconds), section=lambda phase: once)
        self.for_budget, self.replay = lambda budget: plan, lambda stages, rewrites: replay


@pytest.mark.parametrize(("kind", "tried"), [("cpu", [8, 4, 2, 1]), ("cuda", [8])])
def test_on_a_cpu_all_sizes_are_tried(kind, tried):
    seconds = {8: 8.0, 4: 4.5, 2: 1.25, 1: 0.7}  # of a micro-batch
    asked = []

    def planner(size):
        asked.append(size)
        return Timed(seconds[size], kind)

    found = fastest_micro_batch(planner, {8: 1, 4: 2, 2: 4, 1: 8}, "1GiB")
    assert list(dict.fromkeys(asked)) == tried
    assert found[0].micro_batch == (2 if kind == "cpu" else 8)


def test_a_larger_one_that_recomputes_more_is_not_preferred():
    timed = {4: Timed(4.2, "cpu", 0.2), 2: Timed(2.08, "cpu", 0.1), 1: Timed(1.0, "cpu", 0.1)}
    found = fastest_micro_batch(timed.get, {4: 1, 2: 2, 1: 4}, "1GiB")
    assert [sized.micro_batch for sized in found] == [2, 1, 4]


def test_choices_that_are_worth_having_for_one_batch_are_for_another():
    first, other = planner_for(4, 1), planner_for(8, 1)
    taught = planner_for(8, 1, like=first)
    budget = f"{(other.floor.peak_bytes + other.baseline.peak_bytes) // 2}B"
    assert taught.floor.peak_bytes == other.floor.peak_bytes
    assert taught.for_budget(budget).to_dict() == other.for_budget(budget).to_dict()


def test_nothing_is_found_where_nothing_fits():
    planner = planner_for(1, 2)
    assert fastest_micro_batch(lambda size: planner, {1: 2}, "1MiB") == []
    with pytest.raises(PlacementError, match="no placement needs less"):
        planner.check_budget("1MiB")
