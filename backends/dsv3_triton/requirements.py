"""Whether Triton is here and new enough, found out without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

from dsv3.plugin import Probe

OLDEST = (3, 6)
# ROCm builds of torch bring Triton as a distribution of another name, importable under the same.
_DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton")


def triton_problem(remedy: str) -> Probe | None:
    """None if Triton can be imported and is not too old; else the answer that a probe gives. remedy: how to install it."""
    wanted = ".".join(map(str, OLDEST))
    if importlib.util.find_spec("triton") is None:
        return Probe("incompatible", detail="the package triton is not installed", remedy=remedy)
    found = _version()
    if found and tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST:
        return Probe("incompatible", detail=f"triton {found} is too old; these kernels need {wanted}", remedy=remedy)
    return None


def _version() -> str:
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
