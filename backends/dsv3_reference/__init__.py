"""The reference backend: the contract's torch references, through the same door as everybody's kernels.

It runs wherever torch does. It offers the primitives only: a composite is then its decomposition over them.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable

from dsv3.plugin import BackendBase, Capability, Device, Kernel, Probe

# What reads offsets or lengths on the host, and so cannot be part of a captured graph.
_READS_ON_HOST = frozenset({"mla_prefill", "mla_decode", "fn_to_fnuz"})
_DTYPES = frozenset({"float64", "float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"})


class ReferenceBackend(BackendBase):
    name = "reference"
    version = "1"

    def devices(self, emulate: str | None = None) -> list[Device]:
        """The CPU, then whatever accelerator torch itself can reach. Emulates nothing."""
        if emulate:
            return []
        import torch

        cpu = Device("cpu", platform.machine() or "unknown", name=platform.processor() or platform.machine())
        if not torch.accelerator.is_available():
            return [cpu]
        kind = torch.accelerator.current_accelerator()
        family = kind.type if kind is not None else "cpu"
        if family == "cuda" and torch.version.hip:
            family = "rocm"
        return [cpu] + [
            Device(family, f"torch-{family}", index=i, name=f"{family} through torch")
            for i in range(torch.accelerator.device_count())
        ]

    def probe(self, device: Device) -> Probe:
        return Probe("usable", Capability(dtypes=_DTYPES))

    def kernels(self, device: Device) -> Iterable[Kernel]:
        from dsv3 import ops

        for op in ops.names():
            spec = ops.spec(op)
            if spec.decompose is None:
                yield Kernel(
                    op=op,
                    name="torch",
                    target=f"{spec.reference.__module__}:{op}",
                    graph_safe=op not in _READS_ON_HOST,
                )


backend = ReferenceBackend()
