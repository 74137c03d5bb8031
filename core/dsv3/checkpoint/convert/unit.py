"""The unit of a conversion: one tensor of the source, in slices of rows, as one or two tensors of the destination."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv3.checkpoint.calibrate.migrate import Shift
from dsv3.checkpoint.convert.rows import rows_of
from dsv3.checkpoint.header import ITEM_BYTES
from dsv3.checkpoint.layout import Entry
from dsv3.checkpoint.loader import as_tensor
from dsv3.checkpoint.reader import Array, Reader, check_contents, check_replicas
from dsv3.checkpoint.stored import BLOCK

_SLICE = 1 << 20  # numbers converted at a time: bounds what a worker holds, and keeps it in a core's cache


@dataclass(frozen=True)
class Output:
    """A tensor that will be written: name, dtype in safetensors' spelling, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_BYTES[self.dtype]


class Unit(ABC):
    """Slices come in order of rows; each holds the next bytes of every output (possibly none)."""

    name: str  # the tensor's, in the destination; of a linear its weight's
    outputs: tuple[Output, ...]
    nbytes: int  # read
    entry: Entry
    scale: Entry | None

    def check(self, reader: Reader) -> None:
        """What several ranks of the source hold must be the same."""
        for entry in (self.entry, self.scale):
            if entry is not None:
                check_replicas(entry, reader)

    @abstractmethod
    def slices(self, reader: Reader) -> Iterator[tuple[Array, ...]]:
        """The next bytes of every output, contiguous. CheckpointError where the source's numbers cannot be right."""


def row_slices(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of whole blocks of rows, about _SLICE numbers each; one for an empty tensor."""
    rows = shape[0] if shape else 1
    width = int(np.prod(shape[1:], dtype=np.int64))
    step = max(1, _SLICE // max(width, 1) // BLOCK) * BLOCK
    for start in range(0, max(rows, 1), step):
        yield start, min(start + step, rows)


class Copy(Unit):
    """The same numbers, whole or a rank's part: `part` is (axis, rank, ranks)."""

    def __init__(self, name: str, entry: Entry, part: tuple[int, int, int] | None = None, scale: bool = False) -> None:
        self.name, self.entry, self.part, self.scale, self.is_scale = name, entry, part, None, scale
        shape, self.nbytes = list(entry.shape), entry.nbytes
        if part is not None:
            shape[part[0]] //= part[2]
            self.nbytes //= part[2]
        self.outputs = (Output(name, entry.dtype, tuple(shape)),)

    def slices(self, reader: Reader) -> Iterator[tuple[Array, ...]]:
        shape = self.outputs[0].shape
        axis, rank = (0, 0) if self.part is None else self.part[:2]
        first = rank * shape[0] if shape and axis == 0 else 0
        for start, stop in row_slices(shape):
            rows = rows_of(self.entry, reader, first + start, first + stop)
            if axis == 1:
                rows = rows[:, rank * shape[1] : (rank + 1) * shape[1]]
            check_contents(self.entry, np.ascontiguousarray(rows), self.is_scale)
            yield (np.ascontiguousarray(rows),)


class Cast(Unit):
    """An unquantised tensor, F32 or BF16, as BF16."""

    def __init__(self, name: str, entry: Entry) -> None:
        self.name, self.entry, self.scale, self.nbytes = name, entry, None, entry.nbytes
        self.outputs = (Output(name, "BF16", entry.shape),)

    def slices(self, reader: Reader) -> Iterator[tuple[Array, ...]]:
        for start, stop in row_slices(self.entry.shape):
            rows = rows_of(self.entry, reader, start, stop)
            check_contents(self.entry, rows)
            yield (bits(as_tensor(rows).to(torch.bfloat16)),)


class Shifted(Unit):
    """An unquantised tensor, in the dtype it has, with outlier channels moved out of it or into it."""

    def __init__(self, name: str, entry: Entry, shift: Shift) -> None:
        self.name, self.entry, self.scale, self.shift, self.nbytes = name, entry, None, shift, entry.nbytes
        self.outputs = (Output(name, entry.dtype, entry.shape),)

    def slices(self, reader: Reader) -> Iterator[tuple[Array, ...]]:
        for start, stop in row_slices(self.entry.shape):
            rows = rows_of(self.entry, reader, start, stop)
            check_contents(self.entry, rows)
            yield (bits(self.shift.applied(as_tensor(rows).clone(), start)),)


def bits(tensor: Tensor) -> Array:
    """A contiguous tensor's bytes."""
    return tensor.contiguous().view(torch.uint8).numpy()


def buffer_of(array: Array) -> memoryview:
    """The bytes of a contiguous array, uncopied."""
    return array.reshape(-1).view(np.uint8).data
