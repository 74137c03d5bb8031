"""Progress of tuning on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_EVERY_S = 2.0
Watch = Callable[[str, int, int, float], None]
Warn = Callable[[str], None]


@contextmanager
def watching() -> Iterator[tuple[Watch, Warn]]:
    """Yields (what to call before each measurement: text, done, total, seconds left; what to call with a warning)."""
    if not sys.stderr.isatty():
        yield _Lines(), _plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[left]:.0f} s left"),
               TextColumn("{task.description}", markup=False))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None, left=0.0)

        def watch(text: str, done: int, total: int, left: float) -> None:
            progress.update(bar, description=text, completed=done, total=total, left=left)

        def warn(text: str) -> None:
            progress.console.print(f"dsv3: {text}", style="bold red", markup=False, highlight=False)

        yield watch, warn


def _plain(text: str) -> None:
    print(f"dsv3: {text}", file=sys.stderr)


class _Lines:
    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, text: str, done: int, total: int, left: float) -> None:
        now = time.monotonic()
        if now - self.last >= _LINE_EVERY_S:
            self.last = now
            print(f"dsv3: tuning {done} of {total}, {left:.0f} s left: {text}", file=sys.stderr)
