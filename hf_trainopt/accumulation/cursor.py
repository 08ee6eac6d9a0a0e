"""Where a run stands in its data, in micro-batches and in reference windows.

A *window* is the micro-batches between two optimizer steps. A *reference window* has `gradient_accumulation_steps`
micro-batches (k_ref): it is the unit in which the budget (`max_steps`), the learning-rate schedule (`warmup_steps`)
and the intervals (`logging_steps`, `eval_steps`, `save_steps`) are counted, whatever k is. At k = k_ref throughout,
one window is one reference window and every count equals that of stock `Trainer`, the short last window of an epoch
included (it counts as a whole one, as it does there).
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass
class DataCursor:
    """Position in the training data. All counts are per rank except `samples_seen`.

    Attributes:
        reference_steps: k_ref, micro-batches in a reference window.
        budget: Reference windows in the whole run (stock `max_steps`).
        micro_batches_per_epoch: Length of the dataloader, or `None` if it has none.
        epoch_length: Denominator of the reported `state.epoch` in micro-batches (equals `micro_batches_per_epoch`
            where that is known).
        epoch: Epoch of the next micro-batch.
        micro_batch: Micro-batches of that epoch that were consumed.
        finished_windows: Reference windows of all finished epochs, short last windows counted as whole.
        samples_seen: Samples consumed over all ranks.
        reported_epoch: `state.epoch` after the last window.
        reported_micro_batches: `micro_batches_passed` when the last window was over.
        previous_micro_batches: `micro_batches_passed` when the one before it was over.
    """

    reference_steps: int
    budget: int
    micro_batches_per_epoch: int | None
    epoch_length: int
    epoch: int = 0
    micro_batch: int = 0
    finished_windows: int = 0
    samples_seen: int = 0
    reported_epoch: float = 0.0
    reported_micro_batches: int = 0
    previous_micro_batches: int = 0

    @property
    def micro_batches_passed(self) -> int:
        """Position in micro-batches, a short reference window at the end of an epoch counted as whole."""
        return self.finished_windows * self.reference_steps + self.micro_batch

    @property
    def reference_position(self) -> int | float:
        """Position in reference windows: the step index at which the learning-rate schedule is evaluated.

        An `int` wherever it is a whole number, so that a schedule evaluated there is bit-identical to stock.
        """
        whole, rest = divmod(self.micro_batches_passed, self.reference_steps)
        return whole + rest / self.reference_steps if rest else whole

    @property
    def budget_micro_batches(self) -> int:
        return self.budget * self.reference_steps

    @property
    def exhausted(self) -> bool:
        return self.micro_batches_passed >= self.budget_micro_batches

    @property
    def progress(self) -> float:
        """Share of the data budget that was consumed, in [0, 1]."""
        return min(1.0, self.micro_batches_passed / self.budget_micro_batches)

    def available(self) -> int:
        """Micro-batches that the next window may take: what is left of the epoch and of the budget."""
        left = self.budget_micro_batches - self.micro_batches_passed
        if self.micro_batches_per_epoch is not None:
            left = min(left, self.micro_batches_per_epoch - self.micro_batch)
        return max(0, left)

    def crossed(self, interval: int | float) -> bool:
        """Whether the last window reached or passed a multiple of `interval` reference windows."""
        size = interval * self.reference_steps
        return size > 0 and self.reported_micro_batches // size > self.previous_micro_batches // size

    def advance(self, num_micro_batches: int, end_of_epoch: bool = False) -> None:
        """Count a window of `num_micro_batches`.

        `end_of_epoch` says that the iterator ran dry in it; where the length is known that is found out here.
        """
        self.previous_micro_batches = self.reported_micro_batches
        self.micro_batch += num_micro_batches
        self.reported_epoch = self.epoch + self.micro_batch / self.epoch_length
        if end_of_epoch or self.micro_batch == self.micro_batches_per_epoch:
            self.close_epoch()
        self.reported_micro_batches = self.micro_batches_passed

    def close_epoch(self) -> None:
        """Move to the start of the next epoch; a part of a reference window counts as a whole one."""
        self.restart_epoch()
        self.epoch += 1

    def restart_epoch(self) -> None:
        """Move to the start of the same epoch; what was consumed stays consumed."""
        self.finished_windows += -(-self.micro_batch // self.reference_steps)
        self.micro_batch = 0

    def remaining_windows(self, accumulation_steps: int) -> int:
        """Windows until the budget is used up if k stays `accumulation_steps` (at least 1 unless exhausted)."""
        return -(-max(0, self.budget_micro_batches - self.micro_batches_passed) // accumulation_steps)

    # The position alone: budget and length of the data belong to the run that resumes.
    _SAVED: ClassVar[tuple[str, ...]] = (
        "epoch",
        "micro_batch",
        "finished_windows",
        "samples_seen",
        "reported_epoch",
        "reported_micro_batches",
        "previous_micro_batches",
    )

    def state_dict(self) -> dict[str, int | float]:
        return {name: getattr(self, name) for name in self._SAVED}

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        for name in self._SAVED:
            setattr(self, name, state[name])
