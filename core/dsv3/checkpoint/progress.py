"""Progress of long work on stderr: a bar on a terminal, a plain line every few seconds elsewhere, nothing if asked to
be quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_EVERY_S = 2.0
Advance = Callable[[int], None]


@contextmanager
def bytes_progress(what: str, total: int, show: bool | None = None) -> Iterator[Advance]:
    """Yields a function to call with the number of bytes just done. show: None means on a terminal only; True also
    elsewhere, where a line appears every few seconds."""
    with _counted(what, total, show, "MB", 1e6) as advance:
        yield advance


@contextmanager
def tokens_progress(what: str, total: int, show: bool | None = None) -> Iterator[Advance]:
    """Yields a function to call with the number of tokens just done. show: as in `bytes_progress`."""
    with _counted(what, total, show, "tokens", 1.0) as advance:
        yield advance


@contextmanager
def _counted(what: str, total: int, show: bool | None, unit: str, per: float) -> Iterator[Advance]:
    if show is False or (show is None and not sys.stderr.isatty()):
        yield lambda n: None
    elif sys.stderr.isatty():
        with _bar(what, total, unit) as advance:
            yield advance
    else:
        yield _Lines(what, total, unit, per)


@contextmanager
def steps_progress(what: str, total: int, show: bool | None = None) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with what the next of `total` steps is. show: as in `bytes_progress`."""
    if show is False or (show is None and not sys.stderr.isatty()):
        yield lambda text: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=total, completed=-1)
            yield lambda text: progress.update(task, advance=1, description=text)
    else:
        yield _StepLines(what, total)


class _StepLines:
    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.last = time.perf_counter()

    def __call__(self, text: str) -> None:
        self.done += 1
        now = time.perf_counter()
        if now - self.last >= _LINE_EVERY_S:
            self.last = now
            print(f"{self.what}: {self.done} of {self.total}: {text}", file=sys.stderr)


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Advance]:
    from rich import progress as rich
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    counts = (
        (rich.DownloadColumn(), rich.TransferSpeedColumn()) if unit == "MB" else (rich.MofNCompleteColumn(), TextColumn(unit))
    )
    columns = (TextColumn(what), rich.BarColumn(), *counts, TextColumn("eta"), rich.TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)


class _Lines:
    def __init__(self, what: str, total: int, unit: str, per: float) -> None:
        self.what, self.total, self.done, self.unit, self.per = what, total, 0, unit, per
        self.start = self.last = time.perf_counter()

    def __call__(self, n: int) -> None:
        self.done += n
        now = time.perf_counter()
        if now - self.last < _LINE_EVERY_S:
            return
        self.last = now
        rate = self.done / (now - self.start)
        eta = (self.total - self.done) / rate if rate else 0.0
        done, total, speed = (f"{n / self.per:,.0f}" for n in (self.done, self.total, rate))
        print(f"{self.what}: {done} of {total} {self.unit}, {speed} {self.unit}/s, eta {eta:.0f} s", file=sys.stderr)
