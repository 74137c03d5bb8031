"""Memory for weights on the CPU: anonymous, in pages of 2 MiB where the system grants them.

Large pages need fewer translations, which few-row products, reading every weight once, are bound by, and far fewer faults
while loading. The memory is zero, and is the process's own only as it is written: nothing is held for what is never filled.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LARGE_PAGE = 2 << 20
_WORTH_LARGE = 2 * LARGE_PAGE  # of smaller tensors too much would be lost to alignment
_ROLLUP = Path("/proc/self/smaps_rollup")


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros for a weight; on other devices than the CPU, and where it is small, torch's own."""
    count = int(np.prod(shape, dtype=np.int64))
    size = count * dtype.itemsize
    if device.type != "cpu" or size < _WORTH_LARGE or sys.platform != "linux":
        return torch.zeros(shape, dtype=dtype, device=device)
    held = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = np.frombuffer(held, np.uint8)
    start = -raw.ctypes.data % LARGE_PAGE
    with contextlib.suppress(AttributeError, OSError):  # a kernel without them: small pages are as right, and slower
        held.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)


def large_pages() -> tuple[int, int] | None:
    """(bytes in large pages, bytes of anonymous memory in all) of this process, as the kernel counts them; None where it does
    not say."""
    try:
        lines = dict(line.split(":", 1) for line in _ROLLUP.read_text().splitlines()[1:] if ":" in line)
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("AnonHugePages", "Anonymous"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError, IndexError):
        return None
