"""The protocol of a part: what the Trainer tells each feature, and what it asks of it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

from transformers import TrainerCallback


class Part(TrainerCallback):
    """One feature of `EfficientTrainer`, behind the only class that touches `Trainer`.

    A part hears the events of a run as a callback does (`on_train_begin`, `on_step_end`, ...), though it isn't in
    `trainer.callback_handler.callbacks`. The methods below are the hooks that several parts share. A hook of `Trainer`
    that concerns one part only is a method of that part, called by name in `trainer.py`. Parts reach each other
    through `self.parts` and use public names only. `engine/parts.py` lists them in order.

    Args:
        trainer: The Trainer. When parts are made it has no attributes yet.
        parts: All parts (`engine.parts.Parts`).
    """

    name: ClassVar[str]  # key of the part's state in a checkpoint
    logged_keys: ClassVar[tuple[str, ...]] = ()  # what `log_values` may return

    def __init__(self, trainer: Any, parts: Any):
        self.trainer = trainer
        self.parts = parts

    # ---- Making the Trainer ----------------------------------------------------------------------------------------

    def trainer_made(self) -> None:
        """Do what needs a complete Trainer, at the end of its `__init__`."""

    # ---- A run -----------------------------------------------------------------------------------------------------

    @contextmanager
    def run(self) -> Iterator[None]:
        """Context that `train` runs in."""
        try:
            yield
        finally:
            self.end_run()

    def end_run(self) -> None:
        """Leave nothing of the run behind, whatever has ended it."""

    def before_preparing(self, dataloader: Any) -> None:
        """Read the arguments and refuse what can't work; the model isn't wrapped yet, and there is no optimizer."""

    def epoch(self, **loop: Any) -> AbstractContextManager[None]:
        """Return the context that an epoch runs in.

        Args:
            **loop: What upstream's loop hands to `_run_epoch`: `epoch`, `train_dataloader`, ...
        """
        return nullcontext()

    def restart_step(self) -> None:
        """Forget what was counted in the present step: it begins again with smaller micro-batches."""

    # ---- Logs and checkpoints --------------------------------------------------------------------------------------

    def listeners(self) -> list[TrainerCallback]:
        """Return what hears the events of the run, in order: by default the part itself."""
        return [self]

    def log_values(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return what to add to a line before it is logged; must not wait for other ranks."""
        return {}

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a checkpoint keeps, as JSON; `None` for nothing."""
        return None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take up the state of a checkpoint (`None`: the run starts anew, or the checkpoint has none).

        `trainer.state` is loaded by then; optimizer and schedule are not.
        """
