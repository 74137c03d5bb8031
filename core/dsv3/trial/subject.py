"""The backend under test, and what the checks have learnt about it so far."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from dsv3.dispatch.guard import CALL_LIMIT_S, Outcome, guarded
from dsv3.plugin import Backend, Device, Kernel, Probe

if TYPE_CHECKING:
    from dsv3.dispatch.choose import Source

T = TypeVar("T")


class Ear:
    """Hears what is printed: to the file behind standard output, where a process of our own has one (C libraries
    included), else to a buffer that takes the place of `sys.stdout`."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._end = 0
        self.stream: TextIO = io.StringIO() if path is None else sys.stdout

    def heard(self) -> str:
        """What was printed since the last time."""
        if isinstance(self.stream, io.StringIO):
            whole = self.stream.getvalue()
        else:
            self.stream.flush()
            assert self._path is not None
            whole = self._path.read_text(encoding="utf-8", errors="replace")
        new, self._end = whole[self._end :], len(whole)
        return new


@dataclass
class Subject:
    """limit_s: for each call of devices and probe. device: the one whose kernels are checked; `missing` says why there is
    none. source: the backend on that device, if it is usable. hangs: listing kernels does."""

    backend: Backend
    origin: str
    emulate: str | None
    ear: Ear
    limit_s: float = CALL_LIMIT_S
    devices: list[Device] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    device: Device | None = None
    source: Source | None = None
    kernels: list[Kernel] | None = None
    missing: str = ""
    hangs: bool = False

    def ask(self, call: Callable[[], T], limit_s: float | None = None) -> Outcome[T]:
        """Run the backend's code guarded."""
        return guarded(call, self.limit_s if limit_s is None else limit_s, self.ear.stream)


def quoted(text: str, most: int = 60) -> str:
    """Its first line, in quotes."""
    line = text.strip().partition("\n")[0]
    return repr(line if len(line) <= most else line[: most - 2] + "..")
