"""What the backends for NVIDIA and AMD share: kernels by architecture, emulation, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dsv3.plugin import BackendBase, Device, Kernel, Prepared
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

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        if layout != "fnuz":
            return super().prepare(weight, layout, device)
        from dsv3_triton.layouts import to_fnuz

        return to_fnuz(weight)

    def unprepare(self, weight: Prepared) -> Prepared:
        if weight.layout != "fnuz":
            return super().unprepare(weight)
        from dsv3_triton.layouts import from_fnuz

        return from_fnuz(weight)

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
