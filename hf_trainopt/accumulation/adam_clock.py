"""The clock of Adam's second moment as a part: while k varies, it runs in data and not in optimizer steps."""

import logging
import weakref
from typing import Any

import torch

from ..core.part import Part
from .schedule import DataIndexedLR, torch_optimizer
from .second_moment import LONGEST_MEMORY, SecondMomentClock, moment_setting, steps_taken


logger = logging.getLogger(__name__)

# Steps, reference windows in them, and what each group has forgotten of them (see `SecondMomentClock`).
Reached = tuple[int, float, list[float]]
# What an optimizer has come to: `train` may be called again, or another Trainer have it.
_REACHED: "weakref.WeakKeyDictionary[torch.optim.Optimizer, Reached]" = weakref.WeakKeyDictionary()


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
        self._not_taken: int | None = None

    # ---- A run -----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """Watch the optimizer; everything is prepared and loaded by now."""
        self.end_run()
        accumulation = self.parts.accumulation
        if args.adam_clock != "tokens" or accumulation.cursor is None or not accumulation.varies:
            return
        inner = torch_optimizer(self.trainer.optimizer)
        by_engine = self.parts.deepspeed.engine is not None
        try:
            setting = moment_setting(inner)
            if setting is not None and not by_engine and not hasattr(inner, "register_step_pre_hook"):
                raise LookupError("it isn't a torch.optim.Optimizer")
        except LookupError as error:
            logger.warning(
                "adam_clock='tokens' has no effect on %s: %s. Its averages forget by optimizer steps, whatever k is; "
                "set adam_clock='steps' to silence this warning.",
                type(inner).__name__,
                error,
            )
            return
        if setting is None:
            return
        longest = LONGEST_MEMORY * accumulation.cursor.budget
        self.clock = SecondMomentClock(inner, setting, *self._start(inner), longest=longest)
        if not by_engine:  # which steps it once for each parameter group
            self._hooks = [
                inner.register_step_pre_hook(self._before_step),
                inner.register_step_post_hook(self._after_step),
            ]
        self._committed_state = self._state()

    def _start(self, optimizer: torch.optim.Optimizer) -> Reached | tuple[int]:
        """Return the steps that the optimizer has taken, and what is known of them."""
        steps, saved = steps_taken(optimizer), self._loaded_state
        known = None if saved is None else (saved["steps"], saved["windows"], saved.get("forgotten", []))
        if known is None and self.parts.resumed_from is None:
            known = _REACHED.get(optimizer)
        if known is None:  # stock's, or written when every step had the β2 of the recipe
            return (self.trainer.state.global_step if steps is None else steps,)
        if steps is None or steps == known[0]:
            return known
        if not known[0]:
            return (steps,)
        # Its state isn't the one of that run (not saved, or begun anew): windows as there are on average.
        share = steps / known[0]
        return steps, known[1] * share, [value * share for value in known[2]]

    def end_run(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self.clock is not None:
            self.clock.put_back()
            _REACHED[self.clock.optimizer] = self.clock.steps, self.clock.windows, self.clock.forgotten
        self.clock, self._hooks, self._committed_state = None, [], None
        self._step_begun = self._not_taken = None

    # ---- A step ----------------------------------------------------------------------------------------------------

    def _before_step(self, *_: Any) -> None:
        # What k was decided: the short last window of an epoch counts as a whole one, as in stock.
        self.begin_step(self.parts.accumulation.last_window[0])

    def begin_step(self, k: int) -> None:
        """Change the optimizer for a step of a window for which k was decided."""
        if self.clock is None:
            return
        scheduler = self.trainer.lr_scheduler
        factor = scheduler.applied_scale if isinstance(scheduler, DataIndexedLR) else 1.0
        self.clock.begin_step(k / self.parts.accumulation.reference_steps, factor)

    def _after_step(self, *_: Any) -> None:
        self.end_step(self._not_taken != self.trainer.state.global_step)

    def end_step(self, is_taken: bool) -> None:
        """Put the optimizer back, and count the step if it was taken."""
        if self.clock is None:
            return
        step = self.trainer.state.global_step
        self.clock.end_step(is_taken)
        self._step_begun = step if is_taken else None

    def was_skipped(self, step: int) -> None:
        """Leave out a step for which the optimizer is called, and which it doesn't take.

        Args:
            step: Optimizer steps before it. It may be over or yet to come.
        """
        if self.clock is None:
            return
        self._not_taken = step
        if self._step_begun == step:
            self.clock.take_back()
            self._step_begun = None
            self._committed_state = self._state()  # it may be known only as a checkpoint of that step is written

    def on_step_end(self, args, state, control, **kwargs):
        if self.clock is not None:
            self._committed_state = self._state()

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {"steps": self.clock.steps, "windows": self.clock.windows, "forgotten": self.clock.forgotten}

    def state_dict(self) -> dict[str, Any] | None:
        return self._committed_state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._loaded_state = state
