"""What a step of a run will take in memory: the planner's figures, whether or not a placement is asked for."""

import logging
from typing import Any

import psutil
import torch

from ...core.facts import rank_batch_size
from ...machine.random_state import forked_random_state
from ...placement.plan.planner import PlacementPlanner
from ...placement.rewrite.rewrites import available_rewrites
from ...placement.simulate.example_batch import largest_batch


logger = logging.getLogger(__name__)


class MemoryForecast:
    """Looks on while a Trainer plans; plans by itself, without putting it to use, where the Trainer does not.

    Args:
        trainer: An `EfficientTrainer`, before `train`. Its plan is not written into the output folder.

    Attributes:
        planner: The planner for the longest samples, on the first process; `None` if there is none.
        obstacle: Why there is none.
    """

    def __init__(self, trainer: Any):
        self.obstacle: str | None = None
        self._trainer = trainer
        self._set_values = trainer.set_initial_training_values
        trainer.set_initial_training_values = self._set_initial_training_values
        trainer.trainopt.placement.keeps_plan = False

    @property
    def planner(self) -> PlacementPlanner | None:
        return self._trainer.trainopt.placement.planner.last

    def _set_initial_training_values(self, args, dataloader, *other, **kwargs):
        # Where the Trainer plans, too: before the model is wrapped.
        values = self._set_values(args, dataloader, *other, **kwargs)
        trainer = self._trainer
        if self.planner is None and not trainer.placement_plan and args.process_index == 0:
            try:
                with forked_random_state([args.device]):
                    batch = largest_batch(dataloader, rank_batch_size(trainer))
                    trainer.trainopt.placement.planner.planner_for(batch, available_rewrites(trainer.model))
            except ValueError as error:
                self.obstacle = str(error)
        return values


def device_memory(device: torch.device) -> tuple[int, str] | None:
    """Return how many bytes a run on a device can have at most, and what they are; `None` if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1], "of the GPU"
    if device.type == "cpu":
        return psutil.virtual_memory().available, "available on this machine now"
    return None
