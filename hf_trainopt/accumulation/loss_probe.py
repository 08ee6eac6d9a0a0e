"""What a loss does, tried on a batch: whether `num_items_in_batch` divides it, and whether rows add up to it."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import Trainer

from ..core.batch import copy_batch, count_rows, split_batch
from ..core.facts import is_sharded, loss_divides_itself
from ..core.shadow import shadow_of
from ..core.versions import loss_is_scaled_for_ga
from ..machine.random_state import devices_of, forked_random_state
from .loss_scaling import base_model, calls_super, own_compute_loss


logger = logging.getLogger(__name__)

_OURS = ("transformers", "hf_trainopt")
# Relative difference below which two losses count as the same.
UNCHANGED = 1e-3
# The same for a batch and its rows one by one, which other kernels may compute, in bf16 for example.
_ADDS_UP = 1e-2


def is_in_doubt(trainer: Trainer) -> bool:
    """Return whether a loss is expected to be divided by `num_items_in_batch`, and comes from code of the user's.

    A class or a loss function that is not of transformers, or a function given as `compute_loss_func`.

    Args:
        trainer: Before its first window. One whose `compute_loss` is wholly the user's is not in doubt: it may do
            anything with the batch, and what it is to do with the items stands in the documentation of `Trainer`.
    """
    own = own_compute_loss(trainer)
    if loss_is_scaled_for_ga(trainer) is not None or (own is not None and not calls_super(own)):
        return False
    if trainer.compute_loss_func is not None:
        return True
    if not trainer.model_accepts_loss_kwargs or hasattr(trainer.model, "accepts_loss_kwargs"):
        return False
    if trainer.label_smoother is not None:
        return False
    inner = base_model(trainer.model)
    return not (_is_ours(type(inner)) and _is_ours(getattr(inner, "_loss_function", Trainer)))


def _is_ours(value: Any) -> bool:
    named = value if hasattr(value, "__module__") else type(value)
    return named.__module__.partition(".")[0] in _OURS


def divides_by_items(trainer: Trainer, model: torch.nn.Module, batch: Any, num_items: Any) -> bool | None:
    """Return whether the loss of a batch is another if the step is said to have twice the items.

    Two forward passes without gradients, of two rows if these can tell: the logits of a whole batch may not fit.
    Random generators and buffers are put back, and what `compute_loss` keeps or logs goes to a copy of the trainer.

    Args:
        trainer: The trainer; not changed.
        model: The model as the loop has it. Ranks of a sharded one call it together; else each rank is on its own.
        batch: A micro-batch.
        num_items: `num_items_in_batch` of its window.

    Returns:
        `None` if that cannot be told: there is no finite loss, or `compute_loss` fails (training will say how).
    """
    if not isinstance(batch, Mapping) or num_items is None:
        return None
    if is_sharded(trainer):
        return _try(trainer, model, batch, num_items)
    if trainer.args.world_size > 1 and any(isinstance(m, torch.nn.SyncBatchNorm) for m in trainer.model.modules()):
        return None  # it would wait for ranks that make fewer tries
    # Not through DDP, whose ranks would have to make the same tries.
    few = _first_rows(batch)
    told = None if few is None else _try(trainer, trainer.model, few, num_items)
    return _try(trainer, trainer.model, batch, num_items) if told is None else told


def rows_add_up(trainer: Trainer, model: torch.nn.Module, batch: Any, num_items: Any) -> bool | None:
    """Return whether the loss of two rows is the sum, or the mean, of what it is for each of them.

    Not so if rows meet (contrastive losses), or if something is added to a loss that the items divide, which isn't
    divided itself: the loss of a router, a penalty. Said to have a thousand times the items, the loss shows that. The
    passes are as in `divides_by_items`.

    Args:
        trainer: As for `divides_by_items`.
        model: As for `divides_by_items`.
        batch: As for `divides_by_items`, of two rows or more.
        num_items: As for `divides_by_items`; not looked at if the loss isn't divided by it.

    Returns:
        `None` if that cannot be told from this batch: its loss isn't finite, or zero.
    """
    model = model if is_sharded(trainer) else trainer.model
    is_sum = loss_divides_itself(trainer, num_items_in_batch=1)
    try:
        rows = _first_rows(batch) or batch
        with _left_as_it_is(trainer, model):
            if is_sum:
                once, thousandth = (_loss(trainer, model, rows, num_items * factor) for factor in (1, 1000))
            parts = (rows, *split_batch(rows, 1))
            losses = [_loss(trainer, model, part, num_items, training=False) for part in parts]
    except Exception:
        logger.info("Whether rows add up to the loss could not be tried.", exc_info=True)
        return False
    whole, first, second = losses
    if not all(map(math.isfinite, losses)) or whole == 0 or (is_sum and not (math.isfinite(once) and once)):
        return None
    if is_sum and abs(1 - 1000 * thousandth / once) > UNCHANGED:
        return False
    return abs(1 - (first + second) / (1 if is_sum else 2) / whole) <= _ADDS_UP


def _first_rows(batch: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return two rows of a batch; `None` if it has no more or cannot be split."""
    try:
        return split_batch(copy_batch(batch), 2)[0] if count_rows(batch) > 2 else None
    except ValueError:
        return None


def _try(trainer: Trainer, model: torch.nn.Module, batch: Mapping[str, Any], num_items: Any) -> bool | None:
    try:
        with _left_as_it_is(trainer, model):
            once, twice = (_loss(trainer, model, batch, num_items * factor) for factor in (1, 2))
    except Exception:
        logger.info("Whether the loss is divided by num_items_in_batch could not be tried.", exc_info=True)
        return None
    if not (math.isfinite(once) and math.isfinite(twice)) or once == 0:
        return None
    # A divided loss halves. Kernels that add in another order each time change the last digits of any.
    return abs(1 - twice / once) > UNCHANGED


@contextlib.contextmanager
def _left_as_it_is(trainer: Trainer, model: torch.nn.Module) -> Iterator[None]:
    """Context of tries without gradients, after which the model's mode and buffers are as before."""
    buffers = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]
    was_training = model.training
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _loss(trainer: Trainer, model: torch.nn.Module, batch: Any, num_items: Any, training: bool = True) -> float:
    """Return the loss of a batch; the random numbers are the same in each try."""
    devices = devices_of([torch.empty(0, device=trainer.args.device), *model.parameters()])
    trainer = shadow_of(trainer, trainer.model)
    model.train(training)
    with forked_random_state(devices):
        inputs = trainer._prepare_inputs(copy_batch(batch))
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, inputs, num_items_in_batch=num_items).float().mean().item()
