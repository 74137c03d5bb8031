"""NVIDIA GPUs, from sm_80 on: `dsv3_triton`'s kernels, with FP8 as e4m3fn."""

from __future__ import annotations

from dsv3.plugin import Device, Probe
from dsv3_triton.backend import TritonBackend
from dsv3_triton.facts import ARCHITECTURES


class CudaBackend(TritonBackend):
    name = "cuda"
    vendor = "nvidia"
    default_arch = "sm_90"

    def devices(self, emulate: str | None = None) -> list[Device]:
        return self.emulated(emulate) if emulate else []

    def probe(self, device: Device) -> Probe:
        return Probe("usable", ARCHITECTURES[device.arch].capability)


backend = CudaBackend()
