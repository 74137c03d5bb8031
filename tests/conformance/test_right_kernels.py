"""Right kernels that are written differently from the reference pass: other orders, roundings and layouts that are legal."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3 import conformance, ops
from dsv3.errors import UsageError
from dsv3.ops.experts import expert_weight
from dsv3.plugin import CacheSpec, Capability, Device, Divides, Kernel, Prepared, Probe, Scheme
from dsv3.quant import dequantize
from tests.support.faulty import Made

LOG2E = 1.4426950408889634
RIGHT: list[tuple[str, str, Callable[..., Any], dict[str, Any]]] = []


def right(op: str, name: str, **claims: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RIGHT.append((op, name, function, claims))
        return function

    return register


def work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sequential(x: Tensor, w: Tensor) -> Tensor:
    total = x.new_zeros(x.shape[0], w.shape[0])
    for k in range(x.shape[1]):
        total = total + x[:, k, None] * w[None, :, k]
    return total


def truncated(x: Tensor, w: Tensor) -> Tensor:
    """14 bits inside a tensor core, promoted every 128."""
    total = x.new_zeros(x.shape[0], w.shape[0])
    for start in range(0, x.shape[1], 128):
        part = torch.zeros_like(total, dtype=torch.float64)
        for k in range(start, min(start + 128, x.shape[1]), 32):
            part = part + x[:, k : min(k + 32, start + 128)].double() @ w[:, k : min(k + 32, start + 128)].double().T
            mantissa, exponent = torch.frexp(part)
            cut = torch.ldexp(torch.trunc(mantissa * 2**14) / 2**14, exponent)
            part = torch.where(torch.isfinite(part), cut, part)
        total = total + part.to(x.dtype)
    return total


def split(x: Tensor, w: Tensor) -> Tensor:
    """Four parts of K, added in any order, as atomics do."""
    step = max(-(-x.shape[1] // 4), 1)
    parts = [x[:, k : k + step] @ w[:, k : k + step].T for k in range(0, x.shape[1], step)]
    total = x.new_zeros(x.shape[0], w.shape[0])
    for i in torch.randperm(len(parts)).tolist():
        total = total + parts[i]
    return total


def rounded_weight(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.bfloat16().to(x.dtype).T


def plain(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.T


def codes_fp8(x: Tensor, largest: float, fmt: str, encoding: str) -> tuple[Tensor, Tensor]:
    """By reciprocals; ue8m0 by the exponent's bits."""
    groups = -(-x.shape[1] // 128)
    v = torch.nn.functional.pad(x.float(), (0, groups * 128 - x.shape[1])).view(x.shape[0], groups, 128)
    scale = v.abs().amax(-1).clamp_min(1e-4) * (1 / largest)
    if fmt == "ue8m0":
        bits = scale.view(torch.int32)
        scale = torch.where(torch.isnan(scale), scale, ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32))
    q = (v * (1 / scale)[..., None]).clamp(-largest, largest).flatten(1)[:, : x.shape[1]]
    return q.to(getattr(torch, encoding)), scale


def matmul(x: Tensor, w: Prepared, mm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """quant_linear before its last rounding, with scales applied to sums."""
    kind = work(x)
    codes = w.tensors["weight"]
    if w.quant == "fp8-w8a8":
        q, s = codes_fp8(x, 448.0, w.scale_fmt, "float8_e4m3fn")
        total = torch.zeros(x.shape[0], w.shape[0], dtype=kind)
        for i in range(s.shape[1]):
            part = slice(i * 128, (i + 1) * 128)
            scale = s[:, i, None] * w.tensors["scale"][:, i].repeat_interleave(128)[: w.shape[0]]
            total = total + mm(q[:, part].float().to(kind), codes[:, part].float().to(kind)) * scale.to(kind)
        return total
    if w.quant == "int8-w8a8":
        amax = x.float().abs().amax(1, keepdim=True).clamp_min(1e-10)
        q = torch.round(x.float() * (127 / amax)).clamp(-127, 127)
        return (q.double() @ codes.double().T).to(kind) * ((amax / 127).to(kind) * w.tensors["scale"].T.to(kind))
    if w.quant.startswith("int8"):
        return mm(x.to(kind), codes.to(kind)) * w.tensors["scale"].T.to(kind)
    return mm(x.to(kind), dequantize(w, kind))


for _mm, _claims in (
    (sequential, {}),
    (truncated, {"numerics": "tc14"}),
    (split, {"deterministic": False}),
    (rounded_weight, {"numerics": "bf16-operand"}),
):

    def _linear(x: Tensor, w: Prepared, mm: Any = _mm) -> Tensor:
        return matmul(x, w, mm).to(x.dtype)

    RIGHT.append(("quant_linear", _mm.__name__, _linear, _claims))


@right("block_scaled_mm", "dequantised, one float32 sum")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    x = a.float() * a_scale.repeat_interleave(128, 1)[:, : a.shape[1]]
    w = b.float() * b_scale.repeat_interleave(128, 0)[: b.shape[0]].repeat_interleave(128, 1)[:, : b.shape[1]]
    return sequential(x, w).to(getattr(torch, out_dtype))


@right("quant_int8", "by the reciprocal, a scale that is a transposed view")
def _(x: Tensor, amax_floor: float) -> list[Tensor]:
    amax = x.float().abs().amax(1).clamp_min(amax_floor) if x.shape[1] else torch.full((x.shape[0],), amax_floor)
    scale = (amax * (1 / 127))[None, :].T
    return [torch.round(x.float() * (1 / scale)).clamp(-127, 127).to(torch.int8), scale]


@right("act_quant", "by the reciprocal, exponent bits")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> Any:
    if group != 128 or amax_floor != 1e-4:
        return ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    return codes_fp8(x, 448.0 if dtype == "float8_e4m3fn" else 224.0, scale_fmt, dtype)


@right("silu_mul", "by tanh in 16 bits")
def _(x: Tensor) -> Tensor:
    if x.dtype != torch.bfloat16:
        return ops.silu_mul(x)
    gate, up = x.to(work(x)).chunk(2, -1)
    return (0.5 * gate * (1 + torch.tanh(0.5 * gate)) * up).to(x.dtype)


@right("silu_mul", "exp2, flushing subnormals")
def _(x: Tensor) -> Tensor:
    torch.set_flush_denormal(True)
    try:
        gate, up = x.to(work(x)).chunk(2, -1)
        return (gate / (1 + torch.exp2(-gate * LOG2E)) * up).to(x.dtype)
    finally:
        torch.set_flush_denormal(False)


@right("silu_mul_quant", "no rounding between")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str) -> Any:
    gate, up = x.float().chunk(2, -1)
    return ops.act_quant(gate * up / (1 + torch.exp(-gate)), group, dtype, scale_fmt)


@right("rms_norm", "weight first, an output that is not contiguous")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    v = x.to(work(x))
    y = v * (weight.to(v.dtype) / torch.sqrt(v.square().sum(1, keepdim=True) / v.shape[1] + eps))
    return y.to(x.dtype).T.contiguous().T


@right("apply_rope", "complex numbers")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    v, half = x.to(work(x)), x.shape[-1] // 2
    table = cos_sin[positions.long()].to(v.dtype)[:, None]
    turn = torch.complex(table[..., :half].contiguous(), table[..., half:].contiguous())
    a, b = (v[..., 0::2], v[..., 1::2]) if interleaved else (v[..., :half], v[..., half:])
    z = torch.complex(a.contiguous(), b.contiguous()) * turn
    out = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return out.to(x.dtype)


@right("grouped_topk", "torch.topk, a named tuple")
def _(logits: Tensor, bias: Tensor | None, n_group: int, topk_group: int, topk: int, score: str, group_score: str,
      renormalize: bool, scale: float) -> Any:  # fmt: skip
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if n_group > 1:
        grouped = choice.unflatten(1, (n_group, choice.shape[1] // n_group))
        best = grouped.amax(-1) if group_score == "max" else grouped.topk(2, -1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter_(1, best.topk(topk_group, -1).indices, 1).bool()
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    ids = choice.topk(topk, -1, sorted=False).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return collections.namedtuple("Routed", "weights ids")(weights * scale, ids.int())


def _experts(rounded: tuple[bool, bool], mm: Any) -> Callable[..., Tensor]:
    """Per expert, with the product or the activation between kept in x's dtype or not."""

    def kernel(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
        total = torch.zeros(x.shape[0], w2.shape[1], dtype=work(x))
        for e in range(w13.shape[0]):
            token, slot = torch.nonzero(ids == e, as_tuple=True)
            if len(token):
                h = matmul(x[token], expert_weight(w13, e), mm)
                gate, up = (h.to(x.dtype) if rounded[0] else h).to(work(x)).chunk(2, -1)
                a = gate * up / (1 + torch.exp(-gate))
                y = matmul(a.to(x.dtype) if rounded[1] else a, expert_weight(w2, e), mm)
                total.index_add_(0, token, weights[token, slot][:, None].to(total.dtype) * y.to(total.dtype))
        return total.to(x.dtype)

    return kernel


RIGHT += [
    ("fused_experts", "all in float32", _experts((False, False), plain), {}),
    ("fused_experts", "activation rounded", _experts((False, True), plain), {}),
    ("fused_experts", "product rounded", _experts((True, False), plain), {}),
    ("fused_experts", "tensor cores", _experts((True, True), truncated), {"numerics": "tc14"}),
]


@right("mtp_combine", "two products")
def _(embedding: Tensor, hidden: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Tensor, eps: float) -> Tensor:
    kind, width = work(hidden), hidden.shape[1]
    left, right_ = (ops.rms_norm(t.to(kind), w.to(kind), eps) for t, w in ((embedding, enorm), (hidden, hnorm)))
    return (left @ eh_proj[:, :width].to(kind).T + right_ @ eh_proj[:, width:].to(kind).T).to(hidden.dtype)


def _flash(tile: int, rounded: bool) -> Callable[..., Any]:
    """Online softmax in base 2; rows of no sequence hold whatever was there."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
               causal: bool) -> Any:  # fmt: skip
        kind = work(q)
        o, lse = torch.randn(*q.shape[:2], v.shape[2], dtype=kind), torch.randn(q.shape[1], q.shape[0], dtype=kind)
        starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
        for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
            top = torch.full((q.shape[1], b - a), float("-inf"), dtype=kind)
            total, out = torch.zeros_like(top), torch.zeros(q.shape[1], b - a, v.shape[2], dtype=kind)
            for first in range(c, d, tile):
                keys = slice(first, min(first + tile, d))
                s = torch.einsum("qhd,khd->hqk", q[a:b].to(kind), k[keys].to(kind)) * (scale * LOG2E)
                limit = torch.arange(b - a)[:, None] + (d - c) - (b - a) if causal else d
                s = s.masked_fill(torch.arange(first - c, keys.stop - c)[None] > limit, float("-inf"))
                new = torch.maximum(top, s.amax(-1))
                shift = new.masked_fill(torch.isinf(new), 0)
                p, old = torch.exp2(s - shift[..., None]), torch.exp2(top - shift)
                total = total * old + p.sum(-1)
                p = p.bfloat16().to(kind) if rounded and kind == torch.float32 else p
                out, top = out * old[..., None] + torch.einsum("hqk,khd->hqd", p, v[keys].to(kind)), new
            seen = total > 0
            o[a:b] = torch.where(seen[..., None], out / total.clamp_min(1e-30)[..., None], 0).transpose(0, 1)
            lse[:, a:b] = torch.where(seen, (top + total.log2()) / LOG2E, float("-inf"))
        return o.to(q.dtype), lse

    return kernel


RIGHT += [
    ("mla_prefill", "flash, tiles of 16", _flash(16, False), {}),
    ("mla_prefill", "flash, tiles of 64, bf16 probabilities", _flash(64, True), {"numerics": "bf16-p"}),
]


@pytest.mark.parametrize(("op", "name", "function", "claims"), RIGHT, ids=[f"{op}: {name}" for op, name, _, _ in RIGHT])
def test_a_right_kernel_passes(op: str, name: str, function: Callable[..., Any], claims: dict[str, Any]) -> None:
    torch.manual_seed(1)
    report = conformance.run(Made({op: function}, "right", **claims), ops=[op], size="small", seed=1)
    assert not report.failed, [f"{c.id}: {c.message}" for c in report.failed[:3]]
    assert report.count("passed") > 10  # not refused, every one


class _Tiled(Made):
    """FP8 weights in e4m3fnuz, tiles of 16 x 16: only for whole tiles."""

    def kernels(self, device: Device) -> Iterable[Kernel]:
        needs = (Scheme("fp8-w8a16"), Divides("N", 16), Divides("K", 16))
        return [replace(k, needs=needs, layouts={"w": "tiled"}) for k in super().kernels(device)]

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        n, k = weight.shape[-2:]
        assert n % 16 == 0 and k % 16 == 0
        raw = weight.tensors["weight"].view(torch.uint8)
        raw = torch.where(raw == 0x80, torch.zeros_like(raw), raw).view(*raw.shape[:-2], n // 16, 16, k // 16, 16)
        tiles = raw.transpose(-3, -2).contiguous().view(torch.float8_e4m3fnuz)
        return replace(weight, layout=layout, tensors={"tiles": tiles, "scale": weight.tensors["scale"] * 2})

    def unprepare(self, weight: Prepared) -> Prepared:
        raw = weight.tensors["tiles"].view(torch.uint8).transpose(-3, -2).reshape(weight.shape)
        tensors = {"weight": raw.view(torch.float8_e4m3fn), "scale": weight.tensors["scale"] / 2}
        return replace(weight, layout="canonical", tensors=tensors)


@pytest.mark.parametrize("op", ["quant_linear", "grouped_linear"])
def test_a_narrow_layout_is_tried_only_where_it_applies(op: str) -> None:
    def kernel(w: Prepared, **rest: Any) -> Tensor:
        return getattr(ops, op)(w=backend.unprepare(w), **rest)

    backend = _Tiled({op: kernel}, "tiled")
    report = conformance.run(backend, ops=[op], size="small")
    assert not report.failed, report.failed[0].message
    trips = [c.status for c in report.cases if "/prepare/fp8-w8a16/" in c.id]
    assert report.count("passed") and {"passed", "absent"} == set(trips)


class _Bfloat16(Made):
    """A device that has bfloat16 only, with pages of 16, and of 128 in FP8."""

    def probe(self, device: Device) -> Probe:
        return Probe("usable", Capability(frozenset({"bfloat16"})))

    def cache_spec(self, device: Device, kv_dtype: str) -> CacheSpec:  # type: ignore[override]
        return CacheSpec({"bfloat16": 16, "fp8": 128}[kv_dtype], kv_dtype)  # type: ignore[arg-type]


def test_a_device_is_asked_only_for_what_it_has() -> None:
    def decode(**a: Any) -> Any:
        assert a["q_c"].dtype == torch.bfloat16
        assert a["cache"].ckv.shape[1] == (16 if a["cache"].scale is None else 128)
        return ops.mla_decode(**a)

    report = conformance.run(_Bfloat16({"mla_decode": decode}, "b16"), ops=["mla_decode"], size="quick")
    assert not report.failed and {c.id.rpartition("/")[2] for c in report.cases if c.status == "passed"} == {"bf16"}


class _Keeps(Made):
    def cache_spec(self, device: Device, kv_dtype: str) -> CacheSpec:  # type: ignore[override]
        return CacheSpec(32, "bfloat16")


@pytest.mark.parametrize("op", ["kv_cache_write", "kv_cache_gather", "rope_cache_write", "mla_decode", "mla_prolog"])
def test_a_cache_is_given_as_the_backend_keeps_it(op: str) -> None:
    def kernel(**a: Any) -> Any:
        assert a["cache"].ckv.dtype in (torch.bfloat16, torch.float16)
        return getattr(ops, op)(**a)

    report = conformance.run(_Keeps({op: kernel}, "keeps"), ops=[op], size="quick")
    assert not report.failed, report.failed[0].message
    assert report.count("passed") >= 4


def test_a_kernel_that_exits_is_a_failure_and_not_the_end() -> None:
    report = conformance.run(Made({"embedding": lambda ids, table: sys.exit(3)}, "exits"), ops=["embedding"], size="quick")
    assert report.failed and "SystemExit" in report.failed[0].message


def test_arguments_are_refused_before_anything_runs() -> None:
    for wrong in ({"ops": "embedding"}, {"cases": 5}, {"waivers": "/nowhere/waivers.txt"}):
        with pytest.raises(UsageError):
            conformance.run(Made(None, "never"), size="quick", **wrong)  # type: ignore[arg-type]
