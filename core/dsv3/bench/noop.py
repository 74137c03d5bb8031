"""A backend whose kernels do nothing: what is left of the time of a call is what it costs to get there."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dsv3.plugin import AtMost, BackendBase, Capability, Device, Kernel, Prepared, Probe

_HERE = f"{__name__}:"


class NoOp(BackendBase):
    """Never installed: `dsv3 bench` binds it by hand. The two kernels for grouped_linear make its calls a switch by shape."""

    name = "noop"
    version = "1"
    capability = Capability(frozenset({"float64", "float32", "bfloat16"}))

    def __init__(self, narrow: int) -> None:
        self.narrow = narrow

    def devices(self, emulate: str | None = None) -> list[Device]:
        return [Device("cpu", "noop")]

    def probe(self, device: Device) -> Probe:
        return Probe("usable", self.capability)

    def kernels(self, device: Device) -> Iterable[Kernel]:
        return [
            Kernel("rms_norm", "nothing", _HERE + "rms_norm"),
            Kernel("silu_mul", "nothing", _HERE + "silu_mul"),
            Kernel("grouped_linear", "narrow", _HERE + "grouped_linear", needs=(AtMost("K", self.narrow),)),
            Kernel("grouped_linear", "wide", _HERE + "grouped_linear"),
        ]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x


def silu_mul(x: Tensor) -> Tensor:
    return x


def grouped_linear(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    return x
