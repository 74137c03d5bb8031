"""Which of the two a call goes to: the vendor's operators, or their place-holders on the CPU."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from dsv3_ascend import cpu, npu


def of(x: Tensor) -> ModuleType:
    """`cpu` for a tensor on the CPU, which an emulated device's are; else `npu`."""
    return cpu if x.device.type == "cpu" else npu
