"""Call sites that run the references at once, and note what the linears are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dsv3 import ops


class Taps:
    """What the graph calls for its sites. `inputs`: last part of a linear's name -> what it was given, [T, K], call by call."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}

    def __call__(self, op: str, where: str) -> _Site:
        function: Callable[..., Any] = getattr(ops, op)
        if op != "quant_linear":
            return _Site(function)
        seen = self.inputs.setdefault(where.rpartition(".")[2], [])

        def noted(x: Tensor, w: Any) -> Any:
            seen.append(x)
            return function(x=x, w=w)

        return _Site(noted)


class _Site:
    """One function for every bucket."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __getitem__(self, bucket: int) -> Callable[..., Any]:
        return self._function
