"""Lines that `Trainer` logs: which of them is the last of a run, and ours taken off again."""

from collections.abc import Container, Mapping
from typing import Any


def is_last_line(line: Mapping[str, Any]) -> bool:
    """Return whether a line is that of the end of `train`; with `include_num_input_tokens_seen` all have a runtime."""
    return "train_runtime" in line and "loss" not in line


def give_back(logs: dict[str, Any], line: Mapping[str, Any], own: Container[str]) -> None:
    """Make a caller's `logs` what upstream and callbacks have made of `line`, a copy of it with keys of our own.

    Args:
        logs: What `Trainer.log` was called with; it may be the result of `evaluate` or `train`.
        line: What was logged.
        own: Keys that stay on the line.
    """
    for key in [key for key in logs if key not in line]:
        del logs[key]
    logs.update({key: value for key, value in line.items() if key not in own})
