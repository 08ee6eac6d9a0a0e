"""Whether a loss is divided by `num_items_in_batch`, as `Trainer` expects it to be; told from its code."""

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from ..core.versions import loss_is_scaled_for_ga


_ITEMS = "num_items_in_batch"

# Losses of PyTorch that are means over what they are given.
_MEANS = {
    "CrossEntropyLoss", "NLLLoss", "MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCELoss",
    "BCEWithLogitsLoss", "CTCLoss", "KLDivLoss", "cross_entropy", "nll_loss", "mse_loss", "l1_loss",
    "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "ctc_loss",
    "kl_div",
}  # fmt: skip

# Their loss in transformers is a mean of its own unless each sample has one class.
_BY_PROBLEM_TYPE = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification",
                    "ForAudioClassification")  # fmt: skip


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside a PEFT model, at which Trainer looks too; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adds_router_loss(model: torch.nn.Module) -> bool:
    """Return whether the loss of a router is added to a model's loss, by its config or the one of its text model."""
    config = getattr(model, "config", None)
    texts = [config.get_text_config()] if hasattr(config, "get_text_config") else []
    return any(getattr(part, "output_router_logits", False) for part in (config, *texts))


def model_ignores_num_items(model: torch.nn.Module) -> bool:
    """Return whether the loss of a model is known to be a mean of its own, whatever `num_items_in_batch` it is given.

    So it is in about half of the classes of transformers 5 that take it (BERT, T5, ResNet, all sequence and token
    classification of decoders): they take `**kwargs` and do not hand them on to the loss.

    Args:
        model: As it is given to the Trainer; of a PEFT model the one inside counts.
    """
    inner = base_model(model)
    config = getattr(inner, "config", None)
    return class_ignores_num_items(
        type(inner), getattr(config, "problem_type", None), getattr(config, "num_labels", None)
    )


def class_ignores_num_items(cls: type, problem_type: str | None = None, num_labels: int | None = None) -> bool:
    """Return what `model_ignores_num_items` says of a model of a class.

    Args:
        cls: The class of the model.
        problem_type: Of its config.
        num_labels: Of its config.
    """
    if cls.__name__.endswith(_BY_PROBLEM_TYPE) and (
        problem_type in ("regression", "multi_label_classification") or num_labels == 1
    ):
        return True
    return _forward_ignores_num_items(cls)


@functools.cache
def _forward_ignores_num_items(cls: type) -> bool:
    forward = inspect.unwrap(cls.forward)
    try:
        if "labels" not in inspect.signature(forward).parameters:
            return False
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, ValueError, SyntaxError):
        return False
    names, loss_calls = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name | ast.arg | ast.keyword):
            names.add(getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "arg", None))
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr == "loss_function":
                loss_calls.append(node)
            elif {None, "labels"} <= {keyword.arg for keyword in node.keywords}:
                return False  # a model inside makes the loss
    if _ITEMS in names:
        return False
    if loss_calls:
        return not any(keyword.arg is None for call in loss_calls for keyword in call.keywords)
    return "loss_function" not in names and bool(_MEANS & names)


def own_loss_ignoring_num_items(trainer: Trainer) -> str | None:
    """Return the user's loss that does not read the `num_items_in_batch` which it is to divide by; `None` if none.

    Args:
        trainer: Its `compute_loss_func` and, where a class of the user's overrides it, its `compute_loss` are looked
            at.
    """
    if loss_is_scaled_for_ga(trainer) is not None:
        return None
    method = own_compute_loss(trainer)
    if method is not None and trainer.model_accepts_loss_kwargs and _never_reads_items(method):
        return method.__qualname__
    function = trainer.compute_loss_func
    if function is not None and method is None and _never_reads_items(function):
        return f"compute_loss_func={getattr(function, '__name__', type(function).__name__)}"
    return None


def own_compute_loss(trainer: Trainer) -> Callable[..., Any] | None:
    """Return `compute_loss` of the class that comes first and is neither ours nor of transformers, if there is one."""
    for owner in type(trainer).__mro__:
        if "compute_loss" in vars(owner) and owner.__module__.partition(".")[0] not in ("hf_trainopt", "transformers"):
            return vars(owner)["compute_loss"]
    return None


def calls_super(function: Callable[..., Any]) -> bool:
    """Return whether a method uses `super()`."""
    code = getattr(function, "__code__", None)
    return code is None or "super" in code.co_names


def _never_reads_items(function: Callable[..., Any]) -> bool:
    """Whether neither `num_items_in_batch` nor what else may hold it (`**kwargs`) is ever read in a function."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:  # a callable object, a partial
        return False
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    name = _ITEMS
    if name not in arguments:
        if not code.co_flags & inspect.CO_VARKEYWORDS:
            return False  # given by position
        name = code.co_varnames[len(arguments) + bool(code.co_flags & inspect.CO_VARARGS)]
    if name in code.co_cellvars:
        return False
    for instruction in dis.get_instructions(code):
        read = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        if "LOAD" in instruction.opname and name in read:
            return False
    return True
