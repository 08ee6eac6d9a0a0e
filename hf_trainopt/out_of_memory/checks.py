"""Refusals: what cannot go with windows that are repeated is said before training starts, with the remedy."""

import inspect
import re
from typing import Any

import torch
from accelerate.utils import DDPCommunicationHookType, DistributedType
from torch.nn.parallel import DistributedDataParallel

from ..core.facts import is_sharded, tensor_parallel_size
from ..placement.plan.budget import is_of_own_peak


_REMEDY = "or leave auto_micro_batch out"

# Collectives in the source of a loss. Not `tensor.gather`, which every policy gradient has.
_COLLECTIVES = re.compile(
    r"accelerator\.(?:gather|reduce|pad_across)|nested_gather|\ball_(?:reduce|gather)|broadcast\("
)


def check_auto_micro_batch(trainer: Any) -> None:
    """Refuse what a repeated window cannot work with; for the rest see `check_planned` and `check_adaptive_setup`.

    Args:
        trainer: Trainer with `auto_micro_batch=True`.

    Raises:
        ValueError: Something asked for does not work with it.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if args.n_gpu > 1:
        raise ValueError(
            "auto_micro_batch does not work with nn.DataParallel; start one process per GPU (accelerate launch, "
            f"torchrun), set CUDA_VISIBLE_DEVICES to one of them, {_REMEDY}."
        )
    if accelerator.distributed_type == DistributedType.XLA:
        raise ValueError(
            f"auto_micro_batch does not work with XLA, which runs out of memory elsewhere; {_REMEDY[3:]}."
        )
    if args.world_size > 1 and not is_sharded(trainer):
        _check_ranks(trainer)


def check_planned(trainer: Any) -> None:
    """Refuse a sharded model whose micro-batch isn't planned before the run: no window of it can be repeated.

    Raises:
        ValueError: There is no `memory_budget`, or none that is the same for all sizes.
    """
    budget = trainer.args.memory_budget
    if tensor_parallel_size(trainer.args) > 1:
        return  # refused in any case, with other words (`TensorParallelPart`)
    if budget is None or is_of_own_peak(budget):
        said = "and memory_budget isn't set" if budget is None else f"and memory_budget is '{budget}'"
        raise ValueError(
            "auto_micro_batch can't repeat a step of a sharded model (FSDP, DeepSpeed), whose ranks communicate in "
            f"each micro-batch, so that its size has to be planned before the run, {said}; set memory_budget to "
            f"'device' or a size such as '12GiB', {_REMEDY}."
        )


def _check_ranks(trainer: Any) -> None:
    """Refuse what communicates within a window, where a rank that ran out of memory would be waited for."""
    accelerator = trainer.accelerator
    waits = "where the other ranks would wait for one that ran out of memory"
    handler = getattr(accelerator, "ddp_handler", None)
    if handler is not None and handler.comm_hook != DDPCommunicationHookType.NO:
        raise ValueError(f"auto_micro_batch averages gradients itself and runs no comm_hook; remove it, {_REMEDY}.")
    if trainer.args.ddp_static_graph or (handler is not None and handler.static_graph):
        raise ValueError(
            f"ddp_static_graph reduces gradients in the first backward pass, {waits}; set it to False, {_REMEDY}."
        )
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        raise ValueError(
            f"sync_each_batch reduces gradients in each backward pass, {waits}; set it to False, {_REMEDY}."
        )
    for name, module in trainer.model.named_modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            raise ValueError(
                f"{name} is a SyncBatchNorm, which communicates in each forward pass, {waits}; use BatchNorm, "
                f"{_REMEDY}."
            )
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse:
            raise ValueError(
                f"{name} has sparse gradients, which auto_micro_batch cannot average over ranks; set sparse=False, "
                f"{_REMEDY}."
            )
    method = communicating_method(type(trainer))
    if method is not None:
        raise ValueError(f"{method} communicates in each micro-batch, {waits}; train on one device, {_REMEDY}.")


def communicating_method(cls: type) -> str | None:
    """Return the method of a Trainer class that calls collectives within a micro-batch, if its source shows one.

    TRL's trainers gather what they log there.
    """
    for owner in cls.__mro__:
        package = owner.__module__.partition(".")[0]
        for name in ("compute_loss", "training_step") if package not in ("hf_trainopt", "transformers") else ():
            if name in vars(owner):
                try:
                    source = inspect.getsource(vars(owner)[name])
                except (OSError, TypeError):
                    continue
                if _COLLECTIVES.search(source):
                    return f"{owner.__name__}.{name}"
    return None


def find_ddp(model: torch.nn.Module) -> DistributedDataParallel:
    """Return the DDP wrapper in a model that is ready for training (torch.compile may be around it).

    Raises:
        ValueError: There is none.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return module
    raise ValueError(f"auto_micro_batch on several ranks works with DistributedDataParallel only; {_REMEDY[3:]}.")
