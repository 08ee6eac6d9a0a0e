"""A trainer to replay `compute_loss` with: what it counts, logs and keeps there does not reach the real one."""

import collections
import copy
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerControl, TrainerState


# Containers of more entries are copied, their contents shared: they are data.
_MOST_ENTRIES = 1000

# Tensors of more elements are shared: they are data as well.
_MOST_ELEMENTS = 2**20

# Objects of these packages are shared, modules apart: no `compute_loss` keeps something of its own in them.
_LIBRARIES = {"accelerate", "builtins", "datasets", "hf_trainopt", "logging", "numpy", "peft", "torch", "transformers"}


def shadow_of(trainer: Any, model: torch.nn.Module, others: Mapping[int, torch.Tensor] | None = None) -> Any:
    """Return a copy of a trainer that has another model, logs nothing, and shares nothing that `compute_loss` changes.

    Attributes that are containers or objects of the user's own classes are copied with what they hold, large tensors,
    data and what belongs to libraries shared. Gathering over ranks makes tensors as large as it would in a run, and
    communicates nothing.

    Args:
        trainer: The trainer.
        model: A copy of its model.
        others: Identity of a tensor of another module of the trainer -> what stands in for it.
    """
    shadow = copy.copy(trainer)
    memo = {id(trainer): shadow, **(others or {}), **_parts(trainer.model, model), id(trainer.model_wrapped): model}
    for cls in reversed(type(trainer).__mro__):
        for name, value in vars(cls).items():
            if isinstance(value, _CONTAINERS) and not name.startswith("__") and name not in vars(trainer):
                setattr(shadow, name, _copied(value, memo))
    for name, value in vars(trainer).items():
        setattr(shadow, name, _copied(value, memo))
    shadow.log = lambda *args, **kwargs: None
    if trainer.args.world_size > 1:
        shadow.accelerator = _alone(trainer.accelerator)
    return shadow


def held_modules(trainer: Any) -> list[torch.nn.Module]:
    """Return the modules that a trainer holds besides its model, in containers and objects of the user's as well."""
    seen = {id(trainer), *map(id, trainer.model.modules()), id(trainer.model_wrapped)}
    found: list[torch.nn.Module] = []
    waiting = list(vars(trainer).values())
    while waiting:
        value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.nn.Module):
            found.append(value)
        elif isinstance(value, (*_CONTAINERS, tuple)):
            if len(value) <= _MOST_ENTRIES:
                waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        elif _has_own_state(value):
            waiting += vars(value).values()
    return found


def _parts(model: torch.nn.Module, other: torch.nn.Module) -> dict[int, Any]:
    """Return identities of the modules, parameters and buffers of a model -> those of the same names in another."""
    parts: dict[int, Any] = {}
    for kind in ("named_modules", "named_parameters", "named_buffers"):
        others = dict(getattr(other, kind)())
        parts |= {id(part): others[name] for name, part in getattr(model, kind)() if name in others}
    return parts


def _alone(accelerator: Any) -> Any:
    """Return an accelerator that does not communicate: other ranks do not plan, and would never answer."""
    made = copy.copy(accelerator)
    ranks = accelerator.num_processes

    def gather(tensors, *args, **kwargs):
        return tree_map(
            lambda leaf: (
                torch.cat([leaf.reshape(1) if leaf.dim() == 0 else leaf] * ranks)
                if isinstance(leaf, torch.Tensor)
                else leaf
            ),
            tensors,
        )

    made.gather = made.gather_for_metrics = gather
    made.reduce = made.pad_across_processes = lambda tensors, *args, **kwargs: tensors
    made.wait_for_everyone = lambda: None
    return made


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
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter | FakeTensor):
        if value.numel() <= _MOST_ELEMENTS:  # a count that is added to in place: fake tensors don't stop that
            with _disable_current_modes():
                memo[id(value)] = value = value.detach().clone().requires_grad_(value.requires_grad)
        return value
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
