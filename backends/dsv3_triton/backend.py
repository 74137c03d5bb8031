"""What the backends for NVIDIA and AMD share: devices and what is wrong with them, kernels by architecture, graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from dsv3.plugin import BackendBase, CacheSpec, Device, Kernel, KvDType, Prepared, Probe
from dsv3_triton.catalogue import kernels
from dsv3_triton.facts import ARCHITECTURES, of_vendor
from dsv3_triton.requirements import triton_problem

# What a device stands for that is not there: its probe says why.
ABSENT = "none"


class TritonBackend(BackendBase, ABC):
    """A backend over `dsv3_triton`'s kernels. Subclasses give the attributes below, and find real devices."""

    name: str
    version = "1"
    vendor: str
    default_arch: str
    install_triton: str
    oldest: str
    # What `dsv3 bench aot` compiles this backend's kernels with: a class taking an architecture.
    aot = "dsv3_triton.aot.matrix:Matrix"

    @property
    def architectures(self) -> list[str]:
        """What `aot` compiles for, and `devices` emulates."""
        return of_vendor(self.vendor)

    def devices(self, emulate: str | None = None) -> list[Device]:
        """The GPUs that torch can reach; if there are none, one absent device, whose probe says why. With `emulate`, the
        device that stands for the architecture."""
        if not emulate:
            return self.present() or [Device(self.name, ABSENT, name="no device")]
        arch = self.default_arch if emulate == "default" else emulate
        title = ARCHITECTURES[arch].title if arch in of_vendor(self.vendor) else "unknown"
        return [Device(self.name, arch, name=f"{title}, in Triton's interpreter", emulated=True)]

    @abstractmethod
    def present(self) -> list[Device]:
        """The GPUs that torch can reach."""

    @abstractmethod
    def absence(self) -> Probe:
        """Why there are none."""

    @abstractmethod
    def too_old(self, arch: str) -> bool:
        """Whether an unknown architecture is older than those that are known."""

    def probe(self, device: Device) -> Probe:
        if device.arch == ABSENT:
            return self.absence()
        if device.arch not in of_vendor(self.vendor):
            return self._unknown(device)
        return triton_problem(self.install_triton) or Probe("usable", ARCHITECTURES[device.arch].capability)

    def _unknown(self, device: Device) -> Probe:
        known = ", ".join(of_vendor(self.vendor))
        if device.emulated:
            detail = f"backend {self.name!r} does not emulate {device.arch!r}"
            return Probe("no-device", detail=detail, remedy=f"name one of {known}")
        if self.too_old(device.arch):
            detail = f"{device.name or 'the device'} is {device.arch}, which is too old: these kernels need {self.oldest}"
            return Probe("incompatible", detail=detail, remedy="use --backend reference --device cuda:0, or the CPU")
        detail = f"{device.name or 'the device'} is {device.arch}, which these kernels were not built for; they know {known}"
        return Probe("incompatible", detail=detail, remedy="use --backend reference --device cuda:0, or a newer dsv3")

    def kernels(self, device: Device) -> Iterable[Kernel]:
        facts = ARCHITECTURES.get(device.arch)
        return kernels(facts) if facts else []

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

    def cache_spec(self, device: Device, kv_dtype: KvDType) -> CacheSpec:
        """Pages of 64 tokens; an FP8 cache in the encoding that the device converts itself."""
        return CacheSpec(64, kv_dtype, ARCHITECTURES[device.arch].fp8 or "float8_e4m3fn")

    def capture(self, step: Callable[[], Any], device: Device) -> Callable[[], Any] | None:
        """A CUDA (HIP) graph of the step, all of whose kernels have run before; None where the device is emulated."""
        if device.emulated:
            return None
        import torch

        with torch.cuda.device(self.torch_device(device)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        return graph.replay
