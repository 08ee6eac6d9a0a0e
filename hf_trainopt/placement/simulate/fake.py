"""Models and batches without memory: fake tensors on the CPU, with the kernels that a CUDA device would run."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ..errors import PlacementError
from ..rewrite import chunked_cross_entropy
from . import quantized
from .wrapped import whole_like, without_wrapping


def fake_mode() -> FakeTensorMode:
    """Return a mode in which tensors have shapes and no memory; real ones are taken in as fake ones."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """Return a fake tensor of the same shape, strides and type on the CPU."""
    with mode:
        out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return out.requires_grad_(tensor.requires_grad)


def fake_whole(parameter: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """Return a fake tensor like the whole of a parameter that may be spread over devices."""
    return fake_tensor(whole_like(parameter), mode)


def as_type(dtype: torch.dtype) -> Callable[[torch.Tensor, FakeTensorMode], torch.Tensor]:
    """Return `fake_whole` for floating-point parameters that are cast."""

    def like(parameter: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
        fake = fake_whole(parameter, mode)
        return fake.detach().to(dtype) if fake.is_floating_point() else fake

    return like


def fake_copy(
    model: nn.Module,
    mode: FakeTensorMode,
    parameter_like: Callable[[torch.Tensor, FakeTensorMode], torch.Tensor] = fake_whole,
) -> nn.Module:
    """Return a copy of a model whose parameters and buffers are fake; ties between them are kept.

    Args:
        model: The model, real or fake; parameters that are spread over devices are whole in the copy.
        mode: Of the fake tensors.
        parameter_like: Returns what a parameter is in the copy.

    Raises:
        ValueError: The model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        with mode:
            made = quantized.stand_in(module)
        if made is not None:
            memo[id(module)] = made
            continue
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                fake = parameter_like(parameter, mode)
                memo[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = fake_tensor(buffer.detach(), mode)
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and id(value) not in memo:  # a state that is no buffer
                memo[id(value)] = fake_tensor(value.detach(), mode)
    try:
        with without_wrapping(model) as unwrapped:
            memo |= unwrapped
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise PlacementError(
            f"{type(model).__name__} cannot be copied for a replay without memory ({error!r}); give "
            "`plan_placement` a model that copy.deepcopy can copy."
        ) from error


def fake_batch(batch: Any, mode: FakeTensorMode, keeps_mask: bool = False) -> Any:
    """Return a batch of the same shapes without data.

    An attention mask of ones only is left out, unless it is to be kept: transformers looks at its values and skips it
    in a real run.
    """
    if isinstance(batch, Mapping):
        mask = None if keeps_mask else batch.get("attention_mask")
        if isinstance(mask, torch.Tensor) and not isinstance(mask, FakeTensor) and mask.all():
            batch = {name: value for name, value in batch.items() if name != "attention_mask"}
        else:
            batch = dict(batch)
    return tree_map(lambda leaf: fake_tensor(leaf, mode) if isinstance(leaf, torch.Tensor) else leaf, batch)


# Operators that CUDA's autocast runs in float32 and the CPU's does not (torch/amp documentation, "CUDA Ops that can
# autocast to float32"); those that matter for the memory of a training step.
_FP32_ON_CUDA = (
    "acos", "asin", "cosh", "cumprod", "cumsum", "erfinv", "exp", "expm1", "group_norm", "layer_norm", "log", "log10",
    "log1p", "log2", "log_softmax.int", "nll_loss", "nll_loss2d", "norm.Scalar", "norm.ScalarOpt_dim",
    "pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "prod", "reciprocal", "rsqrt", "sinh", "softmax.int",
    "softplus", "sum", "sum.dim_IntList", "tan", "cross_entropy_loss", "smooth_l1_loss", "mse_loss", "l1_loss",
    "huber_loss", "kl_div", "cosine_similarity", "cdist", "renorm", "rms_norm",
)  # fmt: skip


def _upcast(overload):
    def run(*args, **kwargs):
        args, kwargs = tree_map(
            lambda leaf: (
                leaf.float()
                if isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
                else leaf
            ),
            (args, kwargs),
        )
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            return overload(*args, **kwargs)

    return run


def override(library: torch.library.Library, name: str, function: Callable[..., Any], key: str) -> None:
    """Replace the kernel of an operator while `library` lives. Some versions of PyTorch warn, though it is allowed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"[\s\S]*(?i:overriding a previously registered kernel)")
        library.impl(name, function, key, allow_override=True)


@contextmanager
def cuda_autocast_rules() -> Iterator[None]:
    """Context in which autocast of the CPU follows the rules of CUDA."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name in _FP32_ON_CUDA:
            packet, _, overload = name.partition(".")
            found = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if found is not None:
                override(library, name, _upcast(found), "AutocastCPU")
        yield
    finally:
        library._destroy()


def _cuda_dropout(stock):
    def dropout(input, p=0.5, training=True, inplace=False):
        if not training or not p or inplace or not isinstance(input, FakeTensor):
            return stock(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]

    return dropout


def _cuda_attention(stock):
    aten = torch.ops.aten

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if query.dim() != 4 or key.dim() != 4 or not isinstance(query, FakeTensor):
            return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        half = query.dtype in (torch.float16, torch.bfloat16)
        # What torch chooses on CUDA: flash where there is no mask and the head size fits, else memory-efficient.
        if half and attn_mask is None and query.size(-1) <= 256:
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if enable_gqa:
            groups = query.size(1) // key.size(1)
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        bias = None
        if attn_mask is not None:
            bias = attn_mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]

    return attention


def _apple_attention(stock):
    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not isinstance(query, FakeTensor):
            return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]

    return attention


@contextmanager
def apple_kernels() -> Iterator[None]:
    """Context in which attention keeps its matrix of scores: its fused kernels on Apple GPUs have no backward pass."""
    stock = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _apple_attention(stock)
    try:
        with cuda_autocast_rules():
            yield
    finally:
        F.scaled_dot_product_attention = stock


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Context in which fake tensors on the CPU keep what CUDA kernels keep: byte masks, fused attention.

    Functions are patched, and not a mode used, so that recomputation in the backward pass meets them as well.
    """
    stock_dropout, stock_attention = F.dropout, F.scaled_dot_product_attention
    stock_product, stock_int8 = chunked_cross_entropy.has_wide_product, quantized.has_int8_kernels
    F.dropout, F.scaled_dot_product_attention = _cuda_dropout(stock_dropout), _cuda_attention(stock_attention)
    chunked_cross_entropy.has_wide_product = lambda matrix: True
    quantized.has_int8_kernels = lambda: True
    try:
        with cuda_autocast_rules():
            yield
    finally:
        F.dropout, F.scaled_dot_product_attention = stock_dropout, stock_attention
        chunked_cross_entropy.has_wide_product, quantized.has_int8_kernels = stock_product, stock_int8


def _grouped_mm_shape(mat_a, mat_b, offs=None, bias=None, out_dtype=None):
    sizes = {
        (2, 2): lambda: (offs.size(0), mat_a.size(0), mat_b.size(1)),
        (2, 3): lambda: (mat_a.size(0), mat_b.size(2)),
        (3, 2): lambda: (mat_a.size(1), mat_b.size(1)),
        (3, 3): lambda: (mat_a.size(0), mat_a.size(1), mat_b.size(2)),
    }[mat_a.dim(), mat_b.dim()]
    return mat_a.new_empty(sizes(), dtype=out_dtype or mat_a.dtype)


def _lstm_shape(source, w0, w1, w2, w3, hx, cx, *options):
    """Shapes with the workspace that oneDNN keeps for the backward pass, read off its calls (torch 2.14, to 2 %)."""
    (steps, rows, width), hidden = source.shape, hx.shape[-1]
    workspace = round(source.element_size() * (steps + 1) * rows * (6 * max(width, hidden) + 9.4 * hidden))
    return (
        source.new_empty((steps, rows, hidden)),
        torch.empty_like(hx),
        torch.empty_like(cx),
        source.new_empty((workspace,), dtype=torch.uint8),
    )


@contextmanager
def mended_shapes() -> Iterator[None]:
    """Context in which two shape functions of PyTorch are right.

    That of the products of mixtures of experts takes 16-bit numbers only, where the kernels take all; autocast does
    not know this operator, so that it meets the float32 weights of mixed precision. That of an LSTM on the CPU says
    that nothing is kept for the backward pass.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        override(library, "_grouped_mm", _grouped_mm_shape, "Meta")
        override(library, "mkldnn_rnn_layer", _lstm_shape, "Meta")
        yield
    finally:
        library._destroy()


@contextmanager
def as_on(kind: str, mode: FakeTensorMode) -> Iterator[None]:
    """Context in which fake tensors behave as on a `"cuda"`, `"mps"` or `"cpu"` device."""
    kernels = {"cuda": cuda_kernels, "mps": apple_kernels, "cpu": nullcontext}
    with ExitStack() as stack:
        stack.enter_context(kernels[kind]())
        stack.enter_context(mended_shapes())
        stack.enter_context(mode)
        yield
