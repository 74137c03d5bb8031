"""What a step must read and compute, counted from the weights as they are kept: the numbers behind a roofline.

A step reads every active byte once. Active are all weights but the embedding, of which it reads a row per token; MTP modules;
W_UK and W_UV where it attends over expanded keys, `kv_b` where it attends over latents (the same numbers twice, and a step uses
one of them); and experts that no token goes to. Of E routed experts a step of T tokens visits D different ones, each read once
however many tokens meet there: D is counted by the router's own arithmetic where it was observed, else expected to be

    D = E (1 - (1 - k/E)^T)

for k experts per token, chosen evenly and independently; with T = 1 that is k. Of the latent cache a step reads each row that a
sequence sees, in every layer, and writes its own. Activations are left out: they stay in caches.

FLOP are those of matrix products, two for a multiplication and an addition: 2 N K per token and linear [N, K], k experts per
token; absorbed attention has 2 Nh (R + P) + 2 Nh R per query and visible key, attention over expanded keys 2 Nh (Dqk + Dv),
the head a row per sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dsv3.graph.config import ModelConfig
from dsv3.graph.weights import ModelWeights, walk
from dsv3.plugin import LatentCache, Prepared


@dataclass(frozen=True)
class Cost:
    """Of one step: bytes of weights and of cache that must move, and FLOP. distinct: different experts visited, mean of MoE
    layers; 0.0 without any."""

    weight_bytes: int
    cache_bytes: int
    flop: int
    distinct: float

    @property
    def nbytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flop / self.nbytes

    def seconds(self, gb_s: float, gflop_s: float) -> float:
        """The roofline's time: reading and computing at best overlap, so the longer of the two (Williams et al. 2009)."""
        return max(self.nbytes / (gb_s * 1e9), self.flop / (gflop_s * 1e9))

    def bound(self, gb_s: float, gflop_s: float) -> str:
        """Which of the two it is: "read" or "matmul"."""
        return "read" if self.nbytes / gb_s >= self.flop / gflop_s else "matmul"


def expected_distinct(experts: int, topk: int, tokens: int) -> float:
    """Different experts that `tokens` tokens visit, if each chooses topk evenly."""
    return experts * -math.expm1(tokens * math.log1p(-topk / experts)) if topk < experts else float(experts)


def step_cost(
    c: ModelConfig,
    w: ModelWeights,
    caches: Sequence[LatentCache],
    queries: Sequence[int],
    lengths: Sequence[int],
    absorbed: bool,
    distinct: Sequence[float] | None = None,
) -> Cost:
    """One step of sequences with so many new tokens each and so many cached ones, these included, the head's logits for one row
    of each. distinct: different experts visited in every MoE layer; None: as expected."""
    tokens, weight_bytes, flop = sum(queries), 0, 0
    moe = [i for i in range(c.num_hidden_layers) if c.is_moe(i)]
    experts, topk = c.n_routed_experts or 0, c.num_experts_per_tok
    if distinct is None:
        distinct = [expected_distinct(experts, topk, tokens)] * len(moe)
    visited = dict(zip(moe, distinct, strict=True))
    for path, _, name, value in walk(w):
        parts = path.split(".")
        if parts[0] == "mtp" or name in (("kv_b",) if absorbed else ("w_uk", "w_uv")):
            continue
        if parts[0] in ("embed", "cos_sin"):
            weight_bytes += tokens * nbytes(value) // value.shape[0]
            continue
        shape, routed = value.shape, len(value.shape) == 3 and isinstance(value, Prepared)
        if routed:
            weight_bytes += round(nbytes(value) * visited[int(parts[1])] / shape[0])
        else:
            weight_bytes += nbytes(value)
        if len(shape) > 1:
            # kv_b expands every cached key, the head has a row per sequence; the rest meets every token.
            rows = sum(lengths) if name == "kv_b" else len(lengths) if name == "head" else tokens
            each = math.prod(shape[1:]) * topk if routed else math.prod(shape)
            flop += 2 * rows * each
    layers = caches[: c.num_hidden_layers]
    flop += c.num_hidden_layers * attention_flop(c, queries, lengths, absorbed)
    rows = sum(lengths) + tokens
    mean = sum(distinct) / len(distinct) if distinct else 0.0
    return Cost(weight_bytes, rows * sum(map(cache_row, layers)), flop, mean)


def attention_flop(c: ModelConfig, queries: Sequence[int], lengths: Sequence[int], absorbed: bool) -> int:
    """Of one layer: the causal pairs of query and key, by what a pair costs."""
    seen = sum(q * n - q * (q - 1) // 2 for q, n in zip(queries, lengths, strict=True))
    width = 2 * c.kv_lora_rank + c.qk_rope_head_dim if absorbed else c.qk_head_dim + c.v_head_dim
    return 2 * seen * c.num_attention_heads * width


def cache_row(cache: LatentCache) -> int:
    """Bytes of one token in one layer's cache."""
    planes = [p for p in (cache.ckv, cache.kpe, cache.scale) if p is not None]
    return sum(p.shape[-1] * p.element_size() for p in planes)


def nbytes(value: Tensor | Prepared) -> int:
    """Bytes of a tensor, or of all tensors of a prepared weight."""
    return value.nbytes if isinstance(value, Prepared) else value.numel() * value.element_size()
