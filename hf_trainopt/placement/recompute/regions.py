"""Calls of modules: how they are led into a checkpointed region, and what is needed to make them again."""

import copy
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_trainopt.placement.errors import FilledCacheError


# What a region is called with: the function (bound to its module), the module, its arguments.
Enter = Callable[[Callable[..., Any], nn.Module, tuple[Any, ...], dict[str, Any]], Any]

# Modules of `torch.nn.modules.activation` that are no activation functions of single elements.
_NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax)
_ACTIVATION_MODULES = (
    "torch.nn.modules.activation",
    "transformers.activations",
    "timm.layers.activations",
    "timm.layers.activations_me",
)


_FILLED_CACHE = (
    "stage '{stage}' is recomputed in the backward pass and would update its key-value cache (past_key_values) twice. "
    "If you don't mean to use a cache in training, set model.config.use_cache=False. Prefix tuning passes its prefix "
    "in past_key_values and so works with no recomputed layer: use checkpoint_placement='none' and no memory_budget, "
    "or another method (LoRA, prompt tuning)."
)


class Call:
    """One call of a function, split into tensors and the rest, so that a region can keep the tensors its own way.

    Tensors in keyword arguments are treated like positional ones.

    The first call gets the arguments themselves (a list that the function appends to must be the caller's list), a
    later one gets containers made anew.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._function = function
        self._first: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, kwargs)
        leaves, self._structure = tree_flatten((args, kwargs))
        self._places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = [leaves[place] for place in self._places]
        for place in self._places:
            leaves[place] = None
        self._others = leaves

    def take_tensors(self) -> list[torch.Tensor]:
        """Return the tensors and forget them, so that only the region keeps them."""
        tensors, self.tensors = self.tensors, []
        return tensors

    def __call__(self, *tensors: torch.Tensor) -> Any:
        if self._first is not None:
            (args, kwargs), self._first = self._first, None
        else:
            leaves = list(self._others)
            for place, tensor in zip(self._places, tensors, strict=True):
                leaves[place] = tensor
            args, kwargs = tree_unflatten(leaves, self._structure)
        return self._function(*args, **kwargs)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a value, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def refuse_compiling(stage: str) -> None:
    """Raise `RuntimeError` inside `torch.compile`.

    While it traces, an exception only breaks the graph, and the region then runs between compiled pieces, where
    `is_compiling` is false. What a region stores and recomputes there is compiled differently, so that is refused too.
    """
    if torch.compiler.is_compiling() or get_eval_frame_callback() not in (None, False):
        raise RuntimeError(
            f"stage '{stage}' has a checkpoint placement, which torch.compile cannot trace; train without compiling, "
            "or without a placement and with torch._functorch.config.activation_memory_budget."
        )


def without_cache(
    module: nn.Module, stage: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with an unused key-value cache dropped, as transformers drops it where it checkpoints layers.

    A recomputation would write to the cache a second time. Transformers drops what a cache holds as well, without an
    error, and doesn't see one that is passed by position (GPT-2).

    Raises:
        FilledCacheError: The cache holds something that this layer would attend to.
    """
    is_layer = isinstance(module, GradientCheckpointingLayer)
    if is_layer and kwargs.get("use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    if not caches or getattr(module, "_can_checkpoint_with_cache", False):
        return args, kwargs
    indices = (getattr(member, "layer_idx", getattr(member, "layer_id", None)) for member in module.modules())
    layers = {index for index in indices if isinstance(index, int)}
    if (not layers and not is_layer) or any(cache.get_seq_length(layer) for cache in caches for layer in layers):
        raise FilledCacheError(_FILLED_CACHE.format(stage=stage))
    dropped = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    return tuple(None if isinstance(arg, Cache) else arg for arg in args), dropped


class _Attached:
    """Base of what is put on a module: can be copied with the model, but not pickled."""

    def __reduce_ex__(self, protocol):
        raise pickle.PicklingError(
            "a model with a checkpoint placement cannot be pickled; call undo() of what apply_placement returned "
            "first, or save its state_dict()."
        )


class ForwardOverride(_Attached):
    """Stands in for `forward` on one module.

    On the instance and not around the module, so that no name changes; `forward` and not `__call__`, so that hooks run
    once. A `forward` that was on the instance before (accelerate puts one there) is called through. The layers of
    transformers have a flag for this purpose, but a layer whose flag is set drops its cache even where nothing is
    recomputed, and everybody may set the flags of all layers.
    """

    def __init__(self, module: nn.Module, enter: Enter):
        # Weak: the module holds this object, and a cycle would keep a deleted model in memory.
        self._module = weakref.ref(module)
        self.replaced: Callable[..., Any] | None = module.__dict__.get("forward")
        self.enter = enter
        self.active = True

    def __deepcopy__(self, memo: dict) -> "ForwardOverride":
        # `copy.deepcopy` enters the new module into the memo before it copies what the module holds.
        module = memo.get(id(self._module()))
        if not isinstance(module, nn.Module):
            raise ValueError(
                "the forward of a module with a checkpoint placement cannot be copied without the module; call undo() "
                "of what apply_placement returned first."
            )
        copied = ForwardOverride.__new__(ForwardOverride)
        copied._module = weakref.ref(module)
        copied.replaced = copy.deepcopy(self.replaced, memo)
        copied.enter = copy.deepcopy(self.enter, memo)
        copied.active = self.active
        return copied

    def _function(self, module: nn.Module) -> Callable[..., Any]:
        return self.replaced if self.replaced is not None else type(module).forward.__get__(module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function(self._module()))

    def __call__(self, *args, **kwargs) -> Any:
        module = self._module()
        if module is None:
            raise RuntimeError("the module of this forward is gone; keep the model while its forward is used.")
        function = self._function(module)
        if not (self.active and module.training and torch.is_grad_enabled()):
            return function(*args, **kwargs)
        return self.enter(function, module, args, kwargs)


def activation_modules(stage: nn.Module) -> list[str]:
    """Return the names, relative to `stage`, of its activation functions that can be recomputed on their own.

    They are elementwise functions without parameters that are modules of torch, transformers or timm. Left out are
    those that work in place, as nothing is left of their input; functions that are called without a module cannot be
    seen. A stage that is one itself is named by the empty string.
    """
    return [
        name
        for name, module in stage.named_modules()
        if type(module).__module__ in _ACTIVATION_MODULES
        and not isinstance(module, _NO_ACTIVATIONS)
        and not getattr(module, "inplace", False)
        and not any(True for _ in module.parameters())
    ]
