"""Triton kernels in a replay: none of them runs. What they write to exists already, so memory is what it would be.

Those of Liger (`use_liger_kernel`) are what people train with; any other kernel is treated in the same way.
"""

import ast
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
        launched: Called for each launch with the bytes of the tensors that it is given, and no FLOPs: most kernels are
            bound by memory, and what others compute isn't known.
    """
    jit = sys.modules.get("triton.runtime.jit")
    if jit is None:  # nobody has imported Triton, so there are no kernels
        yield
        return
    known: dict[Callable[..., Any], frozenset[str]] = {}

    def launcher(kernel, grid):
        function = _function_of(kernel)
        if function not in known:
            known[function] = written_arguments(function)

        def launch(*args, **kwargs):
            named = dict(zip(inspect.signature(function).parameters, args, strict=False)) | kwargs
            named = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
            # A kernel that writes to nothing hasn't been understood.
            for name in (known[function] & named.keys()) or named:
                torch.autograd.graph.increment_version(named[name])
            launched(sum(tensor.nbytes for tensor in named.values()), 0, torch.float32)

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


def written_arguments(function: Callable[..., Any], callers: tuple[Callable[..., Any], ...] = ()) -> frozenset[str]:
    """Return the names of the arguments of a Triton kernel that it stores to, read off its source.

    An argument is one of them if the address of a store or of an atomic operation is computed from it (so strides are
    among them), directly or by variables, or if it is handed to another kernel function that stores to it. What is
    loaded is no address. All arguments are, if the source can't be read.

    Args:
        function: The Python function of the kernel.
        callers: Those whose sources are being read: what a recursive call stores to is found without it.
    """
    parameters = set(inspect.signature(function).parameters)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return frozenset(parameters)
    made_of: dict[str, set[str]] = {}
    addresses: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in set().union(*map(_names, targets)):
                made_of.setdefault(name, set()).update(_names(node.value))
        elif isinstance(node, ast.Call):
            addresses |= _stored_to(node, function, callers)
    while more := set().union(*(made_of.get(name, set()) for name in addresses)) - addresses:
        addresses |= more
    return frozenset(addresses & parameters)


def _names(node: ast.AST) -> set[str]:
    """Names in an expression, apart from those that only say what is loaded."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
        return set()
    if isinstance(node, ast.Name):
        return {node.id}
    return set().union(*map(_names, ast.iter_child_nodes(node)))


def _stored_to(call: ast.Call, function: Callable[..., Any], callers: tuple[Callable[..., Any], ...]) -> set[str]:
    """Names in the addresses that a call stores to."""
    named = {word.arg: word.value for word in call.keywords if word.arg}
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if called.startswith(("store", "atomic_")):  # tl.store(pointer, ...), and store(...) of a tensor descriptor
        owner = set() if not isinstance(call.func, ast.Attribute) else _names(call.func.value)
        address = call.args[:1] or [named[name] for name in ("pointer", "desc") if name in named]
        return owner.union(*map(_names, address))
    other = _global_of(call.func, function)
    if not hasattr(other, "fn") or not type(other).__module__.startswith("triton."):
        return set()
    other = _function_of(other)
    if other is function or other in callers:
        return set()
    handed = dict(zip(inspect.signature(other).parameters, call.args, strict=False)) | named
    written = written_arguments(other, (*callers, function))
    return set().union(*(_names(handed[name]) for name in written & handed.keys()))


def _global_of(node: ast.expr, function: Callable[..., Any]) -> Any:
    """Return what a name, dotted or not, stands for outside of a function; `None` if nothing."""
    if isinstance(node, ast.Attribute):
        return getattr(_global_of(node.value, function), node.attr, None)
    return function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
