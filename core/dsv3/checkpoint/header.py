"""The header of one safetensors file, checked in full: what safetensors itself accepts but should not, included."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.errors import CheckpointError

HEADER_LIMIT = 16 << 20
# The largest files of the family, DeepSeek-V3 for one rank, hold about 92,000.
TENSOR_LIMIT = 100_000
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_AGAIN = "download or write the file again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype in safetensors' spelling, shape, and its bytes [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def fault(file: Path | str, tensor: str, expected: str, found: str, remedy: str) -> CheckpointError:
    """The one form of complaint about a checkpoint: file, tensor, expected, found, remedy."""
    name = file.name if isinstance(file, Path) else file
    what = f"{name}: {tensor}" if tensor else name
    return CheckpointError(f"{what}: expected {expected}; found {found}; {remedy}")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of the file. CheckpointError for anything malformed; no tensor data is read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            prefix = f.read(8)
            if len(prefix) < 8:
                raise fault(path, "", "a safetensors file", f"{size} bytes", _AGAIN)
            (length,) = struct.unpack("<Q", prefix)
            if length > HEADER_LIMIT:
                limit = f"a header of at most {HEADER_LIMIT >> 20} MiB"
                raise fault(path, "", limit, f"one of {length} bytes", "this is no safetensors file, or a hostile one")
            if 8 + length > size:
                raise fault(path, "", f"a header of {length} bytes", f"a file of {size} bytes: truncated", _AGAIN)
            raw = f.read(length)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror or error}") from error
    entries = _parse(path, raw)
    entries.pop("__metadata__", None)
    infos = {name: _info(path, name, entry, 8 + length, size) for name, entry in entries.items()}
    _check_tiling(path, infos, 8 + length, size)
    return infos


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise fault(path, name, "one entry in the header", "several", _AGAIN)
            table[name] = value
        return table

    # Counted before parsing, which takes seconds for a header made of nothing but names.
    if (count := raw.count(b'"data_offsets"')) > TENSOR_LIMIT:
        raise fault(path, "", f"at most {TENSOR_LIMIT} tensors", str(count), "this is no checkpoint of the family")
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise fault(path, "", "a JSON header", f"{type(error).__name__}: {str(error)[:80]}", _AGAIN) from error
    if not isinstance(entries, dict):
        raise fault(path, "", "a JSON object as header", type(entries).__name__, _AGAIN)
    return entries


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _info(path: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, Mapping) or any(key not in entry for key in keys):
        raise fault(path, name, f"an entry with {', '.join(keys)}", repr(entry)[:80], _AGAIN)
    dtype, shape, offsets = (entry[key] for key in keys)
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise fault(path, name, "a known dtype", repr(dtype)[:80], "store it as BF16, F32 or F8_E4M3")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape) or len(shape) > 8:
        raise fault(path, name, "a shape of non-negative integers", repr(shape)[:80], _AGAIN)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise fault(path, name, "two byte offsets", repr(offsets)[:80], _AGAIN)
    start, end = offsets
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != wanted:
        raise fault(path, name, f"{wanted} bytes for {dtype} {shape}", f"{end - start}", _AGAIN)
    if base + end > size:
        raise fault(path, name, f"its data up to byte {base + end}", f"a file of {size} bytes: truncated", _AGAIN)
    return TensorInfo(dtype, tuple(shape), base + start, base + end)


def _check_tiling(path: Path, infos: Mapping[str, TensorInfo], base: int, size: int) -> None:
    """The tensors must cover the data exactly: no overlap, hole or trailing bytes."""
    at = base
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            kind = "an overlap" if info.start < at else "a hole"
            raise fault(path, name, f"its data at byte {at}", f"{kind}: byte {info.start}", _AGAIN)
        at = info.end
    if at != size:
        raise fault(path, "", f"{at} bytes", f"{size} bytes: data that no tensor owns", _AGAIN)
