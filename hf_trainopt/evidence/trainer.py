"""Measurements in `Trainer`: adds the callbacks, and their values to each line before it is logged."""

from ..log_lines import give_back
from .base import MeasurementCallback, add_measurements


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
