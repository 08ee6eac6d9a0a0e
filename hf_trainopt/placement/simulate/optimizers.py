"""Optimizers whose packages aren't needed to plan for them: a table of the bytes that each keeps for a parameter.

The optimizers of PyTorch and transformers are replayed as they are. Those of other packages have kernels that take no
fake tensors. So a plan has a stand-in that keeps state of the same bytes and, as these kernels do, allocates nothing
while it steps.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


# Parts of a state: how many numbers, of which type.
State = list[tuple[int, torch.dtype]]

_FLOAT, _BYTE = torch.float32, torch.uint8
# Tensors with fewer numbers keep 32 bits (bitsandbytes' `min_8bit_size`; torchao follows it).
_LEAST_QUANTIZED = 4096
# Buffers of paged optimizers with fewer numbers stay on the device (bitsandbytes, `get_state_buffer`).
_LEAST_PAGED = 100_000
# Rank of GaLore's and APOLLO's projections in transformers.
_RANK = 128


@dataclass(frozen=True)
class Parameter:
    """What an optimizer's state depends on.

    Args:
        shape: Of the parameter.
        dtype: Of the parameter.
        is_embedding: Whether it is an embedding's, for which Trainer has bitsandbytes keep 32 bits.
        is_linear: Whether it is the weight of a linear layer, which low-rank optimizers project.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_embedding: bool = False
    is_linear: bool = False

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def _full(moments: int, dtype: torch.dtype | None = _FLOAT) -> Callable[[Parameter], State]:
    """Moments with a number for each of the parameter's; `None`: in its type."""
    return lambda p: [(p.numel, dtype or p.dtype)] * moments


def _bitsandbytes(moments: tuple[int, ...], bits: int, paged: bool = False) -> Callable[[Parameter], State]:
    """State of bitsandbytes: moments side by side in as many buffers; 8 bits have a scale for each 256 numbers.

    Paged buffers lie in memory that the driver moves to the host when the device is full: none of it has to fit.
    """

    def state(p: Parameter) -> State:
        parts: State = []
        quantized = bits == 8 and p.numel >= _LEAST_QUANTIZED and not p.is_embedding
        for count in moments:
            if not (paged and p.numel >= _LEAST_PAGED):
                parts.append((count * p.numel, _BYTE if quantized else _FLOAT))
            if quantized:
                parts.append((count * math.ceil(p.numel / 256), _FLOAT))
        return parts

    return state


def _torchao(bits: int, block: int) -> Callable[[Parameter], State]:
    """State of torchao's AdamW: codes, a scale for each block and the codes' values, for both moments."""

    def state(p: Parameter) -> State:
        if p.numel < _LEAST_QUANTIZED or p.numel % block:
            return [(p.numel, p.dtype)] * 2
        return [(p.numel * bits // 8, _BYTE), (p.numel // block, _FLOAT), (2**bits, _FLOAT)] * 2

    return state


def _low_rank(inner: Callable[[Parameter], State]) -> Callable[[Parameter], State]:
    """State of GaLore and APOLLO: the inner one's for gradients projected to rank 128, and the projection.

    For the weights of linear layers, which is what `optim_target_modules="all-linear"` projects (GaLore: Zhao et al.
    2024, arXiv:2403.03507, algorithm 1; the shorter side is projected).
    """

    def state(p: Parameter) -> State:
        if not p.is_linear:
            return inner(p)
        short, long = min(p.shape), max(p.shape)
        rank = min(_RANK, short)
        return [*inner(Parameter((long, rank), p.dtype)), (short * rank, p.dtype)]

    return state


_ADAFACTOR = lambda p: [(sum(p.shape), _FLOAT)] if len(p.shape) == 2 else [(p.numel, _FLOAT)]  # noqa: E731

# Names as in `--optim` -> state of a parameter.
STATES: dict[str, Callable[[Parameter], State]] = {
    "adamw_bnb_8bit": _bitsandbytes((1, 1), 8),
    "adamw_8bit": _bitsandbytes((1, 1), 8),
    "paged_adamw_32bit": _bitsandbytes((1, 1), 32, paged=True),
    "paged_adamw_8bit": _bitsandbytes((1, 1), 8, paged=True),
    "ademamix": _bitsandbytes((2, 1), 32),
    "ademamix_8bit": _bitsandbytes((2, 1), 8),
    "paged_ademamix_32bit": _bitsandbytes((2, 1), 32, paged=True),
    "paged_ademamix_8bit": _bitsandbytes((2, 1), 8, paged=True),
    "lion_32bit": _bitsandbytes((1,), 32),
    "lion_8bit": _bitsandbytes((1,), 8),
    "paged_lion_32bit": _bitsandbytes((1,), 32, paged=True),
    "paged_lion_8bit": _bitsandbytes((1,), 8, paged=True),
    "rmsprop_bnb": _bitsandbytes((1,), 32),
    "rmsprop_bnb_32bit": _bitsandbytes((1,), 32),
    "rmsprop_bnb_8bit": _bitsandbytes((1,), 8),
    "adamw_torch_8bit": _torchao(8, 256),
    "adamw_torch_4bit": _torchao(4, 256),
    "adamw_anyprecision": _full(2),
    "grokadamw": _full(3, None),
    "schedule_free_adamw": _full(2, None),
    "schedule_free_radam": _full(2, None),
    "schedule_free_sgd": _full(1, None),
    "stable_adamw": _full(2, None),
    "galore_adamw": _low_rank(_full(2, None)),
    "galore_adamw_8bit": _low_rank(_bitsandbytes((1, 1), 8)),
    "galore_adafactor": _low_rank(_ADAFACTOR),
    "apollo_adamw": _low_rank(_full(2, None)),
}
# Which bytes stay in memory that the driver can move to the host.
PAGED = tuple(name for name in STATES if name.startswith("paged_"))


def described(model: nn.Module) -> Iterable[tuple[nn.Parameter, Parameter]]:
    """Return each parameter of a model that is trained, with what an optimizer's state depends on; ties count once."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_weight = name == "weight"
            yield (
                parameter,
                Parameter(
                    tuple(parameter.shape),
                    parameter.dtype,
                    is_weight and isinstance(module, nn.Embedding),
                    is_weight and isinstance(module, nn.Linear),
                ),
            )


def name_of(optimizer: torch.optim.Optimizer | None) -> str | None:
    """Return what an optimizer is called: its class, or the one that it stands in for."""
    if isinstance(optimizer, TableOptimizer):
        return optimizer.name
    return None if optimizer is None else type(optimizer).__name__


class TableOptimizer(torch.optim.Optimizer):
    """Stand-in for an optimizer of the table: it keeps as many bytes, and changes nothing.

    Args:
        model: Whose trained parameters it has.
        name: A name in `STATES`.
    """

    def __init__(self, model: nn.Module, name: str):
        self.name = name
        self._descriptions = {id(parameter): kind for parameter, kind in described(model)}
        super().__init__([p for p in model.parameters() if p.requires_grad], {"lr": 0.0})

    def step(self, closure: Any = None) -> None:
        """Make the state of parameters that have a gradient and no state."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or self.state[parameter]:
                    continue
                # DeepSpeed puts flat partitions in the place of parameters.
                kind = self._descriptions.get(id(parameter)) or Parameter(tuple(parameter.shape), parameter.dtype)
                parts = STATES[self.name](kind)
                self.state[parameter] = {
                    str(index): torch.zeros(numel, dtype=dtype, device=parameter.device)
                    for index, (numel, dtype) in enumerate(parts)
                }
