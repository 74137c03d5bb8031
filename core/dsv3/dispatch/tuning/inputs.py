"""Arguments for timing and verifying a call: canonical, on the CPU, at any number of tokens.

Sizes, dtypes and scalars come from what the graph was seen to call the operator with; only the values are made here.
Sequences are those of a typical step: up to 64 that decode over some hundred cached tokens each, on shuffled pages, or one
whose prompt is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.dispatch.site import Example
from dsv3.plugin import LatentCache, Prepared
from dsv3.quant import quantize
from dsv3.quant.fp8 import BLOCK

MOST_SEQUENCES = 64
CONTEXT = 512
_ROTARY_BASE = 10_000.0
_UNIT_WEIGHTS = ("enorm", "hnorm")


def sized(one: Any, two: Any, tokens: int) -> Any:
    """What an argument recorded with 1 and with 2 tokens is with `tokens`: a shape for a tensor, a number for an integer."""
    if isinstance(one, Tensor):
        return tuple(a + (b - a) * (tokens - 1) for a, b in zip(one.shape, two.shape, strict=True))
    if isinstance(one, int) and not isinstance(one, bool):
        return one + (two - one) * (tokens - 1)
    return one


class Inputs:
    """Makes the arguments of one call."""

    def __init__(self, example: Example, tokens: int, seed: int = 0) -> None:
        self.op, self.tokens = example.op, tokens
        self.first, self.second = example.arguments
        self.generator = torch.Generator().manual_seed(seed)
        self.dims = example.dims(tokens)

    def make(self) -> dict[str, Any]:
        """By name; defaults included."""
        made = {name: self._argument(name, one, self.second[name]) for name, one in self.first.items()}
        if special := _SPECIAL.get(self.op):
            made |= special(self, made)
        return made

    def nbytes(self) -> int:
        """Bytes of the arguments, weights included, before anything is made."""
        return sum(self._bytes(one, self.second[name]) for name, one in self.first.items())

    def _bytes(self, one: Any, two: Any) -> int:
        if isinstance(one, Mapping):
            return sum(self._bytes(value, two[name]) for name, value in one.items())
        if isinstance(one, Prepared):
            return one.nbytes
        if isinstance(one, LatentCache):
            return self._pages(one.ckv.shape[1]) * one.ckv.shape[1] * (one.ckv.shape[2] + one.kpe.shape[2]) * 4
        return math.prod(sized(one, two, self.tokens)) * one.element_size() if isinstance(one, Tensor) else 0

    def _argument(self, name: str, one: Any, two: Any) -> Any:
        if isinstance(one, Mapping):
            return {member: self._argument(member, value, two[member]) for member, value in one.items()}
        if isinstance(one, Prepared):
            return self._weight(one)
        if isinstance(one, LatentCache):
            return self._cache(one)
        if isinstance(one, Tensor):
            return self._tensor(name, sized(one, two, self.tokens), one.dtype)
        return sized(one, two, self.tokens)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator).mul_(std)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator, dtype=torch.int64)

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name == "cos_sin":
            return _table(*shape).to(dtype)
        if name == "expert_map":
            return torch.arange(shape[0], dtype=dtype)
        if not dtype.is_floating_point:  # rows of tables; what has a meaning of its own is made by _SPECIAL
            return self.integers(0, self.dims.get("V", self.tokens), *shape).to(dtype)
        if dtype.itemsize == 1:
            return self.normal(*shape).to(dtype)
        if name.endswith("norm") or name in _UNIT_WEIGHTS or (name == "weight" and len(shape) == 1):
            return (1 + self.normal(*shape, std=0.1)).to(dtype)
        if name in ("weight", "gate", "eh_proj", "w_uk"):
            fan_in = shape[1] if len(shape) == 3 else shape[-1]  # [Nh, A, C] is applied from the left
            return self.normal(*shape, std=fan_in**-0.5).to(dtype)
        return self.normal(*shape, std=0.1 if name == "bias" else 1.0).to(dtype)

    def _weight(self, w: Prepared) -> Prepared:
        """A random weight in the recorded scheme, quantised expert by expert."""
        *lead, n, k = w.shape
        parts = []
        for _ in range(math.prod(lead)):
            real = self.normal(n, k, std=k**-0.5)
            parts.append(quantize(real, w.quant, w.scale_fmt) if w.quant != "none" else {"weight": real})
        tensors = {
            name: torch.stack([p[name] for p in parts]).view(*lead, *parts[0][name].shape).to(w.tensors[name].dtype)
            for name in parts[0]
        }
        return Prepared("canonical", w.quant, w.shape, tensors, w.scale_fmt)

    # ------------------------------------------------------------------------------------------ sequences and their cache

    @property
    def sequences(self) -> int:
        """How many a decoding step of these tokens has; the others of its tokens are further queries of the last ones."""
        return min(self.tokens, MOST_SEQUENCES)

    def _pages(self, page_size: int) -> int:
        longest = CONTEXT + -(-self.tokens // self.sequences) + self.tokens
        return max(self.sequences * -(-(CONTEXT + self.tokens // self.sequences + 2) // page_size), -(-longest // page_size))

    def _cache(self, recorded: LatentCache) -> LatentCache:
        """A cache in the recorded format, every slot filled."""
        size, pages = recorded.ckv.shape[1], self._pages(recorded.ckv.shape[1])

        def plane(like: Tensor | None) -> Tensor | None:
            return None if like is None else torch.zeros(pages, *like.shape[1:], dtype=like.dtype)

        ckv, kpe = plane(recorded.ckv), plane(recorded.kpe)
        assert ckv is not None and kpe is not None
        cache = LatentCache(ckv, kpe, plane(recorded.scale))
        rows = pages * size
        latents, keys = self.normal(rows, ckv.shape[2]), self.normal(rows, kpe.shape[2])
        ops.kv_cache_write(ckv=latents, kpe=keys, slots=torch.arange(rows, dtype=torch.int32), cache=cache)
        return cache

    def table(self, cache: LatentCache, lengths: list[int]) -> Tensor:
        """[S, maxp]: shuffled pages for sequences of these lengths."""
        size = cache.ckv.shape[1]
        used = [-(-n // size) for n in lengths]
        pages = torch.randperm(cache.ckv.shape[0], generator=self.generator).to(torch.int32).tolist()
        found, first = torch.zeros(len(lengths), max(used), dtype=torch.int32), 0
        for row, count in enumerate(used):
            found[row, :count] = torch.tensor(pages[first : first + count], dtype=torch.int32)
            first += count
        return found


def _table(length: int, width: int) -> Tensor:
    """[L, P/2 cosines | P/2 sines] of plain rotary angles."""
    frequency = _ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def _int32(values: Any) -> Tensor:
    return torch.as_tensor(values).to(torch.int32)


def _experts(make: Inputs, rows: int, k: int, experts: int) -> Tensor:
    """ids [rows, k], distinct in each row."""
    scores = torch.rand(rows, experts, generator=make.generator)
    return _int32(scores.topk(min(k, experts), dim=-1).indices)


def _decode(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    """Sequences that decode: their last queries over contexts of different lengths."""
    s, start = make.sequences, made.get("start", 0)
    counts = [make.tokens // s + (i < make.tokens % s) for i in range(s)]
    lengths = [max(CONTEXT - i * 37 % (CONTEXT // 2), 1) + n + start - 1 for i, n in enumerate(counts)]
    cu_q = [sum(counts[:i]) for i in range(s + 1)]
    metadata = {"block_table": make.table(made["cache"], lengths), "seq_lens": _int32(lengths), "cu_q": _int32(cu_q)}
    return {**metadata, "max_q": max(counts), "max_k": max(lengths) - start}


def _gather(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    length = made["total"] + made["start"]
    return {"block_table": make.table(made["cache"], [length]), "seq_lens": _int32([length])}


def _prefill(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    q, k = made["q"].shape[0], made["k"].shape[0]
    return {"cu_q": _int32([0, q]), "cu_k": _int32([0, k]), "max_q": q, "max_k": k}


def _written(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    """Every token has a slot of its own, and a position in the table of angles."""
    rows = made["slots"].shape[0]
    cache = made["cache"]
    slots = torch.randperm(cache.ckv.shape[0] * cache.ckv.shape[1], generator=make.generator)[:rows]
    return {"slots": _int32(slots), **_rotated(make, made)}


def _rotated(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    if "cos_sin" not in made:
        return {}
    return {"positions": _int32(make.integers(0, made["cos_sin"].shape[0], *made["positions"].shape))}


def _permuted(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    t, k = made["weights"].shape
    perm, _ = ops.moe_permute(ids=_experts(make, t, k, 4 * k), n_experts=4 * k)
    return {"perm": perm, "weights": torch.softmax(make.normal(t, k), dim=-1).to(made["weights"].dtype)}


def _chosen(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    """Tokens spread over the experts of a layer."""
    t, k = made["ids"].shape
    experts = made["n_experts"] if "n_experts" in made else made["w13"].shape[0]
    found: dict[str, Any] = {"ids": _experts(make, t, k, experts)}
    if "weights" in made:
        found["weights"] = torch.softmax(make.normal(t, k), dim=-1).to(made["weights"].dtype)
    return found


def _offsets(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    experts = made["w"].shape[0]
    counts = torch.bincount(make.integers(0, experts, made["x"].shape[0]), minlength=experts)
    return {"offsets": _int32(torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))))}


def _fp8_product(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    encoding = str(made["a"].dtype).removeprefix("torch.")
    a, a_scale = ops.act_quant(x=make.normal(*made["a"].shape), group=BLOCK, dtype=encoding)
    n, k = made["b"].shape
    return {"a": a, "a_scale": a_scale, **_block_weight(make, n, k, "b", "b_scale", made["b"].dtype)}


def _int8_product(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    a, a_scale = ops.quant_int8(x=make.normal(*made["a"].shape))
    n, k = made["b"].shape
    b = quantize(make.normal(n, k, std=k**-0.5), "int8-w8a8")
    return {"a": a, "a_scale": a_scale, "b": b["weight"], "b_scale": b["scale"]}


def _dequantised(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    n, k = made["weight"].shape
    return _block_weight(make, n, k, "weight", "scale", made["weight"].dtype)


def _block_weight(make: Inputs, n: int, k: int, codes: str, scale: str, dtype: torch.dtype) -> dict[str, Any]:
    w = quantize(make.normal(n, k, std=k**-0.5), "fp8-w8a8")
    return {codes: w["weight"].to(torch.float32).to(dtype), scale: w["scale"]}


def _sampled(make: Inputs, made: dict[str, Any]) -> dict[str, Any]:
    """Half of the rows greedy, half sampled."""
    rows = made["logits"].shape[0]
    temperature = torch.full((rows,), 0.8, dtype=made["temperature"].dtype)
    temperature[::2] = 0
    return {
        "seeds": make.integers(0, 1 << 62, rows),
        "positions": make.integers(0, 4096, rows).to(made["positions"].dtype),
        "temperature": temperature,
    }


_SPECIAL: dict[str, Callable[[Inputs, dict[str, Any]], dict[str, Any]]] = {
    "apply_rope": _rotated,
    "mla_decode": _decode,
    "mla_prefill": _prefill,
    "kv_cache_gather": _gather,
    "kv_cache_write": _written,
    "rope_cache_write": _written,
    "mla_prolog": _written,
    "moe_combine": _permuted,
    "moe_permute": _chosen,
    "fused_experts": _chosen,
    "grouped_linear": _offsets,
    "block_scaled_mm": _fp8_product,
    "int8_scaled_mm": _int8_product,
    "dequant_block": _dequantised,
    "gumbel_argmax": _sampled,
}
