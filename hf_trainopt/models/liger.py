"""Liger's Triton kernels: put on a model for a plan, and found in one that has them."""

import sys
from importlib.metadata import version
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


def liger_kernels(model: nn.Module) -> list[str]:
    """Return the version of Liger and what of a model it has replaced; empty where it has replaced nothing.

    Liger replaces forward passes, of modules or of their classes, and functions that these call (the rotary
    embedding): those in the Python modules where the classes are defined, and PyTorch's cross-entropy.
    """
    functions: list[Any] = [module.forward for module in model.modules()]
    sources = {type(module).__module__ for module in model.modules() if isinstance(module, PreTrainedModel)}
    for source in sources & sys.modules.keys():
        functions += vars(sys.modules[source]).values()
    functions.append(nn.functional.cross_entropy)
    names = {f"{function.__module__}.{function.__qualname__}" for function in functions if _is_liger(function)}
    return [f"liger-kernel {version('liger-kernel')}", *sorted(names)] if names else []


def uses_liger(model: nn.Module) -> bool:
    """Return whether a model runs kernels of Liger."""
    return bool(liger_kernels(model))


def has_liger_forward(module: nn.Module) -> bool:
    """Return whether the forward pass of a module itself is Liger's."""
    return _is_liger(module.forward)


def _is_liger(function: Any) -> bool:
    is_named = callable(function) and hasattr(function, "__qualname__")
    return is_named and (getattr(function, "__module__", None) or "").startswith("liger_kernel.")
