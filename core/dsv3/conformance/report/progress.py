"""Progress of a run on standard error: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from dsv3.conformance.report.text import one_line, plural, seconds
from dsv3.conformance.result import CaseResult

_LINE_EVERY_S = 5.0


class Progress:
    """`with Progress(total) as progress:` then `progress.start(case_id)` before a case and `progress.finish(result)` after
    each of its results, one per kernel that met it. total: how many cases are expected. A failure is named as soon as it is
    known. stream: standard error by default; show False prints nothing."""

    def __init__(
        self, total: int, *, stream: TextIO | None = None, show: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.failed, self.current = total, 0, ""
        self._met: set[str] = set()
        self.stream = sys.stderr if stream is None else stream
        self._show, self._clock = show, clock
        self._bar: Any = None
        self._task: Any = None
        self._begun = self._said = clock()

    def __enter__(self) -> Progress:
        self._begun = self._said = self._clock()
        if self._show and self.stream.isatty():
            self._bar = _bar(self.stream)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, failed="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def done(self) -> int:
        """Cases with a result."""
        return len(self._met)

    def start(self, case_id: str) -> None:
        """A case begins; where a line is due, it names the case, so that one that hangs is known by name."""
        self.current = case_id
        self._tell()

    def finish(self, result: CaseResult) -> None:
        """A result is known."""
        self._met.add(result.id)
        if result.status == "failed":
            self.failed += 1
            self._say(f"FAILED {one_line(result.id)} {one_line(result.kernel)}: {one_line(result.message, 160)}")
        self._tell()

    def line(self) -> str:
        """Cases done and expected, failures, the current case, the time that is left at the pace so far."""
        failed = f", {self.failed} failed" if self.failed else ""
        spent = self._clock() - self._begun
        left = f"; eta {seconds(spent / self.done * max(self.total - self.done, 0))}" if self.done and spent > 0 else ""
        at = f", at {one_line(self.current, 100)}" if self.current else ""
        return f"conformance: {self.done} of {plural(self.total, 'case')}{failed}{at}{left}"

    def _tell(self) -> None:
        if self._bar is not None:
            failed = f"[red]{self.failed} failed[/red]" if self.failed else ""
            # The description is markup to rich: a case id is not.
            from rich.markup import escape

            description = escape(one_line(self.current, 60))
            self._bar.update(self._task, completed=self.done, description=description, failed=failed)
        elif self._show and self._clock() - self._said >= _LINE_EVERY_S:
            self._said = self._clock()
            print(self.line(), file=self.stream, flush=True)

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, style="red", soft_wrap=True)
        elif self._show:
            print(text, file=self.stream, flush=True)


def _bar(stream: TextIO) -> Any:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[failed]}"),
        progress.TextColumn("eta"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        progress.TextColumn("{task.description}"),
    )
    # rich would send what the program prints on standard output to this console, which is standard error.
    return progress.Progress(
        *columns, console=Console(file=stream), transient=True, redirect_stdout=False, redirect_stderr=False
    )
