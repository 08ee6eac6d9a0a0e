"""Refusals: what cannot work with varying k is said before training starts, with the remedy."""

import logging
from dataclasses import fields

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import is_compiled_module
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from ..core.facts import data_parallel_size, ranks_per_micro_batch, sequence_shards
from ..core.versions import (
    MEAN_LOSS_REMEDY,
    activation_checkpointing,
    activation_checkpointing_kwargs,
    check_sharding_at_load,
    is_sharded_at_load,
    loss_is_scaled_for_ga,
)
from .deepspeed_checks import check_deepspeed
from .halves import can_halve
from .loss_scaling import (
    adds_router_loss,
    base_model,
    calls_super,
    model_ignores_num_items,
    own_compute_loss,
    own_loss_ignoring_num_items,
)


logger = logging.getLogger(__name__)


def check_adaptive_setup(trainer: Trainer, measures: bool, has_own_policy: bool) -> None:
    """Refuse what cannot work with varying k.

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
    elif args.accumulation_policy == "fixed" and not measures:
        what, remedy = "auto_micro_batch", "leave auto_micro_batch out"
    elif args.accumulation_policy == "fixed":
        what, remedy = "measuring the noise scale", "leave measure_noise_scale unset and lr_batch_scaling at 'none'"
    if trainer.is_deepspeed_enabled:
        check_deepspeed(trainer, measures, what, remedy)
    if is_sagemaker_mp_enabled() or trainer.is_fsdp_xla_enabled:
        raise ValueError(f"{what} does not work with SageMaker model parallelism or XLA FSDP; {remedy}.")
    _check_sharding(trainer, measures, what, remedy)
    if measures and sequence_shards(args) > 1:
        raise ValueError(
            f"{what} needs gradient statistics, which context and sequence parallelism (cp_size, sp_size) do not "
            "allow: no rank holds the whole gradient of a sample. Set accumulation_policy='ramp' and "
            f"measure_noise_scale=False, or {remedy}."
        )
    k_varies = has_own_policy or measures or args.accumulation_policy != "fixed"
    if k_varies and args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"train_sampling_strategy='{args.train_sampling_strategy}' builds batches for a constant k and makes the "
            f"micro-batches of a window alike; set it to 'random', or {remedy}."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            f"auto_find_batch_size changes the size of micro-batches, in which {what} counts; set it to False "
            f"(auto_micro_batch=True splits them where memory runs out), or {remedy}."
        )
    optim = getattr(args.optim, "value", args.optim)
    if any(name in optim.lower() for name in ("layerwise", "lomo")):
        raise ValueError(
            f"optim='{optim}' takes a step in the backward pass of every micro-batch, whatever k is; choose another "
            f"optimizer, or {remedy} and gradient_accumulation_steps=1."
        )
    reentrant = activation_checkpointing_kwargs(args).get("use_reentrant")
    if measures and activation_checkpointing(args) and reentrant:
        raise ValueError(
            "use_reentrant=True hands out gradients in pieces, so their norms cannot be measured; set it to False in "
            f"the keyword arguments of checkpointing, or {remedy}."
        )


def loss_ignores_num_items(trainer: Trainer) -> bool:
    """Return whether a model is known not to divide its loss by `num_items_in_batch`, as Trainer expects it to."""
    return _takes_loss_kwargs_unasked(trainer) and model_ignores_num_items(trainer.model)


def check_first_loss(trainer: Trainer, num_items_in_batch: torch.Tensor | int | None) -> None:
    """Refuse a model that has told in its first forward pass that its loss ignores `num_items_in_batch`.

    A `compute_loss_func` that is not given them is warned of.

    Args:
        trainer: As for `check_adaptive_setup`.
        num_items_in_batch: Of the first window.

    Raises:
        ValueError: What its labels are has set the model's `problem_type`, and gradients would grow with k.
    """
    if loss_ignores_num_items(trainer):
        model = trainer.model
        raise ValueError(
            f"the loss of {type(model).__name__} for {model.config.problem_type} ignores num_items_in_batch, so that "
            "gradients would grow with k; set `model.config.problem_type` before you make the Trainer."
        )
    unset = loss_is_scaled_for_ga(trainer) is None
    if unset and trainer.compute_loss_func is not None and num_items_in_batch is None:
        logger.warning(
            "compute_loss_func is to divide the loss by num_items_in_batch, but is not told it, since the batches "
            f"have no `labels`: gradients grow with k. Name the targets `labels`, or, if the loss is a mean, "
            f"{MEAN_LOSS_REMEDY}."
        )


def check_amount_of_data(args: TrainingArguments, num_micro_batches: int | None, adapts: bool) -> None:
    """Refuse a run that would train nothing, where k varies; warn of one of stock accumulation.

    Args:
        args: Of the run.
        num_micro_batches: In an epoch on this rank, if that is known.
        adapts: Whether k varies.

    Raises:
        ValueError: k varies and there is nothing to train on, or stock `Trainer` could not begin.
    """
    problem = None
    if args.max_steps == 0:
        problem = "max_steps is 0, with which nothing is trained; give at least 1, or -1 for num_train_epochs."
    elif args.max_steps < 0 and args.num_train_epochs == 0:
        problem = "num_train_epochs is 0, with which nothing is trained; raise it, or set max_steps."
    batch, k = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if num_micro_batches == 0:
        problem = (
            f"train_dataset has no batch of per_device_train_batch_size={batch} on each of {args.world_size} "
            "device(s), so that nothing would be trained; lower it, set dataloader_drop_last=False, or add data."
        )
    if problem is not None:
        if adapts or (num_micro_batches == 0 and args.max_steps <= 0):
            raise ValueError(problem)
        logger.warning("%s", problem)
    elif num_micro_batches is not None and num_micro_batches < k:
        logger.warning(
            "train_dataset has %d micro-batch(es) of per_device_train_batch_size=%d, fewer than one window of "
            "gradient_accumulation_steps=%d: %s. Lower one of the two, or add data.",
            num_micro_batches,
            batch,
            k,
            "each epoch counts as one reference window" if adapts else "each epoch is one step, as in Trainer",
        )


def _check_sharding(trainer: Trainer, measures: bool, what: str, remedy: str) -> None:
    check_sharding_at_load(trainer.model)
    args = trainer.args
    sharded = trainer.is_fsdp_enabled or is_sharded_at_load(trainer)
    shares = ranks_per_micro_batch(args) > 1
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            f"{what} does not work with FSDP1, which hides parameters in flat ones; set `fsdp_version: 2` in the "
            f'accelerate config (or `"version": 2` in fsdp_config), or {remedy}.'
        )
    config = getattr(getattr(trainer.model, "config", None), "distributed_config", None)
    for name in ("ep_size", "pp_size"):
        if (getattr(config, name, None) or 1) > 1:
            raise ValueError(
                f"{what} does not work with DistributedConfig({name}={getattr(config, name)}), where a gradient on "
                f"one rank is of more than its own samples; leave {name} at 1, or {remedy}."
            )
    if measures and (sharded or shares) and (args.torch_compile or is_compiled_module(trainer.model)):
        raise ValueError(
            "torch_compile leaves out the hooks that find gradients of a sharded model (FSDP2, tensor parallelism), "
            f"so that their norms cannot be measured; set torch_compile to False, or {remedy}."
        )


def check_equal_lengths(accelerator: Accelerator, length: int) -> None:
    """Refuse loaders of different lengths on different ranks; all ranks call it.

    Args:
        accelerator: Of the Trainer.
        length: Batches of this rank's loader.

    Raises:
        ValueError: They differ.
    """
    lengths = accelerator.gather(torch.tensor([length], device=accelerator.device)).tolist()
    if min(lengths) < max(lengths):
        raise ValueError(
            f"the ranks have {min(lengths)} to {max(lengths)} batches an epoch, so that some would wait for ever for "
            "the others; leave even_batches in accelerator_config at True, or give all ranks the same number of rows."
        )


def may_end_unevenly(dataloader: torch.utils.data.DataLoader) -> bool:
    """Return whether one rank may run out of data before another: a stream that each rank reads by itself."""
    if isinstance(dataloader, DataLoaderDispatcher):
        return False  # the first rank reads for all
    dataset = getattr(dataloader, "dataset", None)
    return not has_length(dataloader) or isinstance(dataset, torch.utils.data.IterableDataset)


def warn_of_adaptive_setup(trainer: Trainer, measures: bool) -> None:
    """Warn of probes under a fixed policy, and of a loss that may be scaled twice.

    Args:
        trainer: As for `check_adaptive_setup`, which is called again for each run; this is not.
        measures: Whether gradient statistics are taken.
    """
    args, model = trainer.args, trainer.model
    if (
        measures
        and args.accumulation_policy == "fixed"
        and args.gradient_accumulation_steps == 1
        and data_parallel_size(args) == 1
        and not can_halve(trainer)
    ):
        logger.warning(
            "measure_noise_scale with gradient_accumulation_steps=1 on one device: a micro-batch of this model can't "
            "tell its own noise, so every %d-th optimizer step (and the first ones) takes two.",
            args.noise_scale_interval,
        )
    inner = base_model(model)
    if _takes_loss_kwargs_unasked(trainer) and not hasattr(type(inner), "loss_function"):
        logger.warning(
            "%s takes **kwargs, so Trainer expects its loss to be divided by `num_items_in_batch`. If it returns a "
            "plain mean, set `accepts_loss_kwargs = False` on the model: gradients would grow with k otherwise.",
            type(inner).__name__,
        )
    if adds_router_loss(inner) and trainer.model_accepts_loss_kwargs:
        logger.warning(
            "%s adds the loss of its router to each micro-batch undivided, so that it weighs k times as much as the "
            "rest: with small k experts are balanced less than at gradient_accumulation_steps=%d. Raise "
            "router_aux_loss_coef, or set accumulation_policy='fixed'.",
            type(inner).__name__,
            args.gradient_accumulation_steps,
        )
    own_loss = own_loss_ignoring_num_items(trainer)
    if own_loss is not None:
        logger.warning(
            "%s does not read num_items_in_batch, by which Trainer expects it to divide the loss: gradients grow with "
            "k. Divide a sum by it, or, if the loss is a mean, %s.",
            own_loss,
            MEAN_LOSS_REMEDY,
        )


def warn_of_ignored_settings(trainer: Trainer, measures: bool, has_own_policy: bool) -> None:
    """Warn of settings that have no effect in this run; those that depend on the policy alone are the arguments' own.

    Args:
        trainer: As for `check_adaptive_setup`.
        measures: Whether gradient statistics are taken.
        has_own_policy: Whether the policy is the user's own.
    """
    args = trainer.args
    defaults = {field.name: field.default for field in fields(args)}
    ignored = []
    if not measures:
        ignored += [("noise_scale_interval", "nothing is measured"), ("noise_scale_half_life", "nothing is measured")]
    if has_own_policy:
        names = ("noise_scale_ratio", "optimizer_step_cost", "accumulation_ramp")
        ignored += [(name, "the Trainer is given a policy of your own") for name in names]
    if not trainer.is_deepspeed_enabled:
        ignored.append(("coalesce_grad_reduction", "there is no DeepSpeed engine"))
    elif args.accumulation_policy == "fixed" and not measures and not has_own_policy:
        ignored.append(("coalesce_grad_reduction", "k is fixed and nothing is measured, so DeepSpeed's own loop runs"))
    for name, reason in ignored:
        if getattr(args, name) != defaults[name]:
            logger.warning("%s is ignored: %s.", name, reason)


def _takes_loss_kwargs_unasked(trainer: Trainer) -> bool:
    """Whether Trainer concludes from the signature of `forward` that the loss is divided by `num_items_in_batch`."""
    unset = not hasattr(trainer.model, "accepts_loss_kwargs") and loss_is_scaled_for_ga(trainer) is None
    own = own_compute_loss(trainer)
    # Label smoothing and a loss function of the user's take the place of the model's loss.
    is_the_models = trainer.compute_loss_func is None and trainer.label_smoother is None
    return trainer.model_accepts_loss_kwargs and unset and is_the_models and (own is None or calls_super(own))
