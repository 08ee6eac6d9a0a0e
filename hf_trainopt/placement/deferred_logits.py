"""What a model returns in place of logits that were never computed."""

import torch


class LogitsNotComputedError(RuntimeError, AttributeError):
    """Logits were used that the chunked loss has not computed.

    An `AttributeError` too, so that `hasattr` says no: libraries that look for tensors among outputs (accelerate's
    conversion to fp32) then pass the object on as it is.
    """


class DeferredLogits:
    """Stands where logits would: knows what they are computed from, and raises when it is taken for them.

    It holds the hidden states, and with them the graph of the model's forward pass, as long as it lives itself:
    `outputs.logits` usually dies with `outputs` at the end of `Trainer.compute_loss`, before the backward pass. A
    weak reference would make `materialize` fail at once, since nothing else holds the last hidden states by then.

    Args:
        hidden: The inputs of the head.
        head: The head, a `torch.nn.Linear`.
        head_forward: What the head runs when nothing is deferred.
    """

    __slots__ = ("_head", "_head_forward", "_hidden")

    def __init__(self, hidden: torch.Tensor, head: torch.nn.Linear, head_forward):
        self._hidden = hidden
        self._head = head
        self._head_forward = head_forward

    def materialize(self) -> torch.Tensor:
        """Return the real logits: computes all of them, with the memory that this takes."""
        return self._head_forward(self._hidden)

    # What some models do to logits before the loss and what does not change the loss (it computes in fp32 or wider
    # by itself).
    def contiguous(self) -> "DeferredLogits":
        return self

    def float(self) -> "DeferredLogits":
        return self

    def __repr__(self) -> str:
        return f"DeferredLogits({self._head.out_features} classes, not computed; see materialize())"

    def __getattr__(self, name: str):
        raise _error(f"`logits.{name}` was asked for")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise _error(f"`{getattr(function, '__name__', function)}` was called on logits")

    def __array__(self, *args, **kwargs):
        raise _error("logits were converted to an array")

    # `==` raises below, and would otherwise take the hash away; it stays that of the object.
    __hash__ = object.__hash__


def _error(what: str) -> LogitsNotComputedError:
    return LogitsNotComputedError(
        f"{what}, but logits are not computed while training with the chunked loss. Call `logits.materialize()` to "
        "compute them all, or switch `memory_rewrites` off."
    )


def _raising(name: str):
    def method(self, *args, **kwargs):
        raise _error(f"`{name}` was applied to logits")

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
    setattr(DeferredLogits, f"__{_name}__", _raising(f"__{_name}__"))
