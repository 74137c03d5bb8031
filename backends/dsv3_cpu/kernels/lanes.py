"""Stored weights as vectors of float32, several numbers to an instruction.

A format turns a step of a row, `planes` x LANES stored numbers, into as many vectors as it has planes. Where n numbers share a
word, the planes of a vector of words hold its numbers 0, n, 2 n and so on, then 1, n + 1 and so on, which costs fewest
instructions; `arrange` brings what they are multiplied with into the same order. LANES is what a vector register of this
processor holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from dsv3_cpu.processor import LANES

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def vector(kind: ir.Type) -> ir.Type:
    return ir.VectorType(kind, LANES)


def constant(kind: ir.Type, value: float, count: int = LANES) -> Any:
    return ir.Constant(ir.VectorType(kind, count), [value] * count)


def splat(b: Any, value: Any, lanes: int = LANES) -> Any:
    """A number in every lane."""
    kind = ir.VectorType(value.type, lanes)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), constant(I32, 0, lanes))


def read(b: Any, address: Any, kind: ir.Type, offset: int = 0) -> Any:
    """What is at an address (an integer) of any alignment."""
    if offset:
        address = b.add(address, ir.Constant(I64, offset))
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


class Format(ABC):
    """planes: vectors per step, even; size: bytes per step; shared: numbers that share a word, 1 where none do."""

    planes: int
    size: int
    shared = 1

    @property
    def numbers(self) -> int:
        """Per step."""
        return self.planes * LANES

    @abstractmethod
    def decode(self, b: Any, address: Any) -> list[Any]:
        """The step at an address as vectors of float32."""

    def turns(self, b: Any, address: Any) -> Iterator[tuple[int, Any]]:
        """`decode`, plane by plane with its number, in the order in which a product adds them up."""
        yield from enumerate(self.decode(b, address))


class Float32(Format):
    planes, size = 4, 16 * LANES

    def decode(self, b: Any, address: Any, planes: int = 4) -> list[Any]:
        return [read(b, address, vector(F32), 4 * LANES * p) for p in range(planes)]


class BFloat16(Format):
    planes, size = 4, 8 * LANES
    shared = 2

    def decode(self, b: Any, address: Any, planes: int = 4) -> list[Any]:
        found = []
        for n in range(planes // 2):
            both = read(b, address, vector(I32), 4 * LANES * n)
            found += [b.shl(both, constant(I32, 16)), b.and_(both, constant(I32, -(1 << 16)))]
        return [b.bitcast(v, vector(F32)) for v in found]


class Fp8(Format):
    """e4m3fn codes that are numbers, times 2^-120: exponent and mantissa moved to where float32 has its own, so that subnormals
    come out right. Two codes at a time share a shift, which also spreads the sign."""

    planes, size = 4, 4 * LANES
    shared = 4

    def decode(self, b: Any, address: Any) -> list[Any]:
        return [value for _, value in sorted(self.turns(b, address), key=lambda turn: turn[0])]

    def turns(self, b: Any, address: Any) -> Iterator[tuple[int, Any]]:
        pairs, kind = ir.VectorType(I16, 2 * LANES), vector(I32)
        codes, mask, up = read(b, address, pairs), constant(I32, 0x87F00000 - (1 << 32)), constant(I32, 16)
        for first in (1, 0):  # the code in the high byte of each pair, which needs no shift first
            at_top = codes if first else b.shl(codes, constant(I16, 8, 2 * LANES))
            both = b.bitcast(b.ashr(at_top, constant(I16, 4, 2 * LANES)), kind)
            yield first, b.bitcast(b.and_(b.shl(both, up), mask), vector(F32))
            yield first + 2, b.bitcast(b.and_(both, mask), vector(F32))


class Int8(Format):
    planes, size = 4, 4 * LANES

    def decode(self, b: Any, address: Any) -> list[Any]:
        codes = [read(b, address, vector(I8), LANES * p) for p in range(4)]
        return [b.sitofp(b.sext(v, vector(I32)), vector(F32)) for v in codes]


class Int4(Format):
    """Nibbles q + 8, low first. Flipping their highest bits makes them two's complement."""

    planes, size = 8, 4 * LANES
    shared = 8

    def decode(self, b: Any, address: Any) -> list[Any]:
        codes = b.xor(read(b, address, vector(I32)), constant(I32, 0x88888888 - (1 << 32)))
        moved = [b.shl(codes, constant(I32, 28 - 4 * p)) if p < 7 else codes for p in range(8)]
        return [b.sitofp(b.ashr(v, constant(I32, 28)), vector(F32)) for v in moved]


FORMATS = {"f32": Float32(), "bf16": BFloat16(), "fp8": Fp8(), "int8": Int8(), "int4": Int4()}
