"""The outcome of comparing what a kernel returned with what it should have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """margin: the largest error over its budget, over all elements of all outputs (over 1: wrong; infinite for a wrong
    shape, dtype, NaN or integer). nmse: the largest over the outputs. message: "" if right, else expected, found, where.
    details: output, index, expected, found, error, budget of the worst element."""

    margin: float
    nmse: float
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.message
