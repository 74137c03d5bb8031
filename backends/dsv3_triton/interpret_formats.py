"""bfloat16 and FP8 in Triton's interpreter: it keeps their bits as integers, truncates to bfloat16 where devices round,
multiplies bfloat16 as integers, and reads NaN codes of FP8 as numbers. For the time of a launch, this is put right."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e4b8: torch.float8_e4m3fnuz}


@functools.cache
def _table(fp8: Any) -> np.ndarray:
    """The 256 numbers of an FP8 encoding, float32."""
    return torch.arange(256, dtype=torch.uint8).view(_FP8[fp8]).to(torch.float32).numpy()


def _widen(x: TensorHandle) -> TensorHandle:
    """bfloat16 and FP8 as float32, exactly; anything else as it is."""
    if x.dtype.scalar == tl.bfloat16:
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return TensorHandle(_table(x.dtype.scalar)[x.data], tl.float32) if x.dtype.scalar in _FP8 else x


def _narrow(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(x.shape)


def _cast(builder: Any, source: TensorHandle, target: Any) -> TensorHandle:
    """Any number to any number but FP8."""
    to = target.scalar
    if source.dtype.scalar == to:
        return source
    wide = _widen(source)
    if to == tl.bfloat16:
        return TensorHandle(_narrow(wide.data.astype(np.float32)), to)
    return InterpreterBuilder.cast_impl(builder, wide, target)


def _change(builder: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
    """FP8 to another format, or the reverse, which is the interpreter's own."""
    if source.dtype.scalar in _FP8 and target.scalar not in _FP8:
        return _cast(builder, source, target)
    return InterpreterBuilder.create_fp_to_fp(builder, source, target, rounding)


def _dot(builder: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return InterpreterBuilder.create_dot(builder, _widen(a), _widen(b), *rest)


def _patch_core(original: Any, lang: Any, scope: Any) -> None:
    """Triton 3.6's interpreter does not know all FP8 types by name, and its loops do not take the arrays of new numpy."""
    original(lang, scope)
    scope.set_attr(lang.tensor, "__index__", lambda self: int(self.handle.data.item()))
    named = lang.dtype.to_ir
    scope.set_attr(lang.dtype, "to_ir", lambda self, builder: self if self in _FP8 else named(self, builder))


@contextlib.contextmanager
def formats() -> Iterator[None]:
    """Casts and products of bfloat16 and FP8 are those of devices."""
    mine: dict[str, Any] = {"cast_impl": _cast, "create_fp_to_fp": _change, "create_dot": _dot}
    before = interpreter._patch_lang_core
    for name, function in mine.items():
        setattr(interpreter_builder, name, functools.partial(function, interpreter_builder))
    interpreter._patch_lang_core = functools.partial(_patch_core, before)
    try:
        with np.errstate(all="ignore"):  # infinities and NaN are what kernels expect of them
            yield
    finally:
        interpreter._patch_lang_core = before
        for name in mine:
            vars(interpreter_builder).pop(name, None)
