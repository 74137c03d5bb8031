"""Arguments for every operator that its ONNX body has to get right: ragged groups, several sequences, permuted pages, NaN where
nobody may look, experts that are not here, every quantisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import LatentCache, Prepared
from dsv3.quant import quantize

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
I32 = torch.int32
NAN = float("nan")
QUANTS = ("none", "fp8-w8a8", "fp8-w8a16", "int8-w8a8", "int8-w8a16", "int4-w4a16")
ROUTING = {
    "n_group": 4, "topk_group": 2, "topk": 3, "score": "sigmoid", "group_score": "top2_sum", "renormalize": True, "scale": 2.5,
}  # fmt: skip
Case = tuple[str, str, Callable[[], dict[str, Any]]]


class Data:
    """Seeded random tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(7)

    def n(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(dtype or self.dtype)

    def f8(self, *shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
        return self.n(*shape, dtype=F32, scale=40).to(dtype)

    def positive(self, *shape: int) -> Tensor:
        return self.n(*shape, dtype=F32).abs() + 0.01

    def weight(self, *shape: int, quant: str = "none", fmt: str = "float32") -> Prepared:
        *lead, n, k = shape
        parts = [quantize(self.n(n, k) / k**0.5, quant, fmt) for _ in range(lead[0] if lead else 1)]
        tensors = {key: torch.stack([p[key] for p in parts]) if lead else parts[0][key] for key in parts[0]}
        scale_fmt = fmt if quant.startswith("fp8") else "float32"
        return Prepared("canonical", quant, shape, tensors, scale_fmt)

    def cache(self, kv: str = "same", rank: int = 144, rope: int = 8, pages: int = 6, size: int = 4) -> LatentCache:
        ckv, kpe = self.n(pages, size, rank), self.n(pages, size, rope)
        if kv == "same":
            return LatentCache(ckv, kpe)
        return LatentCache(self.f8(pages, size, rank, dtype=getattr(torch, kv)), kpe, self.positive(pages, size, 2) / 40)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=I32)


def _decode(d: Data, kv: str, start: int) -> dict[str, Any]:
    """Sequences of 6, 3 and 9 slots with 2, 1 and 3 queries over permuted pages; an empty one; a row past the last query."""
    cache = d.cache(kv)
    planes = [cache.kpe] if cache.scale is not None else [cache.ckv, cache.kpe]
    for plane in planes:
        plane[3, 2:] = NAN  # page 3 is the second of the first sequence: slots 6 and 7
    table = torch.tensor([[2, 3, -7], [4, 99, 99], [5, 0, 1], [-1, -1, -1]], dtype=I32)
    return {
        "q_c": d.n(7, 2, 144), "q_pe": d.n(7, 2, 8), "cache": cache, "block_table": table, "seq_lens": index(6, 3, 9, 0),
        "cu_q": index(0, 2, 3, 6, 6), "max_q": 3, "max_k": 9, "scale": 0.11, "start": start,
    }  # fmt: skip


def _prefill(d: Data, causal: bool) -> dict[str, Any]:
    """Keys without queries, queries without keys, more queries than keys, and NaN that only its own sequence sees."""
    k, v = d.n(13, 2, 20), d.n(13, 2, 12)
    v[8] = NAN
    return {
        "q": d.n(12, 2, 20), "k": k, "v": v, "cu_q": index(0, 3, 7, 9, 12), "cu_k": index(0, 5, 7, 7, 13), "max_q": 4,
        "max_k": 6, "scale": 0.3, "causal": causal,
    }  # fmt: skip


def _prolog(d: Data, quant: str, low_rank: bool, kv: str) -> dict[str, Any]:
    weights: dict[str, Any] = {"kv_a": d.weight(152, 72, quant=quant), "kv_a_norm": d.n(144), "w_uk": d.n(2, 6, 144)}
    if low_rank:
        weights |= {"q_a": d.weight(40, 72, quant=quant), "q_a_norm": d.n(40), "q_b": d.weight(28, 40, quant=quant)}
    else:
        weights["q"] = d.weight(28, 72, quant=quant)
    return {
        "x": d.n(5, 72), "weights": weights, "positions": index(3, 0, 9, 9, 1), "cos_sin": d.n(12, 8, dtype=F32),
        "slots": index(5, -1, 23, 0, 9), "cache": d.cache(kv), "eps": 1e-6, "n_heads": 2,
    }  # fmt: skip


def _moe(d: Data, quant: str, e: int = 8, local: bool = False) -> dict[str, Any]:
    here = e // 2 if local else e
    given: dict[str, Any] = {
        "x": d.n(6, 72), "gate": d.n(e, 72, scale=0.3), "bias": d.n(e, dtype=F32, scale=0.1),
        "w13": d.weight(here, 40, 72, quant=quant), "w2": d.weight(here, 72, 20, quant=quant),
        "shared13": d.weight(40, 72, quant=quant), "shared2": d.weight(72, 20, quant=quant), **ROUTING,
    }  # fmt: skip
    if local:
        given |= {"expert_map": index(-1, 0, -1, 1, 2, -1, 3, -1), "shared13": None, "shared2": None}
    return given


def _quant_input(d: Data) -> Tensor:
    """Outliers, a row of zeros, exact ties of the rounding, a NaN, an infinity."""
    x = d.n(7, 200)
    x[0] *= 100
    x[1] = 0
    x[2, :128] = torch.arange(128).to(x.dtype) * 3.5
    x[3, 130] = NAN
    x[4, 3] = float("inf")
    x[5] = 1e-6 * x[5]
    return x


def _floating(dtype: torch.dtype) -> list[Case]:
    """Cases for one dtype of activations."""
    tag = str(dtype).removeprefix("torch.")
    d = lambda: Data(dtype)  # noqa: E731
    fp8 = {"group": 128, "dtype": "float8_e4m3fn", "scale_fmt": "ue8m0"}
    found: list[Case] = [
        ("embedding", tag, lambda: {"ids": index(3, 0, 6, 3), "table": d().n(7, 24)}),
        ("rms_norm", tag, lambda: {"x": torch.cat([d().n(4, 100), d().n(1, 100) * 0]), "weight": d().n(100), "eps": 1e-6}),
        ("add_rms_norm", tag, lambda: {
            "x": d().n(5, 100), "residual": d().n(5, 100).flip(0), "weight": d().n(100), "eps": 1e-6,
        }),
        ("rms_norm_quant", tag, lambda: {"x": d().n(5, 200), "weight": d().n(200), "eps": 1e-6, **fp8}),
        ("silu_mul", tag, lambda: {"x": torch.cat([d().n(4, 60) * 9, d().n(1, 60) * 1e4])}),
        ("silu_mul_quant", tag, lambda: {"x": d().n(5, 400), **fp8}),
        ("linear", tag, lambda: {"x": d().n(5, 100), "weight": d().n(33, 100), "bias": d().n(33)}),
        ("linear", f"{tag}-no-bias", lambda: {"x": d().n(5, 100), "weight": d().n(33, 100), "bias": None}),
        ("bmm", tag, lambda: {"x": d().n(5, 3, 20), "weight": d().n(3, 12, 20).transpose(1, 2)}),
        ("router_gemm", tag, lambda: {"x": d().n(5, 100), "weight": d().n(9, 100)}),
        ("mtp_combine", tag, lambda: {
            "embedding": d().n(5, 24), "hidden": d().n(5, 24).flip(1), "enorm": d().n(24), "hnorm": d().n(24),
            "eh_proj": d().n(24, 48), "eps": 1e-6,
        }),
        ("all_reduce", tag, lambda: {"x": d().n(5, 24), "group": None}),
        ("moe_combine", tag, lambda: _combine(d())),
        ("merge_attn_states", tag, lambda: _merge(d())),
        ("gumbel_argmax", tag, lambda: {
            "logits": d().n(6, 50), "seeds": torch.tensor([0, 1, -5, 2**62, -(2**62), 7]),
            "positions": index(0, 3, 9, 2**30, 1, 7), "temperature": torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 0.0]).to(dtype),
        }),
        ("route", tag, lambda: {"x": d().n(9, 60), "gate": d().n(16, 60), "bias": d().n(16, dtype=F32), **ROUTING}),
    ]  # fmt: skip
    for causal in (True, False):
        found.append(("mla_prefill", f"{tag}-causal{int(causal)}", lambda causal=causal: _prefill(d(), causal)))
    for interleaved in (True, False):
        found.append(("apply_rope", f"{tag}-pairs{int(interleaved)}", lambda interleaved=interleaved: {
            "x": d().n(5, 3, 24)[..., 16:], "positions": index(0, 5, 2, 9, 9), "cos_sin": d().n(10, 8, dtype=F32),
            "interleaved": interleaved,
        }))  # fmt: skip
    for kind in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"):
        for fmt in ("float32", "ue8m0"):
            found.append(("act_quant", f"{tag}-{kind}-{fmt}", lambda kind=kind, fmt=fmt: {
                "x": _quant_input(d()), "group": 128, "dtype": kind, "scale_fmt": fmt,
            }))  # fmt: skip
    found.append(("quant_int8", tag, lambda: {"x": _quant_input(d())[:4]}))
    return found + _cached(dtype, tag, d)


def _cached(dtype: torch.dtype, tag: str, d: Callable[[], Data]) -> list[Case]:
    found: list[Case] = []
    for kv in ("same", "float8_e4m3fn", "float8_e4m3fnuz"):
        name = f"{tag}-{kv}"
        found += [
            ("kv_cache_write", name, lambda kv=kv: {
                "ckv": d().n(5, 144), "kpe": d().n(5, 8), "slots": index(5, -1, 23, 0, 9), "cache": d().cache(kv),
            }),
            ("rope_cache_write", name, lambda kv=kv: {
                "q_pe": d().n(5, 2, 8), "kpe": d().n(5, 8), "ckv": d().n(5, 144), "positions": index(3, 0, 9, 9, 1),
                "cos_sin": d().n(12, 8, dtype=F32), "slots": index(-1, -1, 23, 0, 9), "cache": d().cache(kv),
            }),
        ]  # fmt: skip
        for start in (0, 1):
            found += [
                ("mla_decode", f"{name}-start{start}", lambda kv=kv, start=start: _decode(d(), kv, start)),
                ("kv_cache_gather", f"{name}-start{start}", lambda kv=kv, start=start: {
                    "cache": d().cache(kv), "block_table": torch.tensor([[3, 1], [-1, 99], [0, 99]], dtype=I32),
                    "seq_lens": index(7, start, 3), "total": 10 - 2 * start, "start": start,
                }),
            ]  # fmt: skip
        found.append(("mla_prolog", f"{name}-lora", lambda kv=kv: _prolog(d(), "none", True, kv)))
    return found


def _combine(d: Data) -> dict[str, Any]:
    ids = torch.tensor([[0, 3, 1], [1, -1, 0], [2, 2, 2], [-1, -1, -1]], dtype=I32)
    perm, _ = ops.moe_permute(ids, 4)
    y, weights = d.n(12, 24), d.positive(4, 3)
    y[perm < 0] = NAN
    weights[ids < 0] = NAN
    return {"y": y, "perm": perm, "weights": weights}


def _merge(d: Data) -> dict[str, Any]:
    o1, lse1, o2, lse2 = d.n(5, 2, 12), d.n(2, 5, dtype=F32) * 100, d.n(5, 2, 12).flip(0), d.n(2, 5, dtype=F32)
    lse1[0, 1], lse2[1, 2], lse1[0, 3], lse2[0, 3] = (float("-inf"),) * 4
    o1[1, 0], o2[2, 1] = NAN, NAN
    return {"o1": o1, "lse1": lse1, "o2": o2, "lse2": lse2}


def _quantised(dtype: torch.dtype, quant: str, fmt: str = "float32") -> list[Case]:
    """Cases for one scheme of weights."""
    tag = f"{str(dtype).removeprefix('torch.')}-{quant}-{fmt}"
    d = lambda: Data(dtype)  # noqa: E731
    return [
        ("quant_linear", tag, lambda: {"x": d().n(5, 201), "w": d().weight(137, 201, quant=quant, fmt=fmt)}),
        ("grouped_linear", tag, lambda: {
            "x": d().n(8, 201), "w": d().weight(4, 137, 201, quant=quant, fmt=fmt), "offsets": index(0, 3, 3, 5, 6),
        }),
        ("fused_experts", tag, lambda: {
            "x": d().n(4, 72), "weights": d().positive(4, 2),
            "ids": torch.tensor([[0, 3], [1, -1], [2, 2], [-1, -1]], dtype=I32),
            "w13": d().weight(4, 40, 72, quant=quant, fmt=fmt), "w2": d().weight(4, 72, 20, quant=quant, fmt=fmt),
        }),
        ("moe", tag, lambda: _moe(d(), quant)),
        ("mla_prolog", f"{tag}-q", lambda: _prolog(d(), quant, False, "same")),
    ]  # fmt: skip


def _fixed() -> list[Case]:
    """Operators whose dtypes are their own."""
    d = lambda: Data(F32)  # noqa: E731
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    found: list[Case] = [
        ("fn_to_fnuz", "all-codes", lambda: {"weight": codes.reshape(2, 127), "scale": d().positive(1, 1)}),
        ("moe_permute", "mixed", lambda: {"ids": torch.tensor([[0, 3], [1, -1], [3, 3], [5, 0]], dtype=I32), "n_experts": 5}),
        ("moe_permute", "int64-one-hot", lambda: {"ids": torch.full((6, 2), 2), "n_experts": 3}),
        ("moe", "local-experts", lambda: _moe(d(), "none", local=True)),
    ]  # fmt: skip
    for out in ("float32", "bfloat16", "float64"):
        found += [
            ("block_scaled_mm", out, lambda out=out: {
                "a": d().f8(5, 201), "a_scale": d().positive(5, 2), "b": d().f8(137, 201), "b_scale": d().positive(2, 2),
                "out_dtype": out,
            }),
            ("int8_scaled_mm", out, lambda out=out: {
                "a": torch.full((5, 2100), 127, dtype=torch.int8), "a_scale": d().positive(5, 1),
                "b": torch.randint(-127, 128, (7, 2100), generator=d().generator, dtype=torch.int8),
                "b_scale": d().positive(7, 1), "out_dtype": out,
            }),
            ("dequant_block", out, lambda out=out: {
                "weight": d().f8(137, 201), "scale": d().positive(2, 2), "dtype": out,
            }),
        ]  # fmt: skip
    for score in ("sigmoid", "softmax"):
        for rank in ("top2_sum", "max"):
            for norm in (True, False):
                found.append(("grouped_topk", f"{score}-{rank}-{int(norm)}", lambda score=score, rank=rank, norm=norm: {
                    **ROUTING, "logits": torch.cat([d().n(7, 16, dtype=F32, scale=3), torch.zeros(1, 16)]),
                    "bias": d().n(16, dtype=F32) - 1 if norm else None, "score": score, "group_score": rank,
                    "renormalize": norm,
                }))  # fmt: skip
    found.append(("grouped_topk", "one-group", lambda: {
        **ROUTING, "n_group": 1, "topk_group": 1, "topk": 16, "logits": d().n(4, 16, dtype=F32, scale=1e4), "bias": None,
    }))  # fmt: skip
    return found


def _empty() -> list[Case]:
    """No keys, no pages, no sequences, no columns; slots that are all skipped; rows behind the last sequence."""
    d = lambda: Data(F32)  # noqa: E731
    none = torch.zeros(0, dtype=I32)
    size = {"max_q": 3, "max_k": 0, "scale": 0.1}
    query = lambda: {"q_c": d().n(2, 2, 144), "q_pe": d().n(2, 2, 8), "cache": d().cache(), **size}  # noqa: E731
    dense = lambda q, k: {"q": d().n(q, 2, 20), "k": d().n(k, 2, 20), "v": d().n(k, 2, 12), **size}  # noqa: E731
    return [
        ("mla_decode", "no-pages", lambda: {
            **query(), "block_table": torch.zeros(1, 0, dtype=I32), "seq_lens": index(0), "cu_q": index(0, 2),
        }),
        ("mla_decode", "no-sequences", lambda: {
            **query(), "block_table": torch.zeros(0, 3, dtype=I32), "seq_lens": none, "cu_q": index(0),
        }),
        ("mla_prefill", "no-keys", lambda: {**dense(3, 0), "cu_q": index(0, 3), "cu_k": index(0, 0)}),
        ("mla_prefill", "no-queries", lambda: {**dense(0, 4), "cu_q": index(0, 0), "cu_k": index(0, 4)}),
        ("mla_prefill", "rows-behind", lambda: {**dense(5, 4), "cu_q": index(0, 3), "cu_k": index(0, 2)}),
        ("kv_cache_gather", "nothing", lambda: {
            "cache": d().cache(), "block_table": torch.zeros(2, 1, dtype=I32), "seq_lens": index(0, 0), "total": 0,
        }),
        ("kv_cache_write", "all-skipped", lambda: {
            "ckv": d().n(2, 144), "kpe": d().n(2, 8), "slots": index(-1, -1), "cache": d().cache(),
        }),
        ("act_quant", "no-columns", lambda: {"x": d().n(3, 0)}),
        ("quant_int8", "no-columns", lambda: {"x": d().n(3, 0)}),
        ("gumbel_argmax", "all-minus-infinity", lambda: {
            "logits": torch.full((2, 5), float("-inf")), "seeds": torch.zeros(2, dtype=torch.int64), "positions": index(0, 1),
            "temperature": torch.tensor([0.0, 1.0]),
        }),
    ]  # fmt: skip


CASES: list[Case] = [c for dtype in (F32, BF16, F64) for c in _floating(dtype)]
CASES += [c for quant in QUANTS for dtype in (F32, BF16) for c in _quantised(dtype, quant)]
CASES += _quantised(BF16, "fp8-w8a8", "ue8m0") + _fixed() + _empty()
