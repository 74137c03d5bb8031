"""What a measurement depends on: the call, the device, the kernel's code, the versions of what runs it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3.dispatch.choose import Source
from dsv3.dispatch.configs import Config, config_table
from dsv3.dispatch.guard import CALL_LIMIT_S, guarded
from dsv3.dispatch.site import Example
from dsv3.plugin import Kernel

_UNITS = ("compute_units", "multi_processor_count", "cores")
_TRITON = ("triton", "pytorch-triton-rocm", "pytorch-triton", "triton-ascend")


def describe(example: Example) -> dict[str, Any]:
    """The call without its number of tokens: sizes that follow it are written as in "8*T"."""
    dims: dict[str, int | str] = {}
    for name, base in example.base.items():
        slope = example.slope[name]
        if slope:
            dims[name] = ("T" if slope == 1 else f"{slope}*T") + (f"{base:+d}" if base else "")
        else:
            dims[name] = base
    return {"op": example.op, "dims": dims, "dtypes": dict(example.dtypes), "quant": example.quant}


def call_id(description: Mapping[str, Any]) -> str:
    """Equal for equal calls."""
    return json.dumps({name: description.get(name) for name in ("op", "dims", "dtypes", "quant")}, sort_keys=True)


def device_id(source: Source) -> dict[str, Any]:
    """What kind of device, exactly."""
    device = source.device
    return {"family": device.family, "arch": device.arch, "emulated": device.emulated}


class Conditions:
    """The circumstances under which a source's kernels run now."""

    def __init__(self, source: Source) -> None:
        self.source = source
        limits = source.capability.limits
        units = next((int(limits[name]) for name in _UNITS if name in limits), None)
        versions = {
            "torch": _version("torch"),
            "triton": next(filter(None, map(_version, _TRITON)), None),
            "driver": source.device.driver or None,
            "backend": source.backend.version,
        }
        self._device = {"memory": source.device.memory, "compute_units": units, "versions": versions}
        self._files: dict[str, str | None] = {}

    def of(self, kernel: Kernel) -> dict[str, Any]:
        """Memory, compute units, versions, hash of the kernel's file and table, layouts it reads."""
        return {**self._device, "source": self._source(kernel), "layouts": dict(kernel.layouts)}

    def _source(self, kernel: Kernel) -> str | None:
        module = kernel.target.partition(":")[0]
        if module not in self._files:
            self._files[module] = _file_hash(module)
        code = self._files[module]
        table = config_table(kernel, self.source.name)
        return code if table is None or code is None else f"{code}+{table.sha256}"


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first condition that is not what it was, with both values; None if all are."""
    for name, value in now.items():
        found = then.get(name)
        if name == "versions" and isinstance(found, dict):
            for what, version in value.items():
                if found.get(what) != version:
                    return f"{what} version was {found.get(what)}, is {version}"
        elif found != value:
            return "the kernel's source changed" if name == "source" else f"{name} was {found}, is {value}"
    return None


def config_id(config: Config | None) -> str:
    """Equal for equal configurations."""
    return json.dumps(None if config is None else dict(config), sort_keys=True)


def _file_hash(module: str) -> str | None:
    """SHA-256 of the module's file, which is not imported; None if there is no such file."""

    def read() -> str | None:
        found = importlib.util.find_spec(module)
        if found is None or not found.origin or not Path(found.origin).is_file():
            return None
        return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()

    return guarded(read, CALL_LIMIT_S * 5).value  # it imports the package around the module, which is somebody else's


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
