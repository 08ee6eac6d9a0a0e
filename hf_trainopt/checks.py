"""Refusals: what cannot work with varying k is said before training starts, with the remedy."""

import logging

import torch
from transformers import Trainer
from transformers.utils.import_utils import is_sagemaker_mp_enabled


logger = logging.getLogger(__name__)


def check_adaptive_setup(trainer: Trainer, measures: bool, has_own_policy: bool) -> None:
    """Refuse what cannot work with varying k, and warn of a model whose loss may be scaled twice.

    Args:
        trainer: Trainer with `EfficientTrainingArguments`.
        measures: Whether gradient statistics are taken.
        has_own_policy: Whether the policy is the user's own.

    Raises:
        ValueError: Something asked for does not work with varying k.
    """
    args = trainer.args
    what = f"accumulation_policy='{args.accumulation_policy}'"
    remedy = "set accumulation_policy='fixed'"
    if has_own_policy:
        what, remedy = "an accumulation policy of your own", remedy + " and pass no policy"
    elif args.accumulation_policy == "fixed":
        what, remedy = "measuring the noise scale", "leave measure_noise_scale unset and lr_batch_scaling at 'none'"
    if trainer.is_deepspeed_enabled:
        raise ValueError(f"{what} does not work with DeepSpeed, whose engine fixes k when it starts; {remedy}.")
    if is_sagemaker_mp_enabled() or trainer.is_fsdp_xla_enabled:
        raise ValueError(f"{what} does not work with SageMaker model parallelism or XLA FSDP; {remedy}.")
    if trainer.is_fsdp_enabled or trainer.is_distributed_loading_by_transformers:
        raise ValueError(f"{what} does not work with sharded models yet (FSDP, DistributedConfig); {remedy}.")
    if trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise ValueError(f"{what} does not work with tensor, context or sequence parallelism yet; {remedy}.")
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"train_sampling_strategy='{args.train_sampling_strategy}' builds batches for a constant k and makes the "
            f"micro-batches of a window alike; set it to 'random', or {remedy}."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            f"auto_find_batch_size changes the size of micro-batches, in which {what} counts; set it to False, or "
            f"{remedy}."
        )
    if any(name in str(args.optim).lower() for name in ("layerwise", "lomo")):
        raise ValueError(
            f"optim='{args.optim}' takes its steps inside the backward pass, so that gradients cannot be accumulated; "
            f"choose another optimizer, or {remedy}."
        )
    model = trainer.model
    accepts_unset = not hasattr(model, "accepts_loss_kwargs") and trainer.compute_loss_func is None
    if trainer.model_accepts_loss_kwargs and accepts_unset and _loss_ignores_num_items(model):
        raise ValueError(
            f"the loss of {type(model).__name__} for regression or multi-label classification ignores "
            "num_items_in_batch, so that gradients would grow with k; set `model.accepts_loss_kwargs = False` before "
            f"you make the Trainer (a mean of micro-batch means), or {remedy}."
        )
    reentrant = (args.activation_checkpointing_kwargs or {}).get("use_reentrant")
    if measures and args.activation_checkpointing and reentrant:
        raise ValueError(
            "activation_checkpointing_kwargs: use_reentrant=True hands out gradients in pieces, so that their norms "
            f"cannot be measured; set it to False, or {remedy}."
        )
    if (
        measures
        and args.accumulation_policy == "fixed"
        and args.gradient_accumulation_steps == 1
        and args.world_size == 1
    ):
        logger.warning(
            "measure_noise_scale with gradient_accumulation_steps=1 on one device: one micro-batch cannot tell its "
            "own noise, so every %d-th optimizer step (and the first ones) takes two.",
            args.noise_scale_interval,
        )
    if trainer.model_accepts_loss_kwargs and accepts_unset and not hasattr(type(model), "loss_function"):
        logger.warning(
            "%s takes **kwargs, so Trainer expects its loss to be divided by `num_items_in_batch`. If it returns a "
            "plain mean, set `accepts_loss_kwargs = False` on the model: gradients would grow with k otherwise.",
            type(model).__name__,
        )


def _loss_ignores_num_items(model: torch.nn.Module) -> bool:
    """Whether the loss of transformers is a mean of its own here: sequence classification but single-label."""
    config = getattr(model, "config", None)
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return False
    return (
        getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
        or getattr(config, "num_labels", None) == 1
    )
