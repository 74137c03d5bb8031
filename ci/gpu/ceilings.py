"""What the card does at its best, measured in the same run: figures of kernels are shares of these, not of a data sheet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import Clock

from dsv3.dispatch.guard import root_cause

_COPY_BYTES = 2 << 30
_SIZE = 8192


def ceilings(clock: Clock, encoding: str) -> dict[str, dict[str, Any]]:
    """Name -> {"value", "unit", "what", "timing"}, or {"error", "what"}: copy bandwidth, and matmul rates in bf16 and FP8.

    encoding: of the device's FP8 units, "" if it has none.
    """
    made = {
        "copy": lambda: _copy(clock),
        "bf16": lambda: _bf16(clock),
        "fp8": lambda: _fp8(clock, encoding),
    }
    return {name: _guarded(measure) for name, measure in made.items()}


def value(found: dict[str, dict[str, Any]], name: str) -> float | None:
    """Bytes or FLOP per second; None where it was not measured."""
    return found.get(name, {}).get("value")


def _guarded(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except Exception as error:  # noqa: BLE001  a missing ceiling is told, and no reason to stop
        return {"value": None, "unit": "", "what": "", "error": root_cause(error)}


def _copy(clock: Clock) -> dict[str, Any]:
    count = 1024 if clock.emulated else _COPY_BYTES // 2
    source = torch.ones(count, dtype=torch.bfloat16, device=clock.device)
    target = torch.empty_like(source)
    what = f"tensor.copy_ of {count} bf16 numbers, bytes read and bytes written"
    return _rate(clock, lambda: target.copy_(source), 4 * count, "B/s", what)


def _bf16(clock: Clock) -> dict[str, Any]:
    n = 32 if clock.emulated else _SIZE
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=clock.device) for _ in range(2))
    return _rate(clock, lambda: torch.matmul(a, b.t()), 2 * n**3, "FLOP/s", f"torch.matmul {n}^3, bf16, normal numbers")


def _fp8(clock: Clock, encoding: str) -> dict[str, Any]:
    if not encoding:
        return {"value": None, "unit": "FLOP/s", "what": "", "error": "the device has no FP8 units"}
    n = 32 if clock.emulated else _SIZE
    dtype = getattr(torch, encoding)
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    one = torch.ones((), device=clock.device)

    def product() -> Any:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    what = f"torch._scaled_mm {n}^3, {encoding}, one scale per tensor, use_fast_accum, normal numbers"
    return _rate(clock, product, 2 * n**3, "FLOP/s", what)


def _rate(clock: Clock, call: Callable[[], Any], work: int, unit: str, what: str) -> dict[str, Any]:
    timing = clock.time([call], 0.5)
    rate = None if timing.us is None else work / (timing.us * 1e-6)
    return {"value": rate, "unit": unit, "what": what, "timing": timing.record()}
