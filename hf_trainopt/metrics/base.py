"""What the measuring callbacks share: their values on log lines, their state in checkpoints, their clock."""

import json
import logging
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .meter import TrainingMeter


logger = logging.getLogger(__name__)


class MeasurementCallback(TrainerCallback, ExportableState):
    """Callback that adds values to log lines, under stock `Trainer` as under ours.

    A callback hears of a line when it is written. Under stock `Trainer` values are therefore added to the line in
    `state.log_history` and to the dictionary that the callbacks behind this one get; trackers (`report_to`) are before
    it and miss them. `EfficientTrainer` asks for the values first, so that there they are everywhere.

    What must survive a resume is restored from the checkpoint whether or not
    `restore_callback_states_from_checkpoint` is set.

    Attributes:
        position: 0 for the first callback of its class in a run, 1 for the second, ...
        kept: States of the checkpoint that is resumed, by `entry_key`, where `EfficientTrainer` keeps them; `None`
            where they are in `state.stateful_callbacks`, as those of any callback of the user's.
        kept_by_others: What `EfficientTrainer` has kept for its own callbacks, for those of the user's.
    """

    def __init__(self):
        self.position = 0
        self.kept: dict[str, dict[str, Any]] | None = None
        self.kept_by_others: dict[str, dict[str, Any]] = {}
        self._added_to_line = 0
        self._added: set[str] = set()

    # ---- For subclasses --------------------------------------------------------------------------------------------

    def values(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> dict[str, Any]:
        """Return what is added to the line `logs`; must not wait for other ranks (users log on one of them)."""
        raise NotImplementedError

    def begin(self, args: TrainingArguments, state: TrainerState, saved: dict[str, Any] | None, **kwargs) -> None:
        """Start a run; `saved` are the attributes kept in the checkpoint that it resumes from, if any."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """Return what `__init__` takes to make this callback."""
        return {}

    def attributes(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON."""
        return {}

    def step_repeated(self) -> None:
        """Forget what was counted in the present step: `EfficientTrainer` begins it anew (out of memory)."""

    def close(self) -> None:
        """Leave nothing behind on the model or the process; called after a run, also one that an exception ends.

        Nobody tells a callback of stock `Trainer` of an exception: there the next `train` does it, or you.
        """

    # ---- Trainer's hooks -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"args": self.arguments(), "attributes": {"saved": self.attributes()}}

    @property
    def saved(self) -> dict[str, Any]:
        return self.attributes()

    @saved.setter
    def saved(self, value: dict[str, Any]) -> None:
        """Set by `Trainer` if it restores callbacks; `on_train_begin` does it in any case."""

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        self.close()
        self._added_to_line = 0
        name = type(self).__name__
        elsewhere = self.kept_by_others if self.kept is None else self.kept
        here = self._saved_here(state) if self.kept is None else None
        saved = here or elsewhere.get(entry_key(name, self.arguments()))
        saved = saved if state.global_step else None
        # A place that lasts as long as the run, and that the callbacks of a plain `Trainer` share.
        begun = vars(state).setdefault("_callbacks_begun", {})
        self.position = begun[name] = begun.get(name, -1) + 1
        self.begin(args, state, saved, **kwargs)

    def _saved_here(self, state: TrainerState) -> dict[str, Any] | None:
        """Return what `state.stateful_callbacks` has of this callback, which gets an entry there if it has none."""
        name, arguments = type(self).__name__, self.arguments()
        entries = _entries(state, name)
        mine = [entry for entry in entries if entry.get("args", {}) == arguments]
        if mine:
            return _saved(mine[-1])
        # A checkpoint written without this callback, or by others of its class, lacks its entry, and the next save
        # would fail or keep one of them only.
        entries = [*entries, self.state()]
        state.stateful_callbacks[name] = entries if len(entries) > 1 else entries[0]
        return None

    def take_old_entries(self, state: TrainerState) -> None:
        """Move what `state.stateful_callbacks` has of this class to `kept`."""
        for entry in _entries(state, type(self).__name__):
            key = entry_key(type(self).__name__, entry.get("args", {}))
            self.kept.setdefault(key, _saved(entry))
        state.stateful_callbacks.pop(type(self).__name__, None)

    def on_train_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        self.close()

    def on_save(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        entries = _entries(state, type(self).__name__)
        if len(entries) > 1:
            # `Trainer` appends to what it has saved before: keep the last entry of each callback.
            last = {json.dumps(entry.get("args", {}), sort_keys=True): entry for entry in entries}
            state.stateful_callbacks[type(self).__name__] = list(last.values())

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if logs is None or self._added_to_line == len(state.log_history):
            return
        added = {key: value for key, value in self.values(args, state, logs).items() if key not in logs}
        logs.update(added)
        self._added = set(added)
        if state.log_history:
            state.log_history[-1].update(added)

    def on_evaluate(self, args, state: TrainerState, control: TrainerControl, metrics=None, **kwargs):
        # The dictionary of the line is what `evaluate` returns: a hyperparameter search adds up all that is in it.
        for key in self._added if metrics is not None else ():
            metrics.pop(key, None)
        self._added = set()


class MeteredCallback(MeasurementCallback):
    """`MeasurementCallback` with a clock of its own that leaves out evaluations, predictions and saves.

    Attributes:
        meter: The clock.
        is_partial: Whether it knows nothing of what was before the resume.
    """

    def __init__(self):
        super().__init__()
        self.meter = TrainingMeter()
        self.is_partial = False

    def attributes(self):
        return {"meter": self.meter.state()}

    def begin(self, args, state, saved, model=None, **kwargs):
        kept = (saved or {}).get("meter")
        if kept is None and state.global_step:
            # Any clock will do: of another target, say.
            others = (_saved(entry) for name in state.stateful_callbacks for entry in _entries(state, name))
            every = [*(self.kept or self.kept_by_others).values(), *others]
            kept = next((found["meter"] for found in every if found.get("meter", {}).get("seconds")), None)
        self.is_partial = bool(state.global_step) and kept is None
        if self.is_partial:
            logger.warning(
                "The checkpoint was written without %s: seconds of training count from step %d on, and no time or "
                "samples to a target are told.",
                type(self).__name__,
                state.global_step,
            )
        self.meter.begin(args, model, kept)

    def close(self) -> None:
        self.meter.end()

    def step_repeated(self) -> None:
        self.meter.rewind()

    def on_step_begin(self, args, state, control, **kwargs):
        self.meter.step_begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.meter.lap(args, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.meter.lap(args, control)

    def on_save(self, args, state, control, **kwargs):
        super().on_save(args, state, control, **kwargs)
        self.meter.skip()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
        self.meter.skip()

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self.meter.skip()


def entry_of(callback: MeasurementCallback) -> dict[str, Any]:
    """Return the entry of a callback in a checkpoint."""
    name, arguments = type(callback).__name__, callback.arguments()
    return {"name": name, "arguments": arguments, "attributes": callback.attributes()}


def kept_states(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the attributes in the entries of a checkpoint, by `entry_key`."""
    return {entry_key(entry["name"], entry["arguments"]): entry["attributes"] for entry in entries}


def entry_key(name: str, arguments: dict[str, Any]) -> str:
    """Return what tells a callback, by class and arguments, from others in a checkpoint."""
    return f"{name} {json.dumps(arguments, sort_keys=True)}"


def _entries(state: TrainerState, name: str) -> list[dict[str, Any]]:
    stored = state.stateful_callbacks.get(name)
    return stored if isinstance(stored, list) else [stored] if stored else []


def _saved(entry: dict[str, Any]) -> dict[str, Any]:
    return entry.get("attributes", {}).get("saved") or {}


def add_measurements(
    callbacks: Iterable[MeasurementCallback], args: TrainingArguments, state: TrainerState, logs: dict[str, Any]
) -> set[str]:
    """Add the values of `callbacks` to the line `logs` before it is written, and return their keys."""
    before = set(logs)
    for callback in callbacks:
        added = callback.values(args, state, logs)
        logs.update({key: value for key, value in added.items() if key not in logs})
        callback._added_to_line = len(state.log_history) + 1
    return set(logs) - before
