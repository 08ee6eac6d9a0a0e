"""Checkpoints from before `trainopt_state.json`, when each part had a format of its own.

`accumulation_state.json` held k and the place in the data, the manifest what that place is counted in, and
`trainer_state.json` had entries of ours among the states of callbacks. The states of measuring callbacks are read by
`MeasurementCallback`.
"""

import json
import os
from typing import Any


# The old entry in `stateful_callbacks` -> the part.
_ENTRIES = {
    "hf_trainopt_skipped_windows": "skipped_steps",
    "hf_trainopt_micro_batch": "out_of_memory",
    "hf_trainopt_precision": "precision",
}


def read_old_state(folder: str) -> dict[str, Any] | None:
    """Return what `RunState` takes, from the files of an old checkpoint; `None` if it is a stock one.

    Raises:
        ValueError: A later version wrote it.
    """
    accumulation = _read(folder, "accumulation_state.json")
    manifest = _read(folder, "checkpoint_manifest.json")
    callbacks = _read(folder, "trainer_state.json").get("stateful_callbacks", {})
    parts = {
        part: callbacks[entry]["attributes"]
        for entry, part in _ENTRIES.items()
        if isinstance(callbacks.get(entry), dict)
    }
    if accumulation:
        version = accumulation.pop("version", None)
        if version != 1:
            path = os.path.join(folder, "accumulation_state.json")
            raise ValueError(f"{path} has version {version}; resume with the version of hf_trainopt that wrote it.")
        cursor = accumulation["cursor"]
        for name in ("reported", "previous"):
            cursor[f"{name}_micro_batches"] = cursor.pop(f"{name}_units")
        parts["accumulation"] = accumulation
    setup = accumulation.get("setup") or manifest.get("setup", {})
    if not parts and not setup:
        return None
    return {"setup": setup, "parts": parts}


def forget_old_entries(stateful_callbacks: dict[str, Any]) -> None:
    """Take our entries out of the states of callbacks: they would be saved again with every checkpoint."""
    for entry in _ENTRIES:
        stateful_callbacks.pop(entry, None)


def _read(folder: str, name: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):  # whether a checkpoint is whole is told elsewhere
        return {}
    return found if isinstance(found, dict) else {}
