"""Moving arguments about: to the CPU, copies of what is mutated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv3.plugin import LatentCache, Prepared


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor in it changed: tensors, weights, caches, and mappings, tuples and lists of those."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Prepared):
        return replace(value, tensors={k: change(t) for k, t in value.tensors.items()})
    if isinstance(value, LatentCache):
        return LatentCache(change(value.ckv), change(value.kpe), None if value.scale is None else change(value.scale))
    if isinstance(value, Mapping):
        return {k: map_tensors(v, change) for k, v in value.items()}
    if isinstance(value, tuple | list):  # a named tuple becomes a plain one
        return (
            [map_tensors(v, change) for v in value] if isinstance(value, list) else tuple(map_tensors(v, change) for v in value)
        )
    return value


def clone_cache(cache: LatentCache) -> LatentCache:
    """A copy that may be written to."""
    copied: LatentCache = map_tensors(cache, lambda t: t.clone())
    return copied


def to_cpu(value: Any) -> Any:
    """Everything on the CPU."""
    return map_tensors(value, lambda t: t.detach().to("cpu"))


def raw_bytes(tensor: Tensor) -> Tensor:
    """All its bytes in order, u8 of one dimension, whatever its strides (torch takes a dimension of one for contiguous with
    any stride, and then refuses to view it as bytes)."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    flat.view(tensor.shape).copy_(tensor)
    return flat.view(torch.uint8)
