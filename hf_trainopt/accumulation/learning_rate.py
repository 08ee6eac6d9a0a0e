"""The learning rate as a part: a schedule over the data, with a factor for the batch that k makes."""

import logging
from collections.abc import Callable
from typing import Any

from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper, DummyScheduler

from ..core.part import Part
from .deepspeed_schedule import take_over
from .schedule import (
    METRIC_DRIVEN,
    DataIndexedLR,
    batch_scaling_factor,
    chosen_rule,
    is_adaptive_optimizer,
    torch_optimizer,
)


logger = logging.getLogger(__name__)

# Share of the data after which the transfer of rates keeps its noise scale, once the rate has stopped rising. The
# noise scale rises to the end of a run: a transfer that followed it would lower the rate a second time, on top of the
# schedule (measured: benchmarks/convergence.md).
TRANSFER_PROGRESS = 0.1


class LearningRatePart(Part):
    """Schedules that stay right where k changes; `scheduler.pt` holds their place in the data.

    Attributes:
        transfer_noise: B_noise in samples that rates are transferred by, `None` while it is unknown.
        keeps_noise: Whether that stays as it is from here on.
        growth: By which factor the batch has grown in place of a lower rate, as last known.
    """

    name = "learning_rate"

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self._restart({})
        self._committed_state: dict[str, Any] | None = None

    def _restart(self, state: dict[str, Any]) -> None:
        self.transfer_noise: float | None = state.get("noise")  # in samples; of the transfer
        self.keeps_noise: bool = state.get("noise_is_kept", False)
        self.growth: float = state.get("growth", 1.0)
        self._last_factor: float = state.get("last_factor", 0.0)

    @property
    def _follows_data(self) -> bool:
        return self.parts.accumulation.cursor is not None

    def followed(self, scheduler: Any) -> Any:
        """Return what the Trainer keeps for a schedule that it is given: one that follows the data, while k varies."""
        of_engine = (DummyScheduler, DeepSpeedSchedulerWrapper)  # DeepSpeed's: not made yet, or to be taken over
        stays = scheduler is None or isinstance(scheduler, (DataIndexedLR, *METRIC_DRIVEN, *of_engine))
        if stays or not self._follows_data:
            return scheduler
        return DataIndexedLR(scheduler, torch_optimizer(self.trainer.optimizer))

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
                f"'{args.lr_scheduler_type.value}' ({error}); leave out the ones it doesn't take."
            ) from error
        if isinstance(before, DummyScheduler):
            return scheduler  # DeepSpeed's engine asks for it, on a copy of the Trainer, and is not prepared yet
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
        if isinstance(scheduler, DeepSpeedSchedulerWrapper):
            if not isinstance(scheduler, DataIndexedLR):
                taken = take_over(trainer.accelerator.deepspeed_engine_wrapped.engine)
                trainer.lr_scheduler = scheduler if taken is None else taken
                self.apply()
            return trainer.lr_scheduler
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

    def move_on(self, factor: float, growth: float) -> None:
        """Take in a finished window, and place the schedule for the next one; every rank calls it alike.

        Args:
            factor: `factor()`, now that the window's data are consumed.
            growth: Of the batch because of the decayed rate, 0 while it isn't known.
        """
        # While the noise scale is not resolved the policy holds k: what k is made of stays as it was, too.
        self.growth = growth or self.growth
        was_unknown = self.transfer_noise is None
        if not self.keeps_noise:
            noise, cursor = self.parts.accumulation.controller.noise, self.parts.accumulation.cursor
            if noise is not None and noise.resolved:
                self.transfer_noise = noise.value
                self.keeps_noise = cursor.progress >= TRANSFER_PROGRESS and factor <= self._last_factor
        self._last_factor = factor
        self.place()
        if was_unknown and self.transfer_noise is not None:
            self._tell_of_transfer()

    def _tell_of_transfer(self) -> None:
        """Say why the rate changes where the noise scale is known for the first time, late in a run."""
        scheduler, progress = self.trainer.lr_scheduler, self.parts.accumulation.cursor.progress
        if not isinstance(scheduler, DataIndexedLR) or progress < TRANSFER_PROGRESS:
            return
        if not 0.8 < scheduler.scale / scheduler.applied_scale < 1.25:
            logger.info(
                "The noise scale is known from here on (%.3g samples, after %.0f %% of the data): the learning rate "
                "is now %.3g times the schedule's; it was %.3g times.",
                self.transfer_noise,
                100 * progress,
                scheduler.scale,
                scheduler.applied_scale,
            )

    def place(self) -> None:
        """Tell the schedule where the next window begins and how large it will be; its next step applies that."""
        scheduler, accumulation = self.trainer.lr_scheduler, self.parts.accumulation
        if not isinstance(scheduler, DataIndexedLR):
            return
        controller = accumulation.controller
        factor = batch_scaling_factor(
            chosen_rule(self.trainer.args.lr_batch_scaling, accumulation.measures),
            controller.next_window_steps,
            accumulation.reference_steps,
            None if self.transfer_noise is None else self.transfer_noise / controller.micro_batch_samples,
            is_adaptive_optimizer(self.trainer.optimizer),
            self.growth,
        )
        scheduler.set_position(accumulation.cursor.reference_position, factor)

    def apply(self) -> None:
        """Set the rate of the next window now, and not with the next step of the schedule."""
        if isinstance(self.trainer.lr_scheduler, DataIndexedLR):
            self.place()
            self.trainer.lr_scheduler.step()

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def on_step_end(self, args, state, control, **kwargs):
        if self._follows_data:
            self._committed_state = {
                "noise": self.transfer_noise,
                "noise_is_kept": self.keeps_noise,
                "growth": self.growth,
                "last_factor": self._last_factor,
            }

    def state_dict(self) -> dict[str, Any] | None:
        return self._committed_state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._committed_state = state
        self._restart(state or {})
