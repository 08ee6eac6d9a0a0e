"""What a checkpoint holds of adaptive k, and how a run finds its place again."""

import logging
import math
from typing import Any

from .controller import AccumulationController
from .cursor import DataCursor


logger = logging.getLogger(__name__)


def run_state(setup: dict[str, int], cursor: DataCursor, controller: AccumulationController) -> dict[str, Any]:
    """Return the state to save.

    Args:
        setup: What the position in the data is counted in: micro-batch size, ranks, k_ref.
        cursor: Position.
        controller: k and the running averages.
    """
    return {
        "setup": setup,
        "micro_batches_per_epoch": cursor.micro_batches_per_epoch,
        "cursor": cursor.state_dict(),
        "controller": controller.state_dict(),
    }


def check_state(
    path: str,
    state: dict[str, Any] | None,
    saved_setup: dict[str, int],
    setup: dict[str, int],
    adapts: bool,
    keeps_place: bool = True,
) -> None:
    """Look whether a run can go on from a checkpoint.

    Args:
        path: Checkpoint, for the messages.
        state: Its `run_state`; `None` if training didn't go through windows.
        saved_setup: What its place in the data is counted in; empty if not known.
        setup: What this run counts in.
        adapts: Whether this run goes through windows.
        keeps_place: Whether it goes on at the same sample (not with `ignore_data_skip`).

    Raises:
        ValueError: This run is stock, and k has varied.
    """
    if adapts:
        return
    if state is not None:
        check_constant(state)
    if keeps_place:
        warn_of_other_step_size(path, saved_setup, setup)


def check_constant(state: dict[str, Any]) -> None:
    """Refuse a state that a run with constant k cannot go on from.

    Args:
        state: Of `run_state`.

    Raises:
        ValueError: k has varied.
    """
    reference = state["setup"]["gradient_accumulation_steps"]
    if state["controller"]["used_range"] not in ([], [reference, reference]):
        raise ValueError(
            "accumulation_policy='fixed' cannot resume a checkpoint in which k has varied (stock Trainer would not "
            "find its place in the data); resume with the policy that it was written with, or set "
            "measure_noise_scale=True."
        )


def samples_in_step(setup: dict[str, int]) -> int:
    """Samples of a reference window over all ranks."""
    return math.prod(setup.values())


def warn_of_other_step_size(path: str, saved: dict[str, int], setup: dict[str, int]) -> None:
    """Warn where optimizer steps of a run with constant k have other samples than those of the checkpoint.

    How the samples are split into ranks, micro-batches and accumulation makes no difference to the place in the data.
    Their number does: stock `Trainer` counts the place in steps, and goes on at another sample.

    Args:
        path: Checkpoint, for the message.
        saved: Micro-batch size, ranks and k_ref that it was written with; what is missing is taken to be the same.
        setup: Those of this run.
    """
    saved = {**setup, **saved}
    if samples_in_step(saved) == samples_in_step(setup):
        return
    differing = " and ".join(f"{n} is {v} (there {saved[n]})" for n, v in setup.items() if saved[n] != v)
    logger.warning(
        "An optimizer step of this run has %d samples, but %s was written with %d: %s. The place in the data is "
        "counted in steps, as in Trainer, so training goes on at other samples than it stopped at. Choose values with "
        "the same product, or set ignore_data_skip=True to begin the epoch anew.",
        samples_in_step(setup),
        path,
        samples_in_step(saved),
        differing,
    )


def restore(
    state: dict[str, Any], cursor: DataCursor, controller: AccumulationController, setup: dict[str, int]
) -> None:
    """Put a run where `state` was. Budget and length of the data are those of this run, which may have been raised.

    The place is in samples: where micro-batches are of another size or ranks of another number, the run goes on at the
    same sample if it is one at which a micro-batch can begin, and else at the last such one before it.
    """
    saved = state["setup"]
    length = state["micro_batches_per_epoch"]
    if saved == setup and length != cursor.micro_batches_per_epoch:
        logger.warning(
            "An epoch has %s micro-batches, in the run that is resumed it had %s: the place in the data is counted "
            "from the start of the epoch and need not be the same samples.",
            cursor.micro_batches_per_epoch,
            length,
        )
    cursor.load_state_dict(state["cursor"])
    controller.load_state_dict(state["controller"])
    if saved == setup:
        return
    controller.timer.forget()
    reference = saved["gradient_accumulation_steps"]
    before, now = (samples_in_step(s) // s["gradient_accumulation_steps"] for s in (saved, setup))
    cursor.micro_batch, again = divmod(cursor.micro_batch * before, now)
    if again:
        logger.warning(
            "The checkpoint was written %d samples into a micro-batch of this run (%d samples over all ranks): these "
            "%d are trained on again. A size that divides %d resumes at the very sample.",
            again,
            now,
            again,
            before,
        )
    is_regular = length is not None and cursor.finished_windows == cursor.epoch * -(-length // reference)
    if is_regular and cursor.micro_batches_per_epoch is not None:
        cursor.finished_windows = cursor.epoch * -(-cursor.micro_batches_per_epoch // cursor.reference_steps)
    else:  # an epoch was stopped early, or has no length
        ratio = samples_in_step(saved) / samples_in_step(setup)
        cursor.finished_windows = round(cursor.finished_windows * ratio)
    cursor.reported_micro_batches = cursor.previous_micro_batches = cursor.micro_batches_passed
    if before != now:
        controller.convert_size(before / now)
    controller.follow_schedule(cursor.progress)


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
            "the checkpoint was written with varying k but what hf_trainopt has saved in it is missing, so that its "
            "place in the data is unknown; resume from another checkpoint, or start anew from its weights."
        )
    k = cursor.reference_steps
    length = cursor.micro_batches_per_epoch or cursor.budget_micro_batches
    windows_per_epoch = -(-length // k)
    cursor.epoch, windows = divmod(steps, windows_per_epoch)
    cursor.finished_windows = cursor.epoch * windows_per_epoch
    cursor.micro_batch = windows * k
    epoch_samples = min(length * micro_batch_samples, epoch_examples)
    cursor.samples_seen = cursor.epoch * epoch_samples + cursor.micro_batch * micro_batch_samples
    cursor.reported_micro_batches = cursor.micro_batches_passed
    logger.info("The checkpoint knows of no windows: taken as written at k = %d throughout.", k)
