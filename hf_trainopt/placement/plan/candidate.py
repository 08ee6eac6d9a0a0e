"""What a planner chooses between: choices that were replayed, and which of them is better."""

import dataclasses
from collections.abc import Mapping

from .plan import Rewrites, StageChoice


Rank = tuple[float, bool, float, int]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Choices that were replayed.

    Args:
        stages: Choice of each stage.
        rewrites: The rewrites that are on.
        peak_bytes: Replayed peak.
        extra_seconds: Time to recompute.
        rewritten_seconds: What the rewrites together add to the time of a step; negative where they save it.
    """

    stages: Mapping[str, StageChoice]
    rewrites: Rewrites
    peak_bytes: int
    extra_seconds: float
    rewritten_seconds: float = 0.0

    @property
    def cost_seconds(self) -> float:
        """What a step takes longer than without recomputation and rewrites; 0 if it is faster."""
        return max(0.0, self._added_seconds)

    @property
    def _added_seconds(self) -> float:
        return self.extra_seconds + self.rewritten_seconds

    @property
    def rank(self) -> Rank:
        """What makes a candidate that fits better than another, apart from its bytes."""
        return rank_of(self._added_seconds, self.rewrites)

    @property
    def order(self) -> tuple[Rank, int]:
        """The rank, then fewer bytes."""
        return self.rank, self.peak_bytes


def rank_of(added_seconds: float, rewrites: Rewrites) -> Rank:
    """Return what a step takes longer, then whether there are rewrites, then what it gains, then how many they are.

    Rewrites change results by rounding, so that to be faster than the step of the user is no reason for them; with
    some of them that something is to be gained is welcome.
    """
    added = round(added_seconds, 9)
    return max(0.0, added), bool(rewrites.names()), added, len(rewrites.names())
