"""Facts about a run that several parts ask for, each told in one place."""

import math
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, is_initialized
from transformers import Trainer, TrainingArguments

from .versions import is_sharded_at_load, loss_is_scaled_for_ga


try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
except ImportError:  # PyTorch without torch.distributed
    FSDPModule = DTensor = None


def is_fsdp_module(module: torch.nn.Module) -> bool:
    """Return whether `fully_shard` was called with a module."""
    return FSDPModule is not None and isinstance(module, FSDPModule)


def is_distributed(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a `DTensor`: a parameter of FSDP2 or of tensor parallelism, or its gradient."""
    return DTensor is not None and isinstance(tensor, DTensor)


def is_compiled(args: TrainingArguments, model: torch.nn.Module) -> bool:
    """Return whether `torch.compile` has the model or a part of it (a hook there would be traced into the graph)."""
    return bool(args.torch_compile) or any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules()
    )


def is_sharded(trainer: Trainer) -> bool:
    """Return whether ranks hold pieces of the model (FSDP, DeepSpeed, `from_pretrained` with a distributed config)."""
    by_wrapper = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return by_wrapper or is_sharded_at_load(trainer) or tensor_parallel_size(trainer.args) > 1


def _parallelism() -> ParallelismConfig | None:
    # `Trainer` tells Accelerate about models that `from_pretrained` has parallelized.
    return AcceleratorState().parallelism_config if is_initialized() else None


def tensor_parallel_size(args: TrainingArguments) -> int:
    """Return how many ranks hold a layer together (tensor parallelism); 1 without it.

    Args:
        args: Of a Trainer that has been made: its Accelerator knows.
    """
    config = _parallelism()
    if config is not None and config.tp_size > 1:
        return config.tp_size
    deepspeed = getattr(args, "hf_deepspeed_config", None)  # set only under DeepSpeed
    return (deepspeed.config.get("tensor_parallel", {}).get("autotp_size") or 1) if deepspeed is not None else 1


def sequence_shards(args: TrainingArguments) -> int:
    """Return how many ranks share the positions of a sample (context or sequence parallelism); 1 without them."""
    config = _parallelism()
    return 1 if config is None else config.cp_size * config.sp_size


def ranks_per_micro_batch(args: TrainingArguments) -> int:
    """Return how many ranks run a micro-batch together; 1 unless the model is parallelized.

    Args:
        args: As for `tensor_parallel_size`.
    """
    return tensor_parallel_size(args) * sequence_shards(args)


def data_parallel_size(args: TrainingArguments) -> int:
    """Return W, how many groups of ranks train on different rows; each rank is one unless the model is parallelized.

    Args:
        args: As for `tensor_parallel_size`.
    """
    return args.world_size // ranks_per_micro_batch(args)


def gradient_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Return the gradient scaler of a run in fp16; `None` where there is none, or it is switched off."""
    return enabled_scaler(trainer.accelerator)


def enabled_scaler(holder: Any) -> torch.amp.GradScaler | None:
    """Return the `scaler` of an Accelerator, or of the optimizer that it has prepared, if it is in use."""
    scaler = getattr(holder, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def inverse_loss_scale(holder: Any) -> float:
    """Return what scaled gradients must be multiplied by: 1/(loss scale), 1 without a scaler.

    Args:
        holder: As for `enabled_scaler`. A scale that was halved down to 0 gives infinity: no gradient is finite.
    """
    scaler = enabled_scaler(holder)
    scale = scaler.get_scale() if scaler is not None else 1.0
    return 1.0 / scale if scale else math.inf


def loss_divides_itself(trainer: Trainer, num_items_in_batch: Any) -> bool:
    """Return whether the loss is taken to be divided by the items of the step, so that `Trainer` doesn't divide by k.

    The condition of `Trainer.training_step`.

    Args:
        trainer: The Trainer.
        num_items_in_batch: Items of the step; `None` where they are not known.
    """
    said = loss_is_scaled_for_ga(trainer)
    if said is not None:
        return said
    if trainer.compute_loss_func is not None:
        return True
    return trainer.model_accepts_loss_kwargs and num_items_in_batch is not None


def rank_batch_size(trainer: Any) -> int:
    """Return the samples in a micro-batch of one rank, as the data loader makes them.

    With `split_batches` in `accelerator_config` the ranks share each batch.
    """
    return trainer._train_batch_size // (data_parallel_size(trainer.args) if trainer.accelerator.split_batches else 1)
