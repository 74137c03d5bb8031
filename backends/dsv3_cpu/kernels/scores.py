"""The two products of absorbed attention: queries with keys, and probabilities with values, which are the keys' latents."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dsv3_cpu.constants import LINE_BYTES
from dsv3_cpu.kernels.atoms import prefetch
from dsv3_cpu.kernels.dots import Emitter, several
from dsv3_cpu.kernels.lanes import F32, FORMATS, I32, I64, read, splat, vector
from dsv3_cpu.processor import LANES

FOUR = 4  # heads at a time
PAIR = 2  # keys at a time
AHEAD = 4  # keys that are asked for while the values of others are added up


@functools.cache
def scores(name: str) -> Any:
    """An intrinsic (w, w_stride, size, k, k_stride, k_size, count, q, q_stride, heads, factor, out, out_stride): out[c, r] =
    q[c] . (row r of w, then row r of k) * factor, for PAIR keys and FOUR heads.

    All but sizes and counts are addresses, strides in bytes; factor at one, too. size, k_size: bytes of a row, whole steps of
    the format. count, heads: of keys and of rows of q that there are, beyond which the last counts again. q: arranged float32.
    """
    form = FORMATS[name]

    @intrinsic
    def multiply(typing, w, w_stride, size, k, k_stride, k_size, count, q, q_stride, heads, factor, out, out_stride):
        def generate(context, b, signature, arguments):
            latents, rotary = arguments[:3], arguments[3:6]
            count, q, q_stride, heads, factor, out, out_stride = arguments[6:]
            made, qs, before = Emitter(b, form, PAIR, FOUR, False), several(b, q, q_stride, heads, FOUR), ir.Constant(I64, 0)
            for base, stride, bytes_ in (latents, rotary):
                rows, steps = several(b, base, stride, count, PAIR), b.sdiv(bytes_, ir.Constant(I64, form.size))
                with cgutils.for_range(b, steps) as loop:
                    offset = b.mul(loop.index, ir.Constant(I64, form.size))
                    along = b.mul(b.add(before, loop.index), ir.Constant(I64, 4 * form.numbers))
                    places = [b.add(at, offset) for at in rows]
                    made.step(places, [b.add(at, along) for at in qs], rows)
                before = b.add(before, steps)
            sums = [b.load(made.sums[r, c]) for c in range(FOUR) for r in range(PAIR)]
            total = b.fmul(folded(b, sums), splat(b, read(b, factor, F32), PAIR * FOUR))
            pairs = b.bitcast(total, ir.VectorType(I64, FOUR))
            for c in range(FOUR):
                place = b.add(out, b.mul(out_stride, ir.Constant(I64, c)))
                b.store(b.extract_element(pairs, ir.Constant(I32, c)), b.inttoptr(place, I64.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 13), generate

    return multiply


def folded(b: Any, values: list[Any]) -> Any:
    """The sums of eight vectors as one: a tree over pairs, which takes a third of the instructions of eight folds."""

    def mixed(x: Any, y: Any, *places: int) -> Any:
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(places)), list(places)))

    def added(x: Any, y: Any, places: tuple[tuple[int, ...], ...]) -> Any:
        return b.fadd(mixed(x, y, *places[0]), mixed(x, y, *places[1]))

    if LANES == 16:
        values = [b.fadd(mixed(v, v, *range(8)), mixed(v, v, *range(8, 16))) for v in values]
    # Within halves of a register, twice; then the halves.
    neighbours = ((0, 2, 8, 10, 4, 6, 12, 14), (1, 3, 9, 11, 5, 7, 13, 15))
    halves = ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
    for places in (neighbours, neighbours, halves):
        values = [added(x, y, places) for x, y in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _ask(b: Any, at: Any, stride: Any, width: int, turn: Any) -> None:
    """Asks for `width` bytes of AHEAD rows; of half of them each turn where two turns go over one line."""
    rows = range(AHEAD)
    if width < LINE_BYTES:
        half = ir.Constant(I64, AHEAD // 2)
        at, rows = b.add(at, b.mul(stride, b.mul(half, b.and_(turn, ir.Constant(I64, 1))))), range(AHEAD // 2)
    for r in rows:
        for further in range(0, width, LINE_BYTES):
            prefetch(b, b.add(b.add(at, b.mul(stride, ir.Constant(I64, r))), ir.Constant(I64, further)), near=False)


@functools.cache
def mix(name: str, rows: int) -> Any:
    """An intrinsic (p, p_stride, v, v_stride, count, shrink, before, before_stride, sums, sums_stride, size, following):
    sums[r] = before[r] * shrink[r] + the sum over i below count of p[r, i] * v[i], for `rows` rows.

    All are addresses, strides in bytes; p, shrink, before, sums float32; v in the format, sums in the order of its planes;
    size: numbers of a row, a multiple of two vectors. AHEAD rows of v from `following` on are asked of memory meanwhile.
    """
    form = FORMATS[name]
    pair = 4 * vector(F32).count * 2  # bytes of two vectors of sums
    width = form.size * 2 // form.planes  # and of what they are sums of

    @intrinsic
    def add(typing, p, p_stride, v, v_stride, count, shrink, before, before_stride, sums, sums_stride, size, following):
        def generate(context, b, signature, arguments):
            p, p_stride, v, v_stride, count, shrink, before, before_stride, sums, sums_stride, size, following = arguments
            made = Emitter(b, form, 0, 0, False)

            def row(base: Any, stride: Any, r: int) -> Any:
                return b.add(base, b.mul(stride, ir.Constant(I64, r)))

            factors = [splat(b, read(b, b.add(shrink, ir.Constant(I64, 4 * r)), F32)) for r in range(rows)]
            with cgutils.for_range(b, b.sdiv(b.mul(size, ir.Constant(I64, 4)), ir.Constant(I64, pair))) as outer:
                along = b.mul(outer.index, ir.Constant(I64, pair))
                places = [b.add(row(sums, sums_stride, r), along) for r in range(rows)]
                sources = [b.add(row(before, before_stride, r), along) for r in range(rows)]
                held = [
                    [
                        cgutils.alloca_once_value(b, b.fmul(read(b, at, vector(F32), pair // 2 * j), factors[r]))
                        for j in range(2)
                    ]
                    for r, at in enumerate(sources)
                ]
                step = b.mul(outer.index, ir.Constant(I64, width))
                _ask(b, b.add(following, step), v_stride, width, outer.index)
                with cgutils.for_range(b, count) as loop:
                    values = form.decode(b, b.add(b.add(v, b.mul(loop.index, v_stride)), step), 2)
                    for r in range(rows):
                        at = b.add(row(p, p_stride, r), b.mul(loop.index, ir.Constant(I64, 4)))
                        weight = splat(b, read(b, at, F32))
                        for j in range(2):
                            made.add(held[r][j], weight, values[j])
                for r, at in enumerate(places):
                    for j in range(2):
                        to = b.add(at, ir.Constant(I64, pair // 2 * j))
                        b.store(b.load(held[r][j]), b.inttoptr(to, vector(F32).as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 12), generate

    return add
