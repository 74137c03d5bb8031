"""Memory for weights on the CPU: anonymous, in pages of 2 MiB where the system grants them.

Large pages need fewer translations, which few-row products, reading every weight once, are bound by, and far fewer faults
while loading. The memory is zero, and is the process's own only as it is written: nothing is held for what is never filled.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LARGE_PAGE = 2 << 20
_WORTH_LARGE = 2 * LARGE_PAGE  # of smaller tensors too much would be lost to alignment
_ROLLUP = Path("/proc/self/smaps_rollup")
_NODES = Path("/sys/devices/system/node/has_memory")
_MBIND = {"x86_64": 237, "aarch64": 235}  # the number of Linux's call; Python has no name for it
_IN_TURN = 3  # MPOL_INTERLEAVE


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros for a weight; on other devices than the CPU, and where it is small, torch's own."""
    count = int(np.prod(shape, dtype=np.int64))
    size = count * dtype.itemsize
    if device.type != "cpu" or size < _WORTH_LARGE or sys.platform != "linux":
        return torch.zeros(shape, dtype=dtype, device=device)
    held = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = np.frombuffer(held, np.uint8)
    start = -raw.ctypes.data % LARGE_PAGE
    if len(nodes := memory_nodes()) > 1:
        interleave(raw.ctypes.data + start, size, nodes)
    with contextlib.suppress(AttributeError, OSError):  # a kernel without them: small pages are as right, and slower
        held.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)


@functools.cache
def memory_nodes() -> tuple[int, ...]:
    """The system's memory nodes, each near to some of its processors; one where it does not say."""
    try:
        spans = [span.partition("-") for span in _NODES.read_text().strip().split(",")]
        return tuple(n for first, _, last in spans for n in range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return (0,)


def interleave(address: int, size: int, nodes: tuple[int, ...]) -> bool:
    """Have the pages of memory that was not written yet taken from these nodes in turn; False where the system does not.

    Every thread reads rows from all over a weight: with all of it beside one node the others would wait for that one's memory.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return False
    mask = (ctypes.c_ulong * (max(nodes) // 64 + 1))()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    start, bits = address - address % mmap.PAGESIZE, 64 * len(mask) + 1
    arguments = (ctypes.c_long(number), ctypes.c_void_p(start), ctypes.c_ulong(address + size - start), ctypes.c_int(_IN_TURN))
    call = ctypes.CDLL(None, use_errno=True).syscall
    return bool(call(*arguments, mask, ctypes.c_ulong(bits), ctypes.c_uint(0)) == 0)


def large_pages() -> tuple[int, int] | None:
    """(bytes in large pages, bytes of anonymous memory in all) of this process, as the kernel counts them; None where it does
    not say."""
    try:
        lines = dict(line.split(":", 1) for line in _ROLLUP.read_text().splitlines()[1:] if ":" in line)
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("AnonHugePages", "Anonymous"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError, IndexError):
        return None
