"""The processor that kernels are compiled for, known without numba: its vectors, and what tells caches of code apart."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm


def has(feature: str) -> bool:
    """Whether kernels may use instructions of this name ("avx512f"): on this processor, unless numba is told otherwise."""
    if features := os.environ.get("NUMBA_CPU_FEATURES"):
        return f"+{feature}" in features.split(",")
    if (name := os.environ.get("NUMBA_CPU_NAME")) and llvm.get_host_cpu_name() != name:
        return False
    return bool(llvm.get_host_cpu_features().get(feature, False))


# Instructions that kernels are compiled for where they are to run on other processors than the one that compiles them, by the
# name that LLVM knows most of them by; the first that a processor has all of is its level.
_V3 = ("sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe", "xsave", "cx16")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni")
LEVELS = {"x86-64-v4": _V4, "x86-64-v3": _V3}
# Settings of numba that leave machine code as it is.
_HARMLESS = ("NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER")

LANES = 16 if has("avx512f") else 8  # float32 numbers to a vector register


def level() -> str | None:
    """Which of LEVELS kernels made elsewhere may be of: None if of none, or if numba is told what to compile for."""
    if platform.machine().lower() not in ("x86_64", "amd64") or _settings():
        return None
    there = llvm.get_host_cpu_features()
    return next((name for name, needed in LEVELS.items() if all(there.get(feature, False) for feature in needed)), None)


def fingerprint() -> str:
    """Of all that machine code depends on: this package's sources, numba and LLVM, the processor, and numba's settings."""
    about = [
        version("numba"), llvmlite.__version__, platform.machine(), llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(), *_settings(),
    ]  # fmt: skip
    return hashlib.sha256(sources() + "\n".join(about).encode()).hexdigest()[:16]


@functools.cache
def sources() -> bytes:
    """The sha256 of this package's sources."""
    found = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in found)).digest()


def _settings() -> list[str]:
    return sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("NUMBA_") and k not in _HARMLESS)
