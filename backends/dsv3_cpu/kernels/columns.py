"""Products of a few numbers with the rows of a matrix, added up: a matrix read along its rows where its columns are summed."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dsv3_cpu.kernels.dots import fma
from dsv3_cpu.kernels.lanes import F32, FORMATS, I64, read, splat, vector
from dsv3_cpu.processor import LANES

AT_ONCE = 8  # rows whose products are added before a sum is stored


@functools.cache
def add_rows(name: str, rows: int) -> Any:
    """An intrinsic (p, p_stride, v, stride, sums, size): sums += p[0] * v[0] + p[1] * v[1] and so on, for `rows` rows.

    All are addresses, strides in bytes; p and sums float32; v in the format, sums in the order of its planes; size: numbers of
    a row, a multiple of four vectors.
    """
    form = FORMATS[name]

    @intrinsic
    def add(typing, p, p_stride, v, stride, sums, size):
        def generate(context, b, signature, arguments):
            p, p_stride, v, stride, sums, size = arguments
            places = [ir.Constant(I64, i) for i in range(rows)]
            factors = [splat(b, read(b, b.add(p, b.mul(p_stride, i)), F32)) for i in places]
            starts = [b.add(v, b.mul(stride, i)) for i in places]
            with cgutils.for_range(b, b.sdiv(size, ir.Constant(I64, form.numbers))) as loop:
                to = b.add(sums, b.mul(loop.index, ir.Constant(I64, 4 * form.numbers)))
                totals = [read(b, to, vector(F32), 4 * LANES * j) for j in range(form.planes)]
                offset = b.mul(loop.index, ir.Constant(I64, form.size))
                for start, factor in zip(starts, factors, strict=True):
                    values = form.decode(b, b.add(start, offset))
                    totals = [fma(b, factor, value, total) for value, total in zip(values, totals, strict=True)]
                for j, total in enumerate(totals):
                    place = b.add(to, ir.Constant(I64, 4 * LANES * j))
                    b.store(total, b.inttoptr(place, total.type.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return add
