"""What differs between the versions of PyTorch and transformers that we support, and until when each branch is needed.

Nothing else in the package compares versions. A branch goes when the floor in `pyproject.toml` has passed the version
in its docstring.
"""

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import Trainer
from transformers.distributed.fsdp import is_fsdp_managed_module


TORCH = Version(Version(torch.__version__).base_version)
TRANSFORMERS = Version(Version(transformers.__version__).base_version)

# The suite was run with the first and with the last of these: [first, end).
TESTED_TRANSFORMERS = ("5.17.0", "5.24.0")
TESTED_TORCH = ("2.11.0", "2.15.0")


def check_versions() -> None:
    """Warn of versions of PyTorch and transformers that the suite was not run with."""
    for package, version, (first, end) in (
        (torch, TORCH, TESTED_TORCH),
        (transformers, TRANSFORMERS, TESTED_TRANSFORMERS),
    ):
        if not Version(first) <= version < Version(end):
            warnings.warn(
                f"hf_trainopt was tested with {package.__name__} >={first},<{end}, not with {package.__version__}. If "
                "training misbehaves, install a tested version.",
                stacklevel=3,
            )


check_versions()

# transformers 5.23 renamed `gradient_checkpointing` and `gradient_checkpointing_kwargs` of `TrainingArguments`, and
# warns of the old names. Goes with 5.23.
ACTIVATION_CHECKPOINTING = "activation_checkpointing" if Version("5.23") <= TRANSFORMERS else "gradient_checkpointing"


def activation_checkpointing(args: Any) -> bool:
    """Return whether stock activation checkpointing is on.

    Args:
        args: A `transformers.TrainingArguments`.
    """
    return bool(getattr(args, ACTIVATION_CHECKPOINTING))


def activation_checkpointing_kwargs(args: Any) -> dict[str, Any]:
    """Return the settings of stock activation checkpointing; empty if there are none.

    Args:
        args: A `transformers.TrainingArguments`.
    """
    return getattr(args, f"{ACTIVATION_CHECKPOINTING}_kwargs") or {}


# What to do about a loss that is a mean although `Trainer` takes it for a share of one.
MEAN_LOSS_REMEDY = "set `loss_is_scaled_for_ga = False` on the Trainer" + (
    "" if Version("5.19") <= TRANSFORMERS else " (needs transformers >= 5.19)"
)


def loss_is_scaled_for_ga(trainer: Trainer) -> bool | None:
    """Return what the user says of the loss: `None` leaves it to `Trainer`. Goes with transformers 5.19.

    Raises:
        ValueError: The attribute is set, but this version of transformers ignores it.
    """
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    if said is not None and Version("5.19") > TRANSFORMERS:
        raise ValueError(
            f"loss_is_scaled_for_ga={said} needs transformers >= 5.19; {transformers.__version__} ignores it. Upgrade "
            "transformers, or leave the attribute unset."
        )
    return said


def is_sharded_at_load(trainer: Trainer) -> bool:
    """Return whether `from_pretrained` has spread the model over the ranks. Goes with transformers 5.19.

    Before 5.19, `Trainer` did not train such models.
    """
    return Version("5.19") <= TRANSFORMERS and trainer.is_distributed_loading_by_transformers


def check_sharding_at_load(model: torch.nn.Module) -> None:
    """Refuse a model that `from_pretrained` has sharded where `Trainer` doesn't train or save it. Goes with 5.23.

    Raises:
        ValueError: transformers is too old for it.
    """
    is_split = (getattr(model, "tp_size", None) or 1) > 1  # 5.17 trains it; its ranks stop matching when it saves
    if Version("5.23") > TRANSFORMERS and (is_split or is_fsdp_managed_module(model)):
        raise ValueError(
            "Training a model that from_pretrained has sharded (FSDP2 at load time, tensor parallelism) needs "
            f"transformers >= 5.23, not {transformers.__version__}. Upgrade transformers, or let accelerate shard the "
            "model (fsdp_version: 2 in the accelerate config)."
        )


def deferred_fsdp_reduction(trainer: Trainer) -> AbstractContextManager:
    """Return `no_sync` for a model that `check_sharding_at_load` has let through."""
    return trainer._defer_fsdp_gradient_reduction()
