"""Ascend NPUs through torch_npu: INT8 products, fused experts, attention. Without an NPU, `--emulate` puts exact INT8
arithmetic on the CPU in the place of every vendor operator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dsv3.plugin import BackendBase, CacheSpec, Device, Kernel, KvDType, Prepared, Probe
from dsv3_ascend.soc import ARCHITECTURES, too_old

if TYPE_CHECKING:
    import torch

# What a device stands for that is not there: its probe says why.
ABSENT = "none"
_KNOWN = ", ".join(ARCHITECTURES)


class AscendBackend(BackendBase):
    name = "ascend"
    version = "1"

    def devices(self, emulate: str | None = None) -> list[Device]:
        """The NPUs; if there are none, one absent device, whose probe says why. With `emulate`, the CPU in an NPU's place."""
        if not emulate:
            from dsv3_ascend.driver import devices

            return devices() or [Device("npu", ABSENT, name="no device")]
        arch = "910b" if emulate == "default" else emulate
        title = ARCHITECTURES[arch].title if arch in ARCHITECTURES else "unknown"
        return [Device("npu", arch, name=f"{title}, exact INT8 arithmetic on the CPU", emulated=True)]

    def probe(self, device: Device) -> Probe:
        if device.arch == ABSENT:
            from dsv3_ascend.driver import absence

            return absence()
        if device.arch in ARCHITECTURES:
            return Probe("usable", ARCHITECTURES[device.arch].capability)
        if device.emulated:
            detail = f"backend 'ascend' does not emulate {device.arch!r}"
            return Probe("no-device", detail=detail, remedy=f"name one of {_KNOWN}")
        if too_old(device.arch):
            detail = f"the NPU is an {device.arch}, which has no bfloat16: these kernels need a 910B or newer"
            return Probe("incompatible", detail=detail, remedy="use --backend reference on the CPU")
        return Probe(
            "error",
            detail=f"unknown SoC {device.arch!r}: nothing is known about what it has; known are {_KNOWN}",
            remedy="report the name; use --backend reference until a newer dsv3 knows it",
        )

    def kernels(self, device: Device) -> Iterable[Kernel]:
        from dsv3_ascend.catalogue import kernels

        return kernels() if device.arch in ARCHITECTURES else []

    def torch_device(self, device: Device) -> torch.device:
        import torch

        if device.emulated:
            return torch.device("cpu")
        from dsv3_ascend.driver import torch_npu

        torch_npu()  # which tells torch of "npu"
        return torch.device("npu", device.index)

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        from dsv3_ascend.layouts import LAYOUTS

        if layout not in LAYOUTS:
            return super().prepare(weight, layout, device)
        return LAYOUTS[layout][0](weight, device.emulated)

    def unprepare(self, weight: Prepared) -> Prepared:
        from dsv3_ascend.layouts import LAYOUTS

        return LAYOUTS[weight.layout][1](weight) if weight.layout in LAYOUTS else super().unprepare(weight)

    def cache_spec(self, device: Device, kv_dtype: KvDType) -> CacheSpec:
        """Pages of 128, which the vendor's attention reads; bfloat16 in the place of FP8, which these devices do not have."""
        return CacheSpec(128, "bfloat16" if kv_dtype == "fp8" else kv_dtype)


backend = AscendBackend()
