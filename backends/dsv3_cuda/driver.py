"""NVIDIA devices through torch, and what stands in the way where there are none."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3.plugin import Device, Probe
from dsv3_triton.bus import on_bus

_EMULATE = "run the kernels in Triton's interpreter with --emulate (slow), or take --backend reference"
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_PCI = Path("/sys/bus/pci/devices")
_VENDOR = "0x10de"


def devices() -> list[Device]:
    """The devices that a CUDA build of torch sees."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = f"sm_{properties.major}{properties.minor}"
        found.append(Device("cuda", arch, index, properties.name, properties.total_memory, driver=f"CUDA {torch.version.cuda}"))
    return found


def absence() -> Probe:
    """Why torch sees none: no device, a driver at fault, or a torch that was built without CUDA."""
    hardware = on_bus(_PCI, _VENDOR)
    if torch.version.cuda is None:
        if hardware or _DRIVER_VERSION.exists():
            return Probe(
                "incompatible",
                detail=f"there is an NVIDIA GPU, but torch {torch.__version__} is built without CUDA",
                remedy="install a CUDA build of torch (pip install 'torch>=2.10'), in this environment",
            )
        return Probe("no-device", detail="no NVIDIA GPU on this machine", remedy=_EMULATE)
    if not hardware and not _DRIVER_VERSION.exists():
        return Probe("no-device", detail="no NVIDIA GPU on this machine", remedy=_EMULATE)
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return Probe(
            "driver",
            detail=f"the NVIDIA driver does not work with CUDA {torch.version.cuda} of torch: {reason}",
            remedy="see whether nvidia-smi works; install a newer driver, or an older CUDA build of torch",
        )
    return Probe(
        "no-device",
        detail="the NVIDIA driver works, but shows this process no GPU",
        remedy="look at CUDA_VISIBLE_DEVICES, and at the container's --gpus",
    )
