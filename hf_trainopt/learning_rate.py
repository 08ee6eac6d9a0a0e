"""The learning rate in `Trainer`: a schedule over the data, with a factor for the batch that k makes."""

import logging

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

    def create_scheduler(self, *args, **kwargs):
        """As in `Trainer`, in reference windows, evaluated by the data consumed."""
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
                    "lr_batch_scaling='%s' is ignored: lr_scheduler_type='%s' sets the rate itself.",
                    self.args.lr_batch_scaling,
                    self.args.lr_scheduler_type,
                )
            return scheduler
        inner = scheduler.inner if isinstance(scheduler, DataIndexedLR) else scheduler
        self.lr_scheduler = DataIndexedLR(inner)
        self._place_learning_rate()
        self.lr_scheduler.step()
        return self.lr_scheduler

    def _learning_rate_factor(self) -> float:
        return (
            self.lr_scheduler.factor(self._cursor.reference_position)
            if isinstance(self.lr_scheduler, DataIndexedLR)
            else 1.0
        )

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
