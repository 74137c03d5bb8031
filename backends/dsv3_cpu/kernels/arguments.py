"""A kernel's arguments, read from a block of int64 words: arrays as an address and their sizes, numbers as they are."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np import arrayobj

_DTYPES = {
    "u1": types.uint8, "i1": types.int8, "i2": types.int16, "u2": types.uint16, "f4": types.float32, "f8": types.float64,
    "i4": types.int32, "i8": types.int64,
}  # fmt: skip
_WORD = ir.IntType(64)


@functools.cache
def unpacker(signature: str) -> Any:
    """An intrinsic that makes the arguments' tuple of a block's address; signature as `compile.Kernel` has it."""
    kinds = [_kind(code) for code in signature.split(",")]

    @intrinsic
    def unpack(typing, block):
        made = types.Tuple(kinds)

        def generate(context, builder, _, arguments):
            base = builder.inttoptr(arguments[0], _WORD.as_pointer())
            at, values = 0, []
            for kind in kinds:
                read = [builder.load(builder.gep(base, [ir.Constant(_WORD, at + n)])) for n in range(_words(kind))]
                values.append(_value(context, builder, kind, read))
                at += len(read)
            return context.make_tuple(builder, made, values)

        return made(types.intp), generate

    return unpack


def _kind(code: str) -> Any:
    if code in ("i", "f"):
        return types.intp if code == "i" else types.float64
    dtype, _, dimensions = code.partition(":")
    return types.Array(_DTYPES[dtype], int(dimensions), "C")


def _words(kind: Any) -> int:
    return 1 + kind.ndim if isinstance(kind, types.Array) else 1


def _value(context: Any, builder: Any, kind: Any, read: list[Any]) -> Any:
    if kind == types.float64:
        return builder.bitcast(read[0], ir.DoubleType())
    if not isinstance(kind, types.Array):
        return read[0]
    array = arrayobj.make_array(kind)(context, builder)
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    shape, stride = read[1:], ir.Constant(_WORD, size)
    strides: list[Any] = []
    for extent in reversed(shape):
        strides.insert(0, stride)
        stride = builder.mul(stride, extent)
    data = builder.inttoptr(read[0], context.get_data_type(kind.dtype).as_pointer())
    arrayobj.populate_array(array, data, shape, strides, ir.Constant(_WORD, size), meminfo=None)
    return array._getvalue()
