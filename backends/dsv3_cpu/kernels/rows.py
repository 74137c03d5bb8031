"""Which format a weight has, and rows of x as products with it want them.

Weights are [E, N, ..], one expert where there are none. Which format it is shows in the types: (int8, scales of three axes) is
FP8, (int8, two) INT8, (uint8, three) INT4, uint16 bfloat16, and float32 itself. Rows are named by their indices, not sliced: a
slice costs numba more to compile than a loop, and a reference count.
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from dsv3_cpu.compile import inner, overloads, strict
from dsv3_cpu.constants import GROUP
from dsv3_cpu.kernels.lanes import FORMATS
from dsv3_cpu.kernels.numbers import bits_of, float_of, power_of, widen
from dsv3_cpu.kernels.order import spread
from dsv3_cpu.kernels.whole import arrange8, arrange16
from dsv3_cpu.processor import LANES

_LIFT = 100  # FP8 decodes to 2^-120 of its value: x is scaled to about 2^100 so that products stay normal numbers


def kind(w, s) -> str:
    """The format of a weight with scales s, from their numba types."""
    if w.dtype == types.int8:
        return "fp8" if s.ndim == 3 else "int8"
    return {types.uint8: "int4", types.uint16: "bf16", types.float32: "f32"}[w.dtype]


def arrange(w, s, x, t, out, i, snapped):
    """x[t] in the order of the weight's planes, in out[i]: in float32, zero up to whole steps, and `peaks` after that; or in
    whole numbers, see whole.py. snapped: INT8 activations, for an INT8 weight."""


@overloads(arrange)
def _arrange(w, s, x, t, out, i, snapped):
    if out.dtype == types.int16:
        return lambda w, s, x, t, out, i, snapped: arrange16(x, t, out, i, snapped)
    if out.dtype == types.int8:
        return lambda w, s, x, t, out, i, snapped: arrange8(x, t, out, i)
    name = kind(w, s)
    form = FORMATS[name]
    step, shared = form.numbers, form.shared
    block, eight, whole_numbers = shared * LANES, name == "fp8", name == "int8"
    if shared == 1:

        def copy(w, s, x, t, out, i, snapped):
            for k in range(x.shape[1]):
                out[i, k] = widen(x[t, k])
            for k in range(x.shape[1], out.shape[1]):
                out[i, k] = 0
            if whole_numbers and snapped:
                snap_row(out, i)

        return copy

    in_planes, item = spread(shared, x.dtype == types.uint16), x.dtype.bitwidth // 8

    def planes(w, s, x, t, out, i, snapped):
        size = x.shape[1]
        whole, end = size // block * block, (size + step - 1) // step * step
        in_planes(x.ctypes.data + item * t * size, whole, out.ctypes.data + 4 * i * out.shape[1])
        if whole < end:
            for k in range(whole, end):
                out[i, k] = 0
            for k in range(whole, size):
                out[i, whole + (k - whole) % shared * LANES + (k - whole) // shared] = widen(x[t, k])
        if eight:
            peaks(s, out, i)

    return planes


@inner
def peaks(s, x, i):
    """For an FP8 weight with scales s: the largest size of each block of 128 numbers of arranged x[i], into the row's last
    numbers, one per block; NaN counts as larger than any number."""
    blocks = s.shape[2]
    end = x.shape[1] - blocks
    for g in range(blocks):
        most = np.uint32(0)
        for k in range(g * GROUP, min((g + 1) * GROUP, end)):
            most = max(most, bits_of(x[i, k]) & np.uint32(0x7FFFFFFF))
        x[i, end + g] = float_of(most)


@strict
def snap_row(x, i):
    """x[i] = scale * (x[i] / scale, rounded half to even), scale = max(max|x[i]|, 1e-10) / 127: what quant_int8 makes of it."""
    most = np.float32(1e-10)
    for k in range(x.shape[1]):
        size = abs(x[i, k])
        most = size if size > most else most
    scale = most / np.float32(127)
    for k in range(x.shape[1]):
        x[i, k] = min(max(np.rint(x[i, k] / scale), np.float32(-127)), np.float32(127)) * scale


@inner
def lift(x, i, s, e, block, out, o):
    """out[o] = arranged x[i] times the block scales of FP8 rows and a power of two -> what undoes that power and the codes'."""
    blocks = s.shape[2]
    end = x.shape[1] - blocks
    product, scale = np.float32(0), np.float32(0)
    for g in range(blocks):
        factor = s[e, block, g]
        size = x[i, end + g] * factor
        product = size if size > product or size != size else product
        scale = max(scale, factor)
    # As large as may be, but no scale times the power may overflow by itself.
    exponent = max(exponent_of(product), exponent_of(scale) - 26)
    exponent = max(exponent, _LIFT - 127)
    up = float_of(np.uint32((_LIFT - exponent + 127) << 23))
    for g in range(blocks):
        factor = s[e, block, g] * up
        for k in range(g * GROUP, min((g + 1) * GROUP, end)):
            out[o, k] = x[i, k] * factor
    return power_of(120 - _LIFT + exponent)


@inner
def exponent_of(value):
    """Of the largest power of two in a positive number, -127 for 0 and subnormal ones, 128 for infinity and NaN."""
    return (np.int64(bits_of(value)) >> 23) - 127


def ready(w, s, e, first, x, index, i, rows, out, undo):
    """Rows index[i] to index[i + rows] of arranged x, one after another, for the rows of a weight in the block of `first`
    -> their address; undo[j]: by which the sums of row i + j are to be multiplied. out: scratch for them."""


@overloads(ready)
def _ready(w, s, e, first, x, index, i, rows, out, undo):
    def scaled(w, s, e, first, x, index, i, rows, out, undo):
        for j in range(rows):
            undo[j] = lift(x, index[i + j], s, e, first // GROUP, out, j)
        return out.ctypes.data

    def same(w, s, e, first, x, index, i, rows, out, undo):
        together = True
        for j in range(rows):
            undo[j] = 1
            together = together and index[i + j] == index[i] + j
        if together:
            return x.ctypes.data + x.itemsize * index[i] * x.shape[1]
        for j in range(rows):
            for k in range(x.shape[1]):
                out[j, k] = x[index[i + j], k]
        return out.ctypes.data

    return scaled if kind(w, s) == "fp8" else same


@intrinsic
def row_factor(typing, w, s, e, n):
    """By which sums of a row of a weight are multiplied: INT8's scale, else 1."""
    scaled = kind(w, s) == "int8"
    index = types.UniTuple(types.intp, 2)
    getter = typing.resolve_function_type(operator.getitem, (s, index), {}) if scaled else None

    def generate(context, builder, signature, arguments):
        if getter is None:
            return ir.Constant(ir.FloatType(), 1.0)
        at = context.make_tuple(
            builder, index, [context.cast(builder, v, t, types.intp) for v, t in zip(arguments[2:], (e, n), strict=True)]
        )
        return context.get_function(operator.getitem, getter)(builder, (arguments[1], at))

    return types.float32(w, s, e, n), generate
