"""Execution providers as devices. One row per provider: everything that differs between them is here.

Only the rows of the CPU and of OpenVINO on a CPU have been run by the authors; the others follow ONNX Runtime's documentation.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv3.plugin import Capability, Device, Probe

# What every kernel takes; it computes in float32 either way.
DTYPES = frozenset({"float32", "bfloat16"})
_MISSING = Device("cpu", "ort-missing", name="ONNX Runtime is not installed")


@dataclass(frozen=True)
class Provider:
    """An execution provider. memory: what ONNX Runtime calls the memory that torch's tensors lie in, so that they are
    bound where they are; None where it has no name for it, and tensors go through host memory. options: in the provider's
    own words, so that float32 means float32. ops, schemes: what it gets right; None is everything."""

    key: str
    provider: str
    family: str
    arch: str
    index: int = 0
    memory: str | None = "cpu"
    options: Mapping[str, str] = field(default_factory=dict)
    remedy: str = ""
    ops: frozenset[str] | None = None
    schemes: tuple[str, ...] | None = None


_OPENVINO = "OpenVINOExecutionProvider"
# Found by running the plugin's tests on it (1.24.1). Its FP8 casts, TopK, Where under NaN, Scan and int4 grouping give other
# results, or no model at all.
_OPENVINO_RIGHT: dict[str, Any] = {
    "ops": frozenset(
        {
            "embedding", "rms_norm", "add_rms_norm", "apply_rope", "silu_mul",
            "linear", "quant_linear", "bmm", "router_gemm", "mtp_combine",
        }
    ),
    "schemes": ("none", "fp8-w8a16", "int8-w8a16"),
}  # fmt: skip
# Accelerators first: the first usable device is the default.
PROVIDERS: Mapping[str, Provider] = {
    p.key: p
    for p in (
        Provider(
            "cuda", "CUDAExecutionProvider", "cuda", "ort-cuda", memory="cuda",
            options={"use_tf32": "0"}, remedy="install a build of torch for CUDA, or use --device cpu",
        ),
        Provider(
            "rocm", "MIGraphXExecutionProvider", "rocm", "ort-migraphx", memory=None,
            remedy="install a build of torch for ROCm, or use --device cpu",
        ),
        Provider(
            "cann", "CANNExecutionProvider", "npu", "ort-cann", memory="cann",
            options={"precision_mode": "must_keep_origin_dtype"}, remedy="install torch_npu, or use --device cpu",
        ),
        Provider(
            "openvino_gpu", _OPENVINO, "openvino-gpu", "ort-openvino-gpu",
            options={"device_type": "GPU", "precision": "ACCURACY"}, **_OPENVINO_RIGHT,
        ),
        Provider(
            "openvino_npu", _OPENVINO, "openvino-npu", "ort-openvino-npu",
            options={"device_type": "NPU", "precision": "ACCURACY"}, **_OPENVINO_RIGHT,
        ),
        Provider("cpu", "CPUExecutionProvider", "cpu", ""),
        Provider(
            "openvino", _OPENVINO, "cpu", "ort-openvino", index=1,
            options={"device_type": "CPU", "precision": "ACCURACY"}, **_OPENVINO_RIGHT,
        ),
    )
}  # fmt: skip


def provider_of(device: Device) -> Provider:
    """The provider behind a device that `devices` listed."""
    for p in PROVIDERS.values():
        if p.family == device.family and (device.family != "cpu" or p.index == device.index):
            return p
    raise ValueError(f"{device} is no device of backend 'onnxruntime'")


def devices() -> list[Device]:
    """One device per provider of the installed ONNX Runtime; without ONNX Runtime one that says so when probed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return [_MISSING]
    import onnxruntime

    present = set(onnxruntime.get_available_providers())
    found = []
    for p in PROVIDERS.values():
        if p.provider in present and (p.provider != _OPENVINO or p.options["device_type"] in _openvino_devices()):
            name = f"{p.provider.removesuffix('ExecutionProvider')} of ONNX Runtime {onnxruntime.__version__}"
            found.append(Device(p.family, _arch(p), index=p.index, name=name, driver=_driver(p)))
    return found


def _openvino_devices() -> list[str]:
    import onnxruntime.capi._pybind_state as state

    listed = getattr(state, "get_available_openvino_device_ids", lambda: ["CPU"])()
    return [str(name).partition(".")[0] for name in listed]


def _arch(p: Provider) -> str:
    """The exact architecture where torch or the platform knows it, else the provider's name."""
    if p.key == "cpu":
        return platform.machine() or "ort-cpu"
    if p.family in ("cuda", "rocm") and _accelerator(p) is None:
        import torch

        facts: Any = torch.cuda.get_device_properties(p.index)
        if p.family == "rocm":
            return str(facts.gcnArchName).partition(":")[0]
        return f"sm_{facts.major}{facts.minor}"
    return p.arch


def _driver(p: Provider) -> str:
    if p.family in ("cuda", "rocm"):
        import torch

        return str(torch.version.cuda or torch.version.hip or "")
    return ""


def _accelerator(p: Provider) -> Probe | None:
    """None if torch can hold tensors on the provider's device, else what is wrong."""
    if p.family in ("cuda", "rocm"):
        import torch

        built = torch.version.hip if p.family == "rocm" else torch.version.cuda
        if not built:
            return Probe("incompatible", detail=f"this torch is not built for {p.family}", remedy=p.remedy)
        if torch.cuda.device_count() <= p.index:
            return Probe("no-device", detail=f"torch finds no {p.family} device {p.index}", remedy=p.remedy)
        if not torch.cuda.is_available():
            return Probe("driver", detail=f"torch cannot use {p.family}", remedy="check the driver's version")
    elif p.family == "npu" and importlib.util.find_spec("torch_npu") is None:
        return Probe("incompatible", detail="torch_npu is not installed: torch has no memory on the NPU", remedy=p.remedy)
    return None


def probe(device: Device) -> Probe:
    """Usable, or why not and what to do; makes no session."""
    if device == _MISSING:
        return Probe(
            "driver",
            detail="the module onnxruntime is not installed",
            remedy="pip install onnxruntime (or onnxruntime-gpu, onnxruntime-openvino, ... for an accelerator)",
        )
    if importlib.util.find_spec("onnx") is None:
        return Probe("driver", detail="the module onnx, which builds the models, is not installed", remedy="pip install onnx")
    p = provider_of(device)
    import onnxruntime

    if p.provider not in onnxruntime.get_available_providers():
        detail = f"the installed ONNX Runtime {onnxruntime.__version__} has no {p.provider}"
        return Probe("incompatible", detail=detail, remedy="install the package of ONNX Runtime built for it")
    return _accelerator(p) or Probe("usable", Capability(dtypes=DTYPES))
