"""Windows that aren't finite as a part: their optimizer step is skipped, and too many in a row end the run."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DistributedType

from ..accumulation import deepspeed_checks
from ..accumulation.window import lacks_targets, without_empty_mean
from ..core.facts import gradient_scaler
from ..core.part import Part
from .losses import FiniteWindows, SkippedWindows, TrainingDivergedError, last_good_step, obstacle_to_skipping


logger = logging.getLogger(__name__)

# Where k varies and `max_skipped_windows` is unset. With a constant k a run is stock's unless it is asked for more.
DEFAULT_LIMIT = 10


class SkippedStepsPart(Part):
    """Skips optimizer steps whose loss or gradients aren't finite, and counts them.

    Attributes:
        count: Skipped windows.
    """

    name = "skipped_steps"
    logged_keys = ("skipped_windows",)

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self.count = SkippedWindows()
        self._windows: FiniteWindows | None = None
        self._lacks: torch.Tensor | None = None
        self._loaded_state: dict[str, Any] | None = None

    # ---- A run -----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self.count = SkippedWindows(**self._loaded_state or {})
        self._windows = None
        if not self.limit:
            return
        obstacle = self.obstacle
        if obstacle is None:
            self._windows = FiniteWindows(self.trainer.model, self.trainer.optimizer)
        else:
            logger.warning("max_skipped_windows has no effect: %s.", obstacle)

    def end_run(self) -> None:
        self._windows = None

    @property
    def is_on(self) -> bool:
        """Whether windows are judged."""
        return self._windows is not None

    @property
    def obstacle(self) -> str | None:
        """Why steps cannot be left out, if so."""
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            return deepspeed_checks.obstacle_to_skipping(trainer)
        by_xla = trainer.accelerator.distributed_type == DistributedType.XLA
        return obstacle_to_skipping(trainer.optimizer, str(trainer.args.optim), by_xla)

    @property
    def limit(self) -> int:
        """Skipped steps in a row that end the run; 0: nothing is checked, as in stock `Trainer`."""
        asked = self.trainer.args.max_skipped_windows
        if asked is not None:
            return asked
        return DEFAULT_LIMIT if self.parts.accumulation.varies else 0

    # ---- A window --------------------------------------------------------------------------------------------------

    def run_micro_batch(self, inputs: Any, step: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """Run one pass through the model and take in its loss.

        Args:
            inputs: Collated samples.
            step: Forward and backward; returns the loss.
        """
        if self._windows is None:
            return step(inputs)
        # Before the step: the batch may be taken apart.
        return self.run_slice(inputs, lacks_targets(inputs, self.trainer._loss_shifts_labels), step)

    def run_slice(self, inputs: Any, lacks: torch.Tensor | None, step: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """As `run_micro_batch`, with inputs of which `lacks_targets` is known."""
        if self._windows is None:
            return step(inputs)
        self._lacks = lacks
        self._windows.begin_micro_batch()
        loss = step(inputs)
        self._windows.end_micro_batch(loss, lacks)
        if lacks is None or self.trainer.args.logging_nan_inf_filter:
            return loss  # stock logs the mean of the other steps in its place
        return without_empty_mean(loss, lacks)

    def spoiled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return what DeepSpeed differentiates: of a loss that isn't finite something whose gradient isn't, either.

        Its engine skips steps by the gradients alone, and on all ranks if they aren't finite on one.

        Args:
            loss: Of the micro-batch that runs.
        """
        if self._windows is None:
            return loss
        is_bad = ~torch.isfinite(without_empty_mean(loss.detach(), self._lacks))
        return loss * torch.ones_like(loss).masked_fill(is_bad, torch.nan)

    def restart_step(self) -> None:
        if self._windows is not None:
            self._windows.restart_window()

    @property
    def loss_is_bad(self) -> bool:
        """Whether a loss of this window is known not to be finite: of this rank, or of any once they agreed."""
        if self._windows is None or not self._windows.is_in_window:
            return False
        return self._windows.any_loss_is_bad or bool(self._windows.loss_is_bad())

    def flags(self) -> list[float]:
        """Return what ranks add up at the end of a window: whether a loss is bad, whether there are targets."""
        windows = self._windows
        has_targets = windows is not None and windows.is_in_window and bool(windows.has_targets())
        return [float(self.loss_is_bad), float(has_targets)]

    def take_flags(self, sums: list[float]) -> None:
        """Take in the sums of `flags` over the ranks."""
        if self._windows is not None:
            self._windows.any_loss_is_bad, self._windows.any_has_targets = (total > 0 for total in sums)

    def judge(self, norm: torch.Tensor) -> None:
        """Decide whether the step of a window is skipped, by its gradient norm (the same on all ranks)."""
        if self._windows is None:
            return
        self.settle()
        by_scaler = gradient_scaler(self.trainer) is not None or self.parts.deepspeed.scales_loss
        self._windows.judge(norm, self.trainer.state.global_step, by_scaler=by_scaler)
        if not self._windows.is_deferred:
            self.settle()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._windows is not None:
            self._windows.before_optimizer_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._windows is not None:
            self._windows.after_optimizer_step()

    def settle(self) -> None:
        """Count the last window that was judged.

        Raises:
            TrainingDivergedError: There were too many in a row.
        """
        settled = None if self._windows is None else self._windows.settle()
        if settled is None:
            return
        skipped, is_empty, step = settled
        count = self.count
        count.count(skipped, is_empty)
        if skipped:
            self.parts.adam_clock.was_skipped(step)
        if count.in_a_row < self.limit:
            return
        # Infinite losses under fp16 are overflows of the forward pass, which no loss scale helps.
        reason = f"the loss of {count.in_a_row} optimizer steps in a row was not finite"
        if self.parts.precision.leave_fp16(reason):
            count.in_a_row = 0
            return
        raise TrainingDivergedError(
            f"the loss or the gradients of {count.in_a_row} optimizer steps in a row (max_skipped_windows) were "
            f"not finite, since step {step + 2 - count.in_a_row}; {self._remedy(step)}."
        )

    def _remedy(self, step: int) -> str:
        """Return what to do about windows that aren't finite, the last one after `step` steps."""
        hint = "lower the learning rate and check the data"
        last_complete = self.parts.checkpoints.last_complete
        good = last_complete(last_good_step(step, self.count.in_a_row))
        if good is not None:
            where = f"the last good checkpoint is {good.path}"
            return f"{where}: resume from it with a lower learning rate, and check the data"
        last = last_complete()
        if last is None:
            return f"there is no complete checkpoint; {hint}"
        return f"there is no checkpoint from before the last good step ({last.path} may hold what broke it); {hint}"

    @property
    def last_good_step(self) -> int | None:
        """Last step whose weights are known to be good, while windows are being skipped; else `None`."""
        if not self.count.in_a_row:
            return None
        return last_good_step(self.trainer.state.global_step - 1, self.count.in_a_row)

    # ---- Logs and checkpoints --------------------------------------------------------------------------------------

    def log_values(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return `skipped_windows` for a line of training, once there are any."""
        if "loss" not in line and "train_runtime" not in line:
            return {}
        self.settle()
        return {"skipped_windows": self.count.total} if self.count.total else {}

    def state_dict(self) -> dict[str, Any] | None:
        return dict(vars(self.count)) if self.count.total else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._loaded_state = state
