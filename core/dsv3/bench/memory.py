"""What this process holds in memory, as the kernel of Linux counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _field(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def peak() -> int | None:
    """Bytes: the most that was ever resident, mapped files among it, since the last `reset_peak`; None where not told."""
    return _field("VmHWM")


def anonymous() -> int | None:
    """Bytes that no file backs: what the process needs for itself. None where not told."""
    return _field("RssAnon")


def resident() -> int | None:
    """Bytes in memory now, mapped files among them; None where not told."""
    return _field("VmRSS")


def available() -> int:
    """Bytes that can be had without swapping; 4 GB where it is not told."""
    path = Path("/proc/meminfo")
    if path.exists():
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 << 30


def reset_peak() -> bool:
    """Let `peak` begin again at what is resident now; False where that cannot be done (then it counts from the start)."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


class Watch:
    """The peak from when it was made, but for what happens `aside`."""

    def __init__(self) -> None:
        self.notes = [] if reset_peak() else ["peak memory counts from the process's start, and the ceilings' buffer in"]
        self._before = 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is allocated and freed inside does not count."""
        self._before = max(self._before, peak() or 0)
        yield
        reset_peak()

    def peak(self) -> int | None:
        """Bytes; None where not told."""
        now = peak()
        return None if now is None else max(self._before, now)
