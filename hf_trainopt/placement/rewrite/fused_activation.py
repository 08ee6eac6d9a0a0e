"""Activation functions written out in single operations, replaced by fused kernels of the same function.

An activation such as GPT-2's `gelu_new` keeps every intermediate for the backward pass (four tensors of the size of
its input); a fused kernel keeps the input only. Nothing is taken for granted from a name: each module is compared
with the kernel in value and gradient, and so is what both keep.
"""

import functools
import re
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from .overrides import Overrides


# Which modules are looked at. `GELU` of torch.nn and the like are fused already: the comparison of what is kept
# leaves them alone.
_NAMES = re.compile(r"gelu|silu|swish|mish|hardsigmoid", re.IGNORECASE)

# Largest difference, relative to 1 + |value|. fp64: constants such as sqrt(2/π) are written with 10 digits in some
# classes. The functions themselves lie far apart: the two forms of GELU differ by up to 5e-4.
_TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-9}


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """`x · sigmoid(1.702 x)`: keeps 1.702 x instead of x and the sigmoid."""
    return F.silu(1.702 * x) / 1.702


_KERNELS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    functools.partial(F.gelu, approximate="tanh"),
    F.gelu,
    F.silu,
    F.mish,
    F.hardswish,
    F.hardsigmoid,
    _quick_gelu,
)


def fusable_activations(model: torch.nn.Module) -> list[str]:
    """Return the names of the modules whose activation function has a fused kernel that keeps less memory."""
    return [name for name, _, _ in _find(model)]


def apply_fused_activations(model: torch.nn.Module) -> Overrides:
    """Let the modules that `fusable_activations` names run the fused kernel; return what undoes it.

    `forward` is replaced on the instances. Results change by rounding. A written-out form may run in fp32 under
    autocast (`pow` is on its list) where the fused kernel takes the type it is given and computes in fp32 inside.

    Raises:
        ValueError: There is no such module.
    """
    overrides = Overrides()
    for _, module, kernel in _find(model):
        overrides.set(module, "forward", kernel)
    if not overrides:
        raise ValueError(
            f"no activation function of {type(model).__name__} has a fused kernel that keeps less memory; "
            "switch fused_activations off for this model."
        )
    return overrides


def _find(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, Callable]]:
    for name, module in model.named_modules():
        if _is_candidate(module) and (kernel := _kernel_of(module)) is not None:
            yield name, module, kernel


def _is_candidate(module: torch.nn.Module) -> bool:
    return (
        _NAMES.search(type(module).__name__) is not None
        and "forward" not in module.__dict__
        and not any(True for _ in module.children())
        and not any(True for _ in module.parameters())
        and not any(True for _ in module.buffers())
        and not any(module is shared for shared in _shared_instances())
    )


def _shared_instances() -> list[torch.nn.Module]:
    """Return the modules that transformers keeps as global objects: every model that uses one shares it."""
    from transformers import activations

    return [value for value in vars(activations).values() if isinstance(value, torch.nn.Module)]


def _kernel_of(module: torch.nn.Module) -> Callable | None:
    # Planning happens under fake tensors and under modes that count: this comparison is neither part of the model
    # nor of its memory, and it needs numbers.
    with _disable_current_modes(), torch.autocast("cpu", enabled=False), torch.enable_grad():
        try:
            expected = {dtype: _probe(module, dtype) for dtype in _TOLERANCES}
        except Exception:  # Any error means: not a function of one tensor.
            return None
        for kernel in _KERNELS:
            found = {dtype: _probe(kernel, dtype) for dtype in _TOLERANCES}
            if all(_agree(expected[dtype], found[dtype], dtype) for dtype in _TOLERANCES):
                return kernel if found[torch.float32][2] < expected[torch.float32][2] else None
    return None


def _probe(function: Callable, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return values and gradients of `function` at fixed points, and the bytes that it keeps for the gradients."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    points = torch.randn(4096, generator=generator, dtype=torch.float64, device="cpu")
    special = torch.tensor([0.0, 1e-4, -1e-4, 3.0, -3.0, 20.0, -20.0], dtype=torch.float64, device="cpu")
    x = torch.cat([points, 4 * points, special]).to(dtype).requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # `* 1`: forms that write into their input must not meet a leaf.
        y = function(x * 1)
        if y.shape != x.shape or y.dtype != x.dtype:
            raise ValueError("not elementwise")
    return y.detach().clone(), torch.autograd.grad(y.sum(), x)[0], sum(kept.values())


def _agree(expected: tuple, found: tuple, dtype: torch.dtype) -> bool:
    return all(
        bool(((a - b).abs() <= _TOLERANCES[dtype] * (1 + a.abs())).all())
        for a, b in zip(expected[:2], found[:2], strict=True)
    )
