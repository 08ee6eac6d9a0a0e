"""What a run took: callbacks that measure, for any `Trainer`; see docs/evidence.md."""

from .gradients import GradientStatisticsCallback
from .memory import MemoryCallback
from .targets import Crossing, TargetCallback, curve_from_log, first_crossing
from .throughput import ThroughputCallback


__all__ = [
    "Crossing",
    "GradientStatisticsCallback",
    "MemoryCallback",
    "TargetCallback",
    "ThroughputCallback",
    "curve_from_log",
    "first_crossing",
]
