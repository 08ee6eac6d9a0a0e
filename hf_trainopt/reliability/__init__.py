"""A run that cannot be lost: complete checkpoints, signals, windows that are not finite."""

from .losses import TrainingDivergedError
from .resume import Checkpoint, CheckpointError, find_last_complete, inspect_checkpoint
from .signals import TrainingInterrupted, TrainingTerminated


__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TrainingDivergedError",
    "TrainingInterrupted",
    "TrainingTerminated",
    "find_last_complete",
    "inspect_checkpoint",
]
