"""The processor that kernels are compiled for, known without numba: its vectors, and what tells caches of code apart."""

from __future__ import annotations

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


LANES = 16 if has("avx512f") else 8  # float32 numbers to a vector register


def fingerprint() -> str:
    """Of all that machine code depends on: this package's sources, numba and LLVM, the processor, and numba's settings."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    settings = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("NUMBA_") and k != "NUMBA_CACHE_DIR")
    about = [
        version("numba"), llvmlite.__version__, platform.machine(), llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(), *settings,
    ]  # fmt: skip
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources) + "\n".join(about).encode()).hexdigest()[:16]
