"""A trainer to replay `compute_loss` with: what it counts, logs and keeps there does not reach the real one."""

import collections
import copy
import types
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerControl, TrainerState


# Containers of more entries are copied, their contents shared: they are data.
_MOST_ENTRIES = 1000

# Objects of these packages are shared, modules apart: no `compute_loss` keeps something of its own in them.
_LIBRARIES = {"accelerate", "builtins", "datasets", "hf_trainopt", "logging", "numpy", "peft", "torch", "transformers"}


def shadow_of(trainer: Any, model: torch.nn.Module) -> Any:
    """Return a copy of a trainer that has another model, logs nothing, and shares nothing that `compute_loss` changes.

    Attributes that are containers or objects of the user's own classes are copied with what they hold, tensors, data
    and what belongs to libraries shared.
    """
    shadow = copy.copy(trainer)
    memo = {id(trainer): shadow, id(trainer.model): model, id(trainer.model_wrapped): model}
    for cls in reversed(type(trainer).__mro__):
        for name, value in vars(cls).items():
            if isinstance(value, _CONTAINERS) and not name.startswith("__") and name not in vars(trainer):
                setattr(shadow, name, _copied(value, memo))
    for name, value in vars(trainer).items():
        setattr(shadow, name, _copied(value, memo))
    shadow.log = lambda *args, **kwargs: None
    return shadow


_CONTAINERS = (dict, list, set, collections.deque)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, _CONTAINERS):
        memo[id(value)] = made = copy.copy(value)
        if len(value) <= _MOST_ENTRIES:
            if isinstance(value, dict):
                for key, inner in value.items():
                    made[key] = _copied(inner, memo)
            elif isinstance(value, list | collections.deque):
                for index, inner in enumerate(value):
                    made[index] = _copied(inner, memo)
        return made
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _copied(value.__self__, memo))
    if not _has_own_state(value):
        return value
    try:
        made = copy.copy(value)
    except Exception:  # a lock, a connection
        return value
    if made is value:
        return value
    memo[id(value)] = made
    for name, inner in vars(value).items():
        made.__dict__[name] = _copied(inner, memo)
    return made


def _has_own_state(value: Any) -> bool:
    shared = (type, types.ModuleType, types.FunctionType, torch.Tensor, torch.optim.Optimizer, Dataset, DataLoader)
    if isinstance(value, shared) or not hasattr(value, "__dict__") or hasattr(type(value), "__del__"):
        return False
    kinds = (torch.nn.Module, TrainerState, TrainerControl)
    return isinstance(value, kinds) or type(value).__module__.partition(".")[0] not in _LIBRARIES
