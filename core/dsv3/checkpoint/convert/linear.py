"""A linear's weight from one number format into another."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dsv3.checkpoint.calibrate.migrate import Shift
from dsv3.checkpoint.convert.rows import rows_of
from dsv3.checkpoint.convert.unit import Output, Unit, bits, row_slices
from dsv3.checkpoint.layout import Entry
from dsv3.checkpoint.loader import as_tensor
from dsv3.checkpoint.reader import Array, Reader, check_contents
from dsv3.checkpoint.stored import (
    BLOCK,
    StoredFormat,
    scale_name,
    scale_shape,
    shape_name,
    weight_dtype,
    weight_name,
    weight_shape,
)
from dsv3.checkpoint.unpack import real_rows
from dsv3.quant.fp8 import dequantize_numbers, quantize_block
from dsv3.quant.int4 import quantize_group
from dsv3.quant.int8 import quantize_channel


class _Buffer(threading.local):
    """A thread's memory for one slice, kept from slice to slice: fresh memory costs a page fault every 4 KiB."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Uninitialised, [rows, cols]."""
        needed = shape[0] * shape[1] * dtype.itemsize
        if self._bytes.numel() < needed:
            self._bytes = torch.empty(needed, dtype=torch.uint8)
        return self._bytes[:needed].view(dtype).view(shape)


_buffer = _Buffer()


class Linear(Unit):
    """A linear's weight in another number format. entry and scale: as it is stored; shift: of outlier channels."""

    def __init__(
        self, name: str, shape: tuple[int, ...], entry: Entry, scale: Entry | None, source: StoredFormat, to: StoredFormat,
        scale_fmt: str, shift: Shift | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.entry, self.scale, self.source, self.to, self.scale_fmt = shape, entry, scale, source, to, scale_fmt
        self.name, self.shift = name, shift
        self.nbytes = entry.nbytes + (scale.nbytes if scale is not None else 0)
        self.outputs = outputs_of(name, shape, to)

    def slices(self, reader: Reader) -> Iterator[tuple[Array, ...]]:
        for start, stop in row_slices(self.shape):
            real = self._real(reader, start, stop)
            if self.shift is not None:
                real = self.shift.applied(real, start)
            yield encode(real, self.to, self.scale_fmt, None if start else self.shape)

    def _real(self, reader: Reader, start: int, stop: int) -> Tensor:
        """Rows start to stop as real numbers, in the dtype that `encode` takes: until the next call."""
        codes = rows_of(self.entry, reader, start, stop)
        check_contents(self.entry, codes)
        out = _buffer.take((stop - start, self.shape[1]), torch.bfloat16 if self.to == "none" else torch.float32)
        if self.scale is None:
            return out.copy_(as_tensor(codes))
        first, last = (start // BLOCK, -(-stop // BLOCK)) if self.source == "fp8" else (start, stop)
        scale = rows_of(self.scale, reader, first, last)
        check_contents(self.scale, scale, scale=True)
        if self.source == "fp8":
            return dequantize_numbers(as_tensor(codes), as_tensor(scale), out)
        return real_rows(as_tensor(codes), as_tensor(scale), self.source, self.shape[1], 0, stop - start, out.dtype)


def outputs_of(name: str, shape: tuple[int, ...], to: StoredFormat) -> tuple[Output, ...]:
    """The tensors of a linear in the format `to`: codes, scales, and the shape of a packed one."""
    if to == "none":
        return (Output(name, "BF16", shape),)
    codes = Output(weight_name(name, to), weight_dtype(to), weight_shape(shape, to))
    made = (codes, Output(scale_name(name, to), "F32", scale_shape(shape, to)))
    return (*made, Output(shape_name(name), "I64", (2,))) if codes.dtype == "I32" else made


def encode(real: Tensor, to: StoredFormat, scale_fmt: str, whole: tuple[int, ...] | None) -> tuple[Array, ...]:
    """Real rows [n, K] as bytes of the outputs of `outputs_of`. whole: the weight's shape with its first rows, else None."""
    if to == "none":
        return (bits(real),)
    if to == "fp8":
        codes, scale = quantize_block(real, scale_fmt)
        return bits(codes), bits(scale)
    codes, scale = quantize_group(real) if to == "int4" else quantize_channel(real)
    return pack(codes, scale, to, real.shape[1], whole)


def pack(codes: Tensor, scale: Tensor, to: StoredFormat, k: int, whole: tuple[int, ...] | None) -> tuple[Array, ...]:
    """Canonical INT8 or INT4 codes [n, ..] and scales of rows with k columns, as they are stored. whole: see `encode`."""
    if to == "int8":
        return bits(codes), bits(scale)
    if to == "int8-packed":
        codes = codes.view(torch.uint8).bitwise_xor(0x80)
    words = torch.zeros(codes.shape[0], weight_shape((1, k), to)[1] * 4, dtype=torch.uint8)
    words[:, : codes.shape[1]] = codes
    return bits(words), bits(scale), np.array(whole or (), dtype=np.int64)
