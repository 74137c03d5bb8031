"""Products of a few numbers with the rows of a matrix, added up: a matrix read along its rows where its columns are summed."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dsv3_cpu.kernels.dots import fma, prefetch
from dsv3_cpu.kernels.lanes import F32, FORMATS, I64, read, splat, vector
from dsv3_cpu.processor import LANES

AT_ONCE = 8  # rows whose products are added before a sum is stored


@functools.cache
def add_rows(name: str, rows: int) -> Any:
    """An intrinsic (p, v, stride, sums, size): sums += p[0] * v[0] + p[1] * v[1] and so on, for `rows` rows.

    All are addresses, stride in bytes; p and sums float32; v in the format, sums in the order of its planes; size: numbers of a
    row, a multiple of four vectors.
    """
    form = FORMATS[name]

    @intrinsic
    def add(typing, p, v, stride, sums, size):
        def generate(context, b, signature, arguments):
            p, v, stride, sums, size = arguments
            factors = [splat(b, read(b, p, F32, 4 * i)) for i in range(rows)]
            starts = [b.add(v, b.mul(stride, ir.Constant(I64, i))) for i in range(rows)]
            following = b.mul(stride, ir.Constant(I64, rows))
            with cgutils.for_range(b, b.sdiv(size, ir.Constant(I64, form.numbers))) as loop:
                to = b.add(sums, b.mul(loop.index, ir.Constant(I64, 4 * form.numbers)))
                totals = [read(b, to, vector(F32), 4 * LANES * j) for j in range(form.planes)]
                offset = b.mul(loop.index, ir.Constant(I64, form.size))
                for start, factor in zip(starts, factors, strict=True):
                    at = b.add(start, offset)
                    for line in range(0, form.size, 64):
                        prefetch(b, b.add(at, following), line)
                    totals = [fma(b, factor, value, total)
                              for value, total in zip(form.decode(b, at), totals, strict=True)]  # fmt: skip
                for j, total in enumerate(totals):
                    place = b.add(to, ir.Constant(I64, 4 * LANES * j))
                    b.store(total, b.inttoptr(place, total.type.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), generate

    return add
