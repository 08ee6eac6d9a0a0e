"""Triton kernels that are read and never run (`test_placement_liger.py`)."""

import sys

import triton
import triton.language as tl
from triton.language import store


this = sys.modules[__name__]


@triton.jit
def by_variables(out, source, size: tl.constexpr):
    place = tl.arange(0, size)
    where = out
    where += tl.load(source + place)  # what is loaded is no address
    address = where + place
    tl.store(address, tl.load(source + place))


@triton.jit
def by_atomics(total, source):
    tl.atomic_add(total, tl.load(source))


@triton.jit
def by_another(source, target, size: tl.constexpr):
    by_variables(target, source, size=size)


@triton.jit
def by_keyword(out, source):
    tl.store(value=tl.load(source), pointer=out)


@triton.jit
def by_name(out, source):
    if (place := out) is not None:
        store(place, tl.load(source))


@triton.jit
def by_descriptor(out, source, n):
    block = tl.make_tensor_descriptor(out, shape=[n], strides=[1], block_shape=[16])
    block.store([0], tl.load(source))


@triton.jit
def by_module(source, target, size: tl.constexpr):
    this.by_variables(target, source, size)


@triton.jit
def by_itself(out, source, n):
    if n > 0:
        by_itself(out, source, n - 1)
    tl.store(out + n, tl.load(source))


@triton.jit
def not_understood(out, source):
    out.write(source)
