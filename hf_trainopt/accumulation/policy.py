r"""How many micro-batches make the next optimizer step: pure policies, and the limits that every policy is held to.

A policy maps an `Observation` (all of it known before the window begins) to the k it would like, as a float, or to
`None` for "hold". `limit_change` turns that wish into the next k: bounds, at most ×2 a change, hysteresis. Neither
needs a Trainer, so a recorded run can be replayed.
"""

import bisect
import itertools
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

from .noise_scale import NoiseScale


@dataclass(frozen=True)
class Observation:
    """What is known when the next k is chosen.

    Attributes:
        accumulation_steps: k in force.
        reference_steps: k_ref, `gradient_accumulation_steps`.
        micro_batch_samples: Samples in one micro-batch over all ranks (b·W).
        progress: Share of the data budget that was consumed, in [0, 1].
        learning_rate_decay: Learning-rate schedule there, relative to the highest it was so far, in [0, 1]: 1 during
            warm-up. Batch scaling excluded.
        noise: B_noise in samples with its interval, or `None` before anything was measured.
        micro_batch_seconds: Measured time of one more micro-batch in a window, or `None`.
        step_seconds: Measured time that a window costs on top of its micro-batches (all-reduce, clipping, optimizer
            step), or `None`.
    """

    accumulation_steps: int
    reference_steps: int
    micro_batch_samples: float
    progress: float
    learning_rate_decay: float = 1.0
    noise: NoiseScale | None = None
    micro_batch_seconds: float | None = None
    step_seconds: float | None = None

    @property
    def noise_in_micro_batches(self) -> float | None:
        """B_noise in micro-batches over all ranks, or `None` while it is not resolved."""
        return self.noise.resolved_in(self.micro_batch_samples) if self.noise is not None else None


AccumulationPolicy = Callable[[Observation], float | None]


def growth_of(policy: AccumulationPolicy, observation: Observation) -> float | None:
    """Return by which factor a policy lets the batch grow because the rate has decayed, at least 1.

    A policy tells it by a method `growth`; without one it is 1. `None` while it isn't known.
    """
    ask = getattr(policy, "growth", None)
    return 1.0 if ask is None else ask(observation)


@dataclass(frozen=True)
class FixedPolicy:
    """Always k_ref."""

    def __call__(self, observation: Observation) -> float:
        return float(observation.reference_steps)


@dataclass(frozen=True)
class NoiseScalePolicy:
    """Follow the noise scale: a batch of ρ·B_noise samples (McCandlish et al. 2018, section 2.2, at ρ = 1).

    For those who pay per optimizer step: at ρ = 1 a run takes twice the fewest possible steps and twice the least
    possible data. Where time is proportional to data it is wasteful (see `GoodputPolicy`).

    Args:
        ratio: ρ.
    """

    ratio: float = 1.0

    def __call__(self, observation: Observation) -> float | None:
        noise = observation.noise_in_micro_batches
        return None if noise is None else self.ratio * noise


@dataclass(frozen=True)
class GoodputPolicy:
    r"""The smallest k within 3 % of the best progress per second.

    Steps to a given loss are proportional to 1 + B_noise/B (McCandlish et al. 2018, eq. 2.11) and a window of k
    micro-batches takes k·t_mb + t_step seconds, so that the time to the loss is proportional to
    (k + r)(1 + B_noise/k), r = t_step/t_mb, which is least at k* = √(r·B_noise). This is the goodput of Pollux (Qiao
    et al. 2021, arXiv 2008.12260, section 3) maximised over accumulation alone.

    Where the rate has decayed to c of its peak, a larger batch is better. In McCandlish's model (eq. 2.7) a step at
    the rate ε, in units of the largest that is stable without noise, gains 2ε − ε²(1 + B_noise/k). At the peak ε is
    the best for k*, 1/(1 + B_noise/k*). Let it decay to c of that, and follow the batch in proportion, as for SGD.
    Then gain per time is, but for a factor,

        V(k) = (2 − c(k + B_noise)/(k* + B_noise)) / (1 + r/k),

    largest at k° = √(r² + r((2 − c)B_noise + 2k*)/c) − r: k* at c = 1, and about √((2 − c)/c) times that later. So
    the batch takes over a part of the decay (Smith et al. 2018, arXiv 1711.00489; for Adam Meterez et al. 2025, arXiv
    2510.14717).

    V is flat around k°, and what the model leaves out speaks for small batches: in our measurements
    (benchmarks/convergence.md) the best fixed k is below k*, and a run ends lower at equal data the more steps it
    takes. So k is the smallest whole number with V(k) ≥ (1 − slack)·V(k°), or the best one where none has that. On one
    device r is small, and that is mostly 1 or 2, however large the noise scale; it grows where steps are dear
    (all-reduce over a slow network, offloaded optimizers).

    Args:
        step_cost: r in micro-batches instead of the measured one (makes a run reproducible to the bit).
        anneals: Whether the batch grows as the rate decays. Only where the rate follows the batch.
        slack: Share of the model's gain per time that is given up for a smaller k.
    """

    step_cost: float | None = None
    anneals: bool = True
    slack: float = 0.03

    def __call__(self, observation: Observation) -> float | None:
        best, growth = self.without_annealing(observation), self.growth(observation)
        return None if best is None else best * growth

    def without_annealing(self, observation: Observation) -> float | None:
        """Return k at the peak of the rate; `None` while that isn't known."""
        return self._k_at(observation, decay=1.0)

    def growth(self, observation: Observation) -> float | None:
        """Return by which factor k is larger than at the peak of the rate, at least 1; `None` while k isn't known."""
        best = self.without_annealing(observation)
        if best is None or not self.anneals:
            return None if best is None else 1.0
        return max(self._k_at(observation, max(observation.learning_rate_decay, 1e-3)) / best, 1.0)

    def _k_at(self, observation: Observation, decay: float) -> float | None:
        """Return k where the rate has decayed to c = `decay`."""
        cost, noise = self._cost(observation), observation.noise_in_micro_batches
        if cost is None or noise is None:
            return None
        # The trace of micro-batches that are all alike is zero up to rounding, of either sign.
        peak = math.sqrt(cost * max(noise, 0.0))
        if peak == 0:
            return 1.0
        slope = decay / (peak + noise)

        def gain(k: float) -> float:
            return (2 - slope * (k + noise)) / (1 + cost / k)

        best = math.sqrt(cost**2 + cost * ((2 - decay) * noise + 2 * peak) / decay) - cost
        enough = (1 - self.slack) * gain(best)
        # gain(k) = enough is a quadratic, of which this is the smaller root.
        linear = 2 - slope * noise - enough
        least = 2 * enough * cost / (linear + math.sqrt(max(linear**2 - 4 * slope * enough * cost, 0.0)))
        above = max(math.ceil(least), 1)
        below = max(above - 1, 1)
        # Between `least` and `best` there may be no whole number.
        return float(above if gain(above) >= min(enough, gain(below)) else below)

    def _cost(self, observation: Observation) -> float | None:
        """Return r."""
        if self.step_cost is not None or not observation.micro_batch_seconds or observation.step_seconds is None:
            return self.step_cost
        return observation.step_seconds / observation.micro_batch_seconds


@dataclass(frozen=True)
class RampPolicy:
    """A stated schedule over the data: k is constant from each boundary to the next.

    Args:
        boundaries: Shares of the data budget at which k changes; ascending, the first is 0.
        values: k from each boundary on.
    """

    boundaries: tuple[float, ...]
    values: tuple[int, ...]

    def __post_init__(self):
        if len(self.boundaries) != len(self.values) or not self.boundaries or self.boundaries[0] != 0:
            raise ValueError("a ramp needs one k for each boundary and must begin at 0.")
        ascend = all(a < b for a, b in itertools.pairwise(self.boundaries))
        if not (ascend and self.boundaries[-1] < 1):  # so that NaN is refused too
            raise ValueError("the boundaries of a ramp must ascend within [0, 1).")
        if any(value < 1 for value in self.values):
            raise ValueError("every k of a ramp must be at least 1.")

    @classmethod
    def parse(cls, text: str) -> "RampPolicy":
        """Read `"0:1,0.25:2,0.5:4"`: share of the data, k.

        Raises:
            ValueError: The text is not of that form.
        """
        try:
            pairs = [item.split(":") for item in text.split(",")]
            boundaries = tuple(float(boundary) for boundary, _ in pairs)
            values = tuple(int(value) for _, value in pairs)
        except ValueError:
            raise ValueError(f"'{text}' is not a ramp: write 'share:k' pairs such as '0:1,0.25:2,0.5:4'.") from None
        return cls(boundaries, values)

    def __call__(self, observation: Observation) -> float:
        return float(self.values[bisect.bisect_right(self.boundaries, observation.progress) - 1])


def limit_change(
    current: int, target: float | None, minimum: int, maximum: int, hysteresis: float = 1.25, exact: bool = False
) -> int:
    """Turn the k that a policy would like into the next k.

    Args:
        current: k in force.
        target: k that the policy would like; `None` holds, `inf` and numbers out of bounds are clamped.
        minimum: Least k.
        maximum: Largest k.
        hysteresis: `target` must differ from `current` by this factor before anything changes: the optimum is flat
            (a factor of 1.25 off costs under 2 %), and every change disturbs the optimizer's averages.
        exact: For stated schedules: go to the target at once.

    Returns:
        Next k, within [minimum, maximum], at most doubled or halved.

    Raises:
        ValueError: `target` is no number or NaN (a policy's fault).
    """
    current = min(max(current, minimum), maximum)
    if target is None:
        return current
    if not isinstance(target, numbers.Real) or math.isnan(target):
        raise ValueError(f"the accumulation policy returned {target!r}; return a number, or None to hold k.")
    target = min(max(target, minimum), maximum)
    wanted = round(target)
    if exact or wanted == current:
        return wanted
    if current / hysteresis < target < current * hysteresis:
        return current
    return min(wanted, 2 * current) if wanted > current else max(wanted, -(-current // 2))
