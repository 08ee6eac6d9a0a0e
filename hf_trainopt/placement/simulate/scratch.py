"""What kernels of the CPU allocate and free within one call, which no fake tensor shows."""

from typing import Any

import torch


_aten = torch.ops.aten
_CONVOLUTION = frozenset({_aten.convolution, _aten._convolution, _aten.mkldnn_convolution})
_LSTM, _LSTM_BACKWARD = _aten.mkldnn_rnn_layer, _aten.mkldnn_rnn_layer_backward
_BATCH_NORM_BACKWARD = frozenset({_aten.native_batch_norm_backward, _aten.batch_norm_backward})


def cpu_scratch(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """Return the bytes that an operator has allocated at most beyond its outputs, on the CPU.

    Convolutions of oneDNN copy tensors into its blocked formats and back; the order of these copies was read off
    the allocator's events (`torch.profiler`, torch 2.14). With input x, weight w and output y, the forward kernel
    holds x, w and y in blocked format and then y twice; the backward kernel at last holds x and the gradient of y in
    blocked format beside its outputs; with a stride, twice the gradient of x in other formats. BatchNorm's backward
    kernel holds one more tensor like its input. An LSTM holds its weights and a little more than the four gates, its
    backward kernel one tensor like the output more.
    """
    packet = func._overloadpacket
    if packet in _CONVOLUTION:
        return max(_nbytes(args[0]) + _nbytes(args[1]), _nbytes(out))
    if packet is _aten.convolution_backward:
        gradient, source = _nbytes(args[0]), _nbytes(args[1])
        strided = any(step > 1 for step in args[4]) and args[10][0]
        return max(gradient + source, 2 * source) if strided else gradient + source
    if packet in (_LSTM, _LSTM_BACKWARD):
        gates = 4.25 * _nbytes(out[0]) if packet is _LSTM else 5.25 * _nbytes(args[7])
        return round(gates) + sum(map(_nbytes, args[1:5]))
    if packet in _BATCH_NORM_BACKWARD:
        return _nbytes(args[1])
    return 0


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
