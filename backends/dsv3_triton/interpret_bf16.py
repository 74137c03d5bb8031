"""bfloat16 in Triton's interpreter: it keeps the bits as integers, truncates where devices round, and multiplies the bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(x.shape)


def _cast(builder: Any, source: TensorHandle, target: Any) -> TensorHandle:
    """Any number to any number of which one is bfloat16; the others as before."""
    to = target.scalar
    if tl.bfloat16 not in (source.dtype.scalar, to) or source.dtype.scalar == to:
        return InterpreterBuilder.cast_impl(builder, source, target)
    if to == tl.bfloat16:
        return TensorHandle(narrow(source.data.astype(np.float32)), to)
    return InterpreterBuilder.cast_impl(builder, TensorHandle(widen(source.data), tl.float32), target)


def _dot(builder: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    """bfloat16 operands as the float32 numbers that they are."""
    wide = [TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
    return InterpreterBuilder.create_dot(builder, *wide, *rest)


@contextlib.contextmanager
def bfloat16() -> Iterator[None]:
    """Casts and products of bfloat16 are right."""
    mine = {"cast_impl": _cast, "create_dot": _dot}
    before = {name: vars(interpreter_builder)[name] for name in mine if name in vars(interpreter_builder)}
    for name, function in mine.items():
        setattr(interpreter_builder, name, function.__get__(interpreter_builder))
    try:
        yield
    finally:
        for name in mine:
            delattr(interpreter_builder, name)
        for name, function in before.items():
            setattr(interpreter_builder, name, function)
