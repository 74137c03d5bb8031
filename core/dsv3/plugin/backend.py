"""The interface a backend implements. Entry points of group `dsv3.backends.v1` name a module-level instance.

Importing that module and making the instance must cost nothing: no device query, no torch import, no compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dsv3.plugin.device import Device, Probe
from dsv3.plugin.kernel import Kernel
from dsv3.plugin.weights import CacheSpec, KvDType, Prepared

if TYPE_CHECKING:
    import torch

ENTRY_POINT_GROUP = "dsv3.backends.v1"
ABI = 1


@runtime_checkable
class Backend(Protocol):
    """What core calls. `BackendBase` gives all but name, version, devices, probe and kernels."""

    name: str
    version: str

    def devices(self, emulate: str | None = None) -> list[Device]:
        """The devices present; with `emulate` ("default" or an architecture), one emulated device, or none if the backend
        does not emulate. Guarded by core: time limit, exceptions recorded."""

    def probe(self, device: Device) -> Probe:
        """Whether the device can be used: under 50 ms, no allocation, no compilation."""

    def kernels(self, device: Device) -> Iterable[Kernel]:
        """Metadata of the kernels for this device; imports nothing."""

    def torch_device(self, device: Device) -> torch.device:
        """Where tensors for this device live."""

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        """The canonical weight in one of the layouts that the kernels name."""

    def unprepare(self, weight: Prepared) -> Prepared:
        """The exact inverse of `prepare`."""

    def cache_spec(self, device: Device, kv_dtype: KvDType) -> CacheSpec:
        """How the latent cache should be laid out. A backend that was asked for "fp8" also says in which encoding it wants the
        codes; its kernels for the cache's operators get `cache.ckv` in that dtype."""

    def synchronize(self, device: Device) -> None:
        """Wait for all work on the device."""

    def capture(self, step: Callable[[], Any], device: Device) -> Callable[[], Any] | None:
        """A replayable graph of the step, or None where there is none.

        The engine hands it decode steps whose kernels all claim `graph_safe` and have run before with the same sizes. The
        step reads buffers that keep their addresses, and returns nothing: its outputs must be where it left them after every
        replay. An exception means that the step cannot be captured: the engine says so and decodes without graphs."""


class BackendBase:
    """Defaults: canonical weights only, pages of 64 tokens, nothing to capture.

    captures_exactly: steps are captured for their very number of sequences, as a spare row costs more than another graph; else
    for powers of two, to which steps are padded.
    """

    captures_exactly = False

    def torch_device(self, device: Device) -> torch.device:
        """family:index; "rocm" is torch's cuda; emulated devices and families unknown to torch are the CPU."""
        import torch

        family = {"rocm": "cuda"}.get(device.family, device.family)
        if device.emulated or family == "cpu":
            return torch.device("cpu")
        try:
            return torch.device(family, device.index)
        except RuntimeError:  # torch's answer to a family it has never heard of
            return torch.device("cpu")

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        if layout != "canonical":
            raise ValueError(f"{type(self).__name__} cannot prepare layout {layout!r}; it has only 'canonical'")
        return weight

    def unprepare(self, weight: Prepared) -> Prepared:
        if weight.layout != "canonical":
            raise ValueError(f"{type(self).__name__} cannot undo layout {weight.layout!r}; it has only 'canonical'")
        return weight

    def cache_spec(self, device: Device, kv_dtype: KvDType) -> CacheSpec:
        return CacheSpec(page_size=64, kv_dtype=kv_dtype)

    def synchronize(self, device: Device) -> None:
        place = self.torch_device(device)
        if place.type != "cpu":
            import torch

            torch.accelerator.synchronize(place)

    def capture(self, step: Callable[[], Any], device: Device) -> Callable[[], Any] | None:
        return None
