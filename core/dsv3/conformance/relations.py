"""Metamorphic relations: how an output must follow a change of the input, bit for bit and without a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from dsv3.budget.tensors import map_tensors
from dsv3.conformance.case import Case
from dsv3.plugin import LatentCache

Followed = tuple[dict[str, Any], Callable[[Any], Any]]


def scaled(a: Mapping[str, Any]) -> Followed:
    """x times 2^5: every product, sum and rounding is the same but for the exponent."""
    return {**a, "x": a["x"] * 32}, lambda outputs: outputs * 32


def repaged(a: Mapping[str, Any]) -> Followed:
    """Pages under other names: nothing may depend on where a page is."""
    cache, table = a["cache"], a["block_table"].to(torch.int64)
    pages = cache.ckv.shape[0]
    turned = (torch.arange(pages) + pages // 2 + 1) % pages  # page p is now called turned[p]
    inverse = torch.argsort(turned)

    def move(t: torch.Tensor) -> torch.Tensor:
        raw = t.contiguous().view(torch.uint8)[inverse]
        return raw.view(t.dtype).view(t.shape)

    moved: LatentCache = map_tensors(cache, move)
    named = torch.where((table >= 0) & (table < pages), turned[table.clamp(0, pages - 1)], table)
    return {**a, "cache": moved, "block_table": named.to(a["block_table"].dtype)}, lambda outputs: outputs


RELATIONS: dict[str, Callable[[Mapping[str, Any]], Followed]] = {"scale-2^n": scaled, "page-relabelling": repaged}
# relation -> ids of cases (without dtype) that it is tried on
_ON = {
    "scale-2^n": (
        "linear/t65-n130-k300/normal", "bmm/t5-h3-a20-c33/normal", "router_gemm/t65-e256-k200/normal",
        "quant_linear/none/t5-n100-k129/normal", "quant_linear/fp8-w8a16/t65-n130-k300/normal",
        "quant_linear/int8-w8a16/t5-n100-k129/normal", "quant_linear/int4-w4a16/t5-n100-k129/normal",
    ),
    "page-relabelling": (
        "mla_decode/act/q1/len-1.p-1.p.p+1/h3-r64-p8", "mla_decode/fp8/q2/len-2.p.p+1.2p/h2-r48-p16",
        "kv_cache_gather/act/len-p-1.p.p+1/start0", "kv_cache_gather/fp8/len-p-1.p.p+1/start1",
    ),
}  # fmt: skip


def cases(others: Mapping[str, Case]) -> Iterator[Case]:
    """Cases whose data are those of another case, and which check a relation as well."""
    for relation, names in _ON.items():
        for name in names:
            for tag in ("f32", "bf16"):
                yield replace(
                    others[f"{name}/{tag}"], name=f"{name.partition('/')[2]}/{relation}", relation=relation, size="small"
                )
