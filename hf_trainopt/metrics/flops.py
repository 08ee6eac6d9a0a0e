"""FLOPs of one real optimizer step, and what a device could do at best."""

import itertools
import logging
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    is_in_torch_dispatch_mode,
)
from transformers import TrainingArguments

from ..core.facts import is_compiled, ranks_per_micro_batch
from ..machine.costs import FORMULAS as PLANNED_FORMULAS
from ..machine.costs import attention_backward_flops, attention_flops
from ..machine.devices import DEVICES


logger = logging.getLogger(__name__)

_aten = torch.ops.aten

# Those of plans, and of the CPU's attention.
FORMULAS = {
    **PLANNED_FORMULAS,
    _aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}

# Names of forms of a GPU whose peak is not that in `DEVICES`, or may not be.
_OTHER_FORMS = {"laptop", "mobile", "max", "d", "ti", "super", "nvl", "fhhl", "mig"}
_SLOWER_ON_PCIE = {"v100", "h100"}


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step on one rank.

    Args:
        total: Everything that ran: hardware FLOPs.
        recomputed: Those in forward passes that activation checkpointing ran again.
        optimizer: Those of the optimizer's step.
        dtype: Type of the numbers in which most of them were done.
        is_convolution: Whether most of them are convolutions.
    """

    total: int
    recomputed: int
    optimizer: int
    dtype: torch.dtype
    is_convolution: bool

    @property
    def model(self) -> int:
        """Model FLOPs: of one forward and one backward pass, however much is computed twice (PaLM, appendix B)."""
        return self.total - self.recomputed - self.optimizer


class FlopCounter(TorchDispatchMode):
    """Context in which the FLOPs of operators are counted, by PyTorch's formulas (`torch.utils.flop_counter`).

    Matrix products, convolutions and attention are counted, as two FLOPs for each multiplication and addition; what
    has no formula (elementwise operators, custom and compiled kernels) counts as nothing. Fused attention counts as in
    PyTorch: whole score matrices, causal or not, which the backward pass computes once more.

    A forward pass within a backward pass is one that activation checkpointing runs again: autograd switches gradients
    off in a backward pass, and a recomputation on again. (Gradients of gradients, `create_graph=True`, look the same.)

    `FlopCounterMode` itself sees no difference between the two, follows modules with hooks on all of them, and refuses
    operators of higher order, such as flex attention, that it does not know.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else torch.compile would not compile within, and fail where it must

    def __init__(self):
        super().__init__()
        self.in_optimizer = False
        self.is_over = False
        self.error: Exception | None = None
        self._flops: Counter[str] = Counter()
        self._kinds: Counter[tuple[torch.dtype, bool]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", func)
        if packet in FORMULAS and self.error is None and not self.is_over:
            try:
                self._count(packet, FORMULAS[packet](*args, **kwargs, out_val=out), args)
            except Exception as error:  # training goes on without a count
                self.error = error
        return out

    def _count(self, packet: Any, flops: int, args: tuple[Any, ...]) -> None:
        if self.in_optimizer:
            self._flops["optimizer"] += flops
        elif torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            self._flops["recomputed"] += flops
        else:
            self._flops["model"] += flops
        dtype = next((arg.dtype for arg in args if isinstance(arg, torch.Tensor)), torch.float32)
        self._kinds[dtype, "conv" in str(packet)] += flops

    def restart(self) -> None:
        """Count from zero again."""
        self._flops.clear()
        self._kinds.clear()

    def leave(self) -> bool:
        """End the count, and the context unless a mode that was entered later is still active; return whether."""
        self.is_over = True
        if _get_current_dispatch_mode() is not self:
            return False
        self.__exit__(None, None, None)
        return True

    def result(self) -> StepFlops | None:
        """Return what was counted; `None` if that is nothing or a formula has failed."""
        if self.error is not None or not self._kinds:
            return None
        (dtype, is_convolution), _ = self._kinds.most_common(1)[0]
        flops = self._flops
        return StepFlops(flops.total(), flops["recomputed"], flops["optimizer"], dtype, is_convolution)


def why_not_counted(args: TrainingArguments, model: torch.nn.Module) -> str | None:
    """Return why the FLOPs of a step cannot be counted now, if so."""
    if is_compiled(args, model):
        return "the model is compiled"
    if args.n_gpu > 1:
        return "nn.DataParallel runs the model in threads"
    if ranks_per_micro_batch(args) > 1:
        return "ranks share operators (tensor, context or sequence parallelism)"
    if is_in_torch_dispatch_mode():
        return "another TorchDispatchMode is active"
    return None


def peak_flops(device_name: str, dtype: torch.dtype, is_convolution: bool = False) -> float | None:
    """Return the FLOP/s of matrix products that a device can do at best; `None` if its peak is not known.

    Args:
        device_name: As `torch.cuda.get_device_name` has it.
        dtype: Type of the numbers that are multiplied. float32 is taken as TF32 where PyTorch is set to use that.
        is_convolution: Whether convolutions are meant, for which TF32 is a setting of its own.
    """
    words = [word for word in re.split(r"[^a-z0-9]+", device_name.lower()) if word]
    words += [first + second for first, second in itertools.pairwise(words)]  # "RTX 4090"
    found = [name for name in words if name in DEVICES and DEVICES[name].kind == "cuda"]
    if not found or _OTHER_FORMS & set(words) or ("pcie" in words and found[0] in _SLOWER_ON_PCIE):
        return None
    rates = DEVICES[found[0]].flops
    backend = torch.backends.cudnn.conv if is_convolution else torch.backends.cuda.matmul
    if dtype == torch.float32 and backend.fp32_precision == "tf32" and found[0] not in ("t4", "v100"):
        return rates[torch.float16] / 2  # on all tensor cores since Ampere
    return rates.get(dtype)


def device_peak_flops(device: torch.device, flops: StepFlops) -> float | None:
    """Return the best FLOP/s of a device in the type of numbers that a step uses; `None` if that is not known."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), flops.dtype, flops.is_convolution)
