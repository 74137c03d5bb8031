"""Which kernels there are for an architecture, as metadata: one module per family. Imports neither torch nor triton."""

from __future__ import annotations

from dsv3.plugin import Kernel
from dsv3_triton.catalogue import experts, linear, quantize, routing
from dsv3_triton.facts import Facts


def kernels(facts: Facts) -> list[Kernel]:
    """All kernels for the architecture."""
    return [kernel for family in (quantize, linear, routing, experts) for kernel in family.kernels(facts)]
