"""What a micro-batch and what an optimizer step cost in seconds, measured while training."""

import statistics
import time
from collections import deque
from collections.abc import Callable


_SAVED_TIMES = 8


class StepTimer:
    """Median times over the last windows.

    A window of k micro-batches is modelled as k·t_mb + t_step. t_mb is the time of a micro-batch without gradient
    synchronisation, fetching its data included. t_step is all that a window costs on top: what the last micro-batch
    takes longer because gradients are reduced in it (many ranks only), clipping, the optimizer step, zeroing.

    Medians, because evaluations, saves and other processes disturb single windows.

    Args:
        synchronize: Waits for the device; `None` where work is done when a call returns (CPU).
        distributed: Whether the last micro-batch of a window reduces gradients.
        interval: Time every n-th window only (each timed window waits for the device once a micro-batch).
        window: Measurements kept.
        enabled: Whether anything is timed at all.

    Attributes:
        needs_whole_micro_batch: Whether the window that has begun is timed in place of one that was left out.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] | None = None,
        distributed: bool = False,
        interval: int = 1,
        window: int = 64,
        enabled: bool = True,
    ):
        self._synchronize = synchronize
        self._distributed = distributed
        self._interval = interval
        self._enabled = enabled
        self._plain: deque[float] = deque(maxlen=window)
        self._last: deque[float] = deque(maxlen=window)
        self._step: deque[float] = deque(maxlen=window)
        self._times = {"plain": self._plain, "last": self._last, "step": self._step}
        self._count = 0
        self._has_begun = False
        self._timed = self._is_owed = self.needs_whole_micro_batch = False
        self._mark = 0.0
        self._fetch = 0.0
        self._engine_step = 0.0

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()

    def start_window(self) -> None:
        """Call before the window's data are fetched."""
        self._timed = self._times_next
        self.needs_whole_micro_batch = self._timed and self._is_owed
        self._count += 1
        self._has_begun = True
        self._engine_step = 0.0
        if self._timed:
            self._is_owed = False
            self._mark = self._now()

    def fetched(self, num_micro_batches: int) -> None:
        """Call when the window's data are there."""
        if self._timed:
            now = self._now()
            self._fetch = (now - self._mark) / max(1, num_micro_batches)
            self._mark = now

    def micro_batch_done(self, last: bool) -> None:
        """Call after each backward pass; `last` is the one that reduces gradients."""
        if not self._timed:
            return
        now = self._now()
        seconds = now - self._mark + self._fetch
        self._mark = now
        (self._last if last and self._distributed else self._plain).append(seconds)

    def leave_out_window(self) -> None:
        """Call where a window isn't like others; the next one is timed in its place."""
        self._is_owed |= self._timed
        self._timed = False

    def engine_has_stepped(self) -> None:
        """Call after an optimizer step that was taken before the window was over, as an engine does it."""
        if self._timed:
            now = self._now()
            self._engine_step, self._mark = now - self._mark, now

    def abandon_window(self) -> None:
        """Forget the window, and what micro-batches took so far: call where it is repeated with smaller ones."""
        self._timed = False
        self.forget()

    def forget(self) -> None:
        """Forget what micro-batches and steps took so far: call where they are of another size from now on."""
        for times in self._times.values():
            times.clear()

    def restart(self) -> None:
        """Leave out what happened since the last mark (gradient statistics, our own book-keeping)."""
        if self._timed:
            self._mark = self._now()

    def step_done(self) -> None:
        """Call after the optimizer step."""
        if self._timed:
            self._step.append(self._now() - self._mark + self._engine_step)
            self._timed = False

    @property
    def _times_next(self) -> bool:
        # The first window of a process is left out: lazy initialisation, autotuning, cold caches.
        return self._enabled and self._has_begun and (self._is_owed or self._count % self._interval == 0)

    @property
    def needs_plain_micro_batch(self) -> bool:
        """Whether the next window is timed but k = 1 on many ranks could not tell what the reduction costs.

        Equal on all ranks: it depends on how often was measured, not on what.
        """
        return self._distributed and len(self._plain) < 2 and self._times_next

    @property
    def micro_batch_seconds(self) -> float | None:
        return statistics.median(self._plain) if len(self._plain) >= 2 else None

    @property
    def step_seconds(self) -> float | None:
        if len(self._step) < 2 or (self._distributed and (len(self._last) < 2 or len(self._plain) < 2)):
            return None
        reduction = 0.0
        if self._distributed:
            reduction = max(0.0, statistics.median(self._last) - statistics.median(self._plain))
        return statistics.median(self._step) + reduction

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps, so that a resumed run doesn't measure again what is known.

        Of the times only the last few: where it resumes on another machine, new ones soon outweigh them.
        """
        saved = {name: list(times)[-_SAVED_TIMES:] for name, times in self._times.items()}
        return {**saved, "count": self._count, "is_owed": self._is_owed}

    def load_state_dict(self, state: dict) -> None:
        self._count, self._is_owed = state["count"], state["is_owed"]
        self.forget()
        for name, times in self._times.items():
            times.extend(state[name])
