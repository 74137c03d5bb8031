"""NVIDIA GPUs, from sm_80 on: `dsv3_triton`'s kernels, with FP8 as e4m3fn."""

from __future__ import annotations

from dsv3.plugin import Device, Probe
from dsv3_triton.backend import TritonBackend


class CudaBackend(TritonBackend):
    name = "cuda"
    vendor = "nvidia"
    default_arch = "sm_90"
    install_triton = "pip install 'triton>=3.6'; CUDA builds of torch bring their own"
    oldest = "sm_80 (Ampere) or newer"

    def present(self) -> list[Device]:
        from dsv3_cuda.driver import devices

        return devices()

    def absence(self) -> Probe:
        from dsv3_cuda.driver import absence

        return absence()

    def too_old(self, arch: str) -> bool:
        return int(arch.removeprefix("sm_")) < 80


backend = CudaBackend()
