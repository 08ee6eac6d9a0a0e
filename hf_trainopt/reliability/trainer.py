"""Reliability in `Trainer`: signals, windows that are not finite, and what `checkpoints` does."""

import logging

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from transformers.integrations.neftune import deactivate_neftune

from ..accumulation.window import lacks_targets, without_empty_mean
from ..log_lines import give_back
from .checkpoints import CheckpointsTrainerMixin
from .interrupts import SIGNALS, SignalWatch, ending, signal_of
from .losses import FiniteWindows, SkippedWindows, TrainingDivergedError, last_good_step, obstacle_to_skipping


logger = logging.getLogger(__name__)

# Our entry among the states of callbacks in `trainer_state.json`.
STATE_KEY = "hf_trainopt_skipped_windows"


class ReliabilityTrainerMixin(CheckpointsTrainerMixin):
    """Reliability for any `Trainer` class; a base of `EfficientTrainerMixin`, which says where its windows end."""

    def __init__(self, *args, **kwargs):
        self._signals = SignalWatch()
        self._interrupt = None
        self._finite: FiniteWindows | None = None
        self._skipped_windows = SkippedWindows()
        super().__init__(*args, **kwargs)
        self.add_callback(_RunEvents(self))

    @property
    def _watches_signals(self) -> bool:
        return getattr(self.args, "saves_on_interrupt", False)

    # ---- Beginning and end -----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`, from the last *complete* checkpoint; signals are watched once training has begun.

        Raises:
            CheckpointError: No checkpoint could be saved, or the one asked for is not complete or of another set-up (a
                `ValueError`).
            TrainingInterrupted: Ctrl-C, after the checkpoint was saved (a `KeyboardInterrupt`).
            TrainingTerminated: SIGTERM, likewise (a `SystemExit`).
            TrainingDivergedError: `max_skipped_windows` in a row were not finite.
        """
        resume_from_checkpoint = self._check_start(resume_from_checkpoint)
        self._interrupt = None
        self._forget_saves()
        self._own_trial = kwargs.get("trial", args[0] if args else None)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            if self._signals.received is not None:
                self._interrupt = self._signals.received  # too late for a window to serve it
                raise self._ending("all steps were done")
            return output
        except BaseException:
            if self.neftune_noise_alpha is not None and getattr(self, "neftune_hook_handle", None) is not None:
                # Or the next `train` adds its noise to this one's.
                deactivate_neftune(self.model, self.neftune_hook_handle, self.accelerator)
            raise
        finally:
            self._finite = None
            self._signals.restore()
            self._signals.received = None

    def _ending(self, what: str) -> BaseException:
        """Return the exception that a signal ends training with, and say so in the log."""
        last = self._last_complete()
        rest = "there is no complete checkpoint" if last is None else f"resume from {last.path}"
        if self._failed_save is not None:
            rest = f"the last save failed ({self._failed_save}); {rest}"
        message = f"{self._interrupt.name} ended training at step {self.state.global_step}, {what}; {rest}."
        if self.args.should_log:
            logger.warning("%s", message)
        self.is_in_train = False
        return ending(self._interrupt, message, None if last is None else last.path)

    def _run_epoch(self, *args, **kwargs):
        super()._run_epoch(*args, **kwargs)
        if self._interrupt is not None:
            if self._saved_step != self.state.global_step and self._failed_save is None:
                # The signal came in an evaluation, after which save_strategy="best" saves the best only.
                self._save_checkpoint(self.model, self._own_trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise self._ending("after a save" if self._failed_save is None else "without a save")

    def _finalize_training(self, trial, *args, **kwargs):
        if self._finite is not None:
            self._settle()
        if self._failed_save is not None:
            self._save_checkpoint(self.model, trial)
        output = super()._finalize_training(trial, *args, **kwargs)
        if self._failed_save is not None:
            self._end_without_last_save(trial)
        return output

    # ---- The end of a window ---------------------------------------------------------------------------------------

    def training_step(self, model, inputs, *args, **kwargs):
        """As in `Trainer`; the losses of a window are added up to see whether they are finite."""
        if self._finite is None:
            return super().training_step(model, inputs, *args, **kwargs)
        lacks = lacks_targets(inputs, self._loss_shifts_labels)  # now: the batch may be taken apart
        self._finite.begin_micro_batch()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._finite.end_micro_batch(loss, lacks)
        if lacks is None or self.args.logging_nan_inf_filter:
            return loss  # stock logs the mean of the other steps in its place
        return without_empty_mean(loss, lacks)

    def _window_flags(self) -> torch.Tensor:
        """What ranks add up at the end of a window: signals that came, losses that are not finite, targets."""
        has_targets = self._finite is not None and self._finite.is_in_window and bool(self._finite.has_targets())
        flags = [*self._signals.counts(), float(self._loss_of_window_is_bad()), float(has_targets)]
        return torch.tensor(flags, dtype=torch.float64)

    def _loss_of_window_is_bad(self) -> bool:
        """Whether a loss of this window is known not to be finite: one of this rank, or of any once they agreed."""
        if self._finite is None or not self._finite.is_in_window:
            return False
        return self._finite.any_loss_is_bad or bool(self._finite.loss_is_bad())

    def _agree_on_flags(self, flags: list[float] | None = None) -> None:
        """Take in the sums of `_window_flags` over the ranks, which are added up here if they have not been."""
        if self.args.world_size == 1 or not (self._watches_signals or self._finite is not None):
            return
        if flags is None:
            local = self._window_flags().float().to(self.args.device)
            flags = self.accelerator.reduce(local, reduction="sum").tolist()
        if self._watches_signals:
            self._interrupt = signal_of(flags[: len(SIGNALS)])
        if self._finite is not None:
            self._finite.any_loss_is_bad = flags[len(SIGNALS)] > 0
            self._finite.any_has_targets = flags[len(SIGNALS) + 1] > 0

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        if self._finite is not None:
            self._judge_window(norm)
        return norm

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._finite is not None and grad_norm is None:
            self._judge_window(norm)
        return norm

    def _judge_window(self, norm: torch.Tensor) -> None:
        """Decide whether the window is skipped, by the norm that clipping has computed (the same on all ranks)."""
        self._settle()
        scaler = getattr(self.accelerator, "scaler", None)
        self._finite.judge(norm, self.state.global_step, by_scaler=scaler is not None and scaler.is_enabled())
        if not self._finite.is_deferred:
            self._settle()

    def _settle(self) -> None:
        """Count the last window that was judged.

        Raises:
            TrainingDivergedError: There were too many in a row.
        """
        settled = self._finite.settle()
        if settled is None:
            return
        skipped, is_empty, step = settled
        count = self._skipped_windows
        count.count(skipped, is_empty)
        if skipped or STATE_KEY in self.state.stateful_callbacks:
            self.state.stateful_callbacks[STATE_KEY] = {"args": {}, "attributes": dict(vars(count))}
        if count.in_a_row >= self.args.max_skipped_windows and self._can_go_on(count.in_a_row):
            count.in_a_row = 0
        if count.in_a_row >= self.args.max_skipped_windows:
            raise TrainingDivergedError(
                f"the loss or the gradients of {count.in_a_row} optimizer steps in a row (max_skipped_windows) were "
                f"not finite, since step {step + 2 - count.in_a_row}; {self._remedy(step)}."
            )

    def _can_go_on(self, skipped_in_a_row: int) -> bool:
        """Whether something is changed in place of stopping the run."""
        return False

    def _remedy(self, step: int) -> str:
        """What to do about windows that are not finite, the last one after `step` steps."""
        hint = "lower the learning rate and look at the data"
        good = self._last_complete(last_good_step(step, self._skipped_windows.in_a_row))
        if good is not None:
            return f"the last good checkpoint is {good.path}: resume from it and {hint}"
        last = self._last_complete()
        if last is None:
            return f"there is no complete checkpoint; {hint}"
        return f"there is no checkpoint from before the last good step ({last.path} may hold what broke it); {hint}"

    def _good_checkpoint(self) -> str | None:
        # Saves between windows that are not finite must not push out the one to go back to.
        if not self._skipped_windows.in_a_row:
            return None
        good = self._last_complete(last_good_step(self.state.global_step - 1, self._skipped_windows.in_a_row))
        return None if good is None else good.path

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`; lines of training have `skipped_windows` once there are any."""
        is_training = "loss" in logs or "train_runtime" in logs
        if self._finite is not None and is_training:
            self._settle()
        total = self._skipped_windows.total
        line = {**logs, "skipped_windows": total} if is_training and total else logs
        super().log(line, *args, **kwargs)
        give_back(logs, line, {"skipped_windows"})

    # ---- Events ----------------------------------------------------------------------------------------------------

    def _begin_watching(self) -> None:
        saved = self.state.stateful_callbacks.get(STATE_KEY, {}).get("attributes", {})
        self._skipped_windows = SkippedWindows(**saved)
        self._finite = None
        if getattr(self.args, "max_skipped_windows", 0):
            engine = self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.XLA)
            obstacle = obstacle_to_skipping(self.optimizer, str(self.args.optim), engine)
            if obstacle is None:
                self._finite = FiniteWindows(self.model, self.optimizer)
            else:
                logger.warning("max_skipped_windows has no effect: %s.", obstacle)
        if self._watches_signals:
            self._signals.install()

    def _serve_interrupt(self, control, over_ranks: bool = False) -> None:
        """Let the loop save and end if a signal has come."""
        if not (self._watches_signals and self.is_in_train):
            return
        if self.args.world_size == 1:
            self._interrupt = self._signals.received
        elif over_ranks:
            self._agree_on_flags()
        if self._interrupt is None:
            return
        control.should_training_stop = True
        # There may be seconds left: an evaluation that is due now is not done.
        control.should_evaluate = False
        control.should_save = self._saved_step != self.state.global_step


class _RunEvents(TrainerCallback):
    """Hands the events of a run to the trainer."""

    def __init__(self, trainer: ReliabilityTrainerMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._begin_watching()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._trainer._finite is not None:
            self._trainer._finite.before_optimizer_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._trainer._finite is not None:
            self._trainer._finite.after_optimizer_step()

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer._serve_interrupt(control)

    def on_evaluate(self, args, state, control, **kwargs):
        self._trainer._serve_interrupt(control, over_ranks=True)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._trainer._serve_interrupt(control)
