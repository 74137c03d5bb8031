"""Products of INT8 and INT4 weights with bfloat16 activations, in whole numbers.

Every block of 128 activations has a power of two under which they are 16-bit integers, so that what is within a hundredth of
a block's largest number is exact, and sums of a block are too: twice the numbers to an instruction that float32 has. INT8
weights are widened to 16 bits. INT4's are multiplied as bytes q + 8 with both bytes of an activation, and 8 times the sum of
the activations is taken off. INT8 activations (see quant_int8) go the same way, under their row's scale.

A row of arranged activations: their numbers, zero up to whole blocks, then for every block its scale, float32, and for INT4
that correction, int32.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dsv3_cpu.compile import inner, strict
from dsv3_cpu.constants import GROUP, WHOLE
from dsv3_cpu.kernels.dots import STREAMS, ask_ahead, copied, fma, fold, several
from dsv3_cpu.kernels.lanes import F32, I8, I16, I32, I64, constant, read, splat, vector
from dsv3_cpu.kernels.numbers import bits_of, float_of, widen
from dsv3_cpu.processor import LANES, has

_INT8_BITS, _INT4_BITS = 14, 13  # of the largest activation's whole part; INT4 needs the high byte of a rounded one below 128
_EXPONENTS = (-112, 127)  # of blocks' largest numbers: below, scales would not be normal numbers; above are infinity and NaN
_X86 = {8: ("avx2", "llvm.x86.avx2.pmadd.wd", "llvm.x86.avx2.pmadd.ub.sw"),
        16: ("avx512bw", "llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx512.pmaddubs.w.512")}  # fmt: skip


def _native() -> bool:
    """Whether the processor multiplies and adds neighbours in one instruction that LLVM is told by name."""
    return has(_X86[LANES][0])


def _neighbours(b: Any, name: str, x: Any, y: Any, wide: ir.Type, unsigned: bool, native: bool) -> Any:
    """Products of two vectors of integers in a type twice as wide, neighbours added; x unsigned if told so."""
    count = x.type.count
    if native:
        kind = ir.FunctionType(ir.VectorType(wide, count // 2), [x.type, y.type])
        return b.call(cgutils.get_or_insert_function(b.module, kind, name), [x, y])
    whole = ir.VectorType(wide, count)
    product = b.mul(b.zext(x, whole) if unsigned else b.sext(x, whole), b.sext(y, whole))
    even, odd = (
        b.shuffle_vector(product, ir.Constant(whole, ir.Undefined), ir.Constant(ir.VectorType(I32, count // 2), which))
        for which in ([*range(0, count, 2)], [*range(1, count, 2)])
    )
    return b.add(even, odd)


def pairs16(b: Any, x: Any, y: Any, native: bool) -> Any:
    """[2 n x i16] times [2 n x i16], neighbours added, as [n x i32]."""
    return _neighbours(b, _X86[LANES][1], x, y, I32, False, native)


def pairs8(b: Any, x: Any, y: Any, native: bool) -> Any:
    """Unsigned [2 n x i8] times signed [2 n x i8], neighbours added, as [n x i16], which must hold the sums."""
    return _neighbours(b, _X86[LANES][2], x, y, I16, True, native)


def _bytes(name: str) -> tuple[int, int]:
    """Of a block of activations, and of what a row has for it at its end."""
    code, block, end = WHOLE[name]
    return block * int(code[1]), end * int(code[1])


class _Int8:
    """size: bytes of a block; x_size: of its activations; tail: of what a row has for a block after those."""

    size, x_size, tail = GROUP, *_bytes("int8")

    def block(self, b: Any, ws: list[Any], xs: list[Any], tails: list[Any], native: bool) -> list[list[Any]]:
        """Sums of a block's products for every row of the weight and of x, as vectors of int32."""
        sums: list[list[Any]] = [[None] * len(xs) for _ in ws]
        for i in range(0, GROUP, 2 * LANES):
            codes = [b.sext(read(b, w, ir.VectorType(I8, 2 * LANES), i), ir.VectorType(I16, 2 * LANES)) for w in ws]
            for c, x in enumerate(xs):
                value = read(b, x, codes[0].type, 2 * i)
                for r, code in enumerate(codes):
                    part = pairs16(b, code, value, native)
                    sums[r][c] = part if sums[r][c] is None else b.add(sums[r][c], part)
        return sums


class _Int4:
    size, x_size, tail = GROUP // 2, *_bytes("int4")

    def block(self, b: Any, ws: list[Any], xs: list[Any], tails: list[Any], native: bool) -> list[list[Any]]:
        bytes_, words = ir.VectorType(I8, 4 * LANES), ir.VectorType(I16, 2 * LANES)
        mask = constant(I8, 15, 4 * LANES)
        high: list[list[Any]] = [[None] * len(xs) for _ in ws]
        low: list[list[Any]] = [[None] * len(xs) for _ in ws]
        for i in range(0, self.size, 4 * LANES):
            planes = []
            for w in ws:
                both = read(b, w, bytes_, i)
                moved = b.bitcast(b.lshr(b.bitcast(both, words), constant(I16, 4, 2 * LANES)), bytes_)
                planes.append((b.and_(both, mask), b.and_(moved, mask)))
            for plane in range(2):
                for c, x in enumerate(xs):
                    for sums, at in ((high, 0), (low, 4 * LANES)):
                        value = read(b, x, bytes_, 4 * i + plane * 8 * LANES + at)
                        for r, codes in enumerate(planes):
                            part = pairs8(b, codes[plane], value, native)
                            sums[r][c] = part if sums[r][c] is None else b.add(sums[r][c], part)
        by = constant(I16, 256, 2 * LANES), constant(I16, 1, 2 * LANES)
        for c, tail in enumerate(tails):
            correction = b.insert_element(constant(I32, 0), read(b, tail, I32, 4), ir.Constant(I32, 0))
            for r in range(len(ws)):
                total = b.add(pairs16(b, high[r][c], by[0], native), pairs16(b, low[r][c], by[1], native))
                high[r][c] = b.add(total, correction)
        return high


_FORMS: dict[str, Any] = {"int8": _Int8(), "int4": _Int4()}


def whole_rows_beside(name: str, columns: int) -> int:
    """See `rows_beside`: a product takes more than one register here."""
    return STREAMS if columns == 1 else STREAMS * LANES // (8 * columns)


@functools.cache
def whole_dots(name: str, columns: int, rows: int = 1) -> Any:
    """`dots` of such rows of x."""
    form, native = _FORMS[name], _native()

    @intrinsic
    def multiply(typing, w, w_stride, count, s, s_stride, x, x_stride, width, size, out, out_stride):
        def generate(context, b, signature, arguments):
            w, w_stride, count, s, s_stride, x, x_stride, width, size, out, out_stride = arguments
            ws, scales = several(b, w, w_stride, count, rows), several(b, s, s_stride, count, rows)
            xs = several(b, x, x_stride, width, columns)
            whole = b.sdiv(size, ir.Constant(I64, form.size))
            done = b.mul(whole, ir.Constant(I64, form.size))
            rest = b.sub(size, done)
            more = b.zext(b.icmp_signed(">", rest, ir.Constant(I64, 0)), I64)
            ends = [b.add(x, b.mul(b.add(whole, more), ir.Constant(I64, form.x_size))) for x in xs]
            sums = [[cgutils.alloca_once_value(b, constant(F32, 0.0)) for _ in xs] for _ in ws]

            def step(addresses: list[Any], number: Any) -> None:
                by, tail, group = (b.mul(number, ir.Constant(I64, n)) for n in (form.x_size, form.tail, 4))
                tails = [b.add(end, tail) for end in ends]
                found = form.block(b, addresses, [b.add(x, by) for x in xs], tails, native)
                own = [read(b, b.add(at, group), F32) for at in scales] if name == "int4" else [None] * rows
                for c, tail in enumerate(tails):
                    scale = read(b, tail, F32)
                    for r, mine in enumerate(own):
                        factor = splat(b, scale if mine is None else b.fmul(scale, mine))
                        value = b.sitofp(found[r][c], vector(F32))
                        b.store(fma(b, value, factor, b.load(sums[r][c])), sums[r][c])

            with cgutils.for_range(b, whole) as loop:
                offset = b.mul(loop.index, ir.Constant(I64, form.size))
                places = [b.add(w, offset) for w in ws]
                ask_ahead(b, places, form.size)
                step(places, loop.index)
            with b.if_then(b.icmp_signed(">", rest, ir.Constant(I64, 0))):
                step([copied(b, b.add(w, done), rest, form.size) for w in ws], whole)
            for r in range(rows):
                for c in range(columns):
                    at = b.add(out, b.add(b.mul(out_stride, ir.Constant(I64, r)), ir.Constant(I64, 4 * c)))
                    b.store(fold(b, b.load(sums[r][c])), b.inttoptr(at, F32.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11), generate

    return multiply


@intrinsic
def poke(typing, array, row, offset, value):
    """Writes a number of 32 bits at so many bytes from the beginning of a row of an array."""
    if value.bitwidth != 32:  # numba makes int64 of sums of int32
        raise TypeError(f"poke writes 32 bits, not {value}")

    def generate(context, b, signature, arguments):
        array, row, offset, number = arguments
        made = context.make_array(signature.args[0])(context, b, array)
        start = b.ptrtoint(made.data, I64)
        stride = b.extract_value(made.strides, 0)
        at = b.add(b.add(start, b.mul(context.cast(b, row, signature.args[1], types.intp), stride)),
                   context.cast(b, offset, signature.args[2], types.intp))  # fmt: skip
        b.store(number, b.inttoptr(at, number.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, row, offset, value), generate


@inner
def unit(x, t, first, last, bits):
    """The power of two under which numbers first to last of x[t] have so many bits, and its inverse; NaN and 0 where one of
    them is not finite, which then shows in every product."""
    most = np.uint32(0)
    for k in range(first, last):
        most = max(most, bits_of(widen(x[t, k])) & np.uint32(0x7FFFFFFF))
    exponent = max(np.int32(most >> np.uint32(23)) - np.int32(127), np.int32(_EXPONENTS[0]))
    if exponent > _EXPONENTS[1]:
        return np.float32(np.nan), np.float32(0)
    up = exponent - np.int32(bits)
    return float_of(np.uint32((up + np.int32(127)) << 23)), float_of(np.uint32((np.int32(127) - up) << 23))


@strict
def code(value, most):
    """The nearest integer, to even, of size `most` at most."""
    return np.int32(min(max(np.rint(value), -most), most))


@strict
def code_under(value, scale):
    """What quant_int8 makes of it."""
    return code(value / scale, np.float32(127))


@strict
def row_unit(x, t):
    """The scale of quant_int8 for x[t], to the last bit: numbers halfway between two codes depend on it."""
    most = np.float32(1e-10)
    for k in range(x.shape[1]):
        size = abs(widen(x[t, k]))
        most = size if size > most or size != size else most
    return most / np.float32(127)


@inner
def arrange16(x, t, out, i, snapped):
    """x[t] for INT8 weights, in out[i], int16."""
    size, blocks = x.shape[1], (x.shape[1] + GROUP - 1) // GROUP
    scale = row_unit(x, t) if snapped else np.float32(0)
    for g in range(blocks):
        first, last = g * GROUP, min(size, (g + 1) * GROUP)
        if snapped:
            for k in range(first, last):
                out[i, k] = np.int16(code_under(widen(x[t, k]), scale))
        else:
            scale, inverse = unit(x, t, first, last, _INT8_BITS)
            for k in range(first, last):
                out[i, k] = np.int16(code(widen(x[t, k]) * inverse, np.float32(32767)))
        poke(out, i, 2 * GROUP * blocks + 4 * g, scale)
    for k in range(size, blocks * GROUP):
        out[i, k] = 0


@inner
def arrange8(x, t, out, i):
    """x[t] for INT4 weights, in out[i], int8: of as many numbers as two vectors have bytes the even ones' high bytes, their low
    bytes, and then the odd ones'."""
    size, blocks = x.shape[1], (x.shape[1] + GROUP - 1) // GROUP
    codes = np.empty(GROUP, np.int32)
    for g in range(blocks):
        first, count = g * GROUP, min(size - g * GROUP, GROUP)
        scale, inverse = unit(x, t, first, first + count, _INT4_BITS)
        total = np.int32(0)
        for k in range(GROUP):
            codes[k] = 0
        for k in range(count):
            codes[k] = code(widen(x[t, first + k]) * inverse, np.float32(16384))
        for k in range(GROUP):
            total += codes[k]
        for part in range(0, GROUP, 8 * LANES):
            at = 2 * (first + part)
            for k in range(4 * LANES):
                for odd in range(2):
                    value = codes[part + 2 * k + odd]
                    high = (value + 128) >> 8
                    out[i, at + odd * 8 * LANES + k] = np.int8(high)
                    out[i, at + odd * 8 * LANES + 4 * LANES + k] = np.int8(value - (high << 8))
        poke(out, i, 2 * GROUP * blocks + 8 * g, scale)
        poke(out, i, 2 * GROUP * blocks + 8 * g + 4, np.int32(-8 * total))
