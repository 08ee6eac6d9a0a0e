"""Policies that were tried against the built-in ones; also an example of how to pass your own to the Trainer."""

import math
from dataclasses import dataclass, field

from hf_trainopt.accumulation import GoodputPolicy, Observation


@dataclass(frozen=True)
class AnnealedGoodput:
    """Goodput, and as the learning rate decays the batch grows in its place, up to ρ·B_noise.

    With `lr_batch_scaling="sqrt"` a schedule at c of its peak runs at √c with a batch 1/c times as large: for Adam the
    same noise in fewer steps (Seesaw, Meterez et al. 2025, arXiv 2510.14717).
    """

    ratio: float = 1.0
    goodput: GoodputPolicy = field(default_factory=GoodputPolicy)

    def __call__(self, observation: Observation) -> float | None:
        best = self.goodput(observation)
        if best is None:
            return None
        best = max(1.0, best)
        ceiling = self.ratio * observation.noise.value / observation.micro_batch_samples
        past_warm_up = observation.progress > 0.05
        decay = max(observation.learning_rate_factor, 1e-3) if past_warm_up else 1.0
        return max(best, min(best / decay, ceiling)) if math.isfinite(ceiling) else best


CANDIDATES = {"annealed_goodput": AnnealedGoodput}
