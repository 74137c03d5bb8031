"""Sizes of DeepSeek-V3 671B on one rank, the data of a call, and what a call must move and compute.

A call's bytes are those of every argument and every result, once, with what a call reads of a table, a cache or a set of
experts in place of the whole. Its FLOP are those of its matrix products, two for a multiplication and an addition; operators
without products have none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv3.ops import spec
from dsv3.plugin import LatentCache, Prepared
from dsv3.quant import canonical
from dsv3.quant.fp8 import BLOCK


@dataclass(frozen=True)
class Model:
    """The model as one rank has it. Tensor parallelism over `tp` slices heads, the dense MLP, the shared expert, the
    vocabulary and, where it is said, each expert; expert parallelism over `ep` leaves experts whole and gives a rank some."""

    hidden: int = 7168
    heads: int = 128
    nope: int = 128
    rope: int = 64
    value: int = 128
    latent: int = 512
    q_rank: int = 1536
    dense: int = 18432
    expert: int = 2048
    experts: int = 256
    groups: int = 8
    kept_groups: int = 4
    topk: int = 8
    vocabulary: int = 129280
    tp: int = 8
    ep: int = 8
    context: int = 4096
    decode: tuple[int, ...] = (1, 8, 32, 128)
    prefill: tuple[int, ...] = (512, 2048, 8192)

    @property
    def rank_heads(self) -> int:
        return self.heads // self.tp

    @property
    def rank_experts(self) -> int:
        return self.experts // self.ep

    @property
    def routing(self) -> dict[str, Any]:
        """The router's arguments other than tensors."""
        return {
            "n_group": self.groups, "topk_group": self.kept_groups, "topk": self.topk, "score": "sigmoid",
            "group_score": "top2_sum", "renormalize": True, "scale": 2.5,
        }  # fmt: skip


V3 = Model()
# What emulation can do in a minute: every ratio that matters is kept, I of a rank is a multiple of 128.
TINY = Model(
    hidden=256, heads=4, nope=32, rope=16, value=32, latent=128, q_rank=128, dense=256, expert=256, experts=8, groups=4,
    kept_groups=2, topk=2, vocabulary=256, tp=2, ep=2, context=70, decode=(1, 3), prefill=(5,),
)  # fmt: skip


def projections(m: Model) -> dict[str, tuple[int, int]]:
    """Name -> [N, K] of this rank's linear layers."""
    h, heads, shared, dense = m.hidden, m.rank_heads, m.expert // m.tp, m.dense // m.tp
    return {
        "o": (h, heads * m.value),
        "dense13": (2 * dense, h),
        "q_a": (m.q_rank, h),
        "q_b": (heads * (m.nope + m.rope), m.q_rank),
        "kv_a": (m.latent + m.rope, h),
        "kv_b": (heads * (m.nope + m.value), m.latent),
        "dense2": (h, dense),
        "shared13": (2 * shared, h),
        "shared2": (h, shared),
    }


@dataclass(frozen=True)
class Call:
    """One call of an operator. variant: which weight, scheme or cache. make: its arguments, from a `Maker`. flop: of its
    products. unit: what they run on, "fp8", "bf16" or "int8"; "" without any. reads: bytes read of an argument ("cache",
    "weights.q_a"), and under "more" bytes that no argument or result shows, where that is not all of it."""

    op: str
    variant: str
    tokens: int
    make: Callable[[Maker], dict[str, Any]]
    flop: int = 0
    unit: str = ""
    reads: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """ "quant_linear o fp8-w8a8 T=32"."""
        return " ".join(filter(None, (self.op, self.variant, f"T={self.tokens}")))

    def arguments(self, maker: Maker) -> dict[str, Any]:
        """New tensors each time, defaults filled in."""
        return {**spec(self.op).defaults, **self.make(maker)}

    def nbytes(self, arguments: Mapping[str, Any]) -> int:
        """Bytes that must move, each once."""
        known = spec(self.op)
        total = sum(self.reads.get(path, nbytes(value)) for path, value in _flat(arguments))
        results = known.meta(arguments)
        written = results if isinstance(results, tuple) else () if results is None else (results,)
        return total + sum(map(nbytes, written)) + self.reads.get("more", 0)


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield prefix + name, value


def nbytes(value: Any) -> int:
    """Bytes of a tensor, a prepared weight or a cache; 0 for anything else."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Prepared):
        return value.nbytes
    if isinstance(value, LatentCache):
        return sum(map(nbytes, (value.ckv, value.kpe, value.scale)))
    return 0


def cache_row(m: Model, kv: str) -> int:
    """Bytes of one token in the latent cache: 512 codes, 4 scales and 64 bf16 numbers in FP8, 576 bf16 numbers else."""
    if kv == "fp8":
        return m.latent + 4 * -(-m.latent // BLOCK) + 2 * m.rope
    return 2 * (m.latent + m.rope)


@functools.lru_cache(maxsize=64)
def chosen(tokens: int, k: int, experts: int, here: int) -> Tensor:
    """int32 [tokens, k] on the CPU: k different experts of `experts` for each token, -1 for those beyond the first `here`,
    which other ranks have; at least one is here. The same for the same sizes."""
    generator = torch.Generator().manual_seed(tokens)
    while True:
        ids = torch.rand(tokens, experts, generator=generator).topk(k, dim=1).indices.to(torch.int32)
        if bool((ids < here).any()):
            return torch.where(ids < here, ids, -1)


def routed(tokens: int, m: Model, here: int) -> tuple[int, int]:
    """Of `chosen`: pairs of token and expert on this rank, and how many different experts they have."""
    ids = chosen(tokens, m.topk, m.experts, here)
    present = ids[ids >= 0]
    return present.numel(), present.unique().numel()


class Maker:
    """Random tensors, made where they are used. On a meta device they have shapes only."""

    def __init__(
        self, m: Model, device: torch.device | str, encoding: str = "float8_e4m3fn", page: int = 64, seed: int = 0
    ) -> None:
        self.m, self.device, self.encoding, self.page = m, torch.device(device), encoding, page
        self.generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=dtype, device=self.device).mul_(std)

    def weight(self, *shape: int) -> Tensor:
        """bf16, so that products of normal numbers stay normal; [Nh, A, C] is applied from the left."""
        return self.normal(*shape, std=(shape[1] if len(shape) == 3 else shape[-1]) ** -0.5)

    def norm(self, width: int) -> Tensor:
        return torch.ones(width, dtype=torch.bfloat16, device=self.device)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator, dtype=dtype, device=self.device)

    def given(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        """Numbers that the host knows."""
        return torch.as_tensor(values, dtype=dtype).to(self.device, copy=True)

    def codes(self, *shape: int, encoding: str = "") -> Tensor:
        """FP8 numbers of both signs, from 2^-5 to 2, none of them NaN in either encoding."""
        bits = self.integers(256, *shape, dtype=torch.uint8).bitwise_and_(0xB7).bitwise_or_(0x10)
        return bits.view(getattr(torch, encoding or self.encoding))

    def scales(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device).add_(0.5).mul_(0.02)

    def prepared(self, quant: str, *shape: int) -> Prepared:
        """A canonical weight [N, K] or [E, N, K]."""
        tensors = canonical(quant, shape, torch.bfloat16, self.device)  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float8_e4m3fn:
                tensors[name] = self.codes(*tensor.shape, encoding="float8_e4m3fn")
            elif name == "scale":
                tensors[name] = self.scales(*tensor.shape)
            elif tensor.dtype == torch.bfloat16:
                tensors[name] = self.weight(*tensor.shape)
            else:
                low = 0 if tensor.dtype == torch.uint8 else -127
                tensors[name] = self.integers(255, *tensor.shape, dtype=torch.int16).add_(low).to(tensor.dtype)
        return Prepared("canonical", quant, shape, tensors)  # type: ignore[arg-type]

    def cache(self, kv: str, tokens: int) -> LatentCache:
        """Pages for `tokens`, all filled."""
        m, pages = self.m, -(-tokens // self.page)
        kpe = self.normal(pages, self.page, m.rope)
        if kv != "fp8":
            return LatentCache(self.normal(pages, self.page, m.latent), kpe)
        scale = self.scales(pages, self.page, -(-m.latent // BLOCK))
        return LatentCache(self.codes(pages, self.page, m.latent), kpe, scale)

    def tables(self, sequences: int, length: int) -> dict[str, Tensor]:
        """Sequences of `length` tokens over shuffled pages of their own."""
        pages = -(-length // self.page)
        order = torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(0))
        return {"block_table": self.given(order.view(sequences, pages)), "seq_lens": self.given([length] * sequences)}

    def angles(self, length: int) -> Tensor:
        """[L, P/2 cosines | P/2 sines]."""
        angle = torch.rand(length, self.m.rope // 2, generator=self.generator, device=self.device) * (2 * math.pi)
        return torch.cat((angle.cos(), angle.sin()), dim=-1)
