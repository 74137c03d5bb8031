"""Prepared weights: what `prepare` made, `unprepare` must undo, bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dsv3.budget.tensors import map_tensors, raw_bytes
from dsv3.conformance.case import padded, weight
from dsv3.conformance.data import Data
from dsv3.conformance.result import CaseResult, Size
from dsv3.conformance.target import Target
from dsv3.dispatch.guard import root_cause
from dsv3.dispatch.wellformed import prepared_mistake
from dsv3.plugin import Prepared, Quant

_OPS = ("quant_linear", "grouped_linear", "fused_experts", "moe", "mla_prolog")
_QUANTS: tuple[Quant, ...] = ("none", "fp8-w8a8", "fp8-w8a16", "int8-w8a8", "int8-w8a16", "int4-w4a16")
_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
_SHAPES = {"n256-k384": (256, 384), "n576-k300": (576, 300), "n100-k129": (100, 129)}


@dataclass(frozen=True)
class RoundTrip:
    """One operator, scheme and shape; a result for every layout that the operator's kernels read."""

    op: str
    quant: Quant
    shape: str

    @property
    def id(self) -> str:
        return f"{self.op}/prepare/{self.quant}/{self.shape}"

    def results(self, target: Target, seed: int, repeat: str) -> Iterator[CaseResult]:
        """Absent where all kernels read canonical weights, or none that reads a layout takes such a weight."""
        asked, refused = self._asked(target, seed)
        if not asked:
            why = refused or "no kernel for it reads a layout of its own with this scheme"
            yield CaseResult(self.id, self.op, "", "absent", 0.0, 0.0, why, repeat)
        for (path, layout), (name, made) in asked.items():
            started = time.perf_counter()
            try:
                message = self._trip(target, path, layout, made)
            except (Exception, SystemExit) as error:
                message = f"layout {layout!r} of {path}: raised {root_cause(error)}"
            margin = math.inf if message else 0.0
            yield CaseResult(
                self.id, self.op, f"{target.name}.{name}", "failed" if message else "passed", margin, 0.0, message, repeat,
                seconds=time.perf_counter() - started,
            )  # fmt: skip

    def _asked(self, target: Target, seed: int) -> tuple[dict[tuple[str, str], tuple[str, Prepared]], str]:
        """(weight argument, layout) -> a kernel that reads it and a weight that it takes; else why one was refused."""
        asked: dict[tuple[str, str], tuple[str, Prepared]] = {}
        refused = ""
        for kernel in target.kernels(self.op):
            for path, layout in kernel.layouts.items():
                if layout == "canonical" or (path, layout) in asked:
                    continue
                dtype = next((d for d in _DTYPES if str(d).removeprefix("torch.") in target.source.capability.dtypes), None)
                if dtype is None:
                    refused = "the device lists no activation dtype"
                    continue
                made = self._weight(path, dtype, seed)
                why = target.refuses_weight(kernel, path, made, dtype)
                refused = refused or why
                if not why:
                    asked[path, layout] = (kernel.name, made)
        return asked, refused

    def _weight(self, path: str, dtype: torch.dtype, seed: int) -> Prepared:
        """Experts are as the loader stores them: whole blocks for FP8."""
        n, k = _SHAPES[self.shape]
        if path in ("w13", "shared13"):
            n = 2 * padded(n // 2, self.quant)
        elif path in ("w2", "shared2"):
            k = padded(k, self.quant)
        experts = (3,) if path in ("w13", "w2") or self.op == "grouped_linear" else ()
        return weight(Data(self.id, seed), "w", self.quant, (*experts, n, k), dtype)

    def _trip(self, target: Target, path: str, layout: str, made: Prepared) -> str:
        original = map_tensors(made, lambda t: t.to(target.device))
        given = map_tensors(original, lambda t: t.clone())
        what = f"layout {layout!r} of {path}"
        prepared = target.source.backend.prepare(given, layout, target.source.device)
        if mistake := prepared_mistake(prepared, original, layout):
            return f"{what}: prepare() answered {mistake}"
        if not _equal(given, original):
            return f"{what}: prepare() changed the weight it was given"
        back = target.source.backend.unprepare(prepared)
        if mistake := prepared_mistake(back, original, "canonical"):
            return f"{what}: unprepare() answered {mistake}"
        if _equal(_without_signed_zeros(back), _without_signed_zeros(original)):
            return ""
        return f"{what}: unprepare(prepare(w)) is not w, bit for bit"


def _without_signed_zeros(w: Prepared) -> Prepared:
    """FP8 -0 as 0: e4m3fnuz, which some devices read, has none."""

    def change(t: torch.Tensor) -> torch.Tensor:
        if t.dtype != torch.float8_e4m3fn:
            return t
        raw = t.contiguous().view(torch.uint8)
        return torch.where(raw == 0x80, torch.zeros_like(raw), raw).view(t.dtype)

    return map_tensors(w, change)


def _equal(a: Prepared, b: Prepared) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        x.shape == (y := b.tensors[k]).shape and x.dtype == y.dtype and torch.equal(raw_bytes(x), raw_bytes(y))
        for k, x in a.tensors.items()
    )


def round_trips(size: Size, ops: Sequence[str] | None) -> list[RoundTrip]:
    """All of a size."""
    shapes = [s for s in _SHAPES if size != "quick" or s == "n576-k300"]
    return [RoundTrip(op, q, s) for op in _OPS if ops is None or op in ops for q in _QUANTS for s in shapes]
