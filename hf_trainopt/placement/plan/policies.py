"""Named placements: none, all, every n-th stage, and the √L segments of Chen et al. (2016)."""

import itertools
import math
import re
from collections.abc import Sequence

from .plan import FULL, STORE, StageChoice


POLICIES = ("none", "all", "every_n", "sqrt", "budget")

_EVERY = re.compile(r"every_(\d+)")


def segments_of(num_stages: int, num_segments: int) -> list[range]:
    """Divide stages into segments that differ in length by one at most, the longer ones first."""
    size, longer = divmod(num_stages, num_segments)
    bounds = [0]
    for index in range(num_segments):
        bounds.append(bounds[-1] + size + (index < longer))
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def named_choices(policy: str, stages: Sequence[str], every_n: int = 2) -> dict[str, StageChoice]:
    """Return the choice of each stage under a named policy.

    `"none"` keeps everything. `"all"` recomputes each stage by itself. `"every_n"` recomputes stage i if
    `i % every_n == 0`, as the `every_n_layers` of transformers does; `"every_3"` says n itself. `"sqrt"` divides the L
    stages into √L segments (rounded), keeps the inputs of segments and recomputes each as a whole, the last one
    included: Chen et al. 2016, arXiv:1604.06174, section 4.1 and algorithm 1.

    Args:
        policy: One of these.
        stages: Names of the stages in the order of the forward pass.
        every_n: n of `"every_n"`.

    Raises:
        ValueError: There is no such policy, or n is below 1.
    """
    if policy == "none":
        return dict.fromkeys(stages, STORE)
    if policy == "all":
        return dict.fromkeys(stages, FULL)
    if policy == "sqrt":
        segments = segments_of(len(stages), max(1, round(math.sqrt(len(stages)))))
        return {
            stages[index]: StageChoice("full", run=number if len(segment) > 1 else None)
            for number, segment in enumerate(segments)
            for index in segment
        }
    if match := _EVERY.fullmatch(policy):
        policy, every_n = "every_n", int(match[1])
    if policy == "every_n":
        if every_n < 1:
            raise ValueError(f"every_n is {every_n}; it must be at least 1.")
        return {name: FULL if index % every_n == 0 else STORE for index, name in enumerate(stages)}
    raise ValueError(
        f"checkpoint_placement is '{policy}'; choose one of {', '.join(POLICIES)} (every_2, every_3, ... say n), or "
        "the path of a plan that `hf-trainopt plan --output` has written."
    )
