"""Out of memory in `Trainer`: windows are repeated with smaller micro-batches until they fit."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from .._compat import rank_batch_size
from .._versions import loss_is_scaled_for_ga
from ..accumulation.window import Part, Window
from .checks import check_auto_micro_batch, find_ddp
from .detection import first_line, is_out_of_memory, release_memory
from .ranks import Ranks
from .split import copy_batch, count_rows, split_batch
from .window_start import WindowStart


logger = logging.getLogger(__name__)

# Our entry among the states of callbacks in `trainer_state.json`.
STATE_KEY = "hf_trainopt_micro_batch"

_ADVICE = (
    "Let activations take less (memory_budget, activation_checkpointing), use shorter samples or a smaller model, or "
    "precision='auto'."
)


class OutOfMemoryTrainerMixin:
    """Out of memory for any `Trainer` class; a base of `EfficientTrainerMixin`, which runs the windows.

    The data loader goes on making the micro-batches that it was told to: position in the data, schedule and what a
    checkpoint counts stay in these. What is halved is what goes through the model at once: a micro-batch is split when
    it is run, so that no sample can be lost or come twice.
    """

    def __init__(self, *args, **kwargs):
        self._part_size: int | None = None
        self._window_start: WindowStart | None = None
        self._ranks: Ranks | None = None
        self._is_in_optimizer_step = False
        super().__init__(*args, **kwargs)
        self.add_callback(_RunEvents(self))

    @property
    def _fits_micro_batches(self) -> bool:
        """Whether a window that does not fit is repeated."""
        return getattr(self.args, "auto_micro_batch", False)

    @property
    def _is_split(self) -> bool:
        """Whether micro-batches are smaller than the data loader makes them."""
        return self._part_size is not None and self._part_size < rank_batch_size(self)

    @property
    def micro_batch_size(self) -> int:
        """Most samples that go through the model of one rank at once in training."""
        return self._part_size if self._is_split else rank_batch_size(self)

    # ---- A run -----------------------------------------------------------------------------------------------------

    def set_initial_training_values(self, *args, **kwargs):
        """As in `Trainer`."""
        self._part_size = self._window_start = self._ranks = None
        if self._fits_micro_batches:
            self.args.validate_out_of_memory()
            check_auto_micro_batch(self)
        return super().set_initial_training_values(*args, **kwargs)

    def _begin_fitting(self) -> None:
        """Take up what a checkpoint says; everything is prepared and loaded by now."""
        saved = self.state.stateful_callbacks.get(STATE_KEY, {}).get("attributes", {}).get("micro_batch_size")
        self._is_in_optimizer_step = False
        if not self._fits_micro_batches:
            if saved is not None:
                logger.warning(
                    "The run that is resumed had come down to micro-batches of %d for want of memory; without "
                    "auto_micro_batch=True it goes on with %d.",
                    saved,
                    rank_batch_size(self),
                )
            return
        self._part_size = saved or rank_batch_size(self)
        self._window_start = WindowStart(self.model, self.args.device)
        if self.args.world_size > 1:
            self._ranks = Ranks(find_ddp(self.model_wrapped), self.args.device)

    def _run_epoch(self, *args, **kwargs):
        try:
            return super()._run_epoch(*args, **kwargs)
        except Exception as error:
            if self._is_in_optimizer_step and is_out_of_memory(error):
                error.add_note(
                    "The optimizer step ran out of memory, not a micro-batch: smaller ones do not help, and a step "
                    "that has begun cannot be repeated. Choose an optimizer with less state (optim='adafactor', "
                    "'adamw_8bit'), or train fewer parameters."
                )
            raise

    def evaluation_loop(self, *args, **kwargs):
        """As in `Trainer`; an error of memory says whose it is."""
        try:
            return super().evaluation_loop(*args, **kwargs)
        except Exception as error:
            if is_out_of_memory(error):
                error.add_note(
                    "The evaluation ran out of memory, not training: lower per_device_eval_batch_size "
                    f"({self.args.per_device_eval_batch_size}), or set eval_accumulation_steps if it keeps "
                    "predictions. auto_micro_batch changes training only."
                )
            raise

    # ---- A window --------------------------------------------------------------------------------------------------

    def _until_it_fits(
        self,
        window: Window,
        num_items_in_batch: Any,
        run: Callable[[Window], torch.Tensor],
        forget: Callable[[], None],
    ) -> tuple[Window, torch.Tensor]:
        """Run a window, from its start again with smaller micro-batches while there is too little memory for it.

        Args:
            window: The window.
            num_items_in_batch: Of the window, if its loss is divided by that.
            run: Runs it forward and backward and returns its loss.
            forget: Called before it is run again: what was counted in it is to be forgotten.

        Returns:
            The window as it was run, and its loss.

        Raises:
            torch.OutOfMemoryError: Its micro-batches cannot be made any smaller.
        """
        if self._window_start is None:
            return window, run(window)
        if self._ranks is not None:
            self._ranks.begin_window()
        self._window_start.save()
        whole, window = window, self._split(window, self._part_size)
        while True:
            loss = failure = None
            try:
                loss = run(window)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = first_line(error)
                logger.debug("A micro-batch did not fit.", exc_info=True)
            # Out here the error is gone, and with it the frames that hold activations.
            size, problem = self._part_size, None
            if failure is not None:
                self._drop_gradients()
                size, problem = self._halved(window, num_items_in_batch)
            if self._ranks is not None:
                size = self._ranks.agree(size)
            if size == self._part_size:
                if self._ranks is not None:
                    self._ranks.average_gradients()
                return window, loss
            del loss
            if failure is None:
                self._drop_gradients()
            window = self._smaller(whole, size, failure, problem)
            self._window_start.restore()
            if self._ranks is not None:
                self._ranks.begin_try()
            forget()

    def _inputs_of_try(self, part: Part) -> Any:
        """Return the inputs of a part for one try, which may change them; a later one begins with the same."""
        return part.inputs if self._window_start is None else copy_batch(part.inputs)

    def _drop_gradients(self) -> None:
        """Give up the gradients of a window, which had none when it began, and hand back memory."""
        self.model.zero_grad(set_to_none=True)
        release_memory()

    def _split(self, window: Window, size: int) -> Window:
        """Return the window with micro-batches of at most `size` samples."""
        if size >= rank_batch_size(self):
            return window
        parts = []
        for micro_batch in window.micro_batches:
            pieces = split_batch(micro_batch, size)
            rows = [count_rows(piece) for piece in pieces] if len(pieces) > 1 else [1]
            parts += [
                Part(piece, count, sum(rows), index == len(pieces) - 1)
                for index, (piece, count) in enumerate(zip(pieces, rows, strict=True))
            ]
        return replace(window, parts=parts)

    def _halved(self, window: Window, num_items_in_batch: Any) -> tuple[int, str | None]:
        """Return the size of micro-batches to try next, or 0 and why there is none."""
        scaled = loss_is_scaled_for_ga(self)
        if scaled is None:
            scaled = self.compute_loss_func is not None
        if scaled and num_items_in_batch is None:
            return 0, "the loss is said to be divided by the items of the step, but these are not known"
        try:
            largest = max(count_rows(part.inputs) for part in window.parts)
        except ValueError as error:
            return 0, f"the micro-batch cannot be split: {error}"
        if largest > self._part_size:
            return 0, (
                f"the data loader makes {largest} rows where per_device_train_batch_size says "
                f"{rank_batch_size(self)}, which is to be set to {largest} if they are samples"
            )
        if largest == 1:
            return 0, "not even a single sample fits"
        return -(-largest // 2), None

    def _smaller(self, window: Window, size: int, failure: str | None, problem: str | None) -> Window:
        """Return the window split anew, once all ranks have found that they can."""
        before = self.micro_batch_size
        split = window
        if size > 0 and problem is None:
            try:
                split = self._split(window, size)
            except ValueError as error:
                problem = f"the micro-batch cannot be split: {error}"
        found = [(failure, problem)]
        if self.args.world_size > 1:
            found = gather_object(found)
        who = [rank for rank, (failed, _) in enumerate(found) if failed is not None]
        failure = found[who[0]][0]
        where = f" on rank {', '.join(map(str, who))}" if self.args.world_size > 1 else ""
        for _, other in found:
            if other is not None:
                raise torch.OutOfMemoryError(
                    f"{failure}\nStep {self.state.global_step + 1} ran out of memory{where} with micro-batches of "
                    f"{before} samples, and auto_micro_batch cannot help: {other}. {_ADVICE}"
                )
        self._part_size = size
        self.state.stateful_callbacks[STATE_KEY] = {"args": {}, "attributes": {"micro_batch_size": size}}
        if self.args.should_log:
            samples = -(-rank_batch_size(self) // size)
            logger.warning(
                "Step %d ran out of memory%s (%s). It is repeated from its start with micro-batches of %d samples "
                "instead of %d, from here on %d for each that the data loader makes: the batch stays as it is.",
                self.state.global_step + 1,
                where,
                failure,
                size,
                before,
                samples,
            )
        return split


class _RunEvents(TrainerCallback):
    """Tells when a run begins and when the optimizer is at work."""

    def __init__(self, trainer: OutOfMemoryTrainerMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._begin_fitting()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._trainer._is_in_optimizer_step = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._trainer._is_in_optimizer_step = False
