"""The innermost loop of all products with stored weights: some rows of a weight times some rows of x, kept in registers.

Whether a row of x is multiplied alone or beside others, its sum is made in the same order, so that results do not depend on
who else is in the batch.

Several rows of a weight are read at a time, from places far apart: a processor asks memory for what follows in a few streams
at once, and one stream alone does not keep it busy (measured on Zen 3, two threads: 20 GB/s from one, 27 from four).
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dsv3_cpu.constants import GROUP, LINE_BYTES
from dsv3_cpu.kernels.atoms import prefetch
from dsv3_cpu.kernels.lanes import F32, FORMATS, I8, I64, Format, constant, read, splat, vector
from dsv3_cpu.processor import LANES

STREAMS = 4  # rows of a weight that are read at a time
AHEAD = 512  # bytes further on in each that are asked for: the processor's own guesses end with a page of 4 KiB


def rows_beside(name: str, columns: int) -> int:
    """Rows of a weight that so many rows of x are multiplied with at a time: their sums must fit the registers, and AVX-512 has
    twice as many. Decoding FP8 takes some too."""
    if columns == 1 or LANES == 16:
        return STREAMS
    return 2 if columns > 2 else 3 if name == "fp8" else STREAMS


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z of vectors, rounded once."""
    kind = x.type
    name = f"llvm.fma.v{kind.count}f32"
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind] * 3), name), [x, y, z])


def fold(b: Any, value: Any) -> Any:
    """The sum of a vector's numbers, in an order that is always the same."""
    kind = ir.FunctionType(F32, [F32, value.type])
    reduce = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fadd.v{value.type.count}f32")
    return b.call(reduce, [ir.Constant(F32, 0.0), value], fastmath=("reassoc",))


def ask_ahead(b: Any, places: list[Any], size: int) -> None:
    """Asks for what follows a step of so many bytes at each of these addresses."""
    for further in range(AHEAD, AHEAD + size, LINE_BYTES):
        for at in places:
            prefetch(b, b.add(at, ir.Constant(I64, further)))


class Emitter:
    """Builds the loop for one format and shape. Each product is one sum: there are enough to keep the processor busy."""

    def __init__(self, builder: Any, form: Format, rows: int, columns: int, grouped: bool) -> None:
        self.b, self.form, self.rows, self.columns, self.grouped = builder, form, rows, columns, grouped
        self.sums = {
            (r, c): cgutils.alloca_once_value(builder, constant(F32, 0.0)) for r in range(rows) for c in range(columns)
        }

    def step(self, weights: list[Any], xs: list[Any], scales: list[Any]) -> None:
        """One step of every row, at these addresses; scales: those of the groups they are in."""
        b, planes, size = self.b, range(self.form.planes), 4 * LANES
        if self.columns == 1 or self.grouped:  # x stays in registers
            x = [[read(b, at, vector(F32), size * p) for p in planes] for at in xs]
            for r, address in enumerate(weights):
                turns = list(self.form.turns(b, address))
                factor = splat(b, read(b, scales[r], F32)) if self.grouped else None
                for c in range(self.columns):
                    if factor is not None:
                        self.add(self.sums[r, c], factor, self._group([value for _, value in turns], x[c]))
                        continue
                    for p, value in turns:
                        self.add(self.sums[r, c], value, x[c][p])
        elif self.columns == 2:  # a decoded row does
            for r, address in enumerate(weights):
                turns = list(self.form.turns(b, address))
                for c, at in enumerate(xs):
                    for p, value in turns:
                        self.add(self.sums[r, c], value, read(b, at, vector(F32), size * p))
        else:  # sums do
            for beside in zip(*(self.form.turns(b, address) for address in weights), strict=True):
                for c, at in enumerate(xs):
                    x_part = read(b, at, vector(F32), size * beside[0][0])
                    for r, (_, value) in enumerate(beside):
                        self.add(self.sums[r, c], value, x_part)

    def add(self, total: Any, a: Any, b: Any) -> None:
        self.b.store(fma(self.b, a, b, self.b.load(total)), total)

    def _group(self, decoded: list[Any], x: list[Any]) -> Any:
        parts = [self.b.fmul(decoded[0], x[0]), self.b.fmul(decoded[1], x[1])]
        for p in range(2, len(x)):
            parts[p % 2] = fma(self.b, decoded[p], x[p], parts[p % 2])
        return self.b.fadd(*parts)

    def total(self, r: int, c: int) -> Any:
        return fold(self.b, self.b.load(self.sums[r, c]))


@functools.cache
def dots(name: str, columns: int, rows: int = 1) -> Any:
    """An intrinsic (w, w_stride, count, s, s_stride, x, x_stride, width, size, out, out_stride): number c at out + r *
    out_stride, float32, is the sum of row r of a weight times row c of x.

    w, s, x, out: addresses, strides in bytes; s of INT4's scales, one for each group; count and width: rows of w and of x that
    there are, beyond which the last counts again; size: bytes of a row of the weight. x is arranged, and zero up to a whole
    step.
    """

    @intrinsic
    def multiply(typing, w, w_stride, count, s, s_stride, x, x_stride, width, size, out, out_stride):
        def generate(context, b, signature, arguments):
            w, w_stride, count, s, s_stride, x, x_stride, width, size, out, out_stride = arguments
            ws, scales = several(b, w, w_stride, count, rows), several(b, s, s_stride, count, rows)
            outs = [b.add(out, b.mul(out_stride, ir.Constant(I64, r))) for r in range(rows)]
            _write(b, name, ws, scales, several(b, x, x_stride, width, columns), size, outs)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11), generate

    return multiply


def several(b: Any, base: Any, by: Any, most: Any, n: int) -> list[Any]:
    """The addresses of n rows, `by` bytes apart, of which there are `most`; beyond those the last one's."""
    last = b.sub(most, ir.Constant(I64, 1))
    found = [base]
    for i in range(1, n):
        index = b.select(b.icmp_signed("<", ir.Constant(I64, i), last), ir.Constant(I64, i), last)
        found.append(b.add(base, b.mul(by, index)))
    return found


def _write(b: Any, name: str, ws: list[Any], scales: list[Any], xs: list[Any], size: Any, outs: list[Any]) -> None:
    """The loop over `size` bytes of rows of the weight, and its sums, to the addresses outs."""
    form, grouped = FORMATS[name], name == "int4"
    made = Emitter(b, form, len(ws), len(xs), grouped)
    steps = b.sdiv(size, ir.Constant(I64, form.size))

    def scales_at(step: Any) -> list[Any]:
        group = b.mul(b.sdiv(b.mul(step, ir.Constant(I64, form.numbers)), ir.Constant(I64, GROUP)), ir.Constant(I64, 4))
        return [b.add(at, group) for at in scales] if grouped else scales

    def x_at(step: Any) -> list[Any]:
        offset = b.mul(step, ir.Constant(I64, 4 * form.numbers))
        return [b.add(at, offset) for at in xs]

    with cgutils.for_range(b, steps) as loop:
        offset = b.mul(loop.index, ir.Constant(I64, form.size))
        places = [b.add(at, offset) for at in ws]
        ask_ahead(b, places, form.size)
        made.step(places, x_at(loop.index), scales_at(loop.index))
    done = b.mul(steps, ir.Constant(I64, form.size))
    rest = b.sub(size, done)
    with b.if_then(b.icmp_signed(">", rest, ir.Constant(I64, 0))):
        made.step([copied(b, b.add(at, done), rest, form.size) for at in ws], x_at(steps), scales_at(steps))
    for r, out in enumerate(outs):
        for c in range(len(xs)):
            at = b.add(out, ir.Constant(I64, 4 * c))
            b.store(made.total(r, c), b.inttoptr(at, F32.as_pointer()))


def copied(b: Any, address: Any, size: Any, whole: int) -> Any:
    """The address of a copy of the last bytes of a row, zero up to a whole step: nothing beyond the row is read."""
    kind = ir.ArrayType(I8, whole)
    place = cgutils.alloca_once(b, kind)
    b.store(ir.Constant(kind, bytearray(whole)), place)
    target = b.bitcast(place, I8.as_pointer())
    source = b.inttoptr(address, I8.as_pointer())
    with cgutils.for_range(b, size) as loop:
        b.store(b.load(b.gep(source, [loop.index])), b.gep(target, [loop.index]))
    return b.ptrtoint(place, I64)
