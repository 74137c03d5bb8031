"""What is known of the processor without torch and without numba: its name and the instructions that kernels ask for."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_ARM = ("aarch64", "arm64")
# Words of the kernel's own for what the features below need, on x86 and on Arm.
_HALF = frozenset({"f16c", "fphp"})
_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_INT8 = frozenset({"avx512_vnni", "amx_int8"})


@functools.cache
def described() -> tuple[str, frozenset[str]]:
    """(name, instruction words) of the first processor, as Linux lists them; elsewhere the platform's name, and no words."""
    name, words = platform.processor() or platform.machine() or "unknown", frozenset[str]()
    try:
        lines = _CPUINFO.read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return name, words
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            words = frozenset(value.split())
    return name, words


@functools.cache
def features() -> frozenset[str]:
    """What kernels ask for, or choose by.

    "half": float16 becomes float32 in one instruction, which FP8 codes are decoded by. "bf16_mm", "int8_mm": instructions for
    products of bfloat16 and of INT8, without which torch's are slower than float32 (here INT8 by a factor of 10).
    """
    _, words = described()
    # Every 64-bit Arm converts float16. Where no words are listed, x86 has F16C if it is of 2013 or later.
    half = platform.machine() in _ARM or not words or bool(words & _HALF)
    found = {"half": half, "bf16_mm": bool(words & _BF16), "int8_mm": bool(words & _INT8)}
    return frozenset(name for name, has in found.items() if has)


def memory() -> int:
    """Bytes of main memory, 0 if the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
