"""Callbacks on the data axis: logging, evaluation, saving, the progress bar and the end of training.

Stock callbacks compare `state.global_step` (optimizer steps) with intervals and with `state.max_steps`. With varying k
an optimizer step is no fixed amount of data. Here the intervals are counted in reference windows (see `DataCursor`),
so that `eval_steps=100` evaluates as often as in stock `Trainer`, and training ends when the data budget is used up.
`state.global_step` stays the number of optimizer steps and `state.max_steps` is a running forecast of their total,
exact at the end.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy

from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .accumulation.cursor import DataCursor


class WindowCallbackHandler(CallbackHandler):
    """Callback handler that fits the state and the arguments to what callbacks know from stock `Trainer`.

    Args:
        handler: Handler of the Trainer; its callbacks are taken over in order.
        show_arguments: Context in which `args.gradient_accumulation_steps` is k_ref (the loop is run with 1).
        before_step_end: Called first at the end of each optimizer step, with the state.
        cursor: Position in the data, or `None` while everything is stock.
        save_failed: Whether the last save has come to nothing.
        after_save: Called when callbacks have had a checkpoint that was saved.
    """

    def __init__(
        self,
        handler: CallbackHandler,
        show_arguments: Callable[[], AbstractContextManager],
        before_step_end: Callable[[TrainerState], None],
        cursor: Callable[[], DataCursor | None],
        save_failed: Callable[[], bool],
        after_save: Callable[[], None],
    ):
        # Not `super().__init__()`: it would add the callbacks anew and warn about those that are there twice.
        self.__dict__.update(handler.__dict__)
        self._show_arguments = show_arguments
        self._before_step_end = before_step_end
        self._cursor = cursor
        self._save_failed = save_failed
        self._after_save = after_save
        self.callbacks = put_on_data_axis(self.callbacks, cursor)

    def add_callback(self, callback):
        super().add_callback(callback)
        self.callbacks = put_on_data_axis(self.callbacks, self._cursor)

    def call_event(self, event, args, state, control, **kwargs):
        if event == "on_step_end":
            self._before_step_end(state)
        if event == "on_save" and self._save_failed():
            return control  # callbacks look for the folder
        with self._show_arguments():
            control = super().call_event(event, args, state, control, **kwargs)
        if event == "on_save":
            self._after_save()
        return control


class DataFlowCallback(DefaultFlowCallback):
    """`DefaultFlowCallback` with intervals in reference windows; the stock one while `cursor()` is `None`."""

    def __init__(self, cursor: Callable[[], DataCursor | None]):
        self._cursor = cursor

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        cursor = self._cursor()
        if cursor is None:
            return super().on_step_end(args, state, control, **kwargs)
        position = cursor.reference_position
        if (state.global_step == 1 and args.logging_first_step) or (
            args.logging_strategy == IntervalStrategy.STEPS and cursor.crossed(state.logging_steps)
        ):
            control.should_log = True
        evaluates = args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= position
        # As in stock, training never ends without an evaluation and a save if these go by steps.
        if evaluates and (cursor.crossed(state.eval_steps) or cursor.exhausted):
            control.should_evaluate = True
        saves = args.save_strategy == SaveStrategy.STEPS
        if saves and (cursor.crossed(state.save_steps) or cursor.exhausted):
            control.should_save = True
        if cursor.exhausted:
            control.should_training_stop = True
        return control


class _DataProgress(TrainerCallback):
    """Lets a progress bar count micro-batches instead of optimizer steps, so that it ends at 100 % of the data."""

    def __init__(self, cursor: Callable[[], DataCursor | None]):
        super().__init__()
        self._cursor = cursor

    def _in_micro_batches(self, state: TrainerState) -> TrainerState:
        cursor = self._cursor()
        if cursor is None:
            return state
        shown = copy(state)
        shown.global_step, shown.max_steps = min(cursor.units, cursor.budget_units), cursor.budget_units
        return shown

    def on_train_begin(self, args, state, control, **kwargs):
        return super().on_train_begin(args, self._in_micro_batches(state), control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        return super().on_step_end(args, self._in_micro_batches(state), control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        return super().on_train_end(args, self._in_micro_batches(state), control, **kwargs)


class DataProgressCallback(_DataProgress, ProgressCallback):
    """Terminal progress bar in micro-batches."""


def _progress_replacement(callback: TrainerCallback) -> type[TrainerCallback] | None:
    if type(callback) is ProgressCallback:
        return DataProgressCallback
    # Known by name: importing its module needs IPython, which is there only where the callback is in use.
    if type(callback).__name__ == "NotebookProgressCallback" and type(callback).__module__.startswith("transformers."):
        return type("NotebookDataProgressCallback", (_DataProgress, type(callback)), {})
    return None


def put_on_data_axis(
    callbacks: list[TrainerCallback], cursor: Callable[[], DataCursor | None]
) -> list[TrainerCallback]:
    """Return `callbacks` with the stock flow and progress callbacks replaced by those on the data axis.

    Subclasses are left alone: they are somebody's own.
    """
    replaced = []
    for callback in callbacks:
        replacement = DataFlowCallback if type(callback) is DefaultFlowCallback else _progress_replacement(callback)
        replaced.append(callback if replacement is None else replacement(cursor))
    return replaced
