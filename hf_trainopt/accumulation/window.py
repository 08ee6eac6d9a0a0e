"""One accumulation window as one Trainer step: its micro-batches, and how each of them is weighted."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

import torch
from transformers.trainer_pt_utils import find_batch_size

from .noise_scale import WindowStatistics


@dataclass(frozen=True)
class Part:
    """What goes through the model at once: a micro-batch, or where memory is too short for it a piece of one.

    Attributes:
        inputs: Collated samples.
        rows: How many they are.
        of: How many its micro-batch has (equal to `rows` if it is whole; then both may be 1).
        ends_micro_batch: Whether it is the last piece.
    """

    inputs: Any
    rows: int = 1
    of: int = 1
    ends_micro_batch: bool = True

    @property
    def share(self) -> float:
        """Share of the samples of its micro-batch."""
        return self.rows / self.of


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
        parts: What is run, in order: the micro-batches as they are, or in pieces.
        num_samples: Samples in all of them, counted before a `training_step` may take the batches apart.
    """

    micro_batches: list[Any]
    planned: int
    measured: bool = False
    parts: list[Part] = field(default_factory=list)
    num_samples: int = 0

    def __post_init__(self):
        if not self.num_samples:
            object.__setattr__(self, "num_samples", sum(map(count_samples, self.micro_batches)))
        if not self.parts:
            object.__setattr__(self, "parts", [Part(micro_batch) for micro_batch in self.micro_batches])

    def __len__(self) -> int:
        return len(self.micro_batches)

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

    def divisor(self, part: Part) -> int | float:
        """Return what a mean loss over a part is divided by: the mean over the micro-batches is what counts."""
        whole, rest = divmod(len(self) * part.of, part.rows)
        return len(self) * part.of / part.rows if rest else whole


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


def micro_batch_weights(
    num_items: Sequence[int],
    world_size: int,
    by_items: bool,
    num_items_over_ranks: float | None = None,
    shares: Sequence[float] | None = None,
) -> list[float]:
    """Return w_i, the shares of this rank's micro-batches in the window's gradient over all ranks.

    Args:
        num_items: n_i of each of them.
        world_size: Number of ranks.
        by_items: Whether the loss of each micro-batch was divided by the items of the window; if not, it is a mean of
            its own, divided by their number.
        num_items_over_ranks: Items of the window on all ranks; `None` if each rank divides by its own.
        shares: Shares of each in the micro-batch that it is a piece of; `None` if all are whole.
    """
    if not by_items:
        shares = shares or [1.0] * len(num_items)
        whole = round(sum(shares))
        return [share / (whole * world_size) for share in shares]
    total = sum(num_items) * world_size if num_items_over_ranks is None else num_items_over_ranks
    return [n / total if total else 0.0 for n in num_items]


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


def with_counted_items(statistics: WindowStatistics, num_items_in_batch: float) -> WindowStatistics:
    """Return the statistics with weights n_i/Σ n_j, where the losses were divided by another number than Σ n_j.

    `num_items_in_batch` of one's own (all tokens, say, and not those with labels) scales all gradients of the window
    alike: with w_i = n_i/`num_items_in_batch` the weights do not add up to 1, as the estimators need.

    Args:
        statistics: Sums over all ranks.
        num_items_in_batch: What the losses were divided by.
    """
    if not statistics.num_items or not num_items_in_batch or statistics.num_items == num_items_in_batch:
        return statistics
    factor = num_items_in_batch / statistics.num_items  # of the weights
    return replace(
        statistics,
        weighted_square_norm=statistics.weighted_square_norm / factor,
        individual_coefficient=statistics.individual_coefficient * factor,
        mean_coefficient=statistics.mean_coefficient * factor**2,
        squared_weight=statistics.squared_weight * factor**2,
    )


# Layout of the vector that ranks add up at the end of a window, one all-reduce in all: these, then `LocalSums` in the
# order of its fields. The first comes from rank 0, the third too unless the model is sharded: the others add 0.
REDUCED = (
    "next_accumulation_steps",
    "num_samples",
    "gradient_square_norm",
    *(field.name for field in fields(LocalSums)),
)

# In place of the next k: rank 0 has no answer.
POLICY_FAILED = -1


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
