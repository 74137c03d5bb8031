"""Tensors as the arrays that kernels take. numba knows neither bfloat16 nor FP8: their bits go in as integers.

bfloat16 is uint16, FP8 e4m3 int8, packed INT4 uint8; INT8 weights are int8 too, and are told from FP8 by their scales, which
have one axis less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dsv3.plugin import LatentCache, Prepared

Array = np.ndarray[Any, Any]
FIRST = np.zeros(1, np.int64)  # the expert of a weight that has none
_NUMBERS = {torch.float32: np.float32, torch.int32: np.int32, torch.int8: np.int8}
_BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.int8}


def array(tensor: Tensor) -> Array:
    """The tensor's numbers or bits, contiguous, without a copy where it is."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    bits = _BITS.get(tensor.dtype)
    found: Array = (tensor if bits is None else tensor.view(bits)).numpy()
    return found


# Views of tensors that stay, by the tensor's identity: making one takes as long as a small kernel.
_kept: dict[int, tuple[weakref.ref[Tensor], int, Array]] = {}
Made = TypeVar("Made")


def _remembered(
    memory: dict[int, tuple[weakref.ref[Tensor], int, Made]], tensor: Tensor, make: Callable[[Tensor], Made]
) -> Made:
    """make(tensor), remembered while the tensor lives and its numbers stay where they are."""
    key = id(tensor)
    found = memory.get(key)
    if found is not None and found[0]() is tensor and found[1] == tensor.data_ptr():
        return found[2]
    value = make(tensor)
    memory[key] = weakref.ref(tensor, lambda _: memory.pop(key, None)), tensor.data_ptr(), value
    return value


def kept(tensor: Tensor) -> Array:
    """`array` of a weight or a table, remembered while the tensor lives."""
    if not tensor.is_contiguous():  # a copy would not see later changes
        return array(tensor)
    return _remembered(_kept, tensor, array)


def weight(w: Prepared) -> tuple[Array, Array]:
    """(weights [E, N, ..], scales) of a canonical weight; E is 1 without experts. Scales: FP8 [E, N/128, K/128], INT4 [E, N,
    K/128], INT8 [E, N]; [E, 1] of nothing where there are none."""
    values = kept(w.tensors["weight"])
    scale = w.tensors.get("scale")
    scales = np.zeros((*values.shape[:-2], 1), np.float32) if scale is None else kept(scale)
    if w.quant.startswith("int8"):
        scales = scales[..., 0]
    return (values, scales) if values.ndim == 3 else (values[None], scales[None])


def wide(x: Tensor) -> Array:
    """x in float32."""
    return array(x if x.dtype == torch.float32 else x.to(torch.float32))


def made(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Array]:
    """An uninitialised tensor for outputs, and its array."""
    if dtype == torch.bfloat16:
        bits = np.empty(shape, np.uint16)
        return torch.from_numpy(bits).view(dtype), bits
    numbers = np.empty(shape, _NUMBERS[dtype])
    return torch.from_numpy(numbers), numbers


def indices(tensor: Tensor) -> Array:
    """int32."""
    return array(tensor if tensor.dtype == torch.int32 else tensor.to(torch.int32))


def _storage(tensor: Tensor) -> Array:
    """Of a view, from its first number to its last, flat."""
    size = 0 if tensor.numel() == 0 else sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return array(tensor.as_strided((size,), (1,), tensor.storage_offset()))


_flat: dict[int, tuple[weakref.ref[Tensor], int, Array]] = {}


def flat(tensor: Tensor) -> Array:
    """The storage of a weight that is a view, for kernels that are told its strides; remembered while the tensor lives."""
    return _remembered(_flat, tensor, _storage)


@dataclass(frozen=True)
class Plane:
    """One plane of a latent cache as flat storage with strides: planes may be views of one buffer, and kernels must not pay for
    that in their inner loops."""

    flat: Array
    page: int
    slot: int

    @classmethod
    def of(cls, tensor: Tensor) -> Plane:
        """tensor [pages, page_size, D], whose rows are contiguous."""
        page, slot, unit = tensor.stride()
        if unit != 1 and tensor.shape[2] > 1:
            raise ValueError(f"a cache whose rows have stride {unit}; rows must be contiguous")
        return cls(_storage(tensor), page, slot)


_planes: dict[int, tuple[weakref.ref[Tensor], int, Plane]] = {}


def plane(tensor: Tensor) -> Plane:
    """`Plane.of`, remembered while the tensor lives."""
    return _remembered(_planes, tensor, Plane.of)


_NO_SCALES = Plane(np.zeros(1, np.float32), 0, 0)


def planes(cache: LatentCache) -> tuple[Any, ...]:
    """The cache's planes as kernels take them: flat, page stride, slot stride of latents, of rotated keys, of scales."""
    parts = (plane(cache.ckv), plane(cache.kpe), _NO_SCALES if cache.scale is None else plane(cache.scale))
    return tuple(member for p in parts for member in (p.flat, p.page, p.slot))
