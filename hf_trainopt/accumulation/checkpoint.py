"""What a checkpoint holds of adaptive k, and how a run finds its place again."""

import json
import logging
import math
import os
from typing import Any

from .controller import AccumulationController
from .cursor import DataCursor


logger = logging.getLogger(__name__)

STATE_NAME = "accumulation_state.json"
STATE_VERSION = 1


def run_state(setup: dict[str, int], cursor: DataCursor, controller: AccumulationController) -> dict[str, Any]:
    """Return the state to save.

    Args:
        setup: What the position in the data is counted in: micro-batch size, ranks, k_ref.
        cursor: Position.
        controller: k and the running averages.
    """
    return {
        "version": STATE_VERSION,
        "setup": setup,
        "micro_batches_per_epoch": cursor.micro_batches_per_epoch,
        "cursor": cursor.state_dict(),
        "controller": controller.state_dict(),
    }


def write_state(state: dict[str, Any], folder: str) -> None:
    """Write the state into a checkpoint folder, which is made if it is not there."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, STATE_NAME), "w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)


def read_state(folder: str, setup: dict[str, int], adapts: bool, keeps_place: bool = True) -> dict[str, Any] | None:
    """Read the state of a checkpoint and refuse one that does not fit this run.

    Args:
        folder: Checkpoint.
        setup: What this run counts its position in the data in.
        adapts: Whether this run goes through windows.
        keeps_place: Whether it goes on at the same sample (not with `ignore_data_skip`), for which the set-up must be
            the same.

    Returns:
        The state, or `None` if the checkpoint has none.

    Raises:
        ValueError: Another version or set-up wrote it, or k has varied and this run is stock.
    """
    path = os.path.join(folder, STATE_NAME)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        state = json.load(file)
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"{path} has version {state.get('version')}, this hf_trainopt reads version {STATE_VERSION}; resume with "
            "the version that wrote it."
        )
    for name, value in setup.items():
        if keeps_place and state["setup"][name] != value:
            raise ValueError(
                f"{name} is {value} but the checkpoint was written with {state['setup'][name]}: its position in the "
                "data is counted in these micro-batches; resume with the same value, or set ignore_data_skip=True to "
                "begin the epoch anew."
            )
    reference = state["setup"]["gradient_accumulation_steps"]
    if not adapts and state["controller"]["used_range"] not in ([], [reference, reference]):
        raise ValueError(
            "accumulation_policy='fixed' cannot resume a checkpoint in which k has varied (stock Trainer would not "
            "find its place in the data); resume with the policy that it was written with, or set "
            "measure_noise_scale=True."
        )
    return state


def restore(
    state: dict[str, Any], cursor: DataCursor, controller: AccumulationController, setup: dict[str, int]
) -> None:
    """Put a run where `state` was. Budget and length of the data are those of this run, which may have been raised.

    Where its micro-batches or reference windows are of another size, it is put after as many samples.
    """
    same_units = state["setup"] == setup
    if same_units and state["micro_batches_per_epoch"] != cursor.micro_batches_per_epoch:
        logger.warning(
            "An epoch has %s micro-batches, in the run that is resumed it had %s: the place in the data is counted "
            "from the start of the epoch and need not be the same samples.",
            cursor.micro_batches_per_epoch,
            state["micro_batches_per_epoch"],
        )
    cursor.load_state_dict(state["cursor"])
    controller.load_state_dict(state["controller"])
    if not same_units:
        finished = cursor.finished_windows + cursor.micro_batch / state["setup"]["gradient_accumulation_steps"]
        cursor.finished_windows = round(finished * math.prod(state["setup"].values()) / math.prod(setup.values()))
        cursor.micro_batch = 0
        cursor.reported_units = cursor.previous_units = cursor.units
        controller.forget_size()


def place_after_stock_steps(
    cursor: DataCursor, steps: int, micro_batch_samples: int, epoch_examples: int, log_history: list[dict[str, Any]]
) -> None:
    """Put a run where stock `Trainer` was after `steps` optimizer steps, each a reference window.

    Args:
        cursor: Cursor at its start.
        steps: `global_step` of the checkpoint.
        micro_batch_samples: b·W.
        epoch_examples: Samples of an epoch (the last micro-batch may be short).
        log_history: Of the checkpoint.

    Raises:
        ValueError: The log says that k has varied: the state is missing.
    """
    if any("accumulation_steps" in entry for entry in log_history):
        raise ValueError(
            f"the checkpoint was written with varying k but has no {STATE_NAME}, so that its place in the data is "
            "unknown; resume from another checkpoint, or start anew from its weights."
        )
    k = cursor.reference_steps
    length = cursor.micro_batches_per_epoch or cursor.budget_units
    windows_per_epoch = -(-length // k)
    cursor.epoch, windows = divmod(steps, windows_per_epoch)
    cursor.finished_windows = cursor.epoch * windows_per_epoch
    cursor.micro_batch = windows * k
    epoch_samples = min(length * micro_batch_samples, epoch_examples)
    cursor.samples_seen = cursor.epoch * epoch_samples + cursor.micro_batch * micro_batch_samples
    cursor.reported_units = cursor.units
    logger.info("The checkpoint has no %s: taken as written at k = %d throughout.", STATE_NAME, k)
