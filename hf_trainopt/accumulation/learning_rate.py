"""The learning rate as a part: a schedule over the data, with a factor for the batch that k makes."""

import logging
from collections.abc import Callable
from typing import Any

from ..core.part import Part
from .schedule import (
    METRIC_DRIVEN,
    NOISE_SCALING_RULES,
    DataIndexedLR,
    batch_scaling_factor,
    chosen_rule,
    is_adaptive_optimizer,
)


logger = logging.getLogger(__name__)


class LearningRatePart(Part):
    """Schedules that stay right where k changes; `scheduler.pt` holds their place in the data."""

    name = "learning_rate"

    @property
    def _follows_data(self) -> bool:
        return self.parts.accumulation.cursor is not None

    def followed(self, scheduler: Any) -> Any:
        """Return what the Trainer keeps for a schedule that it is given: one that follows the data, while k varies."""
        stays = scheduler is None or isinstance(scheduler, (DataIndexedLR, *METRIC_DRIVEN))
        if stays or not self._follows_data:
            return scheduler
        optimizer = self.trainer.optimizer
        return DataIndexedLR(scheduler, getattr(optimizer, "optimizer", optimizer))

    def create(self, create_stock: Callable[[], Any]) -> Any:
        """Return what `create_scheduler` returns.

        Args:
            create_stock: Upstream's `create_scheduler`.

        Raises:
            ValueError: `lr_scheduler_kwargs` has what the schedule doesn't take.
        """
        trainer, args = self.trainer, self.trainer.args
        before = trainer.lr_scheduler
        try:
            scheduler = create_stock()
        except TypeError as error:
            if not args.lr_scheduler_kwargs:
                raise
            raise ValueError(
                f"lr_scheduler_kwargs {args.lr_scheduler_kwargs} do not fit lr_scheduler_type="
                f"'{args.lr_scheduler_type.value}' ({error}); leave out what it does not take."
            ) from error
        if not self._follows_data:
            if isinstance(scheduler, DataIndexedLR):  # the user's, of an earlier run in which k varied
                trainer.lr_scheduler = scheduler = scheduler.unwrapped()
            return scheduler
        if isinstance(scheduler, METRIC_DRIVEN):
            if args.lr_batch_scaling != "none":
                logger.warning(
                    "lr_batch_scaling='%s' is ignored: %s sets the rate itself.",
                    args.lr_batch_scaling,
                    type(scheduler).__name__,
                )
            return scheduler
        if scheduler is before or not isinstance(scheduler, DataIndexedLR):
            # The user's: as it was passed, or as an earlier run has left it, from where it goes on.
            trainer.lr_scheduler = scheduler.inner if isinstance(scheduler, DataIndexedLR) else scheduler
        return trainer.lr_scheduler

    def factor(self) -> float:
        """Return the schedule at the present place in the data, relative to the base rate."""
        scheduler = self.trainer.lr_scheduler
        if not isinstance(scheduler, DataIndexedLR):
            return 1.0
        return scheduler.factor(self.parts.accumulation.cursor.reference_position)

    def place(self) -> None:
        """Tell the schedule where the next window begins and how large it will be; its next step applies that."""
        scheduler, accumulation = self.trainer.lr_scheduler, self.parts.accumulation
        if not isinstance(scheduler, DataIndexedLR):
            return
        controller = accumulation.controller
        rule = chosen_rule(self.trainer.args.lr_batch_scaling, accumulation.measures)
        noise = controller.noise if rule in NOISE_SCALING_RULES else None
        factor = batch_scaling_factor(
            rule,
            controller.next_window_steps,
            accumulation.reference_steps,
            noise.resolved_in(controller.micro_batch_samples) if noise is not None else None,
            is_adaptive_optimizer(self.trainer.optimizer),
        )
        scheduler.set_position(accumulation.cursor.reference_position, factor)

    def apply(self) -> None:
        """Set the rate of the next window now, and not with the next step of the schedule."""
        if isinstance(self.trainer.lr_scheduler, DataIndexedLR):
            self.place()
            self.trainer.lr_scheduler.step()
