"""The step timer on a clock that the test moves."""

import pytest

from hf_trainopt.accumulation import timing
from hf_trainopt.accumulation.timing import StepTimer


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
    return clock


def run_window(timer: StepTimer, clock: Clock, k: int, fetch=0.5, compute=2.0, reduction=0.0, step=3.0, ours=100.0):
    timer.start_window()
    clock.now += fetch * k
    timer.fetched(k)
    for index in range(k):
        last = index == k - 1
        clock.now += compute + (reduction if last else 0.0)
        timer.micro_batch_done(last)
    clock.now += ours  # our own statistics must not count
    timer.restart()
    clock.now += step
    timer.step_done()


def test_one_rank(clock):
    timer = StepTimer()
    for k in (4, 1, 1, 3):
        run_window(timer, clock, k)
    assert timer.micro_batch_seconds == pytest.approx(2.5)
    assert timer.step_seconds == pytest.approx(3.0)
    assert not timer.needs_plain_micro_batch


def test_the_first_window_and_rare_disturbances_do_not_count(clock):
    timer = StepTimer()
    run_window(timer, clock, 2, compute=500.0)
    assert timer.micro_batch_seconds is None
    for k in (2, 2, 2):
        run_window(timer, clock, k)
    run_window(timer, clock, 1, compute=77.0, step=900.0)
    assert timer.micro_batch_seconds == pytest.approx(2.5)
    assert timer.step_seconds == pytest.approx(3.0)


def test_many_ranks_count_the_reduction_as_part_of_the_step(clock):
    timer = StepTimer(distributed=True)
    assert not timer.needs_plain_micro_batch  # the first window is not timed
    for _ in range(4):
        run_window(timer, clock, 1, reduction=1.5)
    assert timer.needs_plain_micro_batch
    assert timer.step_seconds is None
    for _ in range(4):
        run_window(timer, clock, 2, reduction=1.5)
    assert timer.micro_batch_seconds == pytest.approx(2.5)
    assert timer.step_seconds == pytest.approx(4.5)


def test_a_probe_is_asked_for_only_where_it_is_timed(clock):
    timer = StepTimer(distributed=True, interval=4)
    asked = []
    for index in range(13):
        asked += [index] * timer.needs_plain_micro_batch
        run_window(timer, clock, 2 if timer.needs_plain_micro_batch else 1, reduction=1.5)
    assert asked == [4, 8]
    assert timer.step_seconds == pytest.approx(4.5)


def test_interval_leaves_windows_untimed(clock):
    waits = []
    timer = StepTimer(synchronize=lambda: waits.append(clock.now), interval=4)
    for _ in range(8):
        run_window(timer, clock, 2)
    assert len(waits) == 6  # one timed window (the fifth): start, fetch, two micro-batches, restart, step


def resumed(timer: StepTimer, **settings) -> StepTimer:
    other = StepTimer(**settings)
    other.load_state_dict(timer.state_dict())
    return other


def test_a_resumed_run_goes_on_with_what_was_measured(clock):
    timer = StepTimer(distributed=True)
    for _ in range(4):
        run_window(timer, clock, 2, reduction=1.5)
    other = resumed(timer, distributed=True)
    assert (other.micro_batch_seconds, other.step_seconds) == pytest.approx((2.5, 4.5))
    assert not other.needs_plain_micro_batch
    run_window(other, clock, 2, compute=500.0)  # the first of a process isn't timed
    assert not other.needs_plain_micro_batch
    # On a slower machine new times soon outweigh the old ones, however many those were.
    for _ in range(100):
        run_window(timer, clock, 2, reduction=1.5)
    slower = resumed(timer, distributed=True)
    for _ in range(10):
        run_window(slower, clock, 2, compute=9.5, reduction=1.5, step=5.0)
    assert (slower.micro_batch_seconds, slower.step_seconds) == pytest.approx((10.0, 6.5))


def test_a_resumed_run_times_the_windows_that_were_to_be_timed(clock):
    timer = StepTimer(interval=4)
    for _ in range(6):
        run_window(timer, clock, 2)
    other = resumed(timer, interval=4)
    timed = []
    for _ in range(8):
        run_window(other, clock, 2)
        timed.append(len(other.state_dict()["step"]))
    assert timed == [1, 1, 2, 2, 2, 2, 3, 3]


def test_a_window_that_was_left_out_is_timed_after_a_resume(clock):
    timer = StepTimer(interval=4)
    for _ in range(4):
        run_window(timer, clock, 2)
    timer.start_window()
    timer.leave_out_window()
    other = resumed(timer, interval=4)
    whole = []
    for _ in range(3):
        run_window(other, clock, 2)
        whole.append(other.needs_whole_micro_batch)
    assert whole == [False, True, False]
