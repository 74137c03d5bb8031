"""How evenly tokens go to experts: the router's choices, looked at in some of the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dsv3.graph.mlp import Moe
from dsv3.ops import spec

if TYPE_CHECKING:
    from dsv3.server.service import Service

_EVERY = 16  # calls of a layer between two that are looked at


class ExpertLoad:
    """Counts by the router's reference on what every MoE layer is given."""

    def __init__(self, service: Service) -> None:
        graph, config = service.model.graph, service.model.config
        self._lock = threading.Lock()
        self._counts: dict[int, list[int]] = {}
        self._tokens = 0
        self._graphs = service.model.graphs
        if self._graphs.offered():  # a step that is replayed cannot be looked into
            if not self._graphs.exactly:
                return  # and on a device one step kernel by kernel takes as long as several
            self._graphs.eager_every = _EVERY
        for number, block in enumerate(graph.blocks):
            if isinstance(block.mlp, Moe):
                self._counts[number] = [0] * int(config.n_routed_experts or 0)
                block.mlp.watch = self._watcher(number, block.mlp)

    def _watcher(self, layer: int, moe: Moe) -> Callable[[Tensor], None]:
        calls = 0

        def watch(x: Tensor) -> None:
            nonlocal calls
            if self._graphs.capturing:
                return
            if calls % _EVERY == 0 or self._graphs.looking:
                self._look(layer, moe, x)
            calls += 1

        return watch

    def _look(self, layer: int, moe: Moe, x: Tensor) -> None:
        _, ids = spec("route").reference(x=x, gate=moe.w.gate, bias=moe.w.bias, **moe.routing)
        with self._lock:
            counts = self._counts[layer]
            for expert in ids.flatten().tolist():
                counts[expert] += 1
            if layer == min(self._counts):
                self._tokens += ids.shape[0]

    def seen(self) -> dict[str, Any]:
        """Per layer the tokens that went to each expert, of `tokens` tokens that were looked at."""
        with self._lock:
            layers = [{"layer": n, "counts": list(counts)} for n, counts in self._counts.items()] if self._tokens else []
            return {"layers": layers, "tokens": self._tokens}
