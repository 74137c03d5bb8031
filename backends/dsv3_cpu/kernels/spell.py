"""Rows of a weight written out as float32 or bfloat16, for the matrix products of many rows."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dsv3_cpu.compile import inner, overloads
from dsv3_cpu.constants import GROUP
from dsv3_cpu.kernels.atoms import take
from dsv3_cpu.kernels.lanes import F32, I8, I16, I32, I64, constant, read, splat, vector
from dsv3_cpu.kernels.numbers import fp8, put, widen
from dsv3_cpu.kernels.order import rounded
from dsv3_cpu.kernels.rows import kind
from dsv3_cpu.processor import LANES

_ROWS = 8  # that a thread takes at a time


def _fp8(b: Any, address: Any, at: Any) -> Any:
    """LANES codes from number `at` on, exactly: their bits where float32 has its own, and then the exponent put right."""
    codes = b.sext(read(b, b.add(address, at), vector(I8)), vector(I32))
    moved = b.and_(b.shl(codes, constant(I32, 20)), constant(I32, 0x87F00000 - (1 << 32)))
    return b.fmul(b.bitcast(moved, vector(F32)), constant(F32, 2.0**120))


def _int8(b: Any, address: Any, at: Any) -> Any:
    return b.sitofp(b.sext(read(b, b.add(address, at), vector(I8)), vector(I32)), vector(F32))


def _int4(b: Any, address: Any, at: Any) -> Any:
    half, wide = ir.VectorType(I8, LANES // 2), ir.VectorType(I16, LANES // 2)
    pairs = b.zext(read(b, b.add(address, b.ashr(at, ir.Constant(I64, 1))), half), wide)
    high = b.shl(b.lshr(pairs, constant(I16, 4, LANES // 2)), constant(I16, 8, LANES // 2))
    codes = b.bitcast(b.or_(b.and_(pairs, constant(I16, 15, LANES // 2)), high), vector(I8))
    return b.sitofp(b.sub(b.zext(codes, vector(I32)), constant(I32, 8)), vector(F32))


_DECODE = {"fp8": _fp8, "int8": _int8, "int4": _int4}


@functools.cache
def _run(name: str, half: bool) -> Any:
    """An intrinsic (w, scale, start, count, out): numbers start to start + count of the row of codes at address w, times scale,
    to the address out; count a multiple of LANES; half: in bfloat16."""

    @intrinsic
    def write(typing, w, scale, start, count, out):
        def generate(context, b, signature, arguments):
            w, scale, start, count, out = arguments
            factor = splat(b, scale)
            with cgutils.for_range(b, b.sdiv(count, ir.Constant(I64, LANES))) as loop:
                step = b.mul(loop.index, ir.Constant(I64, LANES))
                value = b.fmul(_DECODE[name](b, w, b.add(start, step)), factor)
                to = b.add(out, b.mul(step, ir.Constant(I64, 2 if half else 4)))
                stored = b.trunc(b.lshr(rounded(b, value), constant(I32, 16)), vector(I16)) if half else value
                b.store(stored, b.inttoptr(to, stored.type.as_pointer()), align=2 if half else 4)
            return context.get_dummy_value()

        return types.void(types.intp, types.float32, types.intp, types.intp, types.intp), generate

    return write


def one(w, s, e, n, k):
    """Number k of row n of expert e, without its scale."""


@overloads(one)
def _one(w, s, e, n, k):
    found = {
        "fp8": lambda w, s, e, n, k: fp8(w[e, n, k]) * np.float32(256),
        "int8": lambda w, s, e, n, k: np.float32(w[e, n, k]),
        "int4": lambda w, s, e, n, k: np.float32((np.int32(w[e, n, k // 2]) >> (k % 2 * 4) & 15) - 8),
    }
    return found.get(kind(w, s), lambda w, s, e, n, k: widen(w[e, n, k]))


def scale_of(w, s, e, n, g):
    """By which numbers of group g of a row are multiplied."""


@overloads(scale_of)
def _scale_of(w, s, e, n, g):
    found = {
        "fp8": lambda w, s, e, n, g: s[e, n // GROUP, g],
        "int8": lambda w, s, e, n, g: s[e, n],
        "int4": lambda w, s, e, n, g: s[e, n, g],
    }
    return found.get(kind(w, s), lambda w, s, e, n, g: np.float32(1))


def spell(w, s, e, n, out, i):
    """Row n of expert e as real numbers in out[i], float32 or bfloat16."""


@overloads(spell)
def _spell(w, s, e, n, out, i):
    if kind(w, s) in ("bf16", "f32"):

        def plain(w, s, e, n, out, i):
            for k in range(out.shape[1]):
                put(out, (i, k), widen(w[e, n, k]))

        return plain
    half, item = out.dtype == types.uint16, out.dtype.bitwidth // 8
    run = _run(kind(w, s), half)

    def coded(w, s, e, n, out, i):
        row = w.ctypes.data + (e * w.shape[1] + n) * w.shape[2]
        to = out.ctypes.data + i * out.shape[1] * item
        for g in range((out.shape[1] + GROUP - 1) // GROUP):
            start, factor = g * GROUP, scale_of(w, s, e, n, g)
            count = min(GROUP, out.shape[1] - start)
            whole = count // LANES * LANES
            run(row, factor, start, whole, to + item * start)
            for k in range(start + whole, start + count):
                put(out, (i, k), one(w, s, e, n, k) * factor)

    return coded


@inner
def spell_rows(w, s, e, first, out, start, stop):
    for i in range(start, stop):
        spell(w, s, e, first + i, out, i)


def spelled(team, me, crew, w, s, e, first, out):
    """out[i] = row first + i of expert e as real numbers, float32 or bfloat16 [rows, K]."""
    p = take(team, 0)
    while p * _ROWS < out.shape[0]:
        spell_rows(w, s, e, first, out, p * _ROWS, min(out.shape[0], (p + 1) * _ROWS))
        p = take(team, 0)
