"""Which experts a step really visits: the router's reference on what each MoE layer is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dsv3.engine.model import Model
from dsv3.graph.mlp import Moe
from dsv3.ops import spec

_ROUTING = ("gate", "bias", "n_group", "topk_group", "topk", "score", "group_score", "renormalize", "scale")


def routed(arguments: Mapping[str, Any]) -> int:
    """Different experts that a call of `moe` goes to."""
    _, ids = spec("route").reference(x=arguments["x"], **{name: arguments[name] for name in _ROUTING})
    return int(ids.unique().numel())


@contextmanager
def seen_by_moe(model: Model) -> Iterator[list[dict[str, Any]]]:
    """While open, the arguments of every call of a MoE layer are kept, in order."""
    sites = [block.mlp.moe for block in model.graph.blocks if isinstance(block.mlp, Moe)]
    kept, seen = [list(site) for site in sites], []

    def spied(kernel: Any) -> Any:
        def spy(**arguments: Any) -> Any:
            seen.append({**arguments, "x": arguments["x"].clone()})
            return kernel(**arguments)

        return spy

    for site in sites:
        site[:] = [spied(kernel) for kernel in site]
    try:
        yield seen
    finally:
        for site, kernels in zip(sites, kept, strict=True):
            site[:] = kernels
