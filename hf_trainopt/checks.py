"""Refusals: what cannot work with varying k is said before training starts, with the remedy."""

import logging
from typing import Any

from transformers import Trainer
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from .accumulation.controller import STATE_VERSION


logger = logging.getLogger(__name__)


def check_adaptive_setup(trainer: Trainer, measures: bool) -> None:
    """Refuse what cannot work with varying k, and warn of a model whose loss may be scaled twice.

    Args:
        trainer: Trainer with `EfficientTrainingArguments`.
        measures: Whether gradient statistics are taken.

    Raises:
        ValueError: Something asked for does not work with varying k.
    """
    args = trainer.args
    what = f"accumulation_policy='{args.accumulation_policy}'"
    remedy = "set accumulation_policy='fixed' and leave measure_noise_scale unset"
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
    if (
        trainer.model_accepts_loss_kwargs
        and not hasattr(trainer.model, "loss_function")
        and not hasattr(trainer.model, "accepts_loss_kwargs")
        and trainer.compute_loss_func is None
    ):
        logger.warning(
            "%s takes **kwargs, so Trainer expects its loss to be divided by `num_items_in_batch`. If it returns a "
            "plain mean, set `accepts_loss_kwargs = False` on the model: gradients would grow with k otherwise.",
            type(trainer.model).__name__,
        )


def check_resumed_state(state: dict[str, Any], setup: dict[str, int], path: str, adapts: bool) -> None:
    """Refuse an accumulation state that does not fit this run.

    Args:
        state: Contents of the checkpoint's accumulation state.
        setup: What this run counts its position in the data in.
        path: Where `state` was read.
        adapts: Whether this run goes through windows.

    Raises:
        ValueError: Another version or set-up wrote it, or k has varied and this run is stock.
    """
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"{path} has version {state.get('version')}, this hf_trainopt reads version {STATE_VERSION}; resume with "
            "the version that wrote it."
        )
    for name, value in setup.items():
        if state["setup"][name] != value:
            raise ValueError(
                f"{name} is {value} but the checkpoint was written with {state['setup'][name]}: its position in the "
                "data is counted in these micro-batches; resume with the same value."
            )
    reference = setup["gradient_accumulation_steps"]
    if not adapts and state["controller"]["used_range"] not in ([], [reference, reference]):
        raise ValueError(
            "accumulation_policy='fixed' cannot resume a checkpoint in which k has varied (stock Trainer would not "
            "find its place in the data); resume with the policy that it was written with, or set "
            "measure_noise_scale=True."
        )
