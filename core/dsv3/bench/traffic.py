"""What one call of an operator must move and compute, read off its arguments. Sums over a step's calls are more than the step's
own cost: here activations and results count, which between two calls stay in the processor's caches.

Bytes are those of every argument and every result, once; of a table, a cache or a set of experts what the call reads of it.
FLOP are those of matrix products, as in `cost`; operators without products have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from dsv3.bench.calls.shapes import nbytes
from dsv3.bench.cost import cache_row
from dsv3.bench.routed import routed
from dsv3.ops import spec
from dsv3.plugin import Prepared

Arguments = Mapping[str, Any]


def traffic(op: str, arguments: Arguments) -> tuple[int, int]:
    """(bytes, FLOP) of a call with these arguments."""
    if op == "all_reduce" and arguments["group"] is None:
        return 0, 0  # it hands its argument back
    whole = dict(_flat(arguments))
    reads = dict(_part_reads(op, arguments))
    results = spec(op).meta(arguments)
    made = results if isinstance(results, tuple) else () if results is None else (results,)
    total = sum(reads.get(path, nbytes(value)) for path, value in whole.items()) + sum(map(nbytes, made))
    return total, _FLOP[op](arguments) if op in _FLOP else 0


def _flat(arguments: Arguments, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _part_reads(op: str, a: Arguments) -> Iterator[tuple[str, int]]:
    """Arguments that are not read whole, with the bytes that are."""
    if op == "embedding":
        yield "table", a["ids"].numel() * nbytes(a["table"]) // a["table"].shape[0]
    if "cos_sin" in a:
        yield "cos_sin", a["positions"].numel() * a["cos_sin"].shape[1] * a["cos_sin"].element_size()
    if "cache" in a:
        yield "cache", _rows(op, a) * cache_row(a["cache"])
    if op == "grouped_linear":
        present = int((a["offsets"].diff() > 0).sum())
        yield "w", nbytes(a["w"]) * present // a["w"].shape[0]
    if op in ("fused_experts", "moe"):
        present = _present(op, a)
        for name in ("w13", "w2"):
            yield name, nbytes(a[name]) * present // a[name].shape[0]


def _rows(op: str, a: Arguments) -> int:
    """Of the cache: those that are written, or those that the sequences see."""
    if "slots" in a:
        return int(a["slots"].numel())
    lengths: Tensor = a["seq_lens"]
    return int((lengths - a.get("start", 0)).clamp_min(0).sum())


def _present(op: str, a: Arguments) -> int:
    """Different experts here that the call's tokens go to."""
    if op == "moe":
        return routed(a)
    ids = a["ids"]
    return int(ids[ids >= 0].unique().numel())


def _linear(name: str, x: str = "x") -> Callable[[Arguments], int]:
    """A product with a weight [N, K], or [Nh, A, C] per head, for each row of x."""
    return lambda a: 2 * a[x].shape[0] * math.prod(a[name].shape)


def _each(w: Prepared) -> int:
    """Numbers of one expert."""
    return math.prod(w.shape[1:])


def _moe(a: Arguments) -> int:
    shared = sum(math.prod(a[name].shape) for name in ("shared13", "shared2") if a[name] is not None)
    per_token = a["gate"].numel() + shared + a["topk"] * (_each(a["w13"]) + _each(a["w2"]))
    return 2 * a["x"].shape[0] * per_token


def _mla_decode(a: Arguments) -> int:
    """As in `cost`: every query sees the keys up to its own."""
    counts, lengths = a["cu_q"].diff().tolist(), a["seq_lens"].tolist()
    seen = sum(n * (s - a["start"]) - n * (n - 1) // 2 for n, s in zip(counts, lengths, strict=True))
    return 2 * seen * a["q_c"].shape[1] * (2 * a["q_c"].shape[2] + a["q_pe"].shape[2])


def _mla_prefill(a: Arguments) -> int:
    counts, keys = a["cu_q"].diff().tolist(), a["cu_k"].diff().tolist()
    seen = sum(n * k - (n * (n - 1) // 2 if a["causal"] else 0) for n, k in zip(counts, keys, strict=True))
    return 2 * seen * a["q"].shape[1] * (a["q"].shape[2] + a["v"].shape[2])


def _mla_prolog(a: Arguments) -> int:
    products = [w for name, w in a["weights"].items() if not name.endswith("norm")]
    return 2 * a["x"].shape[0] * sum(math.prod(w.shape) for w in products)


_FLOP: dict[str, Callable[[Arguments], int]] = {
    "quant_linear": _linear("w"),
    "linear": _linear("weight"),
    "bmm": _linear("weight"),
    "router_gemm": _linear("weight"),
    "route": _linear("gate"),
    "mtp_combine": _linear("eh_proj", "hidden"),
    "block_scaled_mm": _linear("b", "a"),
    "int8_scaled_mm": _linear("b", "a"),
    "grouped_linear": lambda a: 2 * int(a["offsets"][-1]) * _each(a["w"]),
    "fused_experts": lambda a: 2 * int((a["ids"] >= 0).sum()) * (_each(a["w13"]) + _each(a["w2"])),
    "moe": _moe,
    "mla_decode": _mla_decode,
    "mla_prefill": _mla_prefill,
    "mla_prolog": _mla_prolog,
}
