"""Triton kernels that are read and never run (`test_placement_liger.py`)."""

import triton
import triton.language as tl


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
