"""The controller: when it measures, when it probes, how fast k moves. Replayed without a Trainer."""

from dataclasses import replace
from itertools import pairwise

import pytest

from hf_trainopt.accumulation import FixedPolicy, GoodputPolicy, NoiseScalePolicy, RampPolicy, WindowStatistics
from hf_trainopt.accumulation.controller import STARTUP_WINDOWS, AccumulationController
from hf_trainopt.accumulation.noise_scale import NoiseScaleTracker


def controller(policy, **kwargs) -> AccumulationController:
    defaults = {
        "reference_steps": 8,
        "minimum": 1,
        "maximum": 32,
        "world_size": 1,
        "micro_batch_size": 4,
        "tracker": NoiseScaleTracker(half_life=400.0),
        "measure_interval": 8,
        "dwell": 4,
    }
    return AccumulationController(policy=policy, **(defaults | kwargs))


def window(k: int, noise_in_micro_batches: float, jitter: float) -> WindowStatistics:
    """Statistics of k micro-batches of 4 samples whose averages say B_noise = `noise_in_micro_batches`."""
    trace, square = 4 * noise_in_micro_batches * (1 + jitter), 1 - jitter
    individual, mean = square + trace / 4, square + trace / (4 * k)
    return WindowStatistics(
        weighted_square_norm=individual,
        squared_weight_square_norm=individual / k,
        gradient_square_norm=mean,
        individual_coefficient=1 / 4,
        mean_coefficient=1 / (4 * k),
        squared_weight=1 / k,
        num_micro_batches=k,
        num_items=4.0 * k,
        num_samples=4 * k,
    )


def replay(subject: AccumulationController, noise_scales: list[float]) -> list[tuple[int, bool]]:
    """Run one window for each entry; return (k, measured) of each."""
    done = []
    for index, scale in enumerate(noise_scales):
        k = subject.next_window_steps
        measured = subject.measures_next and k * subject.world_size >= 2
        next_k = subject.decide(subject.observe(index / len(noise_scales), 1.0))
        subject.finish_window(k, window(max(2, k), scale, 0.1 * (-1) ** index), measured, next_k)
        done.append((k, measured))
    return done


def test_k_climbs_to_the_noise_scale_by_doubling_and_stays():
    done = replay(controller(NoiseScalePolicy()), [12.0] * 80)
    sizes = [k for k, _ in done]
    assert sizes[0] == 2
    changes = [(a, b) for a, b in pairwise(sizes) if a != b]
    assert changes[:2] == [(2, 4), (4, 8)]
    assert sizes[-1] * 1.25 >= 12 >= sizes[-1]
    assert len(set(sizes[40:])) == 1


def test_changes_are_at_least_dwell_windows_apart():
    done = replay(controller(NoiseScalePolicy(), dwell=6), [30.0] * 60)
    sizes = [k for k, _ in done]
    changed = [i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]]
    assert len(changed) >= 3
    assert min(b - a for a, b in pairwise(changed)) >= 6


def test_every_nth_window_is_measured_once_the_gradient_is_resolved():
    done = replay(controller(NoiseScalePolicy()), [12.0] * 100)
    measured = [i for i, (_, m) in enumerate(done) if m]
    assert measured[:4] == [0, 1, 2, 3]
    later = [i for i in measured if i > STARTUP_WINDOWS]
    assert {b - a for a, b in pairwise(later)} == {8}


def test_at_k_1_on_one_rank_every_measured_window_is_a_probe_of_two():
    done = replay(controller(GoodputPolicy(step_cost=0.0), reference_steps=1), [4.0] * 100)
    settled = done[STARTUP_WINDOWS:]
    assert {k for k, measured in settled if measured} == {2}
    assert {k for k, measured in settled if not measured} == {1}
    assert sum(measured for _, measured in settled) == pytest.approx(len(settled) / 8, abs=1)


def test_two_ranks_need_no_probe():
    done = replay(controller(GoodputPolicy(step_cost=0.0), reference_steps=1, world_size=2), [4.0] * 60)
    assert {k for k, _ in done} == {1}
    assert any(measured for _, measured in done)


def test_k_holds_while_the_gradient_is_not_resolved():
    subject = controller(NoiseScalePolicy())
    for _ in range(40):
        k = subject.next_window_steps
        next_k = subject.decide(subject.observe(0.0, 1.0))
        subject.finish_window(k, window(k, 1e9, 0.0), subject.measures_next, next_k)
    assert subject.noise is not None
    assert subject.accumulation_steps <= 32


def test_a_ramp_begins_with_its_first_value_and_jumps():
    subject = controller(RampPolicy.parse("0:3,0.5:24"), tracker=None)
    done = replay(subject, [1.0] * 20)
    sizes = [k for k, _ in done]
    assert set(sizes[:10]) == {3}
    assert sizes[-1] == 24
    assert not any(measured for _, measured in done)


def test_bounds_hold_from_the_first_window():
    assert controller(FixedPolicy(), minimum=10, maximum=12).accumulation_steps == 10
    assert controller(NoiseScalePolicy(), minimum=4).accumulation_steps == 4


def test_decay_is_relative_to_the_highest_rate_so_far():
    """Warm-up is no decay; a restart is the end of one. The peak survives a checkpoint."""
    subject = controller(FixedPolicy())
    seen = []
    for factor in (0.0, 0.5, 1.0, 0.5, 0.25, 1.0):
        seen.append(subject.observe(0.5, factor).learning_rate_decay)
        subject.finish_window(8, window(8, 4.0, 0.0), False, 8, factor)
    assert seen == [1.0, 1.0, 1.0, 0.5, 0.25, 1.0]
    other = controller(FixedPolicy())
    other.load_state_dict(subject.state_dict())
    assert other.observe(0.5, 0.1).learning_rate_decay == pytest.approx(0.1)


def test_a_saved_controller_goes_on_as_if_nothing_had_happened():
    scales = [6.0, 9.0, 3.0, 20.0] * 20
    whole = controller(NoiseScalePolicy())
    expected = replay(whole, scales)
    first, second = controller(NoiseScalePolicy()), controller(NoiseScalePolicy())
    done = replay(first, scales[:30])
    second.load_state_dict(first.state_dict())
    assert done + replay(second, scales[30:]) == expected
    assert second.noise == whole.noise


def lone(k: int) -> WindowStatistics:
    """Statistics of a window of which only one micro-batch has targets."""
    return replace(window(1, 4.0, 0.0), num_samples=4 * k)


def test_a_window_with_one_micro_batch_that_has_targets_is_made_up_for():
    subject = controller(GoodputPolicy(step_cost=1.0), measure_interval=8)
    replay(subject, [4.0] * 40)
    while not subject.measures_next:
        replay(subject, [4.0])
    for _ in range(3):
        assert subject.measures_next
        subject.finish_window(2, lone(2), True, 2)
    replay(subject, [4.0])
    assert not subject.measures_next


def test_where_most_windows_are_like_that_measuring_costs_no_more_than_elsewhere():
    subject = controller(GoodputPolicy(step_cost=1.0), measure_interval=8)
    measured = []
    for _ in range(200):
        measured.append(subject.measures_next)
        subject.finish_window(2, lone(2), subject.measures_next, 2)
    assert sum(measured[:40]) > 16
    assert sum(measured[-80:]) == 10
