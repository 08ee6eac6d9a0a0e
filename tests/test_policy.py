"""Policies and limits are pure: they are checked, and replayed, without a Trainer."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_trainopt.accumulation import (
    FixedPolicy,
    GoodputPolicy,
    NoiseScale,
    NoiseScalePolicy,
    Observation,
    RampPolicy,
    limit_change,
)


def noise(value: float, resolved: bool = True) -> NoiseScale:
    return NoiseScale(value, value / 2, value * 2, value, 1.0, resolved, 10.0)


def observe(**kwargs) -> Observation:
    defaults = {"accumulation_steps": 2, "reference_steps": 8, "micro_batch_samples": 4.0, "progress": 0.5}
    return Observation(**(defaults | kwargs))


def test_fixed_is_the_reference():
    assert FixedPolicy()(observe(accumulation_steps=3, noise=noise(100.0))) == 8


@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.0])
def test_noise_scale_targets_a_batch_of_rho_noise_scales(ratio):
    assert NoiseScalePolicy(ratio)(observe(noise=noise(40.0))) == pytest.approx(ratio * 40.0 / 4.0)


@pytest.mark.parametrize("policy", [NoiseScalePolicy(), GoodputPolicy(step_cost=0.5)])
@pytest.mark.parametrize("seen", [None, noise(40.0, resolved=False), noise(math.inf, resolved=False)])
def test_policies_hold_while_nothing_is_resolved(policy, seen):
    assert policy(observe(noise=seen)) is None


@given(cost=st.floats(0.01, 50), noise_scale=st.floats(0.1, 1e4))
def test_goodput_is_the_best_k_of_a_brute_force_search(cost, noise_scale):
    """k* minimises seconds to the loss, (k + r)(1 + B/k): searched on a fine grid."""
    policy = GoodputPolicy(step_cost=cost, annealing_ratio=0.0)
    target = policy(observe(noise=noise(noise_scale * 4.0), learning_rate_decay=0.1))
    grid = [1e-2 * 1.01**i for i in range(2000)]
    best = min(grid, key=lambda k: (k + cost) * (1 + noise_scale / k))
    assert target == pytest.approx(best, rel=0.011)


@pytest.mark.parametrize(
    ("decay", "noise_in_micro_batches", "expected"),
    [
        (1.0, 100.0, 2.0),  # k* alone: √(0.04 · 100)
        (0.5, 100.0, 4.0),  # half the rate: twice the batch
        (0.05, 100.0, 25.0),  # not above a quarter of the noise scale
        (0.5, 4.0, 1.0),  # k* = 0.4 counts as the 1 that it is, and the ceiling is 1
        (0.0, 400.0, 100.0),  # a schedule that ends at zero
        (0.5, 1.0, 0.25),  # the ceiling is below 1: k stays 1 by the limits
    ],
)
def test_goodput_grows_as_the_rate_decays(decay, noise_in_micro_batches, expected):
    seen = observe(noise=noise(4 * noise_in_micro_batches), learning_rate_decay=decay)
    assert GoodputPolicy(step_cost=0.04)(seen) == pytest.approx(expected)


def test_goodput_measures_its_step_cost():
    seen = observe(noise=noise(36.0), micro_batch_seconds=0.2, step_seconds=0.8)
    assert GoodputPolicy()(seen) == pytest.approx(math.sqrt(4 * 9))
    assert GoodputPolicy()(observe(noise=noise(36.0), micro_batch_seconds=0.2)) is None
    assert GoodputPolicy(step_cost=1.0)(seen) == pytest.approx(3.0)


def test_ramp_follows_its_text():
    ramp = RampPolicy.parse("0:1,0.25:2,0.5:8")
    assert [ramp(observe(progress=p)) for p in (0, 0.2499, 0.25, 0.49, 0.5, 1.0)] == [1, 1, 2, 2, 8, 8]


@pytest.mark.parametrize("text", ["", "1", "0:1,0.5", "0.1:1", "0:1,0.5:2,0.4:3", "0:0", "0:1,1:2", "0:1.5"])
def test_a_bad_ramp_is_refused(text):
    with pytest.raises(ValueError, match=r"ramp|boundaries"):
        RampPolicy.parse(text)


targets = st.one_of(st.none(), st.floats(0, 1e6), st.just(math.inf))


@given(st.integers(1, 500), targets, st.integers(1, 20), st.integers(0, 100))
def test_limits_hold_for_every_wish(current, target, minimum, extra):
    maximum = minimum + extra
    found = limit_change(current, target, minimum, maximum)
    assert minimum <= found <= maximum
    inside = min(max(current, minimum), maximum)
    assert inside / 2 <= found <= 2 * inside
    if target is None:
        assert found == inside


@given(st.integers(1, 64), st.floats(1, 64))
def test_a_constant_wish_is_reached_and_kept(current, target):
    """Hysteresis neither oscillates nor stops short by more than its own width (or one)."""
    for _ in range(20):
        current = limit_change(current, target, 1, 64)
    assert limit_change(current, target, 1, 64) == current
    assert current / 1.25 <= target <= current * 1.25 or abs(current - target) <= 1


@pytest.mark.parametrize("wish", [math.nan, "8"])
def test_what_is_no_number_is_a_fault_of_the_policy(wish):
    with pytest.raises(ValueError, match="the accumulation policy returned"):
        limit_change(2, wish, 1, 8)


def test_exact_wishes_are_not_damped():
    assert limit_change(1, 16.0, 1, 32, exact=True) == 16
