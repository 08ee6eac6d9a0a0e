"""All parts, in the order in which they are called."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from ..accumulation.adam_clock import AdamClockPart
from ..accumulation.deepspeed import DeepSpeedPart
from ..accumulation.learning_rate import LearningRatePart
from ..accumulation.part import AccumulationPart
from ..accumulation.policy import AccumulationPolicy
from ..accumulation.tensor_parallel import TensorParallelPart
from ..core.old_state import forget_old_entries
from ..core.part import Part
from ..core.state import RunState, read_state, write_state
from ..metrics.part import MeasurementsPart
from ..out_of_memory.part import OutOfMemoryPart
from ..placement.part import PlacementPart
from ..precision.part import PrecisionPart
from ..reliability.checkpoints import CheckpointsPart
from ..reliability.interrupts import NUM_FLAGS, InterruptsPart
from ..reliability.random_data import RandomDataPart
from ..reliability.skipped_steps import SkippedStepsPart


class Parts:
    """The parts of a Trainer.

    Events go down the list `in_order`. Contexts (a run, an epoch) are entered from its end, so that what comes later
    is further out. The reasons for the order:

    1. `precision` changes what the optimizer step was taken in; nobody else may have looked at the next step yet.
    2. `measurements` stop their clocks before the parts below do their work at the end of a step.
    3. `placement` begins to count memory when all that measures has begun, and puts itself back before a forward pass.
    4. `random_data` watches the loader in the innermost context of an epoch: what follows may end the run.
    5. `skipped_steps` decides on an optimizer step before `interrupts` ends the run after it.
    6. `interrupts` has the last word on `control`: a run that must end doesn't evaluate first. `checkpoints` saves it.
    7. `out_of_memory` adds its advice to an error on its way out of an epoch, whoever raised it.
    8. `accumulation` shows the loop another `gradient_accumulation_steps` than everybody inside an epoch sees.
    9. `tensor_parallel` asks `accumulation` whether training goes through windows.
    10. `deepspeed` takes over the engine before `adam_clock` looks for it.
    11. `learning_rate` has no context; it reads what `accumulation` has decided. `adam_clock` reads both.

    Args:
        trainer: The Trainer, before its own `__init__`.
        policy: The user's accumulation policy, if any.
    """

    def __init__(self, trainer: Any, policy: AccumulationPolicy | None):
        self.trainer = trainer
        self.accumulation = AccumulationPart(trainer, self, policy)
        self.precision = PrecisionPart(trainer, self)
        self.measurements = MeasurementsPart(trainer, self)
        self.placement = PlacementPart(trainer, self)
        self.skipped_steps = SkippedStepsPart(trainer, self)
        self.interrupts = InterruptsPart(trainer, self)
        self.random_data = RandomDataPart(trainer, self)
        self.checkpoints = CheckpointsPart(trainer, self)
        self.out_of_memory = OutOfMemoryPart(trainer, self)
        self.tensor_parallel = TensorParallelPart(trainer, self)
        self.deepspeed = DeepSpeedPart(trainer, self)
        self.learning_rate = LearningRatePart(trainer, self)
        self.adam_clock = AdamClockPart(trainer, self)
        self.in_order: tuple[Part, ...] = (
            self.precision,
            self.measurements,
            self.placement,
            self.random_data,
            self.skipped_steps,
            self.interrupts,
            self.checkpoints,
            self.out_of_memory,
            self.accumulation,
            self.tensor_parallel,
            self.deepspeed,
            self.learning_rate,
            self.adam_clock,
        )
        self.resumed_from: str | None = None

    # ---- What all parts are told -----------------------------------------------------------------------------------

    def trainer_made(self) -> None:
        for part in self.in_order:
            part.trainer_made()

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part in reversed(self.in_order):
                stack.enter_context(part.run())
            yield

    def before_preparing(self, dataloader: Any) -> None:
        for part in reversed(self.in_order):
            part.before_preparing(dataloader)

    @contextlib.contextmanager
    def epoch(self, **loop: Any) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part in reversed(self.in_order):
                stack.enter_context(part.epoch(**loop))
            yield

    def restart_step(self) -> None:
        for part in self.in_order:
            part.restart_step()

    def listeners(self) -> list[TrainerCallback]:
        """Return what hears the events of a run after the user's callbacks."""
        return [listener for part in self.in_order for listener in part.listeners()]

    # ---- Ranks -----------------------------------------------------------------------------------------------------

    def flags(self) -> torch.Tensor:
        """Return what ranks add up at the end of a step beside the statistics: signals, losses that aren't finite."""
        return torch.tensor([*self.interrupts.flags(), *self.skipped_steps.flags()], dtype=torch.float64)

    def take_flags(self, sums: list[float]) -> None:
        """Take in the sums of `flags` over the ranks."""
        self.interrupts.take_flags(sums[:NUM_FLAGS])
        self.skipped_steps.take_flags(sums[NUM_FLAGS:])

    def agree_on_flags(self) -> None:
        """Add up `flags` in a reduction of their own, where anybody needs them; all ranks call it."""
        trainer = self.trainer
        if trainer.args.world_size == 1 or not (self.interrupts.is_on or self.skipped_steps.is_on):
            return
        local = self.flags().float().to(trainer.args.device)
        self.take_flags(trainer.accelerator.reduce(local, reduction="sum").tolist())

    # ---- Logs and checkpoints --------------------------------------------------------------------------------------

    def log_values(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return what all parts add to a line; the outer ones first, which the inner ones see."""
        added: dict[str, Any] = {}
        for part in reversed(self.in_order):
            added |= part.log_values({**line, **added})
        return added

    def is_logged_key(self, key: str) -> bool:
        """Return whether a key of a logged line is one that a part adds."""
        return self.measurements.is_logged_key(key) or any(key in part.logged_keys for part in self.in_order)

    def state(self) -> RunState:
        """Return what a checkpoint keeps."""
        states = {part.name: part.state_dict() for part in self.in_order}
        return RunState(
            setup=self.accumulation.setup,
            parts={name: state for name, state in states.items() if state is not None},
        )

    def write_state(self, folder: str) -> None:
        """Write `state` into a folder."""
        write_state(self.state(), folder)

    def saved_state(self, name: str) -> dict[str, Any] | None:
        """Return what the checkpoint that is resumed keeps of a part, `None` if nothing or nothing is resumed."""
        return self._saved_parts().get(name)

    def load_state(self) -> None:
        """Let all parts take up the checkpoint that is resumed; `trainer.state` is loaded."""
        saved = self._saved_parts()
        for part in self.in_order:
            part.load_state_dict(saved.get(part.name))
        forget_old_entries(self.trainer.state.stateful_callbacks)

    def _saved_parts(self) -> Mapping[str, dict[str, Any]]:
        state = None if self.resumed_from is None else read_state(self.resumed_from)
        return {} if state is None else state.parts
