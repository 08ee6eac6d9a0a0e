"""SIGTERM and Ctrl-C as a part: served at the end of a window with a checkpoint, after which the run ends."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

from transformers.integrations.neftune import deactivate_neftune

from ..core.part import Part
from .signals import SIGNALS, SignalWatch, ending, signal_of


logger = logging.getLogger(__name__)

NUM_FLAGS = len(SIGNALS)


class InterruptsPart(Part):
    """Ends a run on a signal, once a checkpoint is saved."""

    name = "interrupts"

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self._signals = SignalWatch()
        self._interrupt: signal.Signals | None = None

    @property
    def is_on(self) -> bool:
        """Whether signals save a checkpoint."""
        return self.trainer.args.saves_on_interrupt

    # ---- A run -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        trainer = self.trainer
        self._interrupt = None
        try:
            yield
            if self._signals.received is not None:
                self._interrupt = self._signals.received  # too late for a window to serve it
                raise self._ending("all steps were done")
        except BaseException:
            if trainer.neftune_noise_alpha is not None and getattr(trainer, "neftune_hook_handle", None) is not None:
                # Or the next `train` adds its noise to this one's.
                deactivate_neftune(trainer.model, trainer.neftune_hook_handle, trainer.accelerator)
            raise
        finally:
            self._signals.restore()
            self._signals.received = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.is_on:
            self._signals.install()

    @contextlib.contextmanager
    def epoch(self, **loop: Any) -> Iterator[None]:
        yield
        if self._interrupt is None:
            return
        trainer, checkpoints = self.trainer, self.parts.checkpoints
        if not checkpoints.is_saved and checkpoints.failure is None:
            # The signal came in an evaluation, after which save_strategy="best" saves the best only.
            checkpoints.save_now()
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        raise self._ending("after a save" if checkpoints.failure is None else "without a save")

    def _ending(self, what: str) -> BaseException:
        """Return the exception that a signal ends training with, and say so in the log."""
        trainer, checkpoints = self.trainer, self.parts.checkpoints
        last = checkpoints.last_complete()
        rest = "there is no complete checkpoint" if last is None else f"resume from {last.path}"
        if checkpoints.failure is not None:
            rest = f"the last save failed ({checkpoints.failure}); {rest}"
        message = f"{self._interrupt.name} ended training at step {trainer.state.global_step}, {what}; {rest}."
        if trainer.args.should_log:
            logger.warning("%s", message)
        trainer.is_in_train = False
        return ending(self._interrupt, message, None if last is None else last.path)

    # ---- The end of a window ---------------------------------------------------------------------------------------

    def flags(self) -> list[float]:
        """Return what ranks add up at the end of a window: `NUM_FLAGS` numbers, one for each signal."""
        return self._signals.counts()

    def take_flags(self, sums: list[float]) -> None:
        """Take in the sums of `flags` over the ranks."""
        if self.is_on:
            self._interrupt = signal_of(sums)

    def on_step_end(self, args, state, control, **kwargs):
        self._serve(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._serve(control)

    def on_evaluate(self, args, state, control, **kwargs):
        if self._serves_now and self.trainer.args.world_size > 1:
            self.parts.agree_on_flags()
        self._serve(control)

    @property
    def _serves_now(self) -> bool:
        return self.is_on and self.trainer.is_in_train

    def _serve(self, control: Any) -> None:
        """Let the loop save and end if a signal has come."""
        if not self._serves_now:
            return
        if self.trainer.args.world_size == 1:
            self._interrupt = self._signals.received
        if self._interrupt is None:
            return
        control.should_training_stop = True
        # There may be seconds left: an evaluation that is due now isn't done.
        control.should_evaluate = False
        control.should_save = not self.parts.checkpoints.is_saved
