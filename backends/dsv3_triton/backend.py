"""What the backends for NVIDIA and AMD share: kernels by architecture, emulation, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dsv3.plugin import BackendBase, CacheSpec, Device, Kernel, KvDType

from dsv3_triton.catalogue import kernels
from dsv3_triton.facts import ARCHITECTURES, of_vendor


class TritonBackend(BackendBase):
    """A backend over `dsv3_triton`'s kernels. Subclasses give name, vendor, the architecture emulated by default, and find and
    probe real devices."""

    name: str
    version = "1"
    vendor: str
    default_arch: str

    def emulated(self, emulate: str) -> list[Device]:
        """The device that stands for an architecture: `probe` says if there is no such thing."""
        arch = self.default_arch if emulate == "default" else emulate
        title = ARCHITECTURES[arch].title if arch in of_vendor(self.vendor) else ""
        return [Device(self.name, arch, name=f"{title}, in Triton's interpreter".removeprefix(", "), emulated=True)]

    def kernels(self, device: Device) -> Iterable[Kernel]:
        return kernels(ARCHITECTURES[device.arch])

    def cache_spec(self, device: Device, kv_dtype: KvDType) -> CacheSpec:
        """Pages of 64 tokens; an FP8 cache in the encoding that the device converts itself."""
        return CacheSpec(64, kv_dtype, ARCHITECTURES[device.arch].fp8 or "float8_e4m3fn")

    def capture(self, step: Callable[[], Any], device: Device) -> Callable[[], Any] | None:
        """A CUDA (HIP) graph of the step; None where the device is emulated."""
        if device.emulated:
            return None
        import torch

        place = self.torch_device(device)
        with torch.cuda.device(place):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        return graph.replay
