"""What this backend claims. Importing it must cost nothing: no device query, no torch, no compilation."""

from __future__ import annotations

import platform
from collections.abc import Iterable

from dsv3.plugin import BackendBase, Capability, Device, DType, Kernel, Probe


class Backend(BackendBase):
    name = "__name__"
    version = "0.1.0"  # of the package: pyproject.toml has the same

    def devices(self, emulate: str | None = None) -> list[Device]:
        """The devices present. Any family name will do; torch_device() says where their tensors live.

        This one has the CPU, and emulates nothing. For an accelerator ask its driver here; with emulate="default" answer
        one Device(..., emulated=True) if your kernels can run on the CPU in some way, so that they can be checked anywhere.
        """
        return [] if emulate else [Device("cpu", platform.machine() or "unknown")]

    def probe(self, device: Device) -> Probe:
        """What the device can do: facts only, in under 50 ms, without allocating or compiling anything.

        A device that cannot be used: Probe("driver", detail="what is wrong", remedy="what to do").
        """
        return Probe("usable", Capability(dtypes=frozenset({"float32", "bfloat16"})))

    def kernels(self, device: Device) -> Iterable[Kernel]:
        """One entry per kernel. The reference fills in for every operator that has none."""
        return [
            Kernel(
                op="rms_norm",
                name="first",
                target="__module__.kernels:rms_norm",  # imported when it is bound, not before
                needs=(DType("x", "float32", "bfloat16"),),
                numerics="f32",  # the error budget that the conformance suite holds it to
            ),
        ]


backend = Backend()
