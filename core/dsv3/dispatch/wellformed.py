"""Are the plain data that a plugin hands over what their types say? Nothing in Python enforces a dataclass's annotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from dsv3.errors import nearest
from dsv3.plugin import CacheSpec, Capability, Device, Kernel, KvDType, KvEncoding, Prepared, Probe
from dsv3.plugin.device import ProbeState

_DEVICE = {
    "family": str, "arch": str, "index": int, "name": str, "memory": int, "driver": str, "emulated": bool,
}  # fmt: skip
_KERNEL = {
    "op": str, "name": str, "target": str, "since": int, "needs": (tuple, list), "accepts": (str, type(None)),
    "layouts": Mapping, "priority": int, "numerics": str, "deterministic": bool, "batch_invariant": bool, "graph_safe": bool,
    "configs": (str, type(None)),
}  # fmt: skip


def _field_mistake(value: Any, types: Mapping[str, Any]) -> str | None:
    """The first field that is not of its type."""
    for name, kind in types.items():
        found = getattr(value, name, None)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            return f"a {type(value).__name__} whose {name} is {found!r}, not {wanted}"
    return None


def device_mistake(device: Any) -> str | None:
    """What is wrong with an entry of `Backend.devices`; None if nothing is."""
    if not isinstance(device, Device):
        return f"{device!r}, which is no dsv3.plugin.Device"
    return _field_mistake(device, _DEVICE)


def probe_mistake(answer: Any) -> str | None:
    """What is wrong with the answer of `Backend.probe`."""
    if not isinstance(answer, Probe):
        return f"{answer!r}, which is no dsv3.plugin.Probe"
    if mistake := _field_mistake(answer, {"state": str, "detail": str, "remedy": str}):
        return mistake
    states = get_args(ProbeState)
    if answer.state not in states:
        return f"state {answer.state!r}, which is none of {', '.join(states)}{nearest(answer.state, states)}"
    if answer.state == "usable" and not isinstance(answer.capability, Capability):
        return f"usable, with capability {answer.capability!r}"
    if isinstance(answer.capability, Capability):
        sets = (frozenset, set)
        return _field_mistake(answer.capability, {"dtypes": sets, "features": sets, "limits": Mapping})
    return None


def kernel_mistake(kernel: Any) -> str | None:
    """What is wrong with the types of an entry of `Backend.kernels`."""
    if not isinstance(kernel, Kernel):
        return f"is {type(kernel).__name__}, not a dsv3.plugin.Kernel"
    mistake = _field_mistake(kernel, _KERNEL)
    return f"is {mistake}" if mistake else None


def cache_spec_mistake(spec: Any) -> str | None:
    """What is wrong with the answer of `Backend.cache_spec`."""
    if not isinstance(spec, CacheSpec):
        return f"{spec!r}, which is no dsv3.plugin.CacheSpec"
    if not isinstance(spec.page_size, int) or isinstance(spec.page_size, bool) or not 1 <= spec.page_size <= 1 << 20:
        return f"page_size {spec.page_size!r}, which is no positive number of tokens"
    if spec.kv_dtype not in get_args(KvDType):
        return f"kv_dtype {spec.kv_dtype!r}, which is none of {', '.join(get_args(KvDType))}"
    if spec.encoding not in get_args(KvEncoding):
        return f"encoding {spec.encoding!r}, which is none of {', '.join(get_args(KvEncoding))}"
    return None


def prepared_mistake(prepared: Any, original: Prepared, layout: str) -> str | None:
    """What is wrong with the answer of `Backend.prepare`."""
    if not isinstance(prepared, Prepared):
        return f"{type(prepared).__name__}, which is no dsv3.plugin.Prepared"
    if prepared.layout != layout:
        return f"layout {prepared.layout!r}"
    for name in ("shape", "quant", "scale_fmt"):
        if getattr(prepared, name) != getattr(original, name):
            return f"{name} {getattr(prepared, name)!r}, where {getattr(original, name)!r} went in"
    if not isinstance(prepared.tensors, Mapping) or not prepared.tensors:
        return "a weight without tensors"
    return None
