"""CPUs: kernels compiled by numba for the processor at hand, and torch's matrix products where those are faster.

Nothing is compiled on import: a kernel is when it is first called, and kept on disk.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import Any

from dsv3.plugin import BackendBase, Capability, Device, Kernel, Probe


class CpuBackend(BackendBase):
    name = "cpu"
    version = "1"
    captures_exactly = True

    def devices(self, emulate: str | None = None) -> list[Device]:
        """The CPU. Emulates nothing."""
        if emulate:
            return []
        from dsv3_cpu.facts import described, memory

        return [Device("cpu", platform.machine() or "unknown", name=described()[0], memory=memory())]

    def probe(self, device: Device) -> Probe:
        import importlib.util

        if importlib.util.find_spec("numba") is None:
            return Probe(
                "incompatible", detail="numba is not installed", remedy="pip install numba, or use --backend reference"
            )
        from dsv3_cpu.facts import features

        dtypes = frozenset({"float32", "bfloat16", "int8", "float8_e4m3fn"})
        return Probe("usable", Capability(dtypes=dtypes, features=features()))

    def kernels(self, device: Device) -> Iterable[Kernel]:
        from dsv3_cpu.catalogue import kernels

        return kernels()

    def capture(self, step: Callable[[], Any], device: Device) -> Callable[[], Any]:
        from dsv3_cpu.record import recorded

        return recorded(step)


backend = CpuBackend()
