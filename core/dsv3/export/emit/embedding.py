"""Token embedding, and the input of a multi-token-prediction module."""

from __future__ import annotations

from dsv3.export.builder import Graph, Value
from dsv3.export.emit.linear import linear
from dsv3.export.emit.norm import rms_norm


def embedding(g: Graph, ids: Value, table: Value) -> Value:
    return g.gather(table, ids)


def mtp_combine(g: Graph, embedding: Value, hidden: Value, enorm: Value, hnorm: Value, eh_proj: Value, eps: float) -> Value:
    both = [rms_norm(g, embedding, enorm, eps), rms_norm(g, hidden, hnorm, eps)]
    return linear(g, g.concat([g.work(v) for v in both], 1).to(hidden.dtype), eh_proj)
