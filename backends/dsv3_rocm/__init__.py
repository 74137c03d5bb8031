"""AMD GPUs: `dsv3_triton`'s kernels, with FP8 as e4m3fnuz on gfx942 and as e4m3fn on gfx950."""

from __future__ import annotations

from dsv3.plugin import Device, Probe
from dsv3_triton.backend import TritonBackend

# Instinct generations before the first that is supported.
_OLDER = ("gfx900", "gfx906", "gfx908")


class RocmBackend(TritonBackend):
    name = "rocm"
    vendor = "amd"
    default_arch = "gfx942"
    install_triton = "install a ROCm build of torch, which brings its Triton; for --emulate, pip install 'triton>=3.6'"
    oldest = "gfx90a (CDNA 2) or newer"

    def present(self) -> list[Device]:
        from dsv3_rocm.driver import devices

        return devices()

    def absence(self) -> Probe:
        from dsv3_rocm.driver import absence

        return absence()

    def too_old(self, arch: str) -> bool:
        return arch in _OLDER


backend = RocmBackend()
