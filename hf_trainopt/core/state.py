"""`trainopt_state.json`: what all parts keep in a checkpoint, in one file."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .old_state import read_old_state


STATE_NAME = "trainopt_state.json"
STATE_VERSION = 2  # 1 was the version of accumulation_state.json


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds of hf_trainopt.

    Attributes:
        setup: What the place in the data is counted in: `per_device_train_batch_size`, `world_size` and
            `gradient_accumulation_steps`; empty if not known.
        parts: State of each part, by its name.
    """

    setup: dict[str, int] = field(default_factory=dict)
    parts: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def write_state(state: RunState, folder: str) -> None:
    """Write the state into a folder, which is made if it isn't there; as a whole, whenever the process is killed."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, STATE_NAME)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump({"version": STATE_VERSION, **asdict(state)}, file, indent=1)
    os.replace(path + ".tmp", path)


def read_state(folder: str) -> RunState | None:
    """Read the state of a checkpoint, one of an older format too; `None` if stock `Trainer` wrote it.

    Raises:
        ValueError: It can't be read, or another version wrote it.
    """
    path = os.path.join(folder, STATE_NAME)
    if not os.path.isfile(path):
        old = read_old_state(folder)
        return None if old is None else RunState(**old)
    try:
        with open(path, encoding="utf-8") as file:
            saved = json.load(file)
        version = saved.pop("version")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path} cannot be read; resume from another checkpoint.") from None
    if version != STATE_VERSION:
        raise ValueError(
            f"{path} has version {version}, this hf_trainopt reads version {STATE_VERSION}; resume with the version "
            "that wrote it."
        )
    return RunState(**saved)
