"""What a backend says about the hardware: devices, facts about them, and whether they can be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ProbeState = Literal["usable", "no-device", "driver", "incompatible", "error"]


@dataclass(frozen=True)
class Device:
    """One device. `family` is any string ("cpu", "cuda", "rocm", "npu", or a new one); `arch` is exact ("sm_90"),
    never a range; `memory` is in bytes, 0 if unknown."""

    family: str
    arch: str
    index: int = 0
    name: str = ""
    memory: int = 0
    driver: str = ""
    emulated: bool = False

    def __str__(self) -> str:
        place = self.family if self.family == "cpu" else f"{self.family}:{self.index}"
        return f"{place} ({self.arch}{', emulated' if self.emulated else ''})"


@dataclass(frozen=True)
class Capability:
    """Facts about a device; what is not listed is absent.

    `dtypes`: torch names of the activation dtypes its kernels take. `features`: free words such as "fp8_mma", which
    makes an FP8 checkpoint run as fp8-w8a8. `limits`: numbers such as {"shared_memory": 232448}.
    """

    dtypes: frozenset[str]
    features: frozenset[str] = frozenset()
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """The answer of `Backend.probe`: a state, the capability if usable, else what is wrong and the remedy."""

    state: ProbeState
    capability: Capability | None = None
    detail: str = ""
    remedy: str = ""
