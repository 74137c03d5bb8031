"""Parts of a batch alone: what batch invariance is checked with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from dsv3.budget.tensors import map_tensors
from dsv3.ops import spec

_SEQUENCES = frozenset({"mla_decode", "mla_prefill"})
# What only moves numbers, or gives none back: its values are exact, whatever else is in the batch.
_EXACT = frozenset({"moe_permute", "kv_cache_gather", "kv_cache_write", "all_reduce"})
Part = tuple[dict[str, Any], Callable[[Any], Any]]


def alone(op: str, arguments: Mapping[str, Any]) -> Iterator[Part]:
    """(arguments for some rows only, how to choose their outputs from those of the whole), for several choices of rows: few and
    many, because a kernel may take another way from some number on. None where rows cannot be taken."""
    if op in _EXACT:
        return
    if op in _SEQUENCES:
        yield from _sequence(op, arguments)
        return
    if op == "grouped_linear":
        yield from _expert(arguments)
        return
    dims = spec(op).bind(arguments)
    rows = dims.get("T", dims.get("S", 0))
    parts = ((rows // 2, rows), (rows - 1, rows), (rows // 3, rows // 3 + min(rows // 2, 12)))
    for first, last in dict.fromkeys(parts if rows > 1 else ()):
        if 0 < last - first < rows:
            rows_of = {"moe_combine": _combined, "merge_attn_states": _merged}.get(op)
            yield rows_of(arguments, first, last) if rows_of else _rows(op, arguments, first, last)


def _rows(op: str, arguments: Mapping[str, Any], first: int, last: int) -> Part:
    """Rows first to last of every argument and output that has a row per token; a cache is written in all, and not compared."""
    known = spec(op)
    name = "T" if "T" in known.bind(arguments) else "S"
    part = dict(arguments)
    for term in known.terms:
        if term.kind == "[" and term.dims and term.dims[0].text == name and "." not in term.path:
            value = arguments[term.path]
            part[term.path] = None if value is None else value[first:last].clone()
    return part, lambda outputs: map_tensors(outputs, lambda t: t[first:last])


def _merged(a: Mapping[str, Any], first: int, last: int) -> Part:
    """Tokens first to last of merge_attn_states: they are the second axis of lse."""
    part = {name: (a[name][first:last] if name.startswith("o") else a[name][:, first:last]).clone() for name in a}
    return part, lambda outputs: (outputs[0][first:last], outputs[1][:, first:last].contiguous())


def _combined(a: Mapping[str, Any], first: int, last: int) -> Part:
    """Tokens first to last of moe_combine, with the rows of theirs."""
    k = a["weights"].shape[1]
    perm = a["perm"]
    rows = torch.nonzero((perm >= first * k) & (perm < last * k))[:, 0]
    places = torch.full(((last - first) * k,), -1, dtype=perm.dtype)
    places[: len(rows)] = perm[rows] - first * k
    y = torch.zeros(len(places), a["y"].shape[1], dtype=a["y"].dtype)
    y[: len(rows)] = a["y"][rows]
    return {**a, "y": y, "perm": places, "weights": a["weights"][first:last].clone()}, lambda out: out[first:last]


def _expert(a: Mapping[str, Any]) -> Iterator[Part]:
    """The rows of the last expert that has any."""
    bounds = a["offsets"].tolist()
    owners = [e for e in range(len(bounds) - 1) if bounds[e + 1] > bounds[e]]
    if len(owners) < 2:
        return
    first, last = bounds[owners[-1]], bounds[owners[-1] + 1]
    offsets = torch.where(torch.arange(len(bounds)) > owners[-1], last - first, 0).to(a["offsets"].dtype)
    yield {**a, "x": a["x"][first:last].clone(), "offsets": offsets}, lambda y: y[first:last]


def _sequence(op: str, a: Mapping[str, Any]) -> Iterator[Part]:
    """The last sequence of attention."""
    bounds = a["cu_q"].tolist()
    s = len(bounds) - 2
    first, last = bounds[s], bounds[s + 1]
    if s == 0 or last == first:
        return
    zero = torch.tensor([0, last - first], dtype=a["cu_q"].dtype)
    part = {**a, "cu_q": zero}
    if op == "mla_prefill":
        k0, k1 = a["cu_k"].tolist()[s : s + 2]
        part |= {"q": a["q"][first:last].clone(), "k": a["k"][k0:k1].clone(), "v": a["v"][k0:k1].clone()}
        part["cu_k"] = torch.tensor([0, k1 - k0], dtype=a["cu_k"].dtype)
    else:
        part |= {name: a[name][first:last].clone() for name in ("q_c", "q_pe")}
        part |= {name: a[name][s:].clone() for name in ("block_table", "seq_lens")}
    yield part, lambda outputs: (outputs[0][first:last], outputs[1][:, first:last].contiguous())
