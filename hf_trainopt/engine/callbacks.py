"""Events: the user's callbacks hear them as in stock `Trainer`, on the data axis, and then the parts do.

Stock callbacks compare `state.global_step` (optimizer steps) with intervals and with `state.max_steps`. With varying k
an optimizer step is no fixed amount of data. Here the intervals are counted in reference windows (see `DataCursor`),
so that `eval_steps=100` evaluates as often as in stock `Trainer`, and training ends when the data budget is used up.
`state.global_step` stays the number of optimizer steps and `state.max_steps` is a running forecast of their total,
exact at the end.
"""

from copy import copy
from typing import Any

from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..accumulation.cursor import DataCursor
from .console import ConsolePrinter, RunClock
from .parts import Parts


class PartCallbackHandler(CallbackHandler):
    """Callback handler whose `callbacks` are the user's and stock's; the parts hear each event after them.

    Args:
        handler: Handler of the Trainer, which is taken over.
        parts: All parts.
    """

    def __init__(self, handler: CallbackHandler, parts: Parts):
        # Not `super().__init__()`: it would add the callbacks anew and warn about those that are there twice.
        self.__dict__.update(handler.__dict__)
        self._parts = parts
        self._clock = RunClock()

    def add_callback(self, callback):
        self._parts.measurements.make_way_for(callback)
        super().add_callback(callback)

    def pop_callback(self, callback):
        return super().pop_callback(callback) or self._parts.measurements.remove(callback)

    def remove_callback(self, callback):
        if self._parts.measurements.remove(callback) is None:
            super().remove_callback(callback)

    def call_event(self, event, args, state, control, **kwargs):
        parts = self._parts
        if event == "on_step_end":
            parts.accumulation.step_ended(state)
        if event == "on_save" and parts.checkpoints.failure is not None:
            return control  # callbacks look for the folder
        with parts.accumulation.reference_steps_shown():
            cursor = parts.accumulation.cursor
            prints_short = event == "on_log" and (cursor is not None or any(map(parts.is_logged_key, kwargs["logs"])))
            if event == "on_train_begin":
                self._clock.start(self._progress(state))
            if cursor is None and not prints_short:
                control = super().call_event(event, args, state, control, **kwargs)
            else:
                for callback in self.callbacks:
                    listener, shown = callback, state
                    if prints_short and type(callback) in (PrinterCallback, ProgressCallback):
                        seconds_left = self._clock.seconds_left(self._progress(state))
                        listener = ConsolePrinter(callback, seconds_left, parts.is_logged_key)
                    elif cursor is not None:
                        listener, shown = on_data_axis(callback, event, state, cursor)
                    control = self._only(listener).call_event(event, args, shown, control, **kwargs)
            control = self._only(*parts.listeners()).call_event(event, args, state, control, **kwargs)
        if event == "on_save":
            parts.checkpoints.callbacks_saved()
        return control

    def _progress(self, state: TrainerState) -> float:
        """Return the share of the run's data that was used."""
        cursor = self._parts.accumulation.cursor
        return state.global_step / max(1, state.max_steps) if cursor is None else cursor.progress

    def _only(self, *listeners: TrainerCallback) -> CallbackHandler:
        """Return a stock handler for some listeners, with what this one hands to each: model, optimizer, ..."""
        handler = object.__new__(CallbackHandler)
        vars(handler).update(vars(self), callbacks=listeners)
        return handler


class DataFlowCallback(DefaultFlowCallback):
    """`DefaultFlowCallback` with intervals in reference windows."""

    def __init__(self, cursor: DataCursor):
        self._cursor = cursor

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        cursor = self._cursor
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


# Progress bars count micro-batches instead of optimizer steps in these, so that they end at 100 % of the data.
_PROGRESS_EVENTS = ("on_train_begin", "on_step_end", "on_train_end")


def on_data_axis(
    callback: TrainerCallback, event: str, state: TrainerState, cursor: DataCursor
) -> tuple[TrainerCallback, TrainerState]:
    """Return what hears an event in place of a callback of the user's list, and the state that it is shown.

    Subclasses of the stock callbacks are left alone: they are somebody's own.
    """
    if type(callback) is DefaultFlowCallback:
        return DataFlowCallback(cursor), state
    if event in _PROGRESS_EVENTS and _is_stock_progress(callback):
        shown = copy(state)
        shown.global_step, shown.max_steps = (
            min(cursor.micro_batches_passed, cursor.budget_micro_batches),
            cursor.budget_micro_batches,
        )
        return callback, shown
    return callback, state


def _is_stock_progress(callback: Any) -> bool:
    # The notebook's is known by name: importing its module needs IPython, which is there only where it is in use.
    kind = type(callback)
    in_notebook = kind.__name__ == "NotebookProgressCallback" and kind.__module__.startswith("transformers.")
    return kind is ProgressCallback or in_notebook
