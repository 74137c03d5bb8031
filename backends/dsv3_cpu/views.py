"""Tensors as the arrays that kernels take. numba knows neither bfloat16 nor FP8: their bits go in as integers.

bfloat16 is uint16, FP8 e4m3 int8, packed INT4 uint8; INT8 weights are int8 too, and are told from FP8 by their scales, which
have one axis less.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dsv3.plugin import LatentCache, Prepared
from dsv3_cpu.constants import GROUP, WHOLE
from dsv3_cpu.programs import signature_of, words_of
from dsv3_cpu.team import hold

Array = np.ndarray[Any, Any]
Config = Mapping[str, Any]  # meta-parameters, see configs/kernels
DEFAULT: Config = {}
# See `remembered`: the tensors that something was made of, where their numbers are, and what was made.
Memory = dict[int, tuple[tuple[weakref.ref[Tensor], ...], tuple[int, ...], Any]]
FIRST = np.zeros(1, np.int64)  # the expert of a weight that has none
_NUMBERS = {torch.float32: np.float32, torch.int32: np.int32, torch.int8: np.int8}
_BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.int8}


# Codes of signatures, see programs.Kernel.
CODES = {torch.float32: "f4", torch.bfloat16: "u2", torch.float8_e4m3fn: "i1", torch.int8: "i1", torch.uint8: "u1"}


def array(tensor: Tensor) -> Array:
    """The tensor's numbers or bits, contiguous, without a copy where it is."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    bits = _BITS.get(tensor.dtype)
    found: Array = (tensor if bits is None else tensor.view(bits)).numpy()
    return found


_kept_words: Memory = {}


def kept_words(tensor: Tensor) -> tuple[int, ...]:
    """The words of `kept`."""
    return remembered(_kept_words, (tensor,), lambda: words_of(kept(tensor)))


def dense(x: Tensor) -> Tensor:
    """x, contiguous and without a gradient, for kernels that are told addresses."""
    return x.detach() if x.is_contiguous() else x.detach().contiguous()


# Views of tensors that stay, by the tensor's identity: making one takes as long as a small kernel.
_kept: Memory = {}
Made = TypeVar("Made")


def remembered(memory: Memory, tensors: tuple[Tensor, ...], make: Callable[[], Made]) -> Made:
    """make(), remembered by the first of the tensors that it is made of, while all are the same and their numbers stay where
    they are."""
    key = id(tensors[0])
    found = memory.get(key)
    if found is not None:
        for tensor, reference, address in zip(tensors, found[0], found[1], strict=False):
            if reference() is not tensor or tensor.data_ptr() != address:
                break
        else:
            if len(tensors) == len(found[0]):
                value: Made = found[2]
                return value
    made = make()
    first, *others = tensors
    references = weakref.ref(first, lambda _: memory.pop(key, None)), *(weakref.ref(tensor) for tensor in others)
    memory[key] = references, tuple(tensor.data_ptr() for tensor in tensors), made
    return made


def kept(tensor: Tensor) -> Array:
    """`array` of a weight or a table, remembered while the tensor lives."""
    if not tensor.is_contiguous():  # a copy would not see later changes
        return array(tensor)
    return remembered(_kept, (tensor,), lambda: array(tensor))


class Weight:
    """A canonical weight for kernels: values [E, N, ..] and scales, E being 1 without experts, and both as words of an argument
    block. Scales: FP8 [E, N/128, K/128], INT4 [E, N, K/128], INT8 [E, N]; [E, 1] of nothing where there are none.

    rows: N; step: numbers to whose multiple rows of x are padded; peaks: numbers after those; expert_bytes: of one expert's
    values.
    """

    def __init__(self, values: Array, scales: Array, form: str) -> None:
        self.values, self.scales, self.form = values, scales, form
        self.signature, self.words = signature_of((values, scales)), words_of(values, scales)
        self.experts, self.rows = int(values.shape[0]), int(values.shape[1])
        self.step, self.expert_bytes = steps()[form], values.nbytes // max(1, values.shape[0])
        self.peaks = int(scales.shape[2]) if form == "fp8" else 0
        self.programs: dict[Any, int] = {}  # by what a caller finds them

    @classmethod
    def of(cls, w: Prepared) -> Weight:
        values = kept(w.tensors["weight"])
        scale = w.tensors.get("scale")
        scales = np.zeros((*values.shape[:-2], 1), np.float32) if scale is None else kept(scale)
        if w.quant.startswith("int8"):
            scales = np.ascontiguousarray(scales[..., 0])
        if values.ndim == 2:
            values, scales = values[None], scales[None]
        return cls(values, scales, _FORMS[w.quant.split("-")[0]] or _REAL[values.dtype.name])

    def arranged(self, size: int, dtype: torch.dtype) -> tuple[str, int]:
        """What rows of so many activations become for this weight: their dtype's code in signatures, and how many there are.

        float32, in whole steps and for FP8 with the peaks of its blocks; with bfloat16 activations INT8 and INT4 weights are
        multiplied in whole numbers, see kernels/whole.py."""
        if dtype == torch.bfloat16 and self.form in WHOLE:
            code, block, end = WHOLE[self.form]
            return code, -(-size // GROUP) * (block + end)
        return "f4", -(-size // self.step) * self.step + self.peaks

    @property
    def columns(self) -> int:
        """Numbers of a row; INT4 keeps two to a byte, and so may name one too many."""
        return int(self.values.shape[2]) * (2 if self.form == "int4" else 1)

    def nothing(self) -> Weight:
        """A weight of this format without a row."""
        return Weight(self.values[:, :0], self.scales[:, :0], self.form)


DTYPES = {"f4": np.float32, "i2": np.int16, "i1": np.int8}
_FORMS = {"fp8": "fp8", "int8": "int8", "int4": "int4", "none": ""}
_REAL = {"uint16": "bf16", "float32": "f32"}


@functools.cache
def steps() -> dict[str, int]:
    """Numbers per step of every format on this processor."""
    from dsv3_cpu.kernels.lanes import FORMATS

    return {name: form.numbers for name, form in FORMATS.items()}


_weights: Memory = {}


def weight(w: Prepared) -> Weight:
    """`Weight.of`, remembered while the weight lives."""
    return remembered(_weights, tuple(w.tensors.values()), lambda: Weight.of(w))


def tensor_weight(w: Tensor) -> Weight:
    """A plain tensor [N, K] as a weight."""
    return remembered(_weights, (w,), lambda: Weight.of(Prepared("canonical", "none", tuple(w.shape), {"weight": w})))


class _Scratch(threading.local):
    """Memory that a thread's kernels write before they read it; it grows and is used again."""

    def __init__(self) -> None:
        self.held = np.empty(0, np.float32)
        self.size = self.address = 0


_scratch = _Scratch()


def scratch_address(size: int) -> int:
    """Of room for so many float32, which the next call overwrites."""
    if _scratch.size < size:
        _scratch.held = np.empty(size + 65536, np.float32)
        _scratch.size, _scratch.address = _scratch.held.size, _scratch.held.ctypes.data
    hold(_scratch.held)
    return _scratch.address


def scratch_tensor(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] at the same address."""
    scratch_address(rows * columns)
    size = rows * columns * dtype.itemsize
    return torch.from_numpy(_scratch.held.view(np.uint8)[:size]).view(dtype).view(rows, columns)


def made(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Array]:
    """An uninitialised tensor for outputs, and its array."""
    if dtype == torch.bfloat16:
        bits = np.empty(shape, np.uint16)
        hold(bits)
        return torch.from_numpy(bits).view(dtype), bits
    numbers = np.empty(shape, _NUMBERS[dtype])
    hold(numbers)
    return torch.from_numpy(numbers), numbers


def indices(tensor: Tensor) -> Array:
    """int32."""
    return array(tensor if tensor.dtype == torch.int32 else tensor.to(torch.int32))


def _storage(tensor: Tensor) -> Array:
    """Of a view, from its first number to its last, flat."""
    size = 0 if tensor.numel() == 0 else sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return array(tensor.as_strided((size,), (1,), tensor.storage_offset()))


_flat: Memory = {}


def flat(tensor: Tensor) -> Array:
    """The storage of a weight that is a view, for kernels that are told its strides; remembered while the tensor lives."""
    return remembered(_flat, (tensor,), lambda: _storage(tensor))


_flat_words: Memory = {}


def flat_words(tensor: Tensor) -> tuple[int, ...]:
    """The words of `flat`."""
    return remembered(_flat_words, (tensor,), lambda: words_of(flat(tensor)))


@dataclass(frozen=True)
class Plane:
    """One plane of a latent cache as flat storage with strides: planes may be views of one buffer, and kernels must not pay for
    that in their inner loops."""

    flat: Array
    page: int
    slot: int

    @functools.cached_property
    def words(self) -> tuple[int, ...]:
        return words_of(self.flat, self.page, self.slot)

    @classmethod
    def of(cls, tensor: Tensor) -> Plane:
        """tensor [pages, page_size, D], whose rows are contiguous."""
        page, slot, unit = tensor.stride()
        if unit != 1 and tensor.shape[2] > 1:
            raise ValueError(f"a cache whose rows have stride {unit}; rows must be contiguous")
        return cls(_storage(tensor), page, slot)


_planes: Memory = {}


def plane(tensor: Tensor) -> Plane:
    """`Plane.of`, remembered while the tensor lives."""
    return remembered(_planes, (tensor,), lambda: Plane.of(tensor))


_NO_SCALES = Plane(np.zeros(1, np.float32), 0, 0)


def planes(cache: LatentCache) -> tuple[int, ...]:
    """The cache's planes as the words of kernels: flat, page stride, slot stride of latents, of rotated keys, of scales."""
    key = id(cache)
    found = _cache_words.get(key)
    if found is not None and found[0]() is cache:
        return found[1]
    scale = cache.scale
    words = (*plane(cache.ckv).words, *plane(cache.kpe).words, *(_NO_SCALES if scale is None else plane(scale)).words)
    _cache_words[key] = weakref.ref(cache, lambda _: _cache_words.pop(key, None)), words
    return words


_cache_words: dict[int, tuple[weakref.ref[LatentCache], tuple[int, ...]]] = {}


def index_words(tensor: Tensor) -> tuple[int, ...]:
    """The words of a tensor of indices, int32; the tensor must outlive the call."""
    if tensor.dtype != torch.int32 or not tensor.is_contiguous():
        raise ValueError("indices must be int32 and contiguous: see `as_indices`")
    return (tensor.data_ptr(), *tensor.shape)


def as_indices(tensor: Tensor) -> Tensor:
    """int32 and contiguous, itself where it is."""
    if tensor.dtype == torch.int32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.int32).contiguous()


def plane_arrays(cache: LatentCache) -> tuple[Any, ...]:
    """The same as arrays and integers."""
    parts = (plane(cache.ckv), plane(cache.kpe), _NO_SCALES if cache.scale is None else plane(cache.scale))
    return tuple(member for p in parts for member in (p.flat, p.page, p.slot))
