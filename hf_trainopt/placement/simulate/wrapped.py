"""Models that FSDP2 or DeepSpeed has wrapped or partitioned: what their parameters are as a whole, and copies of them.

A run is planned before `Trainer` wraps the model. But `from_pretrained` may have spread the weights while it loaded
them, and a second call of `train` finds what the first has left.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...core.facts import FSDPModule, is_distributed, is_fsdp_module


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
_WRAPPERS = ("torch.distributed.fsdp", "deepspeed")
_SHARED = ("torch.distributed.device_mesh", "transformers.distributed", "torch.distributed.distributed_c10d")


def whole_like(parameter: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the shape that a parameter has as a whole: of FSDP2 (a DTensor), of ZeRO-3, or of neither."""
    shape = getattr(parameter, "ds_shape", None)
    if shape is not None:
        return torch.empty(shape, dtype=parameter.dtype, device="meta", requires_grad=parameter.requires_grad)
    return parameter.detach()


def num_elements(parameter: torch.Tensor) -> int:
    """Return how many numbers the whole of a parameter has."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def storage_numel(parameter: torch.Tensor) -> int:
    """Return for how many numbers there is room where the piece of a DTensor lies; 0 for other tensors."""
    if not is_distributed(parameter):
        return 0
    return parameter.to_local().untyped_storage().nbytes() // parameter.element_size()


@contextmanager
def without_wrapping(model: nn.Module) -> Iterator[dict[int, Any]]:
    """Context in which no module of a model has classes, hooks or containers of FSDP2 or DeepSpeed.

    Yields:
        What `copy.deepcopy` is to share: device meshes and process groups, which can't be copied.
    """
    shared: dict[int, Any] = {}
    with ExitStack() as stack:
        for module in model.modules():
            values = vars(module)
            for value in values.values():
                if type(value).__module__.startswith(_SHARED):
                    shared[id(value)] = value
            if is_fsdp_module(module):
                stack.callback(setattr, module, "__class__", type(module))
                module.__class__ = next(cls for cls in type(module).__mro__[1:] if not issubclass(cls, FSDPModule))
            for name in _HOOKS:
                hooks = values.get(name)
                if hooks and any(_is_of_wrapper(hook) for hook in hooks.values()):
                    stack.callback(values.__setitem__, name, hooks)
                    values[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_of_wrapper(hook))
            if type(values["_parameters"]).__module__.startswith(_WRAPPERS):
                stack.callback(values.__setitem__, "_parameters", values["_parameters"])
                values["_parameters"] = dict(values["_parameters"])
            for name in [name for name, value in values.items() if _is_state(name, value)]:
                stack.callback(values.__setitem__, name, values.pop(name))
        yield shared


def _is_of_wrapper(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return type(owner).__module__.startswith(_WRAPPERS) or getattr(hook, "__module__", "").startswith(_WRAPPERS)


def _is_state(name: str, value: Any) -> bool:
    """Whether an attribute of a module is what FSDP2 or DeepSpeed keeps there."""
    if name in ("pre_bwd_fn", "post_bwd_fn", "_original_parameters"):
        return True
    if isinstance(value, nn.Module | torch.Tensor) or name in ("_parameters", "_buffers", "_modules", *_HOOKS):
        return False
    values = value.values() if isinstance(value, Mapping) else [value]
    return any(type(inner).__module__.startswith(_WRAPPERS) for inner in values)
