"""What a user without dsv3 would call at the same sizes, from torch alone.

A peer is given the call's own arguments and makes what it needs of them beforehand; that is not timed. `what` says what is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.quant.fp8 import BLOCK, blocks

Arguments = Mapping[str, Any]
Thunk = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """what: the call that is timed. make: from the operator's arguments to that call; it raises where there is none."""

    what: str
    make: Callable[[Arguments], Thunk]


def peers(op: str, arguments: Arguments) -> list[Peer]:
    """The peers of a call, [] where torch has none."""
    found = _PEERS.get(op, [])
    if op == "quant_linear":
        quant = arguments["w"].quant
        found = [_LINEAR, *(_SCALED if quant == "fp8-w8a8" else [_INT8] if quant == "int8-w8a8" else [])]
    return found


# ------------------------------------------------------------------------------------------------------------ matrix products


def _sizes(a: Arguments) -> tuple[Tensor, int, int]:
    """x [T, K] in bf16 or codes, N and K, of any operator with one product."""
    x = next(a[name] for name in ("x", "a") if name in a)
    n = next(a[name].shape[0] for name in ("w", "weight", "b") if name in a)
    return x, n, x.shape[1]


def _linear(a: Arguments) -> Thunk:
    x, n, k = _sizes(a)
    x = x if x.dtype == torch.bfloat16 else torch.randn(x.shape, device=x.device).to(torch.bfloat16)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=x.device)
    return lambda: F.linear(x, weight)


def _fp8_operands(a: Arguments) -> tuple[Tensor, Tensor]:
    """Codes [T, K], and [K, N] as a transposed view."""
    x, n, k = _sizes(a)
    given = a["w"].tensors["weight"] if "w" in a else a["b"]
    dtype = x.dtype if x.dtype.itemsize == 1 else torch.float8_e4m3fnuz if _is_fnuz() else torch.float8_e4m3fn
    right = given if given.dtype == dtype else torch.randn(n, k, device=x.device).to(dtype)
    return x.to(dtype), right.t()


@functools.cache
def _is_fnuz() -> bool:
    """gfx942 multiplies the other encoding."""
    return torch.version.hip is not None and torch.cuda.get_device_properties(0).gcnArchName.startswith("gfx94")


Scales = Callable[[int, int, Any], Tensor]


def _scaled(left: Scales, rights: list[Scales], fast: bool) -> Callable[[Arguments], Thunk]:
    """rights: what builds of torch want the right scales to be, the first that this one takes."""

    def make(a: Arguments) -> Thunk:
        codes, weight = _fp8_operands(a)
        (t, k), n = codes.shape, weight.shape[1]
        refused: Exception = ValueError()
        for right in rights:
            scales = {"scale_a": left(t, k, codes.device), "scale_b": right(n, k, codes.device)}
            run = functools.partial(torch._scaled_mm, codes, weight, **scales, out_dtype=torch.bfloat16, use_fast_accum=fast)
            try:
                run()
            except (RuntimeError, ValueError) as error:
                refused = error
            else:
                return run
        raise refused

    return make


def _block_right(padded: bool) -> Scales:
    """[ceil(K/128), ceil(N/128)], K running fastest; its rows padded to a multiple of 4, as cuBLAS wants them."""

    def make(n: int, k: int, device: Any) -> Tensor:
        width = -(-blocks(k) // 4) * 4 if padded else blocks(k)
        return torch.ones(blocks(n), width, device=device)[:, : blocks(k)].t()

    return make


def _int8(a: Arguments) -> Thunk:
    x, n, k = _sizes(a)
    left = torch.ones(x.shape[0], k, dtype=torch.int8, device=x.device)
    right = torch.ones(n, k, dtype=torch.int8, device=x.device).t()
    return lambda: torch._int_mm(left, right)


_LINEAR = Peer("F.linear, bf16 weight", _linear)
_SCALED = [
    Peer(
        "torch._scaled_mm, 1x128 and 128x128 scales; x quantised already",
        _scaled(lambda t, k, d: torch.ones(blocks(k), t, device=d).t(), [_block_right(True), _block_right(False)], False),
    ),
    Peer(
        "torch._scaled_mm, a scale per row and column; x quantised already",
        _scaled(lambda t, k, d: torch.ones(t, 1, device=d), [lambda n, k, d: torch.ones(1, n, device=d)], True),
    ),
]
_INT8 = Peer("torch._int_mm, without scales; x quantised already", _int8)


def _bmm(a: Arguments) -> Thunk:
    x, weight = a["x"].transpose(0, 1).contiguous(), a["weight"].contiguous()
    return lambda: torch.bmm(x, weight)


def _grouped(a: Arguments) -> Thunk:
    experts, n, k = a["w"].shape
    weight = torch.empty(experts, n, k, dtype=torch.bfloat16, device=a["x"].device).normal_().transpose(1, 2)
    x, ends = a["x"], a["offsets"][1:].to(torch.int32)
    return lambda: torch._grouped_mm(x, weight, offs=ends)


def _router(a: Arguments) -> Thunk:
    x, weight = a["x"].float(), a["weight"].float()
    return lambda: F.linear(x, weight)


# ------------------------------------------------------------------------------------------------------------------ attention


def _prefill(padded: bool) -> Callable[[Arguments], Thunk]:
    def make(a: Arguments) -> Thunk:
        q, k, v = (a[name].transpose(0, 1)[None].contiguous() for name in "qkv")
        if padded:
            v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=a["scale"])

    return make


def _decode(a: Arguments) -> Thunk:
    """All heads over one key and value, as sequences of [heads] queries."""
    lengths, width = a["seq_lens"], a["q_c"].shape[-1]
    q = torch.cat((a["q_c"], a["q_pe"]), dim=-1)[:, None]
    k = torch.randn(lengths.shape[0], 1, a["max_k"], q.shape[-1], device=q.device).to(q.dtype)
    v = k[..., :width]
    return lambda: F.scaled_dot_product_attention(q, k, v, scale=a["scale"])


# -------------------------------------------------------------------------------------------------- normalisation and routing


def _rms_norm(a: Arguments) -> Thunk:
    return lambda: F.rms_norm(a["x"], (a["x"].shape[1],), a["weight"], a["eps"])


def _add_rms_norm(a: Arguments) -> Thunk:
    def run() -> Any:
        total = a["x"] + a["residual"]
        return F.rms_norm(total, (total.shape[1],), a["weight"], a["eps"]), total

    return run


def _silu_mul(a: Arguments) -> Thunk:
    gate, up = a["x"].chunk(2, dim=-1)
    return lambda: F.silu(gate) * up


def _quantised(a: Arguments) -> Thunk:
    x, dtype = a["x"], getattr(torch, a["dtype"])
    largest = torch.finfo(dtype).max

    def run() -> Any:
        work = x.float().view(x.shape[0], -1, BLOCK)
        scale = work.abs().amax(-1, keepdim=True).clamp_min(1e-4) / largest
        return (work / scale).to(dtype), scale

    return run


def topk_routing(logits: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """noaux_tc with torch.topk, as DeepSeek's demo and transformers write it."""
    scores = logits.sigmoid()
    choice = scores + a["bias"]
    grouped = choice.view(logits.shape[0], a["n_group"], -1)
    kept = grouped.topk(2, dim=-1)[0].sum(dim=-1).topk(a["topk_group"], dim=-1)[1]
    mask = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, kept, False)
    ids = grouped.masked_fill(mask[..., None], float("-inf")).flatten(1).topk(a["topk"], dim=-1)[1]
    weights = scores.gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True) * a["scale"], ids


def _route(a: Arguments) -> Thunk:
    x, gate = a["x"], a["gate"].float()
    return lambda: topk_routing(F.linear(x.float(), gate), a)


def _permute(a: Arguments) -> Thunk:
    flat, experts = a["ids"].flatten(), a["n_experts"]

    def run() -> Any:
        key, order = torch.where(flat < 0, experts, flat).sort(stable=True)
        return order, torch.searchsorted(key, torch.arange(experts + 1, device=key.device, dtype=key.dtype))

    return run


def _sample(a: Arguments) -> Thunk:
    logits, temperature = a["logits"], a["temperature"].float()[:, None]

    def run() -> Any:
        p = torch.softmax(logits.float() / temperature, dim=-1)
        return p.div_(torch.empty_like(p).exponential_(1)).argmax(dim=-1)

    return run


_PEERS: dict[str, list[Peer]] = {
    "linear": [_LINEAR],
    "block_scaled_mm": [*_SCALED, _LINEAR],
    "int8_scaled_mm": [_INT8, _LINEAR],
    "bmm": [Peer("torch.bmm, heads first", _bmm)],
    "router_gemm": [Peer("F.linear, float32", _router)],
    "grouped_linear": [Peer("torch._grouped_mm, bf16 weights", _grouped)],
    "mla_prefill": [
        Peer("F.scaled_dot_product_attention", _prefill(False)),
        Peer("F.scaled_dot_product_attention, v padded to the width of q", _prefill(True)),
    ],
    "mla_decode": [Peer("F.scaled_dot_product_attention, bf16 cache without pages", _decode)],
    "rms_norm": [Peer("F.rms_norm", _rms_norm)],
    "add_rms_norm": [Peer("add, F.rms_norm", _add_rms_norm)],
    "silu_mul": [Peer("F.silu(gate) * up", _silu_mul)],
    "act_quant": [Peer("amax, division, conversion, in torch", _quantised)],
    "grouped_topk": [Peer("sigmoid and torch.topk", lambda a: lambda: topk_routing(a["logits"], a))],
    "route": [Peer("F.linear in float32, sigmoid and torch.topk", _route)],
    "moe_permute": [Peer("torch.sort, torch.searchsorted", _permute)],
    "gumbel_argmax": [Peer("softmax, exponential noise, argmax", _sample)],
    "embedding": [Peer("F.embedding", lambda a: lambda: F.embedding(a["ids"], a["table"]))],
}
