"""Part of a batch alone: what batch invariance is checked with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsv3.budget.tensors import map_tensors
from dsv3.ops import spec

_SEQUENCES = frozenset({"mla_decode", "mla_prefill"})
# Rows that depend on each other by definition, or have no row of their own in the output.
_NO_ROWS = frozenset({"moe_permute", "moe_combine", "grouped_linear", "kv_cache_gather", "kv_cache_write", "all_reduce"})
Part = tuple[dict[str, Any], Callable[[Any], Any]]


def alone(op: str, arguments: Mapping[str, Any]) -> Part | None:
    """(arguments for some rows only, how to choose their outputs from those of the whole); None where rows cannot be taken."""
    if op in _SEQUENCES:
        return _sequence(op, arguments)
    known = spec(op)
    dims = known.bind(arguments)
    rows = dims.get("T", dims.get("S", 0))
    name = "T" if "T" in dims else "S"
    if op in _NO_ROWS or known.mutates or rows < 2:
        return None
    first, last = rows // 2, rows
    part = dict(arguments)
    for term in known.terms:
        if term.kind == "[" and term.dims and term.dims[0].text == name and "." not in term.path:
            value = arguments[term.path]
            part[term.path] = None if value is None else value[first:last].clone()
    return part, lambda outputs: map_tensors(outputs, lambda t: t[first:last])


def _sequence(op: str, a: Mapping[str, Any]) -> Part | None:
    """The last sequence of attention."""
    bounds = a["cu_q"].tolist()
    s = len(bounds) - 2
    first, last = bounds[s], bounds[s + 1]
    if s == 0 or last == first:
        return None
    zero = torch.tensor([0, last - first], dtype=a["cu_q"].dtype)
    part = {**a, "cu_q": zero}
    if op == "mla_prefill":
        k0, k1 = a["cu_k"].tolist()[s : s + 2]
        part |= {"q": a["q"][first:last].clone(), "k": a["k"][k0:k1].clone(), "v": a["v"][k0:k1].clone()}
        part["cu_k"] = torch.tensor([0, k1 - k0], dtype=a["cu_k"].dtype)
    else:
        part |= {name: a[name][first:last].clone() for name in ("q_c", "q_pe")}
        part |= {name: a[name][s:].clone() for name in ("block_table", "seq_lens")}
    return part, lambda outputs: (outputs[0][first:last], outputs[1][:, first:last].contiguous())
