"""The learning rate in `Trainer`: a schedule over the data, with a factor for the batch that k makes."""

import logging
from typing import Any

from .schedule import (
    METRIC_DRIVEN,
    NOISE_SCALING_RULES,
    DataIndexedLR,
    batch_scaling_factor,
    chosen_rule,
    is_adaptive_optimizer,
)


logger = logging.getLogger(__name__)


class LearningRateTrainerMixin:
    """Schedules that stay right where k changes; a base of `EfficientTrainerMixin`, whose cursor it reads."""

    @property
    def lr_scheduler(self) -> Any:
        """The schedule. Any that is set while k varies, by an override of `create_scheduler` too, follows the data."""
        return self.__dict__.get("lr_scheduler")

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        stays = scheduler is None or isinstance(scheduler, (DataIndexedLR, *METRIC_DRIVEN))
        if stays or self.__dict__.get("_cursor") is None:
            self.__dict__["lr_scheduler"] = scheduler
            return
        self.__dict__["lr_scheduler"] = DataIndexedLR(scheduler, getattr(self.optimizer, "optimizer", self.optimizer))
        self._set_learning_rate()

    def create_scheduler(self, *args, **kwargs):
        """As in `Trainer`, in reference windows, evaluated by the data consumed."""
        before = self.lr_scheduler
        try:
            scheduler = super().create_scheduler(*args, **kwargs)
        except TypeError as error:
            if not self.args.lr_scheduler_kwargs:
                raise
            raise ValueError(
                f"lr_scheduler_kwargs {self.args.lr_scheduler_kwargs} do not fit lr_scheduler_type="
                f"'{self.args.lr_scheduler_type.value}' ({error}); leave out what it does not take."
            ) from error
        if self._cursor is None:
            if isinstance(scheduler, DataIndexedLR):  # the user's, of an earlier run in which k varied
                self.lr_scheduler = scheduler = scheduler.unwrapped()
            return scheduler
        if isinstance(scheduler, METRIC_DRIVEN):
            if self.args.lr_batch_scaling != "none":
                logger.warning(
                    "lr_batch_scaling='%s' is ignored: %s sets the rate itself.",
                    self.args.lr_batch_scaling,
                    type(scheduler).__name__,
                )
            return scheduler
        if scheduler is before or not isinstance(scheduler, DataIndexedLR):
            # The user's: as it was passed, or as an earlier run has left it, from where it goes on.
            self.lr_scheduler = scheduler.inner if isinstance(scheduler, DataIndexedLR) else scheduler
        return self.lr_scheduler

    def _learning_rate_factor(self) -> float:
        return (
            self.lr_scheduler.factor(self._cursor.reference_position)
            if isinstance(self.lr_scheduler, DataIndexedLR)
            else 1.0
        )

    def _set_learning_rate(self) -> None:
        """Set the rate of the next window now, and not with the next step of the schedule."""
        if isinstance(self.lr_scheduler, DataIndexedLR):
            self._place_learning_rate()
            self.lr_scheduler.step()

    def _place_learning_rate(self) -> None:
        """Tell the schedule where the next window begins and how large it will be."""
        if not isinstance(self.lr_scheduler, DataIndexedLR):
            return
        controller, rule = self._controller, chosen_rule(self.args.lr_batch_scaling, self._measures)
        noise = controller.noise if rule in NOISE_SCALING_RULES else None
        factor = batch_scaling_factor(
            rule,
            controller.next_window_steps,
            self._reference_steps,
            noise.resolved_in(controller.micro_batch_samples) if noise is not None else None,
            is_adaptive_optimizer(self.optimizer),
        )
        self.lr_scheduler.set_position(self._cursor.reference_position, factor)
