"""Liger's Triton kernels: put on a model for a plan, and found in one that has them."""

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel


def with_liger(model: nn.Module) -> nn.Module:
    """Put Liger's kernels on a model, as `TrainingArguments(use_liger_kernel=True)` does.

    Raises:
        ValueError: Liger isn't installed, or has no kernels for the model.
    """
    try:
        apply_liger_kernel(model, None)
    except ImportError as error:
        raise ValueError(f"--use_liger_kernel needs Liger ({error}); pip install liger-kernel.") from error
    if not uses_liger(model):
        raise ValueError(f"--use_liger_kernel: Liger has no kernels for {type(model).__name__}; leave it out.")
    return model


def uses_liger(model: nn.Module) -> bool:
    """Return whether a model runs kernels of Liger.

    Liger replaces forward passes, of modules or of their classes, and functions that these call (the rotary
    embedding): those in the modules where the classes are defined, and PyTorch's cross-entropy.
    """
    if any(has_liger_forward(module) for module in model.modules()) or _is_liger(nn.functional.cross_entropy):
        return True
    sources = {type(module).__module__ for module in model.modules() if isinstance(module, PreTrainedModel)}
    return any(_is_liger(value) for source in sources for value in vars(sys.modules[source]).values())


def has_liger_forward(module: nn.Module) -> bool:
    """Return whether the forward pass of a module itself is Liger's."""
    return _is_liger(module.forward)


def _is_liger(function: Any) -> bool:
    return callable(function) and (getattr(function, "__module__", None) or "").startswith("liger_kernel.")
