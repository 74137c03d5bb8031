"""Which bytes a kernel moves: loads and stores counted while it is interpreted.

What is counted is what the instructions ask for. Bytes that two programs load come from memory once and from a cache the second
time, if they run close together; so `loaded` is the most that memory can be asked for, `touched` the least.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder


@dataclass
class Traffic:
    """Bytes of one tensor. loaded and stored: by all instructions, masked lanes left out; touched: different ones."""

    loaded: int = 0
    stored: int = 0
    touched: int = 0


class _Area:
    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.seen = np.zeros(self.size, dtype=bool)
        self.count = Traffic()


@contextlib.contextmanager
def counted(tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Traffic]]:
    """Counts per name, complete when the context ends. "other": what a host function allocates, partial results say."""
    areas = {name: _Area(tensor) for name, tensor in tensors.items()}
    found = {name: area.count for name, area in areas.items()} | {"other": Traffic()}
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def note(pointers: Any, mask: Any, kind: str) -> None:
        element = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        places = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        wanted = places[np.broadcast_to(mask.data, places.shape).astype(bool)].astype(np.int64)
        for area in areas.values():
            inside = wanted[(wanted >= area.start) & (wanted < area.start + area.size)]
            setattr(area.count, kind, getattr(area.count, kind) + inside.size * element)
            for byte in range(element):
                area.seen[inside - area.start + byte] = True
            wanted = wanted[(wanted < area.start) | (wanted >= area.start + area.size)]
        setattr(found["other"], kind, getattr(found["other"], kind) + wanted.size * element)

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask, "loaded")
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask, "stored")
        return store(pointers, value, mask, *rest)

    interpreter_builder.create_masked_load = counted_load
    interpreter_builder.create_masked_store = counted_store
    try:
        yield found
    finally:
        del interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
        for area in areas.values():
            area.count.touched = int(area.seen.sum())
