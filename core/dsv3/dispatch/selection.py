"""A selection as plain data: computed once, bound again in worker processes without selecting, and compared by hash.

Ranks of one model must run the same kernels: their partial sums are added, and two kernels round differently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsv3.dispatch.decision import Decision
from dsv3.errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from dsv3.dispatch.placement import Placement

FORMAT = 1


def selection(placement: Placement) -> dict[str, Any]:
    """Everything that a worker needs to bind the same kernels, for `json.dumps`; "sha256" is its `digest`."""
    binding = placement.binding
    plain = {
        "format": FORMAT,
        "backend": placement.backend,
        "arch": placement.device.arch,
        "formats": [placement.dtype, placement.quant, placement.kv_dtype],
        "buckets": [list(bucket) for bucket in binding.buckets],
        "sites": [{"op": op, "site": site, "plan": [_plain(d) for d in plan]} for op, site, plan in binding.decisions],
    }
    return {**plain, "sha256": digest(plain)}


def _plain(d: Decision) -> dict[str, Any]:
    found: dict[str, Any] = {"op": d.op, "why": d.why, "rejected": [list(r) for r in d.rejected], "fallback": d.fallback}
    if d.kernel is not None:
        config = {} if d.kernel.config is None else {"config": dict(d.kernel.config)}
        return {**found, "kernel": d.kernel.name, **config}
    if d.cases:
        return {**found, "cases": [[list(shape), _plain(inner)] for shape, inner in d.cases.items()]}
    return {**found, "parts": {op: _plain(inner) for op, inner in d.parts.items()}}


def digest(plain: Mapping[str, Any]) -> str:
    """SHA-256 over backend, architecture, number formats, buckets and the kernels of every site; reasons do not count."""

    def names(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: names(v) for k, v in value.items() if k not in ("why", "rejected", "fallback", "sha256")}
        return [names(v) for v in value] if isinstance(value, list | tuple) else value

    return hashlib.sha256(json.dumps(names(plain), sort_keys=True).encode()).hexdigest()


def selected_backend(plain: Any, asked: str) -> str:
    """The backend of a selection that was read from somewhere. UsageError if it is no selection, is not what it was when it was
    written, or is of another backend than was asked for."""
    if not isinstance(plain, Mapping) or plain.get("format") != FORMAT:
        raise UsageError(f"selection is not one of format {FORMAT}; pass what Placement.selection() gave")
    if digest(plain) != plain.get("sha256"):
        raise UsageError("selection was changed after it was written: its sha256 is another; write it again")
    backend = str(plain["backend"])
    if asked not in ("auto", backend):
        raise UsageError(f"selection is of backend {backend!r}, not {asked!r}; leave backend out")
    return backend


def same_as(placement: Placement, plain: Mapping[str, Any]) -> None:
    """BackendUnavailable, with the first difference, if a worker has bound anything else than the selection says."""
    mine = selection(placement)
    if mine["sha256"] == plain["sha256"]:
        return
    for name in ("backend", "arch", "formats", "buckets"):
        if mine[name] != plain[name]:
            raise BackendUnavailable(f"this worker has {name} {mine[name]}, the selection {plain[name]}: ranks must agree")
    raise BackendUnavailable("this worker has bound other kernels than the selection says: ranks must agree")


def agree(placement: Placement, group: Any, device: str = "cpu") -> None:
    """Compare what every rank of a torch.distributed group runs now. device: where the group's backend takes tensors from.

    Raises BackendUnavailable on every rank if one differs from rank 0, naming those that do.
    """
    import torch
    import torch.distributed as dist

    mine = torch.tensor(list(bytes.fromhex(selection(placement)["sha256"])), dtype=torch.int32, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    other = [rank for rank, found in enumerate(every) if not torch.equal(found, every[0])]
    if other:
        raise BackendUnavailable(
            f"ranks {', '.join(map(str, other))} run other kernels than rank 0: load all with one selection "
            "(`Placement.selection()`), on devices of one architecture"
        )
