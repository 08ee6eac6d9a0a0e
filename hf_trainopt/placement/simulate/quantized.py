"""Layers with weights of 4 or 8 bits (QLoRA) as shapes: what bitsandbytes keeps and allocates, without the package.

Read off bitsandbytes 0.50 (`autograd/_functions.py`, `backends/`). Their weights are frozen. A layer of 4 bits keeps
nothing for its backward pass, and one of 8 bits keeps its input.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


# Weights that share a scale, and scales that share one where they are quantized too.
_BLOCK, _BLOCK_OF_SCALES = 64, 256


@dataclass(frozen=True)
class Quantization:
    """How weights are kept.

    Args:
        bits: 4 or 8.
        compute_dtype: Type of the products of 4-bit layers (`bnb_4bit_compute_dtype`); `None`: of the input.
        double: Whether the scales of 4-bit layers are quantized too (`bnb_4bit_use_double_quant`).
    """

    bits: int
    compute_dtype: torch.dtype | None = None
    double: bool = False


def has_int8_kernels() -> bool:
    """Return whether products of 8-bit layers run on 8-bit numbers; on the CPU they don't."""
    return False


class _FourBit(torch.autograd.Function):
    """`MatMul4Bit`: a whole weight is there during each product."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dense(x.dtype), layer.bias_as(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return torch.matmul(grad, ctx.layer.dense(ctx.layer.whole_dtype).to(grad.dtype)), None


class _EightBit(torch.autograd.Function):
    """`MatMul8bitLt`, and `MatMul8bitFp` on the CPU. The input stays with the node: no recomputation frees it."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.x = layer, x
        if not has_int8_kernels():
            return F.linear(x, layer.dense(x.dtype), layer.bias_as(x.dtype))
        half = x.reshape(-1, x.shape[-1]).to(torch.float16)
        (half.abs() >= 6.0).any()  # outliers
        product = torch._int_mm(half.to(torch.int8), layer.weight.t())
        out = product.to(torch.float16)
        del half, product
        out = out.to(x.dtype)
        if layer.bias is not None:
            out += layer.bias
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        return torch.matmul(grad.to(ctx.x.dtype), ctx.layer.dense(ctx.x.dtype)).view(ctx.x.shape), None


class QuantizedLinear(nn.Linear):
    """A layer with the storage and the temporaries of a quantized one, and no values.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Type of the bias; `None`: there is none.
        how: How the weight is kept.
        whole_dtype: Type of the weight before it was quantized.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: torch.dtype | None,
        how: Quantization,
        whole_dtype: torch.dtype,
    ):
        nn.Module.__init__(self)  # `nn.Linear` would make the whole weight
        self.in_features, self.out_features, self.how, self.whole_dtype = in_features, out_features, how, whole_dtype
        if how.bits == 4:
            packed = torch.empty((self.num_weights + 1) // 2, 1, dtype=torch.uint8)
            scales = -(-self.num_weights // _BLOCK)
            # Scales, and the 16 values that numbers of 4 bits stand for.
            self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8 if how.double else torch.float32))
            self.register_buffer("values", torch.empty(16))
            if how.double:
                self.register_buffer("scales_of_scales", torch.empty(-(-scales // _BLOCK_OF_SCALES)))
                self.register_buffer("values_of_scales", torch.empty(257))
        else:
            packed = torch.empty(out_features, in_features, dtype=torch.int8)
            self.register_buffer("scales", torch.empty(out_features))
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=bias), requires_grad=False)

    @property
    def num_weights(self) -> int:
        """How many numbers the weight stands for."""
        return self.in_features * self.out_features

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return a weight that isn't quantized, as kernels make it for a product."""
        return self.weight.new_zeros((self.out_features, self.in_features), dtype=dtype)

    def bias_as(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the bias in the type of a product."""
        return None if self.bias is None else self.bias.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the right shape."""
        if self.how.bits == 8:
            return _EightBit.apply(x, self)
        inner = x if self.how.compute_dtype is None else x.to(self.how.compute_dtype)
        return _FourBit.apply(inner, self).to(x.dtype)


def stand_in(module: nn.Module) -> QuantizedLinear | None:
    """Return a layer of the same bytes for one of bitsandbytes; `None` for any other.

    Tensors are made where the context says. The flags of training are the module's.
    """
    kinds = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("bitsandbytes.")}
    if not kinds & {"Linear4bit", "Linear8bitLt"}:
        return None
    bias = None if module.bias is None else module.bias.dtype
    how, whole = Quantization(8), torch.float16
    if "Linear4bit" in kinds:
        state = getattr(module.weight, "quant_state", None) or module.quant_state
        how = Quantization(4, module.compute_dtype, bool(state is not None and state.nested))
        whole = torch.float32 if state is None else state.dtype
    made = QuantizedLinear(module.in_features, module.out_features, bias, how, whole)
    made.training = module.training
    return made


def quantize(model: nn.Module, how: Quantization) -> None:
    """Replace the linear layers that `from_pretrained(quantization_config=BitsAndBytesConfig(...))` quantizes.

    These are all but the head, and what is tied to another weight.

    Args:
        model: On the meta device; changed.
        how: How weights are kept.
    """
    kept = set(_kept_whole(model))
    for name, module in list(model.named_modules()):
        if name in kept or not (type(module) is nn.Linear or isinstance(module, Conv1D)):
            continue
        width, out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        bias = None if module.bias is None else module.bias.dtype
        with torch.device("meta"):
            model.set_submodule(name, QuantizedLinear(width, out, bias, how, module.weight.dtype))


def _kept_whole(model: nn.Module) -> Iterator[str]:
    """Yield names of modules that stay as they are, as `get_keys_to_not_convert` of transformers finds them."""
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if id(parameter) in seen:
            yield from (owner, seen[id(parameter)])
        seen[id(parameter)] = owner
    yield list(model.named_parameters())[-1][0].rpartition(".")[0]
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    yield from (name for name, module in model.named_modules() if module is head)


def num_parameters(model: nn.Module, *, is_trained: bool = False) -> int:
    """Return the parameters of a model; numbers of 4 bits count one by one.

    Args:
        model: The model.
        is_trained: Whether only those count that get gradients.
    """
    packed = {id(m.weight): m.num_weights for m in model.modules() if isinstance(m, QuantizedLinear)}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters() if p.requires_grad or not is_trained)
