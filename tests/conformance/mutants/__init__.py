"""Seeded faults: kernels that are almost right. Each must be caught by the suite at size small."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fault:
    """A wrong kernel: operator, what is wrong with it, the function, and what it claims."""

    op: str
    name: str
    function: Callable[..., Any]
    claims: dict[str, Any]


FAULTS: list[Fault] = []


def fault(op: str, name: str, **claims: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated kernel as a fault of the operator."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS.append(Fault(op, name, function, claims))
        return function

    return register


def every() -> list[Fault]:
    """All faults."""
    for family in ("attention", "experts", "memory", "pointwise", "products", "quantise"):
        for name in (family, f"unseen_{family}"):
            importlib.import_module(f"{__name__}.{name}")
    importlib.import_module(f"{__name__}.unseen_cache")

    return FAULTS
