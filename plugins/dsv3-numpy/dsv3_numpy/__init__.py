"""An example backend: claims a few operators and a weight layout of its own. Importing it costs nothing."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable

from dsv3.plugin import BackendBase, Capability, Device, DType, Kernel, Prepared, Probe, Scheme

TRANSPOSED = "kn"  # [K, N] instead of [N, K]
_FLOAT32 = DType("x", "float32")


class NumpyBackend(BackendBase):
    name = "numpy"
    version = "0.1.0"

    def devices(self, emulate: str | None = None) -> list[Device]:
        return [] if emulate else [Device("cpu", platform.machine() or "unknown", name="NumPy")]

    def probe(self, device: Device) -> Probe:
        return Probe("usable", Capability(dtypes=frozenset({"float32"})))

    def kernels(self, device: Device) -> Iterable[Kernel]:
        return [
            Kernel("rms_norm", "mean_square", "dsv3_numpy.kernels:rms_norm", needs=(_FLOAT32,)),
            Kernel("silu_mul", "elementwise", "dsv3_numpy.kernels:silu_mul", needs=(_FLOAT32,)),
            Kernel("router_gemm", "matmul", "dsv3_numpy.kernels:router_gemm", needs=(_FLOAT32,)),
            Kernel("moe_permute", "argsort", "dsv3_numpy.kernels:moe_permute", numerics="exact"),
            Kernel(
                "quant_linear",
                "transposed_matmul",
                "dsv3_numpy.kernels:quant_linear",
                needs=(_FLOAT32, Scheme("none")),
                layouts={"w": TRANSPOSED},
            ),
        ]

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        if layout != TRANSPOSED:
            return super().prepare(weight, layout, device)
        turned = {"weight": weight.tensors["weight"].T.contiguous()}
        return dataclasses.replace(weight, layout=layout, tensors=turned)

    def unprepare(self, weight: Prepared) -> Prepared:
        if weight.layout != TRANSPOSED:
            return super().unprepare(weight)
        turned = {"weight": weight.tensors["weight"].T.contiguous()}
        return dataclasses.replace(weight, layout="canonical", tensors=turned)


backend = NumpyBackend()
