"""What a model returns in place of logits that were never computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map


class LogitsNotComputedError(RuntimeError, AttributeError):
    """Logits were used that the chunked loss has not computed.

    An `AttributeError` too, so that `hasattr` says no: libraries that look for tensors among outputs (accelerate's
    conversion to fp32) then pass the object on as it is.
    """


class DeferredLogits:
    """Stands where logits would: knows what they are computed from.

    When it is taken for them, it raises, or where it is given `on_use` computes them: all operations of tensors then
    work on it.

    It holds the hidden states, and with them the graph of the model's forward pass, as long as it lives itself:
    `outputs.logits` usually dies with `outputs` at the end of `Trainer.compute_loss`, before the backward pass. A
    weak reference would make `materialize` fail at once, since nothing else holds the last hidden states by then.

    Args:
        hidden: The inputs of the head.
        head: The head, a `torch.nn.Linear`.
        head_forward: What the head runs when nothing is deferred.
        on_use: Called with what is done to the logits before they are computed for it; `None`: that is an error.
    """

    __slots__ = ("_autocast", "_head", "_head_forward", "_hidden", "_is_float", "_logits", "_on_use")

    def __init__(
        self,
        hidden: torch.Tensor,
        head: torch.nn.Linear,
        head_forward: Callable[[torch.Tensor], torch.Tensor],
        on_use: Callable[[str], None] | None = None,
    ):
        self._hidden = hidden
        self._head = head
        self._head_forward = head_forward
        self._on_use = on_use
        self._is_float = False
        self._logits: torch.Tensor | None = None
        # Logits may be asked for outside the context in which the model ran.
        kind = hidden.device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def materialize(self) -> torch.Tensor:
        """Return the real logits: computes all of them (once), with the memory that this takes."""
        if self._logits is None:
            kind, dtype, enabled = self._autocast
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                self._logits = self._head_forward(self._hidden)
            if self._is_float:
                self._logits = self._logits.float()
        return self._logits

    def _used(self, what: str) -> torch.Tensor:
        if self._on_use is None:
            raise _error(what)
        self._on_use(what)
        return self.materialize()

    # What some models do to logits before the loss and what does not change the loss (it computes in fp32 or wider
    # by itself).
    def contiguous(self) -> "DeferredLogits":
        return self

    def float(self) -> "DeferredLogits":
        if self._is_float or self._on_use is None:
            return self
        wide = DeferredLogits(self._hidden, self._head, self._head_forward, self._on_use)
        wide._autocast, wide._is_float = self._autocast, True
        return wide

    def __repr__(self) -> str:
        return f"DeferredLogits({self._head.out_features} classes, not computed; see materialize())"

    def __getattr__(self, name: str):
        if name.startswith("_"):  # protocols (copying, arrays of other libraries), slots that are not set yet
            raise AttributeError(name)
        if self._on_use is not None and name in _KNOWN:
            return _KNOWN[name](self)  # computes nothing: Accelerate asks each output for its type
        return getattr(self._used(f"`logits.{name}` was asked for"), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        what = f"`{getattr(function, '__name__', function)}` was called on logits"

        def real(value: Any) -> Any:
            return value._used(what) if isinstance(value, DeferredLogits) else value

        args, kwargs = tree_map(real, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __array__(self, *args, **kwargs):
        return self._used("logits were converted to an array").__array__(*args, **kwargs)

    # `==` raises below, and would otherwise take the hash away; it stays that of the object.
    __hash__ = object.__hash__


def _error(what: str) -> LogitsNotComputedError:
    return LogitsNotComputedError(
        f"{what}, but logits are not computed while training with the chunked loss. Call `logits.materialize()` to "
        "compute them all, or switch `memory_rewrites` off."
    )


def _dtype(logits: DeferredLogits) -> torch.dtype:
    if logits._is_float:
        return torch.float32
    _, dtype, enabled = logits._autocast
    return dtype if enabled else torch.promote_types(logits._hidden.dtype, logits._head.weight.dtype)


# What is known of logits before they are computed.
_KNOWN: dict[str, Callable[[DeferredLogits], Any]] = {
    "dtype": _dtype,
    "device": lambda logits: logits._hidden.device,
    "shape": lambda logits: torch.Size((*logits._hidden.shape[:-1], logits._head.out_features)),
    "ndim": lambda logits: logits._hidden.ndim,
}


def _applied(name: str):
    def method(self, *args, **kwargs):
        return getattr(self._used(f"`{name}` was applied to logits"), name)(*args, **kwargs)

    method.__name__ = name
    return method


# Python looks these up on the class, past `__getattr__`.
_SPECIAL_METHODS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rmatmul", "rand", "ror", "rxor"),
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"),
    *("len", "iter", "bool", "getitem", "setitem", "contains", "float", "int", "index"),
)
for _name in _SPECIAL_METHODS:
    setattr(DeferredLogits, f"__{_name}__", _applied(f"__{_name}__"))
