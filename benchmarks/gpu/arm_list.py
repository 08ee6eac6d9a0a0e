"""Which arms the headline runs have. `run.py` reads this before anything starts, so it imports no package."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


# In which `max_steps` of a task counts.
REFERENCE_K = 8


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Args:
        name: In the record; arms of one name differ in their seed only.
        k: `gradient_accumulation_steps`.
        learning_rate: For a step of so many micro-batches.
        ours: Our arguments; `None`: stock `Trainer`.
        seed: Of weights, order of the data and dropout.
    """

    name: str
    k: int
    learning_rate: float
    ours: dict[str, Any] | None = None
    seed: int = 0

    @property
    def label(self) -> str:
        """Name and seed."""
        return f"{self.name}, seed {self.seed}"


def arms_of(learning_rate: float, more_seeds: int, budget: str = "75%") -> list[Arm]:
    """Return the arms, most valuable first.

    Args:
        learning_rate: At k = 8, of stock and of ours; stock at fewer micro-batches has it times the root of
            their share, the rule of thumb of those who do not search.
        more_seeds: Seeds after the first one, of the two arms that matter most.
        budget: Of one arm of ours.
    """
    k = REFERENCE_K

    def stock(steps: int, seed: int = 0) -> Arm:
        return Arm(f"stock, k = {steps}", steps, learning_rate * math.sqrt(steps / k), seed=seed)

    def ours(seed: int = 0) -> Arm:
        return Arm("ours, defaults", k, learning_rate, {}, seed)

    limited = Arm(f"ours, memory_budget {budget}", k, learning_rate, {"memory_budget": budget})
    first = [stock(k), ours(), limited, stock(2), stock(1)]
    return [*first, *(arm for seed in range(1, 1 + more_seeds) for arm in (stock(k, seed), ours(seed)))]


def arms_for(task: str, rehearse: bool) -> list[Arm]:
    """Return the arms of "language" or of "vision"."""
    if task == "language":
        return arms_of(3e-3, 0) if rehearse else arms_of(6e-4, 2)
    return arms_of(3e-3, 0, "95%") if rehearse else arms_of(1.4e-3, 1)


def choose(arms: Sequence[Arm], asked: Sequence[str]) -> list[Arm]:
    """Return the arms that are asked for by number, name or label, in that order; all if none is.

    Raises:
        ValueError: There is no such arm.
    """
    found = []
    for text in asked:
        chosen = [arm for number, arm in enumerate(arms) if text in (str(number), arm.name, arm.label)]
        if not chosen:
            known = "; ".join(f"{number} {arm.label}" for number, arm in enumerate(arms))
            raise ValueError(f"--arms: there is no {text!r}; choose out of {known}.")
        found += [arm for arm in chosen if arm not in found]
    return found or list(arms)
