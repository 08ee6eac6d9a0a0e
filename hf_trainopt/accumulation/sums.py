"""What ranks add up at the end of a window: one vector, in one all-reduce."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

import torch

from .noise_scale import WindowStatistics


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
        world_size: W, ranks that hold different data.
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
    num_micro_batches: float
    num_items: float


def local_sums(
    square_norms: list[float],
    num_items: list[int],
    weights: list[float],
    gradient_factor: float,
    copies: int = 1,
) -> LocalSums:
    """Return this rank's terms of A, Q, c_A, c_L and S (see `noise_scale`).

    Args:
        square_norms: Square norm of what each backward pass added to `.grad` on this rank.
        num_items: n_i, items of each micro-batch.
        weights: w_i, share of each micro-batch in the window's gradient over all ranks.
        gradient_factor: What `.grad` on this rank must be multiplied by to give its term of the averaged gradient:
            1/W under DDP (which averages), and 1/(loss scale) under a `GradScaler`.
        copies: Ranks that run the same micro-batches (tensor parallelism). Each has its pieces' part of the square
            norms, but all of them count the same items.
    """
    # A micro-batch without a single item (all labels ignored) has no gradient and no weight.
    terms = [t for t in zip(square_norms, num_items, weights, strict=True) if t[1] > 0 and t[2] > 0]
    return LocalSums(
        weighted_square_norm=sum(s * gradient_factor**2 / w for s, _, w in terms),
        squared_weight_square_norm=sum(s * gradient_factor**2 for s, _, _ in terms),
        individual_coefficient=sum(w / n for _, n, w in terms) / copies,
        mean_coefficient=sum(w * w / n for _, n, w in terms) / copies,
        squared_weight=sum(w * w for _, _, w in terms) / copies,
        num_micro_batches=len(terms) / copies,
        num_items=sum(n for _, n, _ in terms) / copies,
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
# order of its fields. The first two come from rank 0, the fourth too unless the model is sharded: the others add 0.
SUMMED = (
    "next_accumulation_steps",
    "growth",
    "num_samples",
    "gradient_square_norm",
    *(field.name for field in fields(LocalSums)),
)

# In place of the next k: rank 0 has no answer.
POLICY_FAILED = -1


@dataclass(frozen=True)
class Proposal:
    """What rank 0 proposes for the next window; other ranks propose zeros, and all get the sum.

    Attributes:
        next_k: k, or `POLICY_FAILED`.
        growth: g of `batch_scaling_factor`; 0 while it isn't known.
        failure: What went wrong.
    """

    next_k: int = 0
    growth: float = 0.0
    failure: Exception | None = None


def pack_sums(
    proposal: Proposal, num_samples: float, gradient_square_norm: float, sums: LocalSums | None
) -> torch.Tensor:
    """Pack what ranks add up, in the order of `SUMMED`; float64 on the CPU."""
    parts = astuple(sums) if sums is not None else (0.0,) * len(fields(LocalSums))
    proposed = (proposal.next_k, proposal.growth)
    return torch.tensor([*proposed, num_samples, gradient_square_norm, *parts], dtype=torch.float64)


def unpack_sums(vector: list[float]) -> tuple[Proposal, WindowStatistics]:
    """Unpack the sum over ranks: what rank 0 has proposed, and the statistics of the window."""
    named = dict(zip(SUMMED, vector, strict=True))
    proposal = Proposal(round(named.pop("next_accumulation_steps")), named.pop("growth"))
    for name in ("num_samples", "num_micro_batches"):
        named[name] = round(named[name])
    return proposal, WindowStatistics(**named)
