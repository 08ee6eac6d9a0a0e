"""What operators take on this machine's processor: each kind of call run once on real numbers, and remembered."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten


# Calls on more than this are not run (memory, time), nor those on many tensors (an optimizer's): the roofline counts.
_MOST_BYTES = 2**31
_MOST_TENSORS = 12
# Calls are repeated until they have taken this long, the fastest counts.
_LONG_ENOUGH_S = 0.02
_MOST_REPEATS = 5


class MeasuredOps:
    """Times calls of operators on real tensors of the shapes, strides and types of fake ones."""

    def __init__(self):
        self._seconds: dict[Any, float | None] = {}

    def seconds(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
        """Return the time of a call; `None` where it was not measured.

        Args:
            func: Operator overload.
            args: Its arguments, with fake tensors or real ones.
            kwargs: Its keyword arguments.
        """
        leaves, structure = tree_flatten((tuple(args), dict(kwargs)))
        try:
            key = (func, structure, tuple(_key(leaf) for leaf in leaves))
            if key not in self._seconds:
                self._seconds[key] = self._measure(func, leaves, structure)
            return self._seconds[key]
        except TypeError:  # an argument that is no key
            return None

    @staticmethod
    def _measure(func: Any, leaves: list[Any], structure: Any) -> float | None:
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if len(tensors) > _MOST_TENSORS or sum(tensor.untyped_storage().nbytes() for tensor in tensors) > _MOST_BYTES:
            return None
        best, spent = float("inf"), 0.0
        try:
            with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng([]):
                args, kwargs = tree_unflatten([_real(leaf) for leaf in leaves], structure)
                func(*args, **kwargs)
                for _ in range(_MOST_REPEATS):
                    start = time.perf_counter()
                    func(*args, **kwargs)
                    taken = time.perf_counter() - start
                    best, spent = min(best, taken), spent + taken
                    if spent > _LONG_ENOUGH_S:
                        break
        except Exception:  # values that no made-up tensor can have
            return None
        return best


def _key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype
    hash(leaf)
    return type(leaf), leaf


def _real(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype)
    if leaf.dtype.is_floating_point:
        return made.normal_()
    # Indices must be within bounds.
    return made.zero_()
