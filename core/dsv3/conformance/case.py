"""A case: an operator, a name that never changes, and how its arguments are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dsv3.conformance.data import Data
from dsv3.conformance.result import SIZES, Size
from dsv3.plugin import KvDType, LatentCache, Prepared, Quant
from dsv3.quant import SCHEMES, canonical, quantize
from dsv3.quant.fp8 import BLOCK, blocks

TAGS = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64, "f16": torch.float16}
# What a kernel's device lists among its dtypes before these cases apply to it.
NAMES = {"f32": "float32", "bf16": "bfloat16", "f64": "float64", "f16": "float16"}


@dataclass(frozen=True)
class Setting:
    """What the backend chooses: tokens per page of its latent cache, the dtype it keeps one in that is not FP8 (None: that of
    the activations), and the encoding of one that is."""

    page_size: int = 64
    kept: torch.dtype | None = None
    encoding: torch.dtype = torch.float8_e4m3fn

    def held(self, kv: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of what a cache holds that is not FP8."""
        return dtype if kv == "fp8" or self.kept is None else self.kept


@dataclass(frozen=True)
class Case:
    """`make(data, dtype, setting)` gives all arguments by name, on the CPU, weights canonical.

    tag: dtype of the activations. size: the smallest size that has the case. needs_dtypes: what the device must list (FP8
    encodings beyond e4m3fn). relation: for metamorphic cases, which. kv: cache format that the backend must offer (a KvDType).
    """

    op: str
    name: str
    tag: str
    make: Callable[[Data, torch.dtype, Setting], dict[str, Any]]
    size: Size = "small"
    needs_dtypes: tuple[str, ...] = ()
    relation: str = ""
    kv: KvDType | Literal[""] = ""

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}/{self.tag}"

    def in_size(self, size: Size) -> bool:
        """Whether a run of this size has the case: quick is part of small, small of full."""
        return SIZES.index(self.size) <= SIZES.index(size)

    def arguments(self, seed: int, setting: Setting, weights: bool = True) -> dict[str, Any]:
        """The arguments for a seed. weights: False leaves prepared weights uninitialised, which are most of the work."""
        return self.make(Data(self.id, seed, weights), TAGS[self.tag], setting)


Make = Callable[[Data, torch.dtype, Setting], dict[str, Any]]


def each(
    op: str, name: str, make: Make, size: Size = "small", tags: Sequence[str] = ("f32", "bf16"), **more: Any
) -> Iterator[Case]:
    """The case in each dtype; float16 and float64 join at size full."""
    for tag in tags:
        yield Case(op, name, tag, make, size, **more)
    if tuple(tags) == ("f32", "bf16") and size != "full":
        for tag in ("f64", "f16"):
            yield Case(op, name, tag, make, "full", **more)


# -- building blocks


def strided(x: Tensor, extra: int = 3) -> Tensor:
    """The same values as a view whose rows are further apart: columns of a wider tensor full of NaN."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 2 * extra), float("nan"), dtype=x.dtype)
    view = wide[..., extra : extra + x.shape[-1]]
    view.copy_(x)
    return view


def weight(
    d: Data,
    name: str,
    quant: Quant,
    shape: Sequence[int],
    dtype: torch.dtype,
    distribution: str = "normal",
    fmt: str = "float32",
) -> Prepared:
    """A canonical weight [N, K] or [E, N, K] whose 128x128 blocks, rows and groups differ in size by powers of two, so that a
    scale from the neighbouring one is far off."""
    *lead, n, k = shape
    if not d.weights:
        return Prepared("canonical", quant, tuple(shape), canonical(quant, tuple(shape), dtype, "cpu"), fmt)  # type: ignore[arg-type]
    real = d.real(f"w.{name}", distribution, *lead, n, k)
    if distribution not in ("zeros", "integers"):
        real = real / max(k, 1) ** 0.5
    if distribution not in ("integers", "onehot", "cancelling", "zeros"):
        grid = torch.exp2(d.integers(f"w.{name}.grid", -3, 4, *lead, blocks(n), blocks(k)).float())
        real = real * grid.repeat_interleave(BLOCK, -2)[..., :n, :].repeat_interleave(BLOCK, -1)[..., :k]
    tensors: Mapping[str, Tensor]
    if quant == "none":
        tensors = {"weight": real.to(dtype)}
    elif lead:
        tensors = canonical(quant, tuple(shape), dtype, "cpu")
        for e in range(lead[0]):
            for part, value in quantize(real[e], quant, fmt).items():
                tensors[part][e] = value
    else:
        tensors = quantize(real, quant, fmt)
    return Prepared("canonical", quant, tuple(shape), tensors, fmt)  # type: ignore[arg-type]


def lowest_codes(d: Data, w: Prepared) -> Prepared:
    """The weight with a third of its codes the lowest of its format: legal, though no quantiser here makes it."""
    codes = w.tensors["weight"]
    if w.quant.startswith("int4"):
        masks = torch.tensor([0xFF, 0xF0, 0x0F], dtype=torch.uint8)
        changed = codes & masks[d.integers("lowest", 0, 3, *codes.shape)]
        if w.shape[-1] % 2:  # the nibble past an odd K stays as it is
            changed[..., -1] = (changed[..., -1] & 0x0F) | (codes[..., -1] & 0xF0)
    else:
        changed = torch.where(d.integers("lowest", 0, 3, *codes.shape) > 0, codes, torch.full_like(codes, -128))
    return replace(w, tensors={**w.tensors, "weight": changed})


def padded(width: int, quant: Quant) -> int:
    """An expert's width as the loader stores it: whole blocks for FP8."""
    return blocks(width) * BLOCK if SCHEMES[quant].weights == "fp8" else width


def gate_up(
    d: Data, name: str, quant: Quant, lead: Sequence[int], width: int, k: int, dtype: torch.dtype, fmt: str
) -> Prepared:
    """[.., 2I, H] with gate rows first; FP8 padded with zero rows in both halves."""
    full = padded(width, quant)
    both = weight(d, name, quant, (*lead, 2 * full, k), dtype, fmt=fmt)
    if full != width:
        for half in (0, full):
            codes = both.tensors["weight"].view(torch.uint8)
            codes[..., half + width : half + full, :] = 0
    return both


def down(d: Data, name: str, quant: Quant, lead: Sequence[int], n: int, width: int, dtype: torch.dtype, fmt: str) -> Prepared:
    """[.., H, I]; FP8 padded with zero columns."""
    full = padded(width, quant)
    w = weight(d, name, quant, (*lead, n, full), dtype, fmt=fmt)
    if full != width:
        w.tensors["weight"].view(torch.uint8)[..., width:] = 0
    return w


def nan_(plane: Tensor) -> Tensor:
    """The plane of a cache, filled with NaN."""
    if plane.element_size() > 1:
        return plane.fill_(float("nan"))
    plane.view(torch.uint8).fill_(0x80 if plane.dtype == torch.float8_e4m3fnuz else 0x7F)
    return plane


def empty_cache(pages: int, s: Setting, rank: int, rope: int, kv: str, dtype: torch.dtype) -> LatentCache:
    """A cache full of NaN, as the backend keeps it: whatever is read without having been written shows. kv: "act", "fp8", or a
    dtype of TAGS."""
    dtype = TAGS.get(kv, s.held(kv, dtype))

    def plane(width: int, of: torch.dtype) -> Tensor:
        return nan_(torch.empty(pages, s.page_size, width, dtype=of))

    if kv == "fp8":
        return LatentCache(plane(rank, s.encoding), plane(rope, dtype), plane(blocks(rank), torch.float32))
    return LatentCache(plane(rank, dtype), plane(rope, dtype))


def index(x: Tensor | Sequence[int], wide: bool = False) -> Tensor:
    """int32, or int64, which is accepted too."""
    made = x if isinstance(x, Tensor) else torch.tensor(list(x))
    return made.to(torch.int64 if wide else torch.int32)
