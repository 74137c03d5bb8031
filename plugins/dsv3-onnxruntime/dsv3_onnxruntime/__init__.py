"""A backend that runs operators as small ONNX models in ONNX Runtime. Importing it costs nothing: no ONNX Runtime, no torch.

`providers` says which execution providers there are, `claims` which kernels, `kernels` what they do, `emit` the arithmetic
as ONNX nodes, `graph` and `session` how a model is built, kept and run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dsv3.plugin import BackendBase, Device, Kernel, Probe

if TYPE_CHECKING:
    import torch


class OnnxRuntimeBackend(BackendBase):
    """Canonical weight layouts and the default cache; one device per execution provider."""

    name = "onnxruntime"
    version = "0.1.0"

    def devices(self, emulate: str | None = None) -> list[Device]:
        """One device per execution provider of the installed ONNX Runtime. Emulates nothing."""
        if emulate:
            return []
        from dsv3_onnxruntime.providers import devices

        return devices()

    def probe(self, device: Device) -> Probe:
        from dsv3_onnxruntime.providers import probe

        return probe(device)

    def kernels(self, device: Device) -> Iterable[Kernel]:
        from dsv3_onnxruntime.claims import kernels

        return kernels(device)

    def torch_device(self, device: Device) -> torch.device:
        """The CPU for providers whose tensors stay in host memory (CPU, OpenVINO), whatever they compute on."""
        import torch

        from dsv3_onnxruntime.providers import provider_of

        if provider_of(device).family in ("cpu", "openvino-gpu", "openvino-npu"):
            return torch.device("cpu")
        return super().torch_device(device)


backend = OnnxRuntimeBackend()
