"""AMD GPUs: `dsv3_triton`'s kernels, with FP8 as e4m3fnuz on gfx942 and e4m3fn on gfx950."""

from __future__ import annotations

from dsv3.plugin import Device, Probe
from dsv3_triton.backend import TritonBackend
from dsv3_triton.facts import ARCHITECTURES


class RocmBackend(TritonBackend):
    name = "rocm"
    vendor = "amd"
    default_arch = "gfx942"

    def devices(self, emulate: str | None = None) -> list[Device]:
        return self.emulated(emulate) if emulate else []

    def probe(self, device: Device) -> Probe:
        return Probe("usable", ARCHITECTURES[device.arch].capability)


backend = RocmBackend()
