"""One optimizer step. `take_step` is the order of things; read it from top to bottom."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.distributed.fsdp import is_fsdp_managed_module

from ..accumulation.noise_scale import WindowStatistics
from ..accumulation.sums import POLICY_FAILED, SUMMED, LocalSums, Proposal, pack_sums, unpack_sums
from ..accumulation.window import Slice, Window, lacks_targets, window_loss
from ..core.facts import ranks_per_micro_batch
from ..core.versions import deferred_fsdp_reduction, is_sharded_at_load
from .parts import Parts


# Upstream's `training_step` of one micro-batch: inputs -> loss, with the gradients added to `.grad`.
StockStep = Callable[[Any], torch.Tensor]


def take_step(parts: Parts, stock_step: StockStep, model: torch.nn.Module, window: Window, num_items: Any):
    """Run a window up to its optimizer step, and decide on the next window.

    Args:
        parts: All parts.
        stock_step: Runs a micro-batch forward and backward.
        model: The model as the loop has it.
        window: As `AccumulationPart.next_window` has fetched it.
        num_items: `num_items_in_batch` of the window.

    Returns:
        The loss of the window, on this rank.
    """
    accumulation, timer = parts.accumulation, parts.accumulation.controller.timer
    window = accumulation.try_loss(model, window, num_items)

    def run(window: Window) -> torch.Tensor:
        return run_slices(parts, stock_step, model, window)

    window, loss = parts.out_of_memory.until_it_fits(window, num_items, run, forget=parts.restart_step)
    timer.micro_batch_done(last=True)
    parts.deepspeed.step(window)  # DeepSpeed knows the norm of a gradient only once it has stepped
    accumulation.advance(window, num_items)
    rate = parts.learning_rate.factor()
    proposal = accumulation.propose(rate)
    square_norm, sums, divided_by = accumulation.measurement.result(window, num_items)
    samples = window.num_samples / ranks_per_micro_batch(parts.trainer.args)
    agreed = agree(parts, proposal, samples, square_norm, sums, loss)
    if agreed.proposal.next_k == POLICY_FAILED:
        raise proposal.failure or RuntimeError("accumulation_policy has failed on rank 0, which says how.")
    accumulation.finish_window(window, agreed.loss, agreed.proposal.next_k, agreed.statistics, divided_by, rate)
    parts.learning_rate.move_on(rate, agreed.proposal.growth)
    timer.restart()
    return loss


def run_slices(parts: Parts, stock_step: StockStep, model: torch.nn.Module, window: Window) -> torch.Tensor:
    """Run what is in a window, one slice after the other; gradients are reduced over ranks in the last one only.

    Returns:
        The sum of the losses: the mean over the window, on this rank.
    """
    trainer, accumulation, memory = parts.trainer, parts.accumulation, parts.out_of_memory
    losses, lacks = [], []
    shown = accumulation.steps_shown(len(window.slices))
    with shown, accumulation.measurement.begin(window), parts.deepspeed.window():
        for index, piece in enumerate(window.slices):
            is_last = index == len(window.slices) - 1
            accumulation.measurement.begin_slice(window, piece)
            lacks.append(lacks_targets(piece.inputs, trainer._loss_shifts_labels))
            trainer.current_gradient_accumulation_steps = window.divisor(piece)
            trainer.accelerator.sync_gradients = is_last
            with backward_pass(parts, model, is_last):
                inputs = memory.inputs_of_try(piece)
                losses.append(parts.skipped_steps.run_slice(inputs, lacks[-1], stock_step))
            accumulation.measurement.end_slice(window)
            if not is_last:
                parts.tensor_parallel.end_micro_batch()
                end_slice(parts, piece)
    return window_loss(losses, lacks, trainer.args.logging_nan_inf_filter)


def backward_pass(parts: Parts, model: torch.nn.Module, is_last: bool) -> AbstractContextManager:
    """Return the context of a backward pass: with gradients reduced over ranks in the last one, in others without."""
    trainer = parts.trainer
    if trainer.is_deepspeed_enabled:
        return nullcontext()  # its engine is told which is the last one
    in_each = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    if (is_last or in_each) and parts.out_of_memory.ranks is None:
        return nullcontext()
    if is_sharded_at_load(trainer) and is_fsdp_managed_module(trainer.model):
        return deferred_fsdp_reduction(trainer)  # Accelerate did not wrap it, so that its `no_sync` does nothing
    return trainer.accelerator.no_sync(model)


def end_slice(parts: Parts, piece: Slice) -> None:
    """Tell the clock and the callbacks that a slice other than the last is over."""
    trainer = parts.trainer
    if piece.ends_micro_batch:
        parts.accumulation.controller.timer.micro_batch_done(last=False)
    trainer.control = trainer.callback_handler.on_substep_end(trainer.args, trainer.state, trainer.control)


@dataclass(frozen=True)
class Agreed:
    """What all ranks know at the end of a window.

    Attributes:
        proposal: Of rank 0.
        statistics: Sums over ranks.
        loss: Mean over ranks.
    """

    proposal: Proposal
    statistics: WindowStatistics
    loss: torch.Tensor


def agree(
    parts: Parts,
    proposal: Proposal,
    num_samples: float,
    square_norm: float,
    sums: LocalSums | None,
    loss: torch.Tensor,
) -> Agreed:
    """Add up over the ranks, in the one reduction of a step, what each of them has to tell; all of them call it."""
    trainer, world_size = parts.trainer, parts.trainer.args.world_size
    vector = pack_sums(proposal, num_samples, square_norm, sums)
    if world_size > 1:
        share = loss.detach().double().cpu().reshape(1) / world_size
        vector = torch.cat([vector, parts.flags(), share])
        vector = trainer.accelerator.reduce(vector.to(trainer.args.device), reduction="sum").cpu()
        parts.take_flags(vector[len(SUMMED) : -1].tolist())
        loss = vector[-1]
    return Agreed(*unpack_sums(vector[: len(SUMMED)].tolist()), loss)
