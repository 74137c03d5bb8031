"""The innermost loop of all products with stored weights: some rows of a weight times some rows of x, kept in registers.

Whether a row of x is multiplied alone or beside others, its sum is made in the same order, so that results do not depend on
who else is in the batch.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dsv3_cpu.kernels.lanes import F32, FORMATS, GROUP, I8, I64, Format, constant, read, splat, vector

SHAPES = {1: 2, 2: 2, 4: 1}  # rows of x: rows of the weight; sums and operands must fit the registers


class _Emitter:
    """Builds the loop for one format and shape."""

    def __init__(self, context: Any, builder: Any, form: Format, rows: int, columns: int, grouped: bool) -> None:
        self.context, self.b, self.form, self.rows, self.columns, self.grouped = context, builder, form, rows, columns, grouped
        zero = constant(F32, 0.0)
        self.sums = {
            (r, c, a): cgutils.alloca_once_value(builder, zero)
            for r in range(rows) for c in range(columns) for a in range(1 if grouped else 2)
        }  # fmt: skip

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        kind = x.type
        name = f"llvm.fma.v{kind.count}f32"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, ir.FunctionType(kind, [kind] * 3), name), [x, y, z])

    def step(self, weights: list[Any], xs: list[Any], scales: list[Any]) -> None:
        """One step of every row, at these addresses; scales: of the group it is in."""
        planes = self.form.planes
        x = [[read(self.b, at, vector(F32), 4 * p * vector(F32).count) for p in range(planes)] for at in xs]
        for r, address in enumerate(weights):
            decoded = self.form.decode(self.b, address)
            factor = splat(self.b, read(self.b, scales[r], F32)) if self.grouped else None
            for c in range(self.columns):
                if factor is None:
                    for p in range(planes):
                        self._add(self.sums[r, c, p % 2], decoded[p], x[c][p])
                else:
                    self._add(self.sums[r, c, 0], factor, self._group(decoded, x[c]))

    def _add(self, total: Any, a: Any, b: Any) -> None:
        self.b.store(self.fma(a, b, self.b.load(total)), total)

    def _group(self, decoded: list[Any], x: list[Any]) -> Any:
        parts = [self.b.fmul(decoded[0], x[0]), self.b.fmul(decoded[1], x[1])]
        for p in range(2, len(x)):
            parts[p % 2] = self.fma(decoded[p], x[p], parts[p % 2])
        return self.b.fadd(*parts)

    def total(self, r: int, c: int) -> Any:
        value = self.b.load(self.sums[r, c, 0])
        if not self.grouped:
            value = self.b.fadd(value, self.b.load(self.sums[r, c, 1]))
        kind = ir.FunctionType(F32, [F32, value.type])
        reduce = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.vector.reduce.fadd.v{value.type.count}f32")
        return self.b.call(reduce, [ir.Constant(F32, 0.0), value], fastmath=("reassoc",))


@functools.cache
def dots(name: str, columns: int) -> Any:
    """An intrinsic (w, stride, rows, s, s_stride, x, x_stride, columns, size, out): out[r * columns + c], float32, is the sum of
    row r of the weight times row c of x, for SHAPES[columns] rows and `columns` columns.

    w, s, x, out: addresses; strides in bytes; rows, columns: how many there are, beyond which the last counts again; size: bytes
    of a row of the weight. x is arranged, and zero up to a whole step. s: INT4's scales, by which each group is multiplied.
    """
    form, grouped, rows = FORMATS[name], name == "int4", SHAPES[columns]

    @intrinsic
    def multiply(typing, w, stride, count, s, s_stride, x, x_stride, width, size, out):
        def generate(context, b, signature, arguments):
            w, stride, count, s, s_stride, x, x_stride, width, size, out = arguments

            def several(base: Any, by: Any, most: Any, n: int) -> list[Any]:
                last = b.sub(most, ir.Constant(I64, 1))
                found = [base]
                for i in range(1, n):
                    index = b.select(b.icmp_signed("<", ir.Constant(I64, i), last), ir.Constant(I64, i), last)
                    found.append(b.add(base, b.mul(by, index)))
                return found

            ws, xs = several(w, stride, count, rows), several(x, x_stride, width, columns)
            ss = several(s, s_stride, count, rows)
            made = _Emitter(context, b, form, rows, columns, grouped)
            steps = b.sdiv(size, ir.Constant(I64, form.size))

            def scales(step: Any) -> list[Any]:
                group = b.mul(b.sdiv(b.mul(step, ir.Constant(I64, form.numbers)), ir.Constant(I64, GROUP)), ir.Constant(I64, 4))
                return [b.add(at, group) for at in ss] if grouped else []

            def x_at(step: Any) -> list[Any]:
                offset = b.mul(step, ir.Constant(I64, 4 * form.numbers))
                return [b.add(at, offset) for at in xs]

            with cgutils.for_range(b, steps) as loop:
                offset = b.mul(loop.index, ir.Constant(I64, form.size))
                made.step([b.add(at, offset) for at in ws], x_at(loop.index), scales(loop.index))
            done = b.mul(steps, ir.Constant(I64, form.size))
            rest = b.sub(size, done)
            with b.if_then(b.icmp_signed(">", rest, ir.Constant(I64, 0))):
                made.step([_copied(b, b.add(at, done), rest, form.size) for at in ws], x_at(steps), scales(steps))
            for r in range(rows):
                for c in range(columns):
                    at = b.add(out, ir.Constant(I64, 4 * (r * columns + c)))
                    b.store(made.total(r, c), b.inttoptr(at, F32.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), generate

    return multiply


def _copied(b: Any, address: Any, size: Any, whole: int) -> Any:
    """The address of a copy of the last bytes of a row, zero up to a whole step: nothing beyond the row is read."""
    kind = ir.ArrayType(I8, whole)
    place = cgutils.alloca_once(b, kind)
    b.store(ir.Constant(kind, bytearray(whole)), place)
    target = b.bitcast(place, I8.as_pointer())
    source = b.inttoptr(address, I8.as_pointer())
    with cgutils.for_range(b, size) as loop:
        b.store(b.load(b.gep(source, [loop.index])), b.gep(target, [loop.index]))
    return b.ptrtoint(place, I64)
