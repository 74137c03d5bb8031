"""AMD devices through torch, and what stands in the way where there are none."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3.plugin import Device, Probe
from dsv3_triton.bus import on_bus

_EMULATE = "run the kernels in Triton's interpreter with --emulate (slow), or take --backend reference"
_KFD = Path("/dev/kfd")
_PCI = Path("/sys/bus/pci/devices")
_VENDOR = "0x1002"


def devices() -> list[Device]:
    """The devices that a ROCm build of torch sees."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = properties.gcnArchName.partition(":")[0]  # "gfx942:sramecc+:xnack-"
        found.append(Device("rocm", arch, index, properties.name, properties.total_memory, driver=f"ROCm {torch.version.hip}"))
    return found


def absence() -> Probe:
    """Why torch sees none: no device, a driver at fault, or a torch that was built without ROCm."""
    hardware = _KFD.exists() or on_bus(_PCI, _VENDOR)
    if not hardware:
        return Probe("no-device", detail="no AMD GPU on this machine", remedy=_EMULATE)
    if torch.version.hip is None:
        return Probe(
            "incompatible",
            detail=f"there is an AMD GPU, but torch {torch.__version__} is built without ROCm",
            remedy="install a ROCm build of torch in this environment",
        )
    if not _KFD.exists():
        return Probe(
            "driver",
            detail="there is an AMD GPU, but its compute driver is not loaded: /dev/kfd is missing",
            remedy="install and load amdgpu-dkms; in a container, pass --device /dev/kfd --device /dev/dri",
        )
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return Probe(
            "driver",
            detail=f"the AMD driver does not work with ROCm {torch.version.hip} of torch: {str(error).splitlines()[0]}",
            remedy="see whether rocminfo works; this user must be in the groups render and video",
        )
    return Probe(
        "no-device",
        detail="the AMD driver works, but shows this process no GPU",
        remedy="look at HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES, and at the container's devices",
    )
