"""Plans for a `compute_loss` of the user's own, or of another library: TRL's DPO, distillation, contrastive losses."""

import dataclasses
import logging
from typing import Any

from ..errors import PlacementError, ReplayError
from ..simulate.step_setup import StepSetup
from .planner import PlacementPlanner


logger = logging.getLogger(__name__)

# Whose overrides of a hook do what the hook does in `Trainer`.
_LIBRARIES = ("hf_trainopt", "transformers")


def own_loss_planner(trainer: Any, batch: Any, setup: StepSetup, options: dict[str, Any]) -> PlacementPlanner:
    """Return a planner for the loss of a trainer.

    A loss that looks at values is replayed with those of the batch. Numbers that the model computes are unknown: they
    may be recorded, and the log says so.

    Raises:
        ReplayError: The loss cannot be replayed. The reason is that of the second try, which knows more.
        PlacementError: No placement can be had for another reason.
    """
    try:
        return PlacementPlanner(trainer.model, batch, setup, **options)
    except ReplayError:
        if not has_own_loss(trainer):
            raise
    try:
        planner = PlacementPlanner(trainer.model, batch, dataclasses.replace(setup, follows_values=True), **options)
    except ReplayError as error:
        if "_prepare_inputs" not in overridden(trainer):
            raise
        raise PlacementError(
            f"{type(trainer).__name__} makes its batches within the step, in `_prepare_inputs` (GRPO and RLOO "
            "generate them), so that no batch is known before the run and no peak can be predicted; choose "
            "checkpoint_placement='all', 'every_n' or 'sqrt', which need no prediction, and no memory_budget."
        ) from error
    recorded = (
        ", and numbers that the model computes are recorded there as 1" if planner.replayer.assumed_numbers else ""
    )
    logger.info(
        "%s.compute_loss looks at values: it is planned with those of the example batch%s. The measured peak tells "
        "whether the prediction is right.",
        type(trainer).__name__,
        recorded,
    )
    return planner


def has_own_loss(trainer: Any) -> bool:
    """Whether a trainer's loss is not that of `Trainer`."""
    return "compute_loss" in overridden(trainer) or trainer.compute_loss_func is not None


def overridden(trainer: Any) -> set[str]:
    """Names of hooks that a class of the user's has made its own."""
    owners = [owner for owner in type(trainer).__mro__ if owner.__module__.partition(".")[0] not in _LIBRARIES]
    names = ("compute_loss", "create_optimizer", "_prepare_inputs")
    return {name for name in names if any(name in vars(owner) for owner in owners)}
