"""Weights and the latent cache as kernels receive them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Quant = Literal["none", "fp8-w8a8", "fp8-w8a16", "int8-w8a8", "int8-w8a16", "int4-w4a16"]
KvDType = Literal["float64", "float32", "bfloat16", "fp8"]
KvEncoding = Literal["float8_e4m3fn", "float8_e4m3fnuz"]


@dataclass(frozen=True)
class Prepared:
    """A weight of logical shape [N, K], or [E, N, K] for experts, in some layout.

    Layout "canonical" is plain tensors:

    - none: {"weight" [N,K]}
    - fp8-*: {"weight" e4m3fn [N,K], "scale" f32 [ceil(N/128), ceil(K/128)]}; the scale multiplies
    - int8-*: {"weight" i8 [N,K], "scale" f32 [N,1]}
    - int4-w4a16: {"weight" u8 [N, ceil(K/2)], low nibble first, nibble = q + 8, q in [-8, 7],
      "scale" f32 [N, ceil(K/128)]}

    Experts carry a leading E. Fused gate/up weights are [.., 2I, H], gate rows first. For FP8 the loader pads I with zeros
    to a multiple of 128 in both halves, and in the columns of the down projection, so that gate and up never share a
    block. It is always this rank's shard: tensor parallelism slices before preparation.
    """

    layout: str
    quant: Quant
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    scale_fmt: Literal["float32", "ue8m0"] = "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True)
class CacheSpec:
    """How a backend wants the latent cache: tokens per page, and the dtype of its latents. encoding: of an FP8 cache's codes,
    as torch names it; gfx942's own is "float8_e4m3fnuz". It says nothing where the cache is not FP8."""

    page_size: int
    kv_dtype: KvDType
    encoding: KvEncoding = "float8_e4m3fn"


@dataclass(frozen=True)
class LatentCache:
    """One layer's latent cache. ckv [pages, page_size, R], kpe [pages, page_size, P]; both may be views of one buffer.

    With an FP8 cache ckv holds codes in the encoding of the `CacheSpec`, `scale` is f32 [pages, page_size, ceil(R/128)], per
    token, and kpe stays in the activation dtype.
    """

    ckv: Tensor
    kpe: Tensor
    scale: Tensor | None = None
