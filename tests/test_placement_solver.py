"""The solver against a slow twin that tries every path; budgets; the segments of Chen et al."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import all_paths, best_path_twin

from hf_trainopt.placement.plan.plan import FULL, STORE, runs_of
from hf_trainopt.placement.plan.policies import named_choices, segments_of
from hf_trainopt.placement.plan.solver import Chain, Segment, least_peak, solve


def random_chain(seed: int, num_stages: int, options: int = 3, runs: bool = True) -> Chain:
    rng = random.Random(seed)
    segments = []
    for index in range(num_stages):
        for _ in range(options):
            keep = rng.randint(0, 50)
            segments.append(
                Segment(index, index + 1, keep, keep + rng.randint(0, 40), rng.choice([0.0, rng.random()]))
            )
    if runs:
        for start in range(num_stages):
            for stop in range(start + 2, num_stages + 1):
                keep = rng.randint(0, 20)
                segments.append(Segment(start, stop, keep, keep + rng.randint(0, 90), rng.random() * (stop - start)))
    return Chain(num_stages, tuple(segments), rng.randint(0, 30), rng.randint(0, 60), rng.randint(0, 40))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0, 1.2))
def test_solver_finds_what_trying_everything_finds(seed, num_stages, share):
    chain = random_chain(seed, num_stages)
    peaks = [chain.peak(path) for path in all_paths(chain)]
    budget = round(min(peaks) + share * (max(peaks) - min(peaks))) - 1
    found, twin = solve(chain, budget), best_path_twin(chain, budget)
    assert (found is None) == (twin is None)
    if found is not None:
        assert found.seconds == pytest.approx(twin[0], abs=1e-12)
        assert found.peak_bytes == chain.peak(found.path) <= budget
        assert found.gap_seconds == 0
        assert sum(segment.seconds for segment in found.path) == pytest.approx(found.seconds)
        assert [s.start for s in found.path] == [0, *(s.stop for s in found.path[:-1])]
        assert found.path[-1].stop == num_stages


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_solution_is_monotone_in_the_budget(seed, num_stages):
    chain = random_chain(seed, num_stages)
    seconds = [math.inf if (found := solve(chain, budget)) is None else found.seconds for budget in range(0, 500, 5)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < math.inf


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_least_peak(seed, num_stages):
    chain = random_chain(seed, num_stages)
    floor = min(chain.peak(path) for path in all_paths(chain))
    found = least_peak(chain)
    assert found.peak_bytes == chain.peak(found.path) == floor
    assert solve(chain, floor - 1) is None


@pytest.mark.parametrize("seed", range(20))
def test_thinned_states_bound_the_gap(seed):
    chain = random_chain(seed, 7, options=4, runs=False)
    exact, rough = solve(chain, 300), solve(chain, 300, max_states=4)
    assert exact.gap_seconds == 0
    assert rough.peak_bytes <= 300
    assert exact.seconds <= rough.seconds + 1e-12
    assert rough.seconds - rough.gap_seconds <= exact.seconds + 1e-12


def test_a_tie_in_time_keeps_fewer_bytes():
    chain = Chain(1, (Segment(0, 1, 10, 10, 1.0, "more"), Segment(0, 1, 5, 5, 1.0, "less")), 0, 0)
    assert solve(chain, 100).path[0].choice == "less"


def test_sqrt_segments_are_those_of_chen():
    """√L segments (arXiv:1604.06174, section 4.1), each recomputed from its input, the last one included."""
    stages = [f"h.{i}" for i in range(16)]
    choices = named_choices("sqrt", stages)
    assert [len(run) for run in runs_of(choices)] == [4, 4, 4, 4]
    assert runs_of(choices)[0] == ["h.0", "h.1", "h.2", "h.3"]
    assert all(choice.recompute == "full" for choice in choices.values())
    assert [len(s) for s in segments_of(12, 3)] == [4, 4, 4]
    assert [len(s) for s in segments_of(10, 3)] == [4, 3, 3]
    for count in range(1, 60):
        lengths = [len(s) for s in segments_of(count, max(1, round(math.sqrt(count))))]
        assert sum(lengths) == count
        assert max(lengths) - min(lengths) <= 1


def test_other_named_policies():
    stages = ["a", "b", "c", "d"]
    assert set(named_choices("none", stages).values()) == {STORE}
    assert set(named_choices("all", stages).values()) == {FULL}
    assert list(named_choices("every_n", stages).values()) == [FULL, STORE, FULL, STORE]
    assert list(named_choices("every_3", stages).values()) == [FULL, STORE, STORE, FULL]
    assert list(named_choices("every_n", stages, every_n=4).values()) == [FULL, STORE, STORE, STORE]
    with pytest.raises(ValueError, match="every_n is 0"):
        named_choices("every_0", stages)
    with pytest.raises(ValueError, match="choose one of none, all"):
        named_choices("chen", stages)
