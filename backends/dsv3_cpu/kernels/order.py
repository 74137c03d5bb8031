"""Numbers brought into the order that formats decode to, and back, whole vectors at a time.

Where `shared` numbers share a word (see lanes.py), shared * LANES of them lie as numbers 0, shared, 2 shared and so on, then 1,
shared + 1 and so on.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dsv3_cpu.kernels.lanes import F32, I16, I32, I64, constant, read, splat, vector
from dsv3_cpu.processor import LANES


@functools.cache
def spread(shared: int, half: bool) -> Any:
    """An intrinsic (source, count, out): count numbers, a multiple of shared * LANES, in the order of planes, as float32.

    source, out: addresses; half: those at source are bfloat16, else float32.
    """
    block = shared * LANES

    @intrinsic
    def copy(typing, source, count, out):
        def generate(context, b, signature, arguments):
            source, count, out = arguments
            with cgutils.for_range(b, b.sdiv(count, ir.Constant(I64, block))) as loop:
                at = b.add(source, b.mul(loop.index, ir.Constant(I64, block * (2 if half else 4))))
                to = b.add(out, b.mul(loop.index, ir.Constant(I64, 4 * block)))
                for p, plane in enumerate(_planes(b, at, shared, half)):
                    place = b.add(to, ir.Constant(I64, 4 * LANES * p))
                    b.store(plane, b.inttoptr(place, plane.type.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), generate

    return copy


def _planes(b: Any, at: Any, shared: int, half: bool) -> list[Any]:
    if shared == 2 and half:
        both = read(b, at, vector(I32))
        words = b.shl(both, constant(I32, 16)), b.and_(both, constant(I32, -(1 << 16)))
        return [b.bitcast(v, vector(F32)) for v in words]
    kind = ir.VectorType(I16 if half else F32, shared * LANES)
    numbers, found = read(b, at, kind), []
    for p in range(shared):
        places = ir.Constant(ir.VectorType(I32, LANES), list(range(p, shared * LANES, shared)))
        plane = b.shuffle_vector(numbers, ir.Constant(kind, ir.Undefined), places)
        found.append(b.bitcast(b.shl(b.zext(plane, vector(I32)), constant(I32, 16)), vector(F32)) if half else plane)
    return found


@intrinsic
def pack(typing, source, factor, count, out):
    """count float32 numbers in the order of planes of two, times factor, as bfloat16 in their own order; count a multiple of
    2 * LANES; source and out are addresses."""

    def generate(context, b, signature, arguments):
        source, factor, count, out = arguments
        factor = splat(b, factor)
        with cgutils.for_range(b, b.sdiv(count, ir.Constant(I64, 2 * LANES))) as loop:
            at = b.add(source, b.mul(loop.index, ir.Constant(I64, 8 * LANES)))
            low, high = (rounded(b, b.fmul(read(b, at, vector(F32), 4 * LANES * p), factor)) for p in range(2))
            both = b.or_(b.lshr(low, constant(I32, 16)), b.and_(high, constant(I32, -(1 << 16))))
            to = b.add(out, b.mul(loop.index, ir.Constant(I64, 4 * LANES)))
            b.store(both, b.inttoptr(to, both.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp, types.intp), generate


def rounded(b: Any, value: Any) -> Any:
    """float32 as words whose high halves are bfloat16, to nearest even; NaN stays NaN. See numbers.put."""
    bits = b.bitcast(value, vector(I32))
    odd = b.and_(b.lshr(bits, constant(I32, 16)), constant(I32, 1))
    up = b.add(bits, b.add(odd, constant(I32, 0x7FFF)))
    return b.select(b.fcmp_unordered("uno", value, value), b.or_(bits, constant(I32, 0x400000)), up)
