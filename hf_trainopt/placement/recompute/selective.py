"""Selective recomputation: a stage is recomputed but for the outputs of some of its compute-bound operators.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` is not used, because it goes wrong without an error for
random operators: if an attention with dropout is cached, the recomputation skips it, and with it its draw from the
random number generator. All dropouts that follow then have other masks than in the forward pass, and the gradients
are those of another function (`tests/test_placement_selective.py` shows it). Here the state of the generators is
recorded in the forward pass before the first random operator that follows a cached one, and set in the recomputation.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_trainopt.machine.random_state import TorchRandomState, devices_of
from hf_trainopt.placement.errors import ModifiedOutputError


# Operators whose time grows faster than the size of what they write: matrix products, convolutions, attention.
# Names of `torch.ops.aten`, all overloads without `out`. `F.linear`, `torch.matmul` and `torch.einsum` end in these.
COMPUTE_OPS = frozenset(
    {
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "addbmm",
        "linear",
        "_scaled_mm",
        "_grouped_mm",
        "_scaled_grouped_mm",
        "_int_mm",
        "convolution",
        "_convolution",
        "convolution_overrideable",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps",
        "_flash_attention_forward",
        "_efficient_attention_forward",
        "_cudnn_attention_forward",
    }
)
# Products of layers with 4 or 8 bits, of bitsandbytes. In the plan's `QuantizedLinear` an operator of `COMPUTE_OPS`
# stands in the place of each.
QUANTIZED_OPS = frozenset({"gemm_4bit", "int8_mixed_scaled_mm", "int8_scaled_mm"})


@functools.cache
def is_compute_op(func: Any) -> bool:
    """Whether an operator, as `__torch_dispatch__` gets it, is numbered by `StageChoice.saved_ops`."""
    if not isinstance(func, torch._ops.OpOverload):
        return False
    namespace, _, name = func._schema.name.partition("::")
    if namespace == "bitsandbytes":
        return name in QUANTIZED_OPS
    return namespace == "aten" and name in COMPUTE_OPS and not func._overloadname.endswith("out")


@functools.cache
def is_random_op(func: Any) -> bool:
    """Whether an operator may draw from a random number generator (PyTorch's tag says so)."""
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def selective_contexts(
    saved_ops: Iterable[int], stage: str, counted: Callable[[Any], bool] = is_compute_op
) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the contexts of the forward pass and of the recomputation of one call of a stage.

    The first recomputation takes the saved outputs out of the cache, one by one as they are used; what is left when
    it ends (it can end early) is freed. A later one (backward twice over a retained graph) computes everything.

    Args:
        saved_ops: Numbers of the operators whose outputs are saved, from 0 in the order of the forward pass.
        stage: Name of the stage, for errors.
        counted: Which operators are numbered.
    """
    cache = _Cache(frozenset(saved_ops), stage, counted)
    return _Storing(cache), _Reusing(cache)


class _Saved:
    """A saved output and its version.

    Detached, as PyTorch does it, so that it holds no graph (a graph that holds the cache: a cycle that is never
    freed), and so that it can become the output of the recomputed operator. The detached tensor shares its version
    counter with the output.
    """

    def __init__(self, tensor: torch.Tensor):
        # Beneath autograd, `detach` gives a view whose version counter is its own unless this key is let through.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor = tensor.detach()
        self.version = self.tensor._version


class _Cache:
    """What the forward pass hands to the recomputation. It refers to neither mode: no reference cycle."""

    def __init__(self, saved_ops: frozenset[int], stage: str, counted: Callable[[Any], bool]):
        self.saved_ops = saved_ops
        self.stage = stage
        self.counted = counted
        self.operators: list[Any] = []  # the numbered ones, in order
        self.outputs: dict[int, Any] = {}
        self.aliases: dict[int, list[_Saved]] = {}
        self.random_states: dict[int, TorchRandomState] = {}  # by number of the random operator

    def save(self, index: int, output: Any) -> None:
        self.outputs[index] = tree_map(lambda x: _Saved(x) if isinstance(x, torch.Tensor) else x, output)

    def watch_alias(self, output: torch.Tensor) -> None:
        """Watch an `_unsafe_view` of a saved output: the same storage, but a version counter of its own."""
        storage = output.untyped_storage()._cdata
        for index, saved in self.outputs.items():
            if any(
                isinstance(leaf, _Saved) and leaf.tensor.untyped_storage()._cdata == storage
                for leaf in tree_leaves(saved)
            ):
                self.aliases.setdefault(index, []).append(_Saved(output))

    def check(self, index: int) -> None:
        """Raise `ModifiedOutputError` if a saved output was written to after it was saved."""
        for saved in [*tree_leaves(self.outputs[index]), *self.aliases.get(index, [])]:
            if isinstance(saved, _Saved) and saved.tensor._version != saved.version:
                raise ModifiedOutputError(
                    index,
                    f"the output of operator {index} ({self.operators[index]}) of stage '{self.stage}' is saved, but "
                    "was modified in place afterwards (for example by an activation function with inplace=True); "
                    f"leave {index} out of saved_ops.",
                )

    def take(self, index: int) -> Any:
        """Return a saved output and forget it."""
        self.check(index)
        self.aliases.pop(index, None)  # they hold the storage too
        return tree_map(lambda x: x.tensor if isinstance(x, _Saved) else x, self.outputs.pop(index))


class _Storing(TorchDispatchMode):
    """Context of the forward pass: saves outputs, and the states of generators that would be lost with them."""

    def __init__(self, cache: _Cache):
        super().__init__()
        self._cache = cache
        self._randoms = 0
        self._skipped = False  # whether the recomputation will have skipped a draw since the last recorded state
        self._skipped_on: set[torch.device] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        cache = self._cache
        kwargs = kwargs or {}
        counted = cache.counted(func)
        index = len(cache.operators)
        saved = counted and index in cache.saved_ops
        if is_random_op(func):
            if saved:
                self._skipped = True
                self._skipped_on.update(devices_of(tree_leaves((args, kwargs))))
            elif self._skipped:
                cache.random_states[self._randoms] = TorchRandomState(self._skipped_on)
                self._skipped = False
                self._skipped_on.clear()
            self._randoms += 1
        output = func(*args, **kwargs)
        if counted:
            cache.operators.append(func)
        if saved:
            cache.save(index, output)
        if func is torch.ops.aten._unsafe_view.default:
            cache.watch_alias(output)
        return output

    def __exit__(self, exception_type, *exception):
        super().__exit__(exception_type, *exception)
        if exception_type is not None:
            return
        cache = self._cache
        missing = [index for index in sorted(cache.saved_ops) if index >= len(cache.operators)]
        if missing:
            raise RuntimeError(
                f"saved_ops of stage '{cache.stage}' names {missing}, but its forward pass ran only "
                f"{len(cache.operators)} compute-bound operators; make the plan for this model, precision and "
                "attention implementation."
            )
        for index in cache.outputs:  # now rather than in the backward pass
            cache.check(index)


class _Reusing(TorchDispatchMode):
    """Context of a recomputation: returns saved outputs instead of computing them."""

    def __init__(self, cache: _Cache):
        super().__init__()
        self._cache = cache
        self._index = 0
        self._randoms = 0

    def __enter__(self):
        self._index = 0
        self._randoms = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        cache = self._cache
        state = None
        if is_random_op(func):
            state = cache.random_states.get(self._randoms)
            self._randoms += 1
        if cache.counted(func):
            index = self._index
            self._index += 1
            if index >= len(cache.operators) or cache.operators[index] is not func:
                found = cache.operators[index] if index < len(cache.operators) else "no more"
                raise RuntimeError(self._differs(f"operator {index} was {found}, and is {func} now"))
            if index in cache.outputs:
                return cache.take(index)
        if state is not None:
            state.restore()
        return func(*args, **(kwargs or {}))

    def __exit__(self, exception_type, *exception):
        super().__exit__(exception_type, *exception)
        cache = self._cache
        cache.outputs.clear()
        cache.aliases.clear()
        # Early stopping is an exception: then the last operators are missing rightly.
        if exception_type is None and self._index != len(cache.operators):
            raise RuntimeError(self._differs(f"{len(cache.operators)} operators ran, and {self._index} now"))

    def _differs(self, how: str) -> str:
        return (
            f"the recomputation of stage '{self._cache.stage}' runs other compute-bound operators than its forward "
            f"pass: {how}; choose recompute='full' or 'none' for a stage whose operators depend on outside state."
        )
