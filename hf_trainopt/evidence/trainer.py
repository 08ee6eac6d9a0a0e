"""Measurements in `Trainer`: adds the callbacks, and their values to each line before it is logged."""

import logging
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import SaveStrategy

from ..log_lines import give_back
from .base import MeasurementCallback, add_measurements


if TYPE_CHECKING:
    from ..report import Report


logger = logging.getLogger(__name__)


class EvidenceTrainerMixin:
    """What a run measures of itself, for any `Trainer` class; a base of `EfficientTrainerMixin`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        present = self._measurements
        for callback in getattr(self.args, "make_measurements", list)():
            if not any(isinstance(own, type(callback)) for own in present):  # the user's own wins
                self.add_callback(callback)

    @property
    def _measurements(self) -> list[MeasurementCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, MeasurementCallback)]

    def _finalize_training(self, *args, **kwargs):
        output = super()._finalize_training(*args, **kwargs)
        # Else nothing of the log is in the folder, and `hf-trainopt report` has nothing to read.
        if self.args.save_strategy == SaveStrategy.NO and getattr(self.args, "measured", None):
            try:
                self.save_state()
            except (OSError, TypeError, ValueError, OverflowError) as error:  # or a value that is no JSON
                logger.warning("The log of the run could not be saved for `hf-trainopt report`: %s.", error)
        return output

    def train(self, *args, **kwargs):
        """As in `Trainer`; nothing of the measurements is left behind, whatever ends it."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self._measurements:
                callback.close()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`; the values of measuring callbacks are on the line for trackers too."""
        line = dict(logs)
        added = add_measurements(self._measurements, self.args, self.state, line)
        super().log(line, *args, **kwargs)
        give_back(logs, line, added)

    def report(self, *others: Any, **options: Any) -> "Report":
        """Return what this run has done so far; a notebook shows it.

        Args:
            *others: Output folders of other runs to see beside it.
            **options: As for `hf_trainopt.report.make_report`: `baseline` (unless given: this run), `target_metric`
                and `target_value`, `greater_is_better`, `title`.

        Raises:
            ValueError: Nothing has been logged yet, or another folder has no run in it.
        """
        from ..report import make_report
        from ..report.running import run_in_memory

        if not self.state.log_history:
            raise ValueError("there is nothing to report yet: no line has been logged; call it after train().")
        return make_report(run_in_memory(self), *others, **options)
