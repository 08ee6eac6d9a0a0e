"""One accumulation window as one Trainer step: its micro-batches, and what of them is predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.trainer_pt_utils import find_batch_size

from ..core.batch import count_rows


@dataclass(frozen=True)
class Slice:
    """What goes through the model at once: a whole micro-batch, or a slice of one.

    Memory may be too short for more, or the noise of the micro-batch is measured.

    Attributes:
        inputs: Collated samples.
        num_rows: Rows in the slice.
        num_rows_of_micro_batch: Rows in its micro-batch. For a whole micro-batch both may be 1.
        ends_micro_batch: Whether it is the last slice.
    """

    inputs: Any
    num_rows: int = 1
    num_rows_of_micro_batch: int = 1
    ends_micro_batch: bool = True

    @property
    def share(self) -> float:
        """Share of the rows of its micro-batch."""
        return self.num_rows / self.num_rows_of_micro_batch


def slices_of(pieces: Sequence[Any]) -> list[Slice]:
    """Return the pieces of a micro-batch, in order, as slices; the only one is taken for the whole."""
    rows = [count_rows(piece) for piece in pieces] if len(pieces) > 1 else [1]
    last = len(pieces) - 1
    return [
        Slice(piece, count, sum(rows), index == last)
        for index, (piece, count) in enumerate(zip(pieces, rows, strict=True))
    ]


_NO_MICRO_BATCH = (
    "this is a window of several micro-batches, of which EfficientTrainer makes one step; for a training_step or "
    "get_batch_samples of your own that takes micro-batches, put it into a Trainer class and the mixin before it: "
    "`class Efficient(EfficientTrainerMixin, YourTrainer)`."
)


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step on this rank.

    Stock `Trainer` sees it as one batch.

    Attributes:
        micro_batches: At least one, as the data loader has made them.
        planned: k that was decided for it; the last window of an epoch may have fewer micro-batches.
        measured: Whether gradient statistics are taken in it.
        slices: What is run, in order: the micro-batches, whole or in slices.
        num_samples: Samples in all of them, counted before a `training_step` may take the batches apart.
    """

    micro_batches: list[Any]
    planned: int
    measured: bool = False
    slices: list[Slice] = field(default_factory=list)
    num_samples: int = 0

    def __post_init__(self):
        if not self.num_samples:
            object.__setattr__(self, "num_samples", sum(map(count_samples, self.micro_batches)))
        if not self.slices:
            object.__setattr__(self, "slices", [Slice(micro_batch) for micro_batch in self.micro_batches])

    def __len__(self) -> int:
        return len(self.micro_batches)

    @property
    def is_halved(self) -> bool:
        """Whether its only micro-batch runs in slices, which tell its noise."""
        return len(self.micro_batches) == 1 and len(self.slices) > 1

    def __getitem__(self, name: Any) -> Any:
        """Refuse to be taken for a micro-batch, by an override of `training_step` or `get_batch_samples`.

        Raises:
            TypeError: Always; the message has the remedy.
        """
        raise TypeError(_NO_MICRO_BATCH)

    def __getattr__(self, name: str) -> Any:
        """Refuse what mappings and tensors have (`items`, `pop`, `to`), with the remedy; see `__getitem__`."""
        raise AttributeError(name if name.startswith("_") else f"'{name}': {_NO_MICRO_BATCH}")

    def keys(self) -> Any:
        """Refuse to be unpacked as the inputs of a model; see `__getitem__`."""
        return self[None]

    def __contains__(self, name: Any) -> Any:
        return self[name]

    def divisor(self, piece: Slice) -> int | float:
        """Return what the mean loss over a slice is divided by, so that the slices add up to the window's mean.

        The mean over a window is the mean over its micro-batches, whatever their sizes.
        """
        whole, rest = divmod(len(self) * piece.num_rows_of_micro_batch, piece.num_rows)
        return len(self) * piece.num_rows_of_micro_batch / piece.num_rows if rest else whole


def count_samples(micro_batch: Any) -> int:
    """Return the number of samples in a micro-batch (1 where no tensor tells)."""
    return find_batch_size(micro_batch) or 1


def count_target_tokens(micro_batch: Any, labels_are_shifted: bool) -> torch.Tensor | None:
    """Return the number of label positions that enter the loss, as `Trainer` counts them for `num_items_in_batch`.

    Args:
        micro_batch: Mapping with `labels` (or `shift_labels`), -100 where ignored.
        labels_are_shifted: Whether the loss predicts `labels[..., 1:]`.

    Returns:
        A number where the labels are (reading it would wait for a device); `None` if there are no labels.
    """
    if isinstance(micro_batch, Mapping) and "shift_labels" in micro_batch:
        labels = micro_batch["shift_labels"]
    else:
        labels = micro_batch.get("labels") if isinstance(micro_batch, Mapping) else None
        labels = labels[..., 1:] if labels_are_shifted and isinstance(labels, torch.Tensor) else labels
    return labels.ne(-100).sum() if isinstance(labels, torch.Tensor) else None


def lacks_targets(micro_batch: Any, labels_are_shifted: bool) -> torch.Tensor | None:
    """Return, where the labels are, whether a micro-batch has nothing to predict; `None` if it has no labels.

    Prompts that fill their row are such a case. The mean loss over no targets is 0/0, with gradients of zero.

    Args:
        micro_batch: As for `count_target_tokens`.
        labels_are_shifted: As for `count_target_tokens`.
    """
    count = count_target_tokens(micro_batch, labels_are_shifted)
    return None if count is None else count == 0


def without_empty_mean(loss: torch.Tensor, lacks: torch.Tensor | None) -> torch.Tensor:
    """Return a loss, or zero if it is not finite because there was nothing to predict; nothing waits for the device.

    Args:
        loss: Of one micro-batch.
        lacks: Of `lacks_targets`.
    """
    if lacks is None:
        return loss
    return torch.where(lacks.to(loss.device, non_blocking=True) & ~torch.isfinite(loss), 0.0, loss)


def window_loss(
    losses: Sequence[torch.Tensor], lacks: Sequence[torch.Tensor | None], is_filtered: bool
) -> torch.Tensor:
    """Return the loss of a window, to which micro-batches without targets add nothing.

    Args:
        losses: Of its micro-batches, which add up to that of the window.
        lacks: Of `lacks_targets`, for each.
        is_filtered: Whether `Trainer` logs the mean of the other steps for one that is not finite
            (`logging_nan_inf_filter`). It may do so where the whole window has no target; else that one's loss is 0.
    """
    pairs = list(zip(losses, lacks, strict=True))
    finite = [without_empty_mean(loss, lack) for loss, lack in pairs]
    total = sum(finite[1:], finite[0])
    if not is_filtered or any(lack is None for lack in lacks):
        return total
    raw = sum(losses[1:], losses[0])
    all_lack = torch.stack([lack.to(total.device, non_blocking=True) for lack in lacks]).all()
    return torch.where(all_lack, raw, total)
