"""Which kernels there are for an architecture, as metadata: one module per family. Imports neither torch nor triton."""

from __future__ import annotations

from dsv3.plugin import Kernel
from dsv3_triton.catalogue import attention, cache, ends, experts, linear, norm, quantize, routing
from dsv3_triton.facts import Facts

_FAMILIES = (attention, cache, ends, experts, linear, norm, quantize, routing)


def kernels(facts: Facts) -> list[Kernel]:
    """All kernels for the architecture."""
    return [kernel for family in _FAMILIES for kernel in family.kernels(facts)]
