"""The clock of Adam's second moment as a part: while k varies, it runs in data and not in optimizer steps."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from ..core.part import Part
from .schedule import DataIndexedLR
from .second_moment import SecondMomentClock, moment_setting, steps_taken


logger = logging.getLogger(__name__)


class AdamClockPart(Part):
    """Tells the optimizer at each step what makes its second moment forget by data (see `second_moment`).

    Attributes:
        clock: The clock, while it is in play.
    """

    name = "adam_clock"

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self.clock: SecondMomentClock | None = None
        self._hooks: list[Any] = []
        self._loaded_state: dict[str, Any] | None = None
        self._committed_state: dict[str, Any] | None = None
        self._step_begun: int | None = None

    # ---- A run -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._leave()

    def on_train_begin(self, args, state, control, **kwargs):
        """Watch the optimizer; everything is prepared and loaded by now."""
        self._leave()
        accumulation = self.parts.accumulation
        if args.adam_clock != "tokens" or accumulation.cursor is None or not accumulation.varies:
            return
        optimizer = self.trainer.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        try:
            setting = moment_setting(inner)
            if setting is not None and not hasattr(inner, "register_step_pre_hook"):
                raise LookupError("it isn't a torch.optim.Optimizer")
        except LookupError as error:
            logger.warning(
                "adam_clock='tokens' has no effect on %s: %s. Its averages forget by optimizer steps, whatever k is; "
                "adam_clock='steps' says so without this warning.",
                type(inner).__name__,
                error,
            )
            return
        if setting is None:
            return
        self.clock = SecondMomentClock(inner, setting, *self._start(steps_taken(inner)))
        self._hooks = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_step_post_hook(self._after_step),
        ]
        self._committed_state = self._state()

    def _start(self, steps: int | None) -> tuple[int, float | None]:
        """Return the steps that the optimizer has taken, and the reference windows in them if known."""
        saved = self._loaded_state
        if steps is None:
            steps = saved["steps"] if saved is not None else self.trainer.state.global_step
        if saved is not None and saved["steps"] == steps:
            return steps, saved["windows"]
        return steps, None  # stock's, or written when every step had the β2 of the recipe

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self.clock is not None:
            self.clock.put_back()
        self.clock, self._hooks, self._committed_state, self._step_begun = None, [], None, None

    # ---- A step ----------------------------------------------------------------------------------------------------

    def _before_step(self, *_: Any) -> None:
        scheduler = self.trainer.lr_scheduler
        factor = scheduler.applied_scale if isinstance(scheduler, DataIndexedLR) else 1.0
        accumulation = self.parts.accumulation
        # What k was decided: the short last window of an epoch counts as a whole one, as in stock.
        self.clock.begin_step(accumulation.last_window[0] / accumulation.reference_steps, factor)

    def _after_step(self, *_: Any) -> None:
        self.clock.end_step()
        self._step_begun = self.trainer.state.global_step

    def was_skipped(self, step: int) -> None:
        """Take back a step that the optimizer was called for and hasn't taken.

        Args:
            step: Optimizer steps before it.
        """
        if self.clock is not None and self._step_begun == step:
            self.clock.take_back()
            self._step_begun = None
            self._committed_state = self._state()  # it may be known only as a checkpoint of that step is written

    def on_step_end(self, args, state, control, **kwargs):
        if self.clock is not None:
            self._committed_state = self._state()

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {"steps": self.clock.steps, "windows": self.clock.windows}

    def state_dict(self) -> dict[str, Any] | None:
        return self._committed_state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._loaded_state = state
