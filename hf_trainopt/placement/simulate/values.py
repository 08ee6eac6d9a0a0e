"""Values in a replay: those of the batch are followed, numbers that the model computes may be recorded, not judged.

A replay knows shapes only, and many losses look at values. Some come from the batch: masks, lengths, counts of tokens.
`following_values` computes these beside the fake tensors, so that a branch or a shape that depends on them is what it
is for the example batch. The rest come from the model, mostly as metrics. They may be stored and computed with, as
`UnknownNumber`, and raise an error once a branch or a size depends on them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from transformers import masking_utils


# Larger tensors are not followed: nobody branches on them, and computing them takes time and memory.
_MOST_ELEMENTS = 2**22

# Operators whose results are not determined by their arguments, besides those that are tagged as random.
_UNDETERMINED = ("empty", "new_empty", "rand")


def known_pairs(fake: Any, batch: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the fake tensors of a batch, each with the real one."""
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    pairs = zip(tree_leaves(fake), leaves, strict=True)
    return [(fake, real) for fake, real in pairs if isinstance(real, torch.Tensor)]


class UnknownNumberError(RuntimeError):
    """A number that the model computes decides what is computed next."""


def _decides(what: str):
    def method(self, *args):
        raise UnknownNumberError(
            f"a number that the model computes decides what is computed next ({what} of its .item()), and a replay "
            "without memory has no such numbers"
        )

    return method


def _computed(name: str):
    def method(self, *args):
        result = getattr(float, name)(float.__float__(self), *(_plain(arg) for arg in args))
        return UnknownNumber(result) if isinstance(result, float) else result

    return method


def _plain(value: Any) -> Any:
    return float.__float__(value) if isinstance(value, UnknownNumber) else value


class UnknownNumber(float):
    """What `.item()` of a tensor with unknown values gives in a replay: to be stored, computed with and printed.

    To compare it, to ask for its truth or to make an integer of it raises `UnknownNumberError`. What `float`, `math`
    or NumPy make of it is a plain number that is not followed further.
    """

    __slots__ = ()
    __hash__ = float.__hash__


for _name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"):
    setattr(UnknownNumber, _name, _decides("a comparison"))
for _name in ("__int__", "__trunc__", "__floor__", "__ceil__"):
    setattr(UnknownNumber, _name, _decides("an integer"))
UnknownNumber.__bool__ = _decides("the truth")
for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "neg",
    "pos", "abs",
):  # fmt: skip
    setattr(UnknownNumber, f"__{_name}__", _computed(f"__{_name}__"))
UnknownNumber.__pow__ = UnknownNumber.__rpow__ = lambda self, *args: UnknownNumber(1.0)
UnknownNumber.__round__ = lambda self, digits=None: self if digits is not None else self.__int__()

# No other would be less of an error: divisions by it work, and so do logarithms of it.
UNKNOWN = UnknownNumber(1.0)


class _Storage:
    """Whether the values of a storage, which views share, are known."""

    def __init__(self):
        self.is_known = True


class _Known:
    """The value of a fake tensor, valid within one mode."""

    def __init__(self, value: torch.Tensor, storage: _Storage, mode: "KnownValues"):
        self.value, self.storage, self.mode = value, storage, mode


class KnownValues(TorchDispatchMode):
    """Computes, beside the fake tensors, the values that follow from the batch and from constants alone.

    Values are those of small tensors on the CPU. They are copies: nothing real is written to.

    Args:
        known: Fake tensors, each with a real one of the same shape.
    """

    def __init__(self, known: Iterable[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__()
        self._written: set[int] = set()
        with _disable_current_modes():
            for fake, real in known:
                if real.numel() <= _MOST_ELEMENTS:
                    self._attach(fake, real.detach().cpu().clone(), _Storage())

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the value of a tensor; `None` if it is not known."""
        if isinstance(tensor, FakeTensor):
            known = self._known(tensor)
            return None if known is None else known.value
        is_constant = tensor.device.type == "cpu" and not isinstance(tensor, torch.nn.Parameter)
        if not is_constant or tensor.numel() > _MOST_ELEMENTS or id(tensor) in self._written:
            return None
        with _disable_current_modes():
            return tensor.detach().clone()

    def assume(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Make the value of a fake tensor known."""
        self._attach(tensor, value, _Storage())

    def _known(self, tensor: torch.Tensor) -> _Known | None:
        known = getattr(tensor, "_hf_trainopt_known", None)
        return known if known is not None and known.mode is self and known.storage.is_known else None

    def _attach(self, fake: torch.Tensor, value: torch.Tensor, storage: _Storage) -> None:
        fake._hf_trainopt_known = _Known(value, storage, self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_known = _is_determined(func) and all(self.value(tensor) is not None for tensor in tensors)
        if not is_known:
            self._forget_written(func, args, kwargs)
            if func is torch.ops.aten.masked_select.default and (mask := self.value(args[1])) is not None:
                return args[0].new_empty(self._num_selected(args[0].shape, mask))
            return func(*self._with_indices(func, args), **kwargs)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            real = self._run(func, args, kwargs)
            out = tree_map(lambda leaf: self._faked(leaf) if isinstance(leaf, torch.Tensor) else leaf, real)
        else:
            fakes = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            if any(fake.numel() > _MOST_ELEMENTS for fake in fakes):
                self._forget_written(func, args, kwargs)
                return out
            real = self._run(func, args, kwargs)
        if any(not isinstance(tensor, FakeTensor) for tensor in _written(func, args, kwargs)):
            self._forget_written(func, args, kwargs)  # only its copy has been written to
        self._keep(func, tensors, out, real)
        return out

    def _run(self, func, args, kwargs):
        args, kwargs = tree_map(
            lambda leaf: self.value(leaf) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
        )
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _keep(self, func, tensors: list[torch.Tensor], out: Any, real: Any) -> None:
        """Keep the values of what an operator returned; views share the storage of the tensor that they are of."""
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        known = self._known(tensors[0]) if is_view and tensors and isinstance(tensors[0], FakeTensor) else None
        storage = _Storage() if known is None else known.storage
        for fake, value in zip(tree_leaves(out), tree_leaves(real), strict=False):
            if isinstance(fake, FakeTensor) and not any(fake is tensor for tensor in tensors):
                self._attach(fake, value, storage)

    def _forget_written(self, func, args, kwargs) -> None:
        for tensor in _written(func, args, kwargs):
            if not isinstance(tensor, FakeTensor):
                self._written.add(id(tensor))
            elif (known := self._known(tensor)) is not None:
                known.storage.is_known = False

    def _with_indices(self, func, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of an operator that takes a known mask with the places where the mask is true."""
        if func._overloadpacket not in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            return args
        indices = []
        for index in args[1]:
            value = None if index is None or index.dtype not in (torch.bool, torch.uint8) else self.value(index)
            if value is None:
                indices.append(index)
                continue
            with _disable_current_modes():
                places = value.nonzero().unbind(1)
            indices += [self._faked(place) for place in places]
        return (args[0], indices, *args[2:])

    @staticmethod
    def _num_selected(shape: torch.Size, mask: torch.Tensor) -> int:
        with _disable_current_modes():
            return int(mask.expand(torch.broadcast_shapes(shape, mask.shape)).sum())

    def _faked(self, value: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


@cache
def _is_determined(func) -> bool:
    name = func._schema.name.partition("::")[2]
    is_random = torch.Tag.nondeterministic_seeded in func.tags
    return not is_random and not name.startswith(_UNDETERMINED)


@cache
def _places_written(func) -> tuple[int, ...]:
    arguments = func._schema.arguments
    return tuple(
        index
        for index, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _written(func, args, kwargs) -> list[torch.Tensor]:
    """Return the tensors that an operator writes to."""
    found = []
    for place in _places_written(func):
        name = func._schema.arguments[place].name
        written = args[place] if place < len(args) else kwargs.get(name)
        found += [leaf for leaf in tree_leaves(written) if isinstance(leaf, torch.Tensor)]
    return found


class _Reads(TorchFunctionMode):
    """Answers `.item()` and its like: with the value where it is known, else with an unknown number."""

    def __init__(self, values: KnownValues):
        super().__init__()
        self._values = values
        self.assumed = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = args[0] if args else None
        if not isinstance(tensor, FakeTensor) or func not in _READS:
            return func(*args, **kwargs)
        value = self._values.value(tensor)
        if func in (torch.isnan, torch.isinf, torch.isfinite):
            out = func(*args, **kwargs)
            if value is None and out.numel() <= _MOST_ELEMENTS:  # a run that goes well
                with _disable_current_modes():
                    value = torch.full(out.shape, func is torch.isfinite)
                self._values.assume(out, value)
            return out
        if value is not None:
            with _disable_current_modes():
                return func(value, *args[1:], **kwargs)
        if func is torch.Tensor.tolist:
            self.assumed += 1
            return _nested(tuple(tensor.shape))
        if func is torch.Tensor.item and tensor.numel() == 1:
            self.assumed += 1
            return UNKNOWN
        if func is torch.Tensor.__float__ and tensor.numel() == 1:
            self.assumed += 1
            return float.__float__(UNKNOWN)
        if func is torch.Tensor.__format__ and tensor.dim() == 0:
            return format(float.__float__(UNKNOWN), *args[1:])
        return func(*args, **kwargs)


_READS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__bool__,
    torch.Tensor.__index__, torch.Tensor.__format__, torch.isnan, torch.isinf, torch.isfinite,
}  # fmt: skip


def _nested(shape: tuple[int, ...]) -> Any:
    return [_nested(shape[1:]) for _ in range(shape[0])] if shape else UNKNOWN


@contextmanager
def following_values(known: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[_Reads]:
    """Context in which fake tensors have the values that follow from `known`; enter it inside of the fake mode.

    Args:
        known: Fake tensors, each with a real one of the same shape.
    """
    values = KnownValues(known)
    stock = masking_utils.is_tracing

    def is_tracing(tensor=None):
        # Else transformers does not look at a mask, and keeps one of ones that a real run does without.
        return stock() if tensor is not None and values.value(tensor) is not None else stock(tensor)

    reads = _Reads(values)
    with ExitStack() as stack:
        masking_utils.is_tracing = is_tracing
        stack.callback(setattr, masking_utils, "is_tracing", stock)
        stack.enter_context(values)
        stack.enter_context(reads)
        yield reads
