"""Measurements as a part: our callbacks, kept apart from the user's, and their values on each line."""

import logging
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..core.part import Part
from .base import MeasurementCallback, add_measurements, entry_of, kept_states
from .gradients import GradientStatisticsCallback
from .keys import is_evidence_key


logger = logging.getLogger(__name__)


class MeasurementsPart(Part):
    """What a run measures of itself.

    Attributes:
        own: Measuring callbacks that the arguments ask for. They aren't among the user's, so that the list of
            callbacks and `trainer_state.json` are those of stock `Trainer`.
    """

    name = "measurements"

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self.own: list[MeasurementCallback] = []

    def trainer_made(self) -> None:
        present = self.all
        for callback in self.trainer.args.make_measurements():
            if not any(isinstance(other, type(callback)) for other in present):  # the user's own wins
                callback.kept = {}
                self.own.append(callback)

    @property
    def all(self) -> list[MeasurementCallback]:
        """Measuring callbacks, the user's first."""
        present = self.trainer.callback_handler.callbacks
        return [callback for callback in present if isinstance(callback, MeasurementCallback)] + self.own

    def remove(self, callback: type[TrainerCallback] | TrainerCallback) -> MeasurementCallback | None:
        """Take one of our own callbacks away, by class (or a base) or itself, as `Trainer.remove_callback` does.

        Returns:
            The callback, or `None` if it isn't there.
        """
        for own in self.own:
            if own is callback or (isinstance(callback, type) and isinstance(own, callback)):
                self.own.remove(own)
                own.close()
                return own
        return None

    def make_way_for(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Take our own callbacks away that one of the user's, just added, stands in for: of its class or a base."""
        added = callback if isinstance(callback, type) else type(callback)
        for own in [own for own in self.own if issubclass(added, type(own))]:
            self.remove(own)

    # ---- A run -----------------------------------------------------------------------------------------------------

    def listeners(self) -> list[TrainerCallback]:
        return list(self.own)

    def end_run(self) -> None:
        for callback in self.all:
            callback.close()

    def before_preparing(self, dataloader: Any) -> None:
        accumulation = self.parts.accumulation
        for callback in self.all:
            if isinstance(callback, GradientStatisticsCallback):
                callback.is_redundant, callback.k_varies = accumulation.measures, accumulation.varies
                callback.windows_repeat = self.parts.out_of_memory.is_on

    def restart_step(self) -> None:
        for callback in self.all:
            callback.step_repeated()

    def run_is_over(self) -> None:
        """Save the log of a run that saves nothing else: `hf-trainopt report` has nothing to read otherwise."""
        args = self.trainer.args
        if args.save_strategy == SaveStrategy.NO and self.own:
            try:
                self.trainer.save_state()
            except (OSError, TypeError, ValueError, OverflowError) as error:  # or a value that isn't JSON
                logger.warning("The log of the run could not be saved for `hf-trainopt report`: %s.", error)

    # ---- Logs and checkpoints --------------------------------------------------------------------------------------

    def log_values(self, line: dict[str, Any]) -> dict[str, Any]:
        values = dict(line)
        added = add_measurements(self.all, self.trainer.args, self.trainer.state, values)
        return {key: value for key, value in values.items() if key in added}

    def is_logged_key(self, key: str) -> bool:
        """Return whether a key of a line is one of a measuring callback."""
        return is_evidence_key(key)

    def state_dict(self) -> dict[str, Any] | None:
        return {"callbacks": [entry_of(callback) for callback in self.own]} if self.own else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        kept = kept_states((state or {}).get("callbacks", []))
        for callback in self.own:
            callback.kept = kept
            # Checkpoints of before had it among the states of the user's callbacks.
            name = type(callback).__name__
            if not any(type(other).__name__ == name for other in self.trainer.callback_handler.callbacks):
                callback.take_old_entries(self.trainer.state)
        for callback in self.all:
            callback.kept_by_others = kept  # a clock of ours serves a callback of the user's
