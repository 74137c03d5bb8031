"""Backends for testing the suite itself: every operator right, or one of them with a seeded fault."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from dsv3 import ops
from dsv3.plugin import BackendBase, Capability, Device, Kernel, Probe

DTYPES = frozenset({"float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e4m3fnuz"})
_MODULE = "dsv3_faulty_kernels"


class Made(BackendBase):
    """A backend with these functions as kernels; without any, all references, composites taken whole."""

    version = "1"

    def __init__(self, functions: dict[str, Callable[..., Any]] | None = None, name: str = "made", **claims: Any) -> None:
        self.name = name
        self.functions = functions or {op: ops.spec(op).reference for op in ops.names()}
        self.claims = claims
        module = sys.modules.setdefault(_MODULE, types.ModuleType(_MODULE))
        for op, function in self.functions.items():
            setattr(module, f"{name}_{op}", function)

    def devices(self, emulate: str | None = None) -> list[Device]:
        return [] if emulate else [Device("cpu", "x86_64")]

    def probe(self, device: Device) -> Probe:
        return Probe("usable", Capability(dtypes=DTYPES))

    def kernels(self, device: Device) -> Iterable[Kernel]:
        return [Kernel(op, "made", f"{_MODULE}:{self.name}_{op}", **self.claims) for op in self.functions]
