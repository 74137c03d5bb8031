"""Tensor data from memory-mapped files as numpy arrays, with the checks of its contents. No torch."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsv3.checkpoint.header import fault
from dsv3.checkpoint.layout import Entry, Part
from dsv3.checkpoint.validate import LoadPlan

Array = NDArray[np.generic]
# BF16 and FP8 as their bits: numpy has neither.
_NUMPY = {"F32": np.float32, "BF16": np.uint16, "F8_E4M3": np.uint8, "I8": np.int8, "I32": np.int32, "I64": np.int64}
_CHUNK = 1 << 18  # numbers checked at a time: what a core's cache holds
_LARGEST_SCALE = float(np.finfo(np.float32).max) / 448  # times the largest FP8 number it would be infinite
# Bytes that a system may map at once where one of them is read: with a tensor come the ends of its neighbours.
_AROUND = max(1 << 21, mmap.PAGESIZE)
_REPLACE = "the weights are damaged: download or convert the file again"


class Reader:
    """Maps each file once. Arrays are views of the map: reading them costs no anonymous memory."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def array(self, entry: Entry) -> Array:
        """The whole tensor; parts of several ranks are joined into a new array."""
        parts = self.parts(entry)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=entry.axis)

    def parts(self, entry: Entry) -> list[Array]:
        """What each rank holds of the tensor."""
        return [self._part(entry, part) for part in entry.parts]

    def bits(self, entry: Entry) -> Array:
        """The tensor's bytes, for comparisons: NaN equals itself."""
        return self.array(entry).reshape(-1).view(np.uint8)

    def release(self, entry: Entry) -> None:
        """Give back the memory that reading the tensor took: the file is still there, and in the system's cache. Its arrays
        stay right, and are read again where somebody looks at them."""
        for part in entry.parts:
            held = self._maps.get(part.file)
            if held is not None and hasattr(mmap, "MADV_DONTNEED"):
                start = part.info.start // _AROUND * _AROUND
                stop = min(-(-part.info.end // _AROUND) * _AROUND, len(held))
                held.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _part(self, entry: Entry, part: Part) -> Array:
        if part.file not in self._maps:
            with part.file.open("rb") as f:
                # A private copy-on-write map: torch warns about arrays that cannot be written to. Nobody writes.
                self._maps[part.file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = np.dtype(_NUMPY[entry.dtype])
        count = (part.info.end - part.info.start) // dtype.itemsize
        flat = np.frombuffer(self._maps[part.file], dtype, count, part.info.start)
        return flat.reshape(part.info.shape)


def check_contents(entry: Entry, array: Array, scale: bool = False) -> None:
    """Refuse NaN and infinity, FP8 NaN codes, and scales that are not positive or overflow with the largest code."""
    for chunk in _chunks(array):
        if entry.dtype == "F8_E4M3":
            if int((chunk & 0x7F).max()) == 0x7F:  # type: ignore[operator]
                raise fault(entry.file, entry.name, "FP8 numbers", "NaN codes (0x7F or 0xFF)", _REPLACE)
        elif entry.dtype in ("I8", "I32"):
            return  # every code is a number
        elif entry.dtype == "BF16":
            if int((chunk & 0x7FFF).max()) >= 0x7F80:  # type: ignore[operator]
                raise fault(entry.file, entry.name, "finite numbers", "NaN or infinity", _REPLACE)
            if scale and not 0 < int(chunk.min()) <= int(chunk.max()) < 0x8000:
                raise fault(entry.file, entry.name, "finite positive scales", "zero or less", _REPLACE)
        elif not bool(np.isfinite(chunk).all()):
            what = "finite positive scales" if scale else "finite numbers"
            raise fault(entry.file, entry.name, what, "NaN or infinity", _REPLACE)
        elif scale and not (float(chunk.min()) > 0 and float(chunk.max()) < _LARGEST_SCALE):
            extreme = float(chunk.min()) if float(chunk.min()) <= 0 else float(chunk.max())
            raise fault(entry.file, entry.name, "finite positive scales", f"{extreme:g}", _REPLACE)


def check_replicas(entry: Entry, reader: Reader) -> None:
    """What every rank of the demo's layout holds must be the same in all."""
    for part in entry.replicas:
        other = Entry(entry.name, entry.dtype, entry.shape, (part,))
        if not np.array_equal(reader.bits(other), reader.bits(entry)):
            raise fault(part.file, part.key, f"the same bytes as in {entry.file.name}", "others", "convert it again")


def check_copy(copy: Entry, original: Entry, reader: Reader) -> None:
    """The MTP module's copies of embedding and head must be copies."""
    same = copy.dtype == original.dtype and np.array_equal(reader.bits(copy), reader.bits(original))
    if not same:
        found = "other numbers"
        raise fault(copy.file, copy.name, f"the same bytes as {original.name}", found, "MTP modules share it: drop the copy")


def check_plan(plan: LoadPlan, reader: Reader) -> None:
    """Check the contents of everything that the plan loads."""
    for item in plan.items:
        check_contents(item.entry, reader.array(item.entry))
        check_replicas(item.entry, reader)
        if item.scale is not None:
            check_contents(item.scale, reader.array(item.scale), scale=True)
            check_replicas(item.scale, reader)
    for copy, original in plan.copies:
        check_copy(copy, original, reader)


def _chunks(array: Array) -> Iterator[Array]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK]
