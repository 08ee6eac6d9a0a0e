"""One accumulation window as one Trainer step: its micro-batches, and how each of them is weighted."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from transformers.trainer_pt_utils import find_batch_size

from .noise_scale import WindowStatistics


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step on this rank.

    Stock `Trainer` sees it as one batch.

    Attributes:
        micro_batches: At least one.
        planned: k that was decided for it; the last window of an epoch may have fewer micro-batches.
        measured: Whether gradient statistics are taken in it.
    """

    micro_batches: list[Any]
    planned: int
    measured: bool = False

    def __len__(self) -> int:
        return len(self.micro_batches)


def count_samples(micro_batch: Any) -> int:
    """Return the number of samples in a micro-batch (1 where no tensor tells)."""
    return find_batch_size(micro_batch) or 1


def count_target_tokens(micro_batch: Any, labels_are_shifted: bool) -> int:
    """Return the number of label positions that enter the loss, as `Trainer` counts them for `num_items_in_batch`.

    Args:
        micro_batch: Mapping with `labels` (or `shift_labels`), -100 where ignored.
        labels_are_shifted: Whether the loss predicts `labels[..., 1:]`.
    """
    if isinstance(micro_batch, Mapping) and "shift_labels" in micro_batch:
        labels = micro_batch["shift_labels"]
    else:
        labels = micro_batch["labels"]
        labels = labels[..., 1:] if labels_are_shifted else labels
    return int(labels.ne(-100).sum())


@dataclass(frozen=True)
class LocalSums:
    """This rank's share of a window's statistics: what is added up over ranks."""

    weighted_square_norm: float
    squared_weight_square_norm: float
    individual_coefficient: float
    mean_coefficient: float
    squared_weight: float
    num_micro_batches: int
    num_items: float


def local_sums(
    square_norms: list[float],
    num_items: list[int],
    weights: list[float],
    gradient_factor: float,
) -> LocalSums:
    """Return this rank's terms of A, Q, c_A, c_L and S (see `noise_scale`).

    Args:
        square_norms: Square norm of what each backward pass added to `.grad` on this rank.
        num_items: n_i, items of each micro-batch.
        weights: w_i, share of each micro-batch in the window's gradient over all ranks.
        gradient_factor: What `.grad` on this rank must be multiplied by to give its term of the averaged gradient:
            1/W under DDP (which averages), and 1/(loss scale) under a `GradScaler`.
    """
    # A micro-batch without a single item (all labels ignored) has no gradient and no weight.
    terms = [t for t in zip(square_norms, num_items, weights, strict=True) if t[1] > 0 and t[2] > 0]
    return LocalSums(
        weighted_square_norm=sum(s * gradient_factor**2 / w for s, _, w in terms),
        squared_weight_square_norm=sum(s * gradient_factor**2 for s, _, _ in terms),
        individual_coefficient=sum(w / n for _, n, w in terms),
        mean_coefficient=sum(w * w / n for _, n, w in terms),
        squared_weight=sum(w * w for _, _, w in terms),
        num_micro_batches=len(terms),
        num_items=float(sum(n for _, n, _ in terms)),
    )


# Layout of the vector that ranks add up at the end of a window, one all-reduce in all: these, then `LocalSums` in the
# order of its fields. The first and the third come from rank 0, the others add 0: all ranks go on with the same bits.
REDUCED = (
    "next_accumulation_steps",
    "num_samples",
    "gradient_square_norm",
    *(field.name for field in fields(LocalSums)),
)


def to_vector(
    next_accumulation_steps: int, num_samples: int, gradient_square_norm: float, sums: LocalSums | None
) -> torch.Tensor:
    """Pack what ranks add up, in the order of `REDUCED`; float64 on the CPU."""
    parts = astuple(sums) if sums is not None else (0.0,) * len(fields(LocalSums))
    return torch.tensor([next_accumulation_steps, num_samples, gradient_square_norm, *parts], dtype=torch.float64)


def from_vector(vector: list[float]) -> tuple[int, WindowStatistics]:
    """Unpack the sum over ranks: next k, and the statistics of the window."""
    named = dict(zip(REDUCED, vector, strict=True))
    next_steps = round(named.pop("next_accumulation_steps"))
    for name in ("num_samples", "num_micro_batches"):
        named[name] = round(named[name])
    return next_steps, WindowStatistics(**named)
