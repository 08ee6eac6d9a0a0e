"""Out of memory as a part: windows are repeated with smaller micro-batches until they fit."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object

from ..accumulation.window import Slice, Window, slices_of
from ..core.batch import copy_batch, count_rows, split_batch
from ..core.facts import is_sharded, loss_divides_itself, rank_batch_size
from ..core.part import Part
from .alike import split_alike
from .checks import check_auto_micro_batch, check_planned, find_ddp
from .detection import first_line, is_out_of_memory, release_memory
from .ranks import Ranks
from .window_start import WindowStart


logger = logging.getLogger(__name__)

_ADVICE = (
    "Let activations take less (memory_budget, activation_checkpointing), use shorter samples or a smaller model, or "
    "precision='auto'."
)


_UNKNOWN_ITEMS = "the loss is said to be divided by the items of the step, but these are not known"


class OutOfMemoryPart(Part):
    """Windows that don't fit are repeated, with `auto_micro_batch`.

    The data loader goes on making the micro-batches that it was told to: position in the data, schedule and what a
    checkpoint counts stay in these. What is halved is what goes through the model at once: a micro-batch is split when
    it is run, so that no sample can be lost or come twice.

    Attributes:
        ranks: Averages gradients in place of DDP, where windows are repeated on several ranks; else `None`.
        planned_size: Micro-batch that was planned for a memory budget, to begin with.
    """

    name = "out_of_memory"

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self.ranks: Ranks | None = None
        self.planned_size: int | None = None
        self._slice_size: int | None = None
        self._loaded_size: int | None = None
        self._loaded_plan: int | None = None
        self._window_start: WindowStart | None = None
        self._is_in_optimizer_step = False

    @property
    def is_on(self) -> bool:
        """Whether a window that doesn't fit is repeated."""
        return self.trainer.args.auto_micro_batch

    @property
    def is_split(self) -> bool:
        """Whether micro-batches are smaller than the data loader makes them."""
        return self._slice_size is not None and self._slice_size < rank_batch_size(self.trainer)

    @property
    def micro_batch_size(self) -> int:
        """Most samples that go through the model of one rank at once in training."""
        return self._slice_size if self.is_split else rank_batch_size(self.trainer)

    # ---- A run -----------------------------------------------------------------------------------------------------

    def check_setup(self) -> None:
        """Refuse a sharded model without a planned micro-batch, before anything else is looked at."""
        if self.is_on and is_sharded(self.trainer):
            check_planned(self.trainer)

    def before_preparing(self, dataloader: Any) -> None:
        self._slice_size = self._window_start = self.ranks = None
        if self.is_on:
            self.trainer.args.validate_out_of_memory()
            check_auto_micro_batch(self.trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        """Take up what a checkpoint says; everything is prepared and loaded by now."""
        self._is_in_optimizer_step = False
        # What a resumed run had come down to; a size that was only planned is planned anew.
        forced = None if self._loaded_size == self._loaded_plan else self._loaded_size
        if not self.is_on:
            if forced is not None:
                logger.warning(
                    "The resumed run had come down to micro-batches of %d to fit into memory; without "
                    "auto_micro_batch=True it goes on with %d.",
                    forced,
                    rank_batch_size(self.trainer),
                )
            return
        if self._loaded_plan != self.planned_size and self.planned_size is not None:
            forced = None  # under another plan
        self._slice_size = forced or self.planned_size or rank_batch_size(self.trainer)
        self._is_checked = not self.is_split
        if self.is_split and forced is None and args.should_log:
            logger.info(
                "Micro-batches of %d samples are planned: %d for each batch of the data loader. The "
                "effective batch size stays the same.",
                self._slice_size,
                -(-rank_batch_size(self.trainer) // self._slice_size),
            )
        if is_sharded(self.trainer):
            return
        self._window_start = WindowStart(self.trainer.model, args.device)
        if args.world_size > 1:
            self.ranks = Ranks(find_ddp(self.trainer.model_wrapped), args.device)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._is_in_optimizer_step = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._is_in_optimizer_step = False

    @contextlib.contextmanager
    def epoch(self, **loop: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._is_in_optimizer_step and is_out_of_memory(error):
                error.add_note(
                    "The optimizer step ran out of memory, not a micro-batch: smaller ones do not help, and a step "
                    "that has begun cannot be repeated. Choose an optimizer with less state (optim='adafactor', "
                    "'adamw_8bit'), or train fewer parameters."
                )
            raise

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Context of an evaluation: an error of memory says whose it is."""
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                error.add_note(
                    "The evaluation ran out of memory, not training: lower per_device_eval_batch_size "
                    f"({self.trainer.args.per_device_eval_batch_size}), or set eval_accumulation_steps if it keeps "
                    "predictions. auto_micro_batch changes training only."
                )
            raise

    def state_dict(self) -> dict[str, Any] | None:
        own = self._slice_size if self.is_split else None
        size = own if self.is_on else self._loaded_size  # what was loaded is for a later run that has it on again
        if size is None:
            return None
        planned = self.planned_size if self.is_on else self._loaded_plan
        return {"micro_batch_size": size, **({} if planned is None else {"planned_size": planned})}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._loaded_size = None if state is None else state["micro_batch_size"]
        self._loaded_plan = None if state is None else state.get("planned_size")

    # ---- A window --------------------------------------------------------------------------------------------------

    def until_it_fits(
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
            return self._run_once(window, num_items_in_batch, run)
        if self.ranks is not None:
            self.ranks.begin_window()
        self._window_start.save()
        whole, window = window, self._in_slices(window, num_items_in_batch)
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
            size, problem = self._slice_size, None
            if failure is not None:
                self._drop_gradients()
                size, problem = self._halved(window, num_items_in_batch)
            if self.ranks is not None:
                size = self.ranks.agree(size)
            if size == self._slice_size:
                if self.ranks is not None:
                    self.ranks.average_gradients()
                return window, loss
            del loss
            if failure is None:
                self._drop_gradients()
            window = self._smaller(whole, size, failure, problem)
            self._window_start.restore()
            if self.ranks is not None:
                self.ranks.begin_try()
            forget()

    def _run_once(
        self, window: Window, num_items_in_batch: Any, run: Callable[[Window], torch.Tensor]
    ) -> tuple[Window, torch.Tensor]:
        """Run a window that isn't repeated: of a sharded model, or where that isn't asked for."""
        if self._slice_size is None:
            return window, run(window)
        window = self._in_slices(window, num_items_in_batch)
        try:
            return window, run(window)
        except Exception as error:
            if is_out_of_memory(error):
                error.add_note(
                    f"Micro-batches of {self.micro_batch_size} samples, planned for memory_budget="
                    f"'{self.trainer.args.memory_budget}', did not fit. auto_micro_batch can't repeat a step of a "
                    "sharded model, whose ranks communicate in it; lower memory_budget or "
                    "per_device_train_batch_size."
                )
            raise

    def _in_slices(self, window: Window, num_items_in_batch: Any) -> Window:
        """Return a window in slices of the present size; the first one of a run is checked."""
        window = self._split(window, self._slice_size)
        if not self._is_checked:
            self._check_split(window, num_items_in_batch)
        return window

    def inputs_of_try(self, piece: Slice) -> Any:
        """Return the inputs of a slice for one try, which may change them; a later one begins with the same."""
        return piece.inputs if self._window_start is None else copy_batch(piece.inputs)

    def _drop_gradients(self) -> None:
        """Give up the gradients of a window, which had none when it began, and hand back memory."""
        self.trainer.model.zero_grad(set_to_none=True)
        release_memory()

    def _split(self, window: Window, size: int) -> Window:
        """Return the window with micro-batches of at most `size` samples."""
        if size >= rank_batch_size(self.trainer):
            return window
        if self.trainer.args.world_size > 1 and is_sharded(self.trainer):
            split = split_alike(window.micro_batches, size)
        else:
            split = [split_batch(micro_batch, size) for micro_batch in window.micro_batches]
        return replace(window, slices=[piece for pieces in split for piece in slices_of(pieces)])

    def _check_split(self, window: Window, num_items_in_batch: Any) -> None:
        """Refuse to begin with smaller micro-batches where they would train something else.

        Raises:
            ValueError: They would; after out of memory the same ends the run.
        """
        self._is_checked = True
        if num_items_in_batch is None and loss_divides_itself(self.trainer, num_items_in_batch):
            raise ValueError(
                f"auto_micro_batch has planned micro-batches of {self._slice_size} samples, but {_UNKNOWN_ITEMS}; set "
                "auto_micro_batch=False."
            )

    def _halved(self, window: Window, num_items_in_batch: Any) -> tuple[int, str | None]:
        """Return the size of micro-batches to try next, or 0 and why there is none."""
        if num_items_in_batch is None and loss_divides_itself(self.trainer, num_items_in_batch):
            return 0, _UNKNOWN_ITEMS
        try:
            largest = max(count_rows(piece.inputs) for piece in window.slices)
        except ValueError as error:
            return 0, f"the micro-batch cannot be split: {error}"
        if largest > self._slice_size:
            return 0, (
                f"the data loader makes {largest} rows where per_device_train_batch_size says "
                f"{rank_batch_size(self.trainer)}, which is to be set to {largest} if they are samples"
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
        if self.trainer.args.world_size > 1:
            found = gather_object(found)
        who = [rank for rank, (failed, _) in enumerate(found) if failed is not None]
        failure = found[who[0]][0]
        where = f" on rank {', '.join(map(str, who))}" if self.trainer.args.world_size > 1 else ""
        for _, other in found:
            if other is not None:
                raise torch.OutOfMemoryError(
                    f"{failure}\nStep {self.trainer.state.global_step + 1} ran out of memory{where} with micro-"
                    f"batches of {before} samples, and auto_micro_batch cannot help: {other}. {_ADVICE}"
                )
        self._slice_size = size
        if self.trainer.args.should_log:
            samples = -(-rank_batch_size(self.trainer) // size)
            logger.warning(
                "Step %d ran out of memory%s (%s). It is repeated from its start with micro-batches of %d samples "
                "instead of %d, now %d for each of the data loader's: the effective batch size stays the same.",
                self.trainer.state.global_step + 1,
                where,
                failure,
                size,
                before,
                samples,
            )
        return split
