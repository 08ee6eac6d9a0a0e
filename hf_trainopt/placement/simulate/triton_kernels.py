"""Triton kernels in a replay: none of them runs. What they write to exists already, so memory is what it would be.

Those of Liger (`use_liger_kernel`) are what people train with; any other kernel is treated in the same way.
"""

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


# Told of a kernel: bytes, FLOPs and the type of the numbers.
Launched = Callable[[int, int, torch.dtype], None]


@contextmanager
def triton_not_launched(launched: Launched) -> Iterator[None]:
    """Context in which launches of Triton kernels do nothing, except that arrays that they write to count as modified.

    Without that, an output that is kept for selective recomputation could be written to unnoticed: Triton doesn't tell
    autograd (Liger's rotary embedding overwrites queries and keys).

    Args:
        launched: Called for each launch; its bytes are those of the tensors that it is given.
    """
    jit = sys.modules.get("triton.runtime.jit")
    if jit is None:  # nobody has imported Triton, so there are no kernels
        yield
        return

    def launcher(kernel, grid):
        def launch(*args, **kwargs):
            named = _named_tensors(kernel, args, kwargs)
            for name in written_arguments(_function_of(kernel)) & named.keys():
                torch.autograd.graph.increment_version(named[name])
            launched(sum(tensor.numel() * tensor.element_size() for tensor in named.values()), 0, torch.float32)

        return launch

    stock = jit.KernelInterface.__getitem__
    jit.KernelInterface.__getitem__ = launcher
    try:
        yield
    finally:
        jit.KernelInterface.__getitem__ = stock


def _function_of(kernel: Any) -> Callable[..., Any]:
    """Return the Python function of a kernel, whatever it is wrapped in (autotuning, heuristics)."""
    while not inspect.isfunction(kernel):
        kernel = kernel.fn
    return kernel


def _named_tensors(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    named = dict(zip(inspect.signature(_function_of(kernel)).parameters, args, strict=False)) | kwargs
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


@functools.cache
def written_arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the arguments of a Triton kernel that it stores to, read off its source.

    An argument is one of them if the address of a store or of an atomic operation is computed from it (so strides are
    among them), directly or by variables, or if it is handed to another kernel function that stores to it. What is
    loaded is no address.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    made_of: dict[str, set[str]] = {}
    addresses: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in set().union(*map(_names, targets)):
                made_of.setdefault(name, set()).update(_names(node.value))
        elif isinstance(node, ast.Call):
            addresses |= _stored_to(node, function)
    while more := set().union(*(made_of.get(name, set()) for name in addresses)) - addresses:
        addresses |= more
    return frozenset(addresses & set(inspect.signature(function).parameters))


def _names(node: ast.AST) -> set[str]:
    """Names in an expression, apart from those that only say what is loaded."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
        return set()
    if isinstance(node, ast.Name):
        return {node.id}
    return set().union(*map(_names, ast.iter_child_nodes(node)))


def _stored_to(call: ast.Call, function: Callable[..., Any]) -> set[str]:
    """Names in the addresses that a call stores to."""
    if isinstance(call.func, ast.Attribute):
        is_store = call.func.attr == "store" or call.func.attr.startswith("atomic_")
        return _names(call.args[0]) if is_store and call.args else set()
    other = function.__globals__.get(call.func.id) if isinstance(call.func, ast.Name) else None
    if not hasattr(other, "fn") or not type(other).__module__.startswith("triton."):
        return set()
    other = _function_of(other)
    handed = dict(zip(inspect.signature(other).parameters, call.args, strict=False))
    handed |= {word.arg: word.value for word in call.keywords if word.arg}
    return set().union(*(_names(handed[name]) for name in written_arguments(other) & handed.keys()))
