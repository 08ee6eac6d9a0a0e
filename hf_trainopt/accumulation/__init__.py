"""Adaptive-k gradient accumulation: measure (`noise_scale`, `timing`), decide (`policy`), apply (`controller`)."""

from .noise_scale import NoiseScale, NoiseScaleTracker, WindowStatistics, estimate_noise
from .policy import (
    AccumulationPolicy,
    FixedPolicy,
    GoodputPolicy,
    NoiseScalePolicy,
    Observation,
    RampPolicy,
    limit_change,
)


__all__ = [
    "AccumulationPolicy",
    "FixedPolicy",
    "GoodputPolicy",
    "NoiseScale",
    "NoiseScalePolicy",
    "NoiseScaleTracker",
    "Observation",
    "RampPolicy",
    "WindowStatistics",
    "estimate_noise",
    "limit_change",
]
