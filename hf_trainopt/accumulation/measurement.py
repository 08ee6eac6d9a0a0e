"""Gradient statistics of one window, on this rank: norms and weights of its micro-batches."""

import contextlib
from typing import Any

import torch

from ..core.facts import data_parallel_size, inverse_loss_scale, loss_divides_itself, ranks_per_micro_batch
from .deepspeed import DeepSpeedPart
from .gradient_norms import MicroBatchNorms
from .sums import LocalSums, local_sums, micro_batch_weights
from .tensor_parallel import TensorParallelGroup
from .window import Slice, Window, count_samples, count_target_tokens


class WindowMeasurement:
    """Measures windows that are to be measured, and lets the others pass.

    Args:
        trainer: The Trainer.
        enabled: Whether any window is.
        deepspeed: Knows the gradient of a window where DeepSpeed's engine has taken the step already.
        group: Of tensor parallelism, if any.

    Attributes:
        norms: Hooks that take the norms of micro-batch gradients; `None` if nothing is measured.
    """

    def __init__(
        self, trainer: Any, enabled: bool, deepspeed: DeepSpeedPart, group: TensorParallelGroup | None = None
    ):
        self._trainer = trainer
        self._deepspeed = deepspeed
        self.norms = MicroBatchNorms(trainer.model, trainer.args.device, group) if enabled else None
        self._items: list[tuple[int, Any]] = []  # samples and target tokens of each slice

    def begin(self, window: Window) -> contextlib.AbstractContextManager:
        """Return the context in which the slices of a window run."""
        self._items = []
        return self.norms if window.measured else contextlib.nullcontext()

    def begin_slice(self, window: Window, piece: Slice) -> None:
        """Count what a slice has; before `training_step`, which may take the batch apart."""
        if window.measured:
            tokens = count_target_tokens(piece.inputs, self._trainer._loss_shifts_labels)
            self._items.append((count_samples(piece.inputs), tokens))

    def end_slice(self, window: Window) -> None:
        """Take in the gradient of a slice."""
        if window.measured:
            self.norms.end_micro_batch()

    def result(self, window: Window, num_items_in_batch: Any) -> tuple[float, LocalSums | None, float | None]:
        """Return this rank's share of |g|², its other sums, and what all ranks have divided their losses by, if known.

        Gradients are still multiplied by the loss scale here; the results aren't.

        Args:
            window: The window, after its last slice.
            num_items_in_batch: Of the window.
        """
        if not window.measured:
            return 0.0, None, None
        trainer, args = self._trainer, self._trainer.args
        by_engine = self._deepspeed.engine is not None
        unscale = 1.0 / self._deepspeed.loss_scale if by_engine else inverse_loss_scale(trainer.accelerator)
        samples, tokens = zip(*self._items, strict=True)
        divides_itself = loss_divides_itself(trainer, num_items_in_batch)
        # Without labels the items are some of the user's: micro-batches are taken to weigh the same.
        by_tokens = divides_itself and num_items_in_batch is not None and None not in tokens
        total = None
        if by_tokens and args.average_tokens_across_devices:
            # One number a device under DataParallel, all the same.
            total = float(torch.as_tensor(num_items_in_batch).flatten()[0])
        items = [int(count) for count in (tokens if by_tokens else samples)]
        shares = [piece.share for piece in window.slices]
        data_parallel = data_parallel_size(args)
        weights = micro_batch_weights(items, data_parallel, by_tokens, total, shares)
        if by_engine:
            square_norm = self._deepspeed.square_norm if args.process_index == 0 else 0.0
        else:
            square_norm = self.norms.square_norm_share(args.process_index, args.world_size) * unscale**2
        sums = local_sums(self.norms.finish(), items, weights, unscale / data_parallel, ranks_per_micro_batch(args))
        return square_norm, sums, total
