"""NPUs through torch_npu, and what stands in the way where there are none."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dsv3.plugin import Device, Probe
from dsv3_ascend.soc import arch_of

_EMULATE = "run with exact INT8 arithmetic on the CPU with --emulate, or take --backend reference"
_NODES = Path("/dev")
_PCI = Path("/sys/bus/pci/devices")
_VENDOR = "0x19e5"
_ACCELERATOR = "0x12"
_SET_ENV = "source set_env.sh of the CANN toolkit (ASCEND_HOME_PATH must be set), in the version that torch_npu was built for"


def torch_npu() -> Any:
    """The vendor's module; ImportError or OSError where it or CANN is missing. Importing it tells torch of the device "npu"."""
    import torch_npu

    return torch_npu


def devices() -> list[Device]:
    """The NPUs that torch_npu sees; an unknown SoC has its own name as architecture, so that its probe can say it."""
    if importlib.util.find_spec("torch_npu") is None:
        return []
    try:
        npu = torch_npu().npu
        count = npu.device_count() if npu.is_available() else 0
    except (ImportError, OSError, RuntimeError):  # `absence` says which
        return []
    found = []
    for index in range(count):
        soc = str(npu.get_device_name(index))
        memory = int(npu.get_device_properties(index).total_memory)
        found.append(Device("npu", arch_of(soc) or soc, index, soc, memory, driver=_cann(npu)))
    return found


def _cann(npu: Any) -> str:
    try:
        return f"CANN {npu.utils.get_cann_version()}"
    except (AttributeError, RuntimeError, OSError):  # a matter of the report only
        return ""


def absence() -> Probe:
    """Why there are no devices: no NPU, its driver, torch_npu, CANN, or what this process is shown."""
    nodes = any(_NODES.glob("davinci[0-9]*"))
    if not nodes and not _plugged_in():
        return Probe("no-device", detail="no Ascend NPU on this machine", remedy=_EMULATE)
    if not nodes:
        return Probe(
            "driver",
            detail="there is an Ascend NPU, but its driver is not loaded: /dev/davinci0 is missing",
            remedy="install the NPU driver and firmware; in a container, pass --device /dev/davinci0 and /dev/davinci_manager",
        )
    if importlib.util.find_spec("torch_npu") is None:
        import torch

        return Probe(
            "incompatible",
            detail="there is an Ascend NPU, but the package torch_npu is not installed",
            remedy=f"pip install the torch-npu that was built for torch {torch.__version__.partition('+')[0]}, and CANN",
        )
    return _from_import()


def _from_import() -> Probe:
    """What goes wrong between torch_npu and the device."""
    try:
        npu = torch_npu().npu
    except (ImportError, OSError, RuntimeError) as error:
        return _import_failed(str(error).splitlines()[0] if str(error) else type(error).__name__)
    try:
        npu.init()
        count = npu.device_count()
    except (RuntimeError, OSError) as error:
        return Probe(
            "driver",
            detail=f"the NPU driver does not work with this CANN: {str(error).splitlines()[0]}",
            remedy="see whether npu-smi info works; the driver must be as new as CANN asks for",
        )
    seen = f"{count} of its NPUs, and torch_npu says they cannot be used" if count else "no NPU"
    return Probe(
        "no-device",
        detail=f"the NPU driver works, but shows this process {seen}",
        remedy="look at ASCEND_RT_VISIBLE_DEVICES, and at the container's devices",
    )


def _import_failed(reason: str) -> Probe:
    if "undefined symbol" in reason:
        return Probe(
            "incompatible",
            detail=f"torch_npu was built for another torch or CANN: {reason}",
            remedy="install torch and torch-npu of the same version",
        )
    if "cannot open shared object" in reason or "ASCEND" in reason.upper():
        return Probe("driver", detail=f"CANN is missing or broken: torch_npu does not import: {reason}", remedy=_SET_ENV)
    remedy = "python -c 'import torch_npu' shows the whole error"
    return Probe("error", detail=f"torch_npu does not import: {reason}", remedy=remedy)


def _plugged_in() -> bool:
    for device in _PCI.glob("*"):
        try:
            kind, maker = (device / "class").read_text(), (device / "vendor").read_text()
        except OSError:
            continue
        if maker.strip() == _VENDOR and kind.startswith(_ACCELERATOR):
            return True
    return False
