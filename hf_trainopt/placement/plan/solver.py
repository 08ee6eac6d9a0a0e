"""The fastest choice of what to recompute within a memory budget, for stages in a chain: exact, by Pareto sets.

A chain of stages as in Beaumont et al. (2019, arXiv:1911.13214), with more choices for a stage and each recomputed at
most once: going from the first stage to the last, all that matters of what was decided before is how many bytes it
keeps. So a set of (bytes kept, seconds) pairs, none better than another in both, is carried from stage to stage; every
bound on the peak is an upper bound on the bytes kept so far.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


# Pareto sets beyond this are thinned; the solver then states how much that may have cost.
MAX_STATES = 4000


@dataclass(frozen=True)
class Segment:
    """One way to treat the consecutive stages `start` to `stop - 1`.

    Args:
        start: First stage.
        stop: One past the last stage.
        keep_bytes: What stays in memory from their forward to their backward passes.
        need_bytes: Most memory in these passes beyond what earlier stages keep: with `k` bytes kept before, the peak
            within is `k + need_bytes`.
        seconds: Time to recompute.
        choice: What the caller makes of it.
    """

    start: int
    stop: int
    keep_bytes: int
    need_bytes: int
    seconds: float
    choice: Any = None


@dataclass(frozen=True)
class Chain:
    """All there is to choose from.

    Args:
        num_stages: L.
        segments: Ways to treat stages 0 to L-1; each stage lies in at least one.
        base_bytes: What is kept before the first stage.
        head_bytes: Memory that the head and the loss need beyond all that is kept.
        fixed_bytes: Peak of what no choice changes (the optimizer's step).
    """

    num_stages: int
    segments: tuple[Segment, ...]
    base_bytes: int
    head_bytes: int
    fixed_bytes: int = 0

    def peak(self, path: tuple[Segment, ...]) -> int:
        """Return the peak of a path of segments, in bytes."""
        kept, peak = self.base_bytes, self.fixed_bytes
        for segment in path:
            peak = max(peak, kept + segment.need_bytes)
            kept += segment.keep_bytes
        return max(peak, kept + self.head_bytes)


@dataclass(frozen=True)
class Solution:
    """A path through the stages.

    Args:
        path: Segments in order.
        peak_bytes: Its peak.
        seconds: Its time to recompute.
        gap_seconds: How much faster the best path for this budget can be at most (0: this is the best).
    """

    path: tuple[Segment, ...]
    peak_bytes: int
    seconds: float
    gap_seconds: float = 0.0


def solve(chain: Chain, budget_bytes: int, max_states: int = MAX_STATES) -> Solution | None:
    """Return the path with the least time to recompute whose peak is within the budget; `None` if there is none.

    Of paths with the same time, one that keeps the fewest bytes is returned.

    Args:
        chain: The stages.
        budget_bytes: Upper bound on the peak.
        max_states: Largest Pareto set that is not thinned.
    """
    if chain.fixed_bytes > budget_bytes:
        return None
    by_stop: list[list[Segment]] = [[] for _ in range(chain.num_stages + 1)]
    for segment in chain.segments:
        by_stop[segment.stop].append(segment)
    kept = [np.array([chain.base_bytes], dtype=np.int64)]
    seconds = [np.zeros(1)]
    # What the thinned-out states would have had at best: a bound from below.
    least = [np.zeros(1)]
    origin: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))]
    for stop in range(1, chain.num_stages + 1):
        parts: list[tuple[np.ndarray, ...]] = []
        for number, segment in enumerate(by_stop[stop]):
            fits = int(np.searchsorted(kept[segment.start], budget_bytes - segment.need_bytes, side="right"))
            if fits:
                parts.append(
                    (
                        kept[segment.start][:fits] + segment.keep_bytes,
                        seconds[segment.start][:fits] + segment.seconds,
                        least[segment.start][:fits] + segment.seconds,
                        np.full(fits, number),
                        np.arange(fits),
                    )
                )
        if not parts:
            kept.append(np.zeros(0, dtype=np.int64))
            seconds.append(np.zeros(0))
            least.append(np.zeros(0))
            origin.append((np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)))
            continue
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        front = _pareto(columns[0], columns[1])
        columns = [column[front] for column in columns]
        if len(front) > max_states:
            columns = _thinned(columns, max_states)
        kept.append(columns[0])
        seconds.append(columns[1])
        least.append(columns[2])
        origin.append((columns[3], columns[4]))
    fits = int(np.searchsorted(kept[-1], budget_bytes - chain.head_bytes, side="right"))
    if not fits:
        return None
    best = int(np.argmin(seconds[-1][:fits]))
    bound = float(least[-1][:fits].min())
    total = float(seconds[-1][best])
    path: list[Segment] = []
    stop, index = chain.num_stages, best
    while stop:
        segment = by_stop[stop][int(origin[stop][0][index])]
        index = int(origin[stop][1][index])
        path.append(segment)
        stop = segment.start
    found = tuple(reversed(path))
    return Solution(found, chain.peak(found), total, max(0.0, total - bound))


def _pareto(kept: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return the indices of pairs that no other pair beats, by bytes ascending (seconds descending)."""
    order = np.lexsort((seconds, kept))
    ordered = seconds[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(ordered)[:-1]))
    return order[ordered < before]


def _thinned(columns: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Return at most `count` of the states: of each group of neighbours the one with the fewest bytes.

    Neighbours with more bytes have less time; how little they could have had is carried along as the bound.
    """
    size = len(columns[0])
    first = np.unique(np.linspace(0, size - 1, count).astype(np.int64))
    last = np.concatenate((first[1:] - 1, [size - 1]))
    thinned = [column[first] for column in columns]
    thinned[2] = np.array([columns[2][a : b + 1].min() for a, b in zip(first, last, strict=True)])
    return thinned


def least_peak(chain: Chain) -> Solution:
    """Return a path with the least peak, and of those the fastest, by bisection over budgets."""
    high = solve(chain, 2**62)
    low_bytes = 0
    while high.peak_bytes - low_bytes > 1:
        middle = (low_bytes + high.peak_bytes) // 2
        found = solve(chain, middle)
        if found is None:
            low_bytes = middle
        else:
            high = found
    return high
