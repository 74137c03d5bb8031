"""What each architecture has: the facts that kernels, tables and probes go by. Importing it costs neither torch nor triton.

Sources: CUDA programming guide, compute capabilities; AMD CDNA 2, 3 and 4 instruction set references.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv3.plugin import Capability, KvEncoding

_KIB = 1024


@dataclass(frozen=True)
class Facts:
    """One architecture. fp8: the encoding that its matrix units and conversions take, "" if it has none; shared_memory: bytes
    that one program may use (LDS on AMD); warp: lanes; matrix: the matrix instructions that kernels aim for."""

    arch: str
    vendor: Literal["nvidia", "amd"]
    title: str
    fp8: KvEncoding | Literal[""]
    shared_memory: int
    warp: int
    matrix: str

    @property
    def features(self) -> frozenset[str]:
        """Words for `Feature`: "fp8_mma" makes an FP8 checkpoint run as fp8-w8a8."""
        return frozenset({"bf16_mma", "int8_mma", self.matrix}) | (frozenset({"fp8_mma"}) if self.fp8 else frozenset())

    @property
    def capability(self) -> Capability:
        dtypes = {"bfloat16", "float32", "int8"} | ({self.fp8} if self.fp8 else set())
        return Capability(frozenset(dtypes), self.features, {"shared_memory": self.shared_memory, "warp": self.warp})


_OCP: KvEncoding = "float8_e4m3fn"
_FNUZ: KvEncoding = "float8_e4m3fnuz"
_ALL = (
    Facts("sm_80", "nvidia", "Ampere, A100", "", 163 * _KIB, 32, "mma"),
    Facts("sm_86", "nvidia", "Ampere, RTX 30 and A10", "", 99 * _KIB, 32, "mma"),
    Facts("sm_89", "nvidia", "Ada, RTX 40 and L40", _OCP, 99 * _KIB, 32, "mma"),
    Facts("sm_90", "nvidia", "Hopper, H100 and H200", _OCP, 227 * _KIB, 32, "wgmma"),
    Facts("sm_100", "nvidia", "Blackwell, B200", _OCP, 227 * _KIB, 32, "tcgen05"),
    Facts("sm_120", "nvidia", "Blackwell, RTX 50", _OCP, 99 * _KIB, 32, "mma"),
    Facts("gfx90a", "amd", "CDNA 2, MI200", "", 64 * _KIB, 64, "mfma"),
    Facts("gfx942", "amd", "CDNA 3, MI300", _FNUZ, 64 * _KIB, 64, "mfma"),
    Facts("gfx950", "amd", "CDNA 4, MI350", _OCP, 160 * _KIB, 64, "mfma"),
)
ARCHITECTURES: dict[str, Facts] = {facts.arch: facts for facts in _ALL}


def of_vendor(vendor: str) -> list[str]:
    """The architectures of "nvidia" or "amd", oldest first."""
    return [facts.arch for facts in _ALL if facts.vendor == vendor]
