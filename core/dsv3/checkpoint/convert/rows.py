"""Rows of a checkpoint's tensor, without holding the whole of it, also where it is spread over the demo's ranks."""

from __future__ import annotations

import numpy as np

from dsv3.checkpoint.layout import Entry
from dsv3.checkpoint.reader import Array, Reader


def rows_of(entry: Entry, reader: Reader, start: int, stop: int) -> Array:
    """Rows start to stop, in the numpy dtype of `Reader`: a view of the file where they lie in one part, else a copy."""
    parts = reader.parts(entry)
    if len(parts) == 1:
        return parts[0][start:stop]
    if entry.axis == 1:
        return np.concatenate([part[start:stop] for part in parts], axis=1)
    found, at = [], 0
    for part in parts:
        first, last = max(start - at, 0), min(stop - at, part.shape[0])
        if first < last:
            found.append(part[first:last])
        at += part.shape[0]
    return found[0] if len(found) == 1 else np.concatenate(found)
