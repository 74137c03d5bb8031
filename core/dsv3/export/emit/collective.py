"""The sum over ranks: one rank's is its own."""

from __future__ import annotations

from typing import Any

from dsv3.errors import UsageError
from dsv3.export.builder import Graph, Value


def all_reduce(g: Graph, x: Value, group: Any = None) -> Value:
    if group is not None:
        raise UsageError("all_reduce: ONNX has no collectives; only group None can be exported")
    return g.identity(x)
