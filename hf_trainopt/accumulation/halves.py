"""A micro-batch that is alone in its window tells its noise by its halves, where they train what the whole does."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ..core.batch import split_evenly
from ..core.facts import data_parallel_size, is_compiled, loss_divides_itself, rank_batch_size
from ..core.running_statistics import RunningStatistics
from .loss_probe import is_in_doubt
from .loss_scaling import adds_router_loss, base_model, calls_super, own_compute_loss
from .window import Slice, slices_of


logger = logging.getLogger(__name__)

# Their loss is a mean over rows. Others that have one may compare rows with each other.
_MEANS_OVER_ROWS = ("ForSequenceClassification", "ForImageClassification")
_NOT_TEXT = frozenset({"pixel_values", "input_features", "input_values"})
# What is known to have a row for each sample. Others may be of any shape: patches of all pictures, grids, packed rows.
_ONE_ROW_A_SAMPLE = _NOT_TEXT | {
    "input_ids", "attention_mask", "labels", "shift_labels", "token_type_ids", "position_ids", "inputs_embeds",
    "decoder_input_ids", "decoder_attention_mask", "special_tokens_mask", "completion_mask", "assistant_masks",
}  # fmt: skip
_NORMALISATION_OVER_ROWS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)


def can_halve(trainer: Any) -> bool:
    """Return whether the halves of a micro-batch add up to its gradient, as far as can be known before a run.

    So they do if the loss is a sum over targets, divided by the targets of the step (transformers' language models),
    or a mean over rows (its classifiers). They don't if rows meet in BatchNorm or in the loss of a router; other
    means may be contrastive, and a loss of the user's anything. A compiled model would be compiled again for another
    number of rows.

    What the code doesn't tell is tried on the first micro-batch (`rows_add_up`).

    Args:
        trainer: Before its first window.
    """
    args, model = trainer.args, trainer.model
    if data_parallel_size(args) > 1 or args.n_gpu > 1 or rank_batch_size(trainer) < 2:
        return False
    if is_compiled(args, model) or is_compiled(args, trainer.model_wrapped):
        return False
    inner, own = base_model(model), own_compute_loss(trainer)
    if trainer.compute_loss_func is not None or (own is not None and not calls_super(own)) or is_in_doubt(trainer):
        return False
    is_sum = loss_divides_itself(trainer, num_items_in_batch=1)
    is_classifier = type(inner).__module__.startswith("transformers.") and type(inner).__name__.endswith(
        _MEANS_OVER_ROWS
    )
    if not is_sum and not is_classifier:
        return False
    rows_meet = any(isinstance(layer, _NORMALISATION_OVER_ROWS) for layer in model.modules())
    return not (rows_meet or RunningStatistics(model)) and not adds_router_loss(inner)


def in_halves(trainer: Any, micro_batch: Any, num_items_in_batch: Any) -> list[Slice]:
    """Return the halves of a micro-batch (the first may have a row more); none if it is to run as it is.

    Args:
        trainer: The Trainer, for which `can_halve` holds.
        micro_batch: Collated samples.
        num_items_in_batch: Of its window.
    """
    is_mean = not loss_divides_itself(trainer, num_items_in_batch=1)
    if num_items_in_batch is None and not is_mean:
        return []  # a loss over targets that nobody has counted is divided by those of each half
    if not isinstance(micro_batch, Mapping) or not _ONE_ROW_A_SAMPLE.issuperset(micro_batch):
        return []
    if "input_ids" in micro_batch and not _NOT_TEXT.isdisjoint(micro_batch):
        return []  # which picture belongs to which row only the model knows
    tensors = [value for value in micro_batch.values() if value is not None]
    if len({value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else None for value in tensors}) != 1:
        return []
    labels = micro_batch.get("labels")
    if is_mean and (labels is None or bool((labels == -100).any())):
        return []  # a mean over some of the rows
    try:
        return slices_of(split_evenly(micro_batch, 2))
    except ValueError as error:
        logger.debug("A micro-batch wasn't split to measure its noise: %s.", error)
        return []
