"""Tuning: measure every candidate for a model's calls, right results only, and keep what was found.

An explicit phase: `dsv3 tune` and this function are the only ways to it. Loading reads what is in the database and measures
nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from dsv3.dispatch.choose import torch_device
from dsv3.dispatch.configs import text_of
from dsv3.dispatch.select import Candidate, Catalogue, span_text
from dsv3.dispatch.site import Sites
from dsv3.dispatch.tuning.database import Database, Record
from dsv3.dispatch.tuning.fingerprint import Conditions, describe, device_id
from dsv3.dispatch.tuning.inputs import Inputs
from dsv3.dispatch.tuning.measure import Bench, Measurement
from dsv3.dispatch.tuning.plan import Task, plan
from dsv3.dispatch.tuning.tuned import fastest
from dsv3.errors import BackendUnavailable

# Verification keeps some things in float64 beside the inputs: more than this part of the memory would not end well.
_MEMORY_PART = 8


@dataclass(frozen=True)
class Result:
    """A candidate and what was found."""

    candidate: Candidate
    median_us: float | None
    wrong: str = ""

    @property
    def name(self) -> str:
        return named(self.candidate)


@dataclass(frozen=True)
class Row:
    """The results of one task, the default order's first choice first. earlier: all of it was measured before."""

    task: Task
    results: tuple[Result, ...]
    earlier: bool = False

    @property
    def winner(self) -> Result | None:
        """The fastest right one; the first of those that are equally fast."""
        right = [r for r in self.results if r.median_us is not None]
        return right[fastest([r.median_us or 0.0 for r in right])] if right else None

    @property
    def speed_up(self) -> float | None:
        """Time of the default order's first right choice over that of the winner."""
        first = next((r.median_us for r in self.results if r.median_us is not None), None)
        best = self.winner
        return first / best.median_us if first is not None and best is not None and best.median_us else None


@dataclass
class TuneReport:
    """total: tasks. single: calls with one candidate. stopped: why not everything was measured, "" if it was."""

    path: str
    total: int = 0
    single: int = 0
    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[Task, str]] = field(default_factory=list)
    stopped: str = ""

    @property
    def wrong(self) -> list[tuple[Task, Result]]:
        """The candidates whose result was not right."""
        return [(row.task, r) for row in self.rows for r in row.results if r.wrong]


# What is being measured, tasks done, tasks in all, seconds left.
Watch = Callable[[str, int, int, float], None]


def tune(
    catalogue: Catalogue,
    sites: Sites,
    database: Database,
    *,
    budget_s: float,
    ops: Collection[str] = (),
    watch: Watch | None = None,
    warn: Callable[[str], None] | None = None,
) -> TuneReport:
    """Measure the candidates of a recorded graph's calls for about budget_s seconds, the most valuable first.

    catalogue: of the source whose kernels are tuned, with its measurements so far: a call of which every candidate was measured
    under today's conditions is not measured again. ops: only these operators. watch: told of progress. warn: told of every
    wrong kernel. A result is verified against its error budget before it is timed. Each measurement is in the database as soon
    as it is made; an interrupt or the end of the budget loses none. Raises UsageError if the database cannot be written,
    BackendUnavailable if the device fails.
    """
    found = plan(catalogue, sites, ops)
    report = TuneReport(str(database.path), len(found.tasks), found.single)
    run = _Run(catalogue, database, report, time.monotonic() + budget_s, watch, warn)
    try:
        for done, task in enumerate(found.tasks):
            if not run.task(task, done):
                break
        if run.short and not report.stopped:
            report.stopped = "the budget is spent"
    except KeyboardInterrupt:
        report.stopped = "interrupted"
    return report


class _Run:
    """One tuning run."""

    def __init__(
        self,
        catalogue: Catalogue,
        database: Database,
        report: TuneReport,
        deadline: float,
        watch: Watch | None,
        warn: Callable[[str], None] | None,
    ) -> None:
        self.catalogue, self.database, self.report, self.deadline = catalogue, database, report, deadline
        self.watch = watch or (lambda text, done, total, left: None)
        self.warn = warn or (lambda text: None)
        self.source = catalogue.source
        self.place = torch_device(self.source)
        self.conditions = Conditions(self.source)
        self.short = False  # something was left out because there was not enough time for it
        self._warned: set[Any] = set()
        self._took: dict[Any, list[tuple[int, float]]] = {}

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def task(self, task: Task, done: int) -> bool:
        """Measure those of a task's candidates that were not; whether to go on with the next."""
        known = [self._earlier(task, candidate) for candidate in task.candidates]
        earlier = tuple(result for result in known if result is not None)
        if len(earlier) == len(known):
            self.report.rows.append(Row(task, earlier, earlier=True))
            return True
        if self.left <= 0:
            self.report.stopped = "the budget is spent"
            return False
        if reason := self._too_much(task):
            self.report.skipped.append((task, reason))
            return True
        start = time.monotonic()
        self._measure(task, known, done)
        self._took.setdefault((task.op, task.example.key), []).append((task.tokens, time.monotonic() - start))
        return not self.report.stopped

    def _measure(self, task: Task, known: list[Result | None], done: int) -> None:
        bench = Bench(task.op, Inputs(task.example, task.tokens).make(), self.place)
        results: list[Result] = []
        begun = False
        try:
            for candidate, before in zip(task.candidates, known, strict=True):
                if before is not None:
                    results.append(before)
                    continue
                if begun and self.left <= 0:
                    self.report.stopped = "the budget is spent"
                    break
                begun = True
                self.watch(f"{label(task)}: {named(candidate)}", done, self.report.total, max(self.left, 0.0))
                results.append(self._candidate(task, bench, candidate))
        finally:
            if results:
                self.report.rows.append(Row(task, tuple(results)))

    def _candidate(self, task: Task, bench: Bench, candidate: Candidate) -> Result:
        found = bench.measure(candidate)
        self.database.add([self._record(task, candidate, found)])
        if found.wrong:
            if (task.op, task.example.key, named(candidate)) not in self._warned:  # once for all its token counts
                self.warn(f"{named(candidate)} is wrong and will not be used for {label(task)}: {found.wrong}")
            self._warned.add((task.op, task.example.key, named(candidate)))
            self._check_device(candidate)
        return Result(candidate, found.timing.median_us if found.timing else None, found.wrong)

    def _check_device(self, candidate: Candidate) -> None:
        """A kernel may have taken the device down with it: what is measured after that means nothing."""
        try:
            self.source.backend.synchronize(self.source.device)
        except (RuntimeError, OSError) as error:
            raise BackendUnavailable(
                f"{error} ({self.source.device} after {candidate.name}); what was measured before is kept; "
                "run dsv3 tune again, this kernel is then left out"
            ) from error

    def _record(self, task: Task, candidate: Candidate, found: Measurement) -> Record:
        key = {
            **describe(task.example),
            "tokens": list(task.span),
            **device_id(self.source),
            "kernel": candidate.name,
            "config": None if candidate.config is None else dict(candidate.config),
            **self.conditions.of(candidate.kernel),
        }
        when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if found.timing is None:
            return Record(key, {"wrong": found.wrong, "when": when})
        timing = found.timing
        value = {"median_us": round(timing.median_us, 3), "spread": round(timing.spread, 4), "margin": found.margin}
        return Record(key, {**value, "repeats": timing.repeats, "measured_tokens": task.tokens, "when": when})

    def _earlier(self, task: Task, candidate: Candidate) -> Result | None:
        """What is known already, under today's conditions."""
        tuned = self.catalogue.tuned
        record = tuned.record(task.example, task.tokens, candidate.name, candidate.config) if tuned else None
        if record is None or tuple(record.key["tokens"]) != task.span:
            return None
        return Result(candidate, None if record.wrong else record.median_us, record.wrong)

    def _too_much(self, task: Task) -> str:
        """Why a task is not begun; "" if it is."""
        need, memory = Inputs(task.example, task.tokens).nbytes(), _physical_memory()
        if memory and need * _MEMORY_PART > memory:
            return f"its inputs of {need / 1e9:.1f} GB, and float64 copies to verify with, do not fit in memory"
        likely = _extrapolated(self._took.get((task.op, task.example.key), []), task.tokens)
        if likely > self.left:
            self.short = True
            return f"would take about {likely:.0f} s, more than is left of the budget"
        return ""


def named(candidate: Candidate) -> str:
    """ "acme.tiled" or "acme.tiled (BLOCK_M=64, warps=4)"."""
    config = text_of(candidate.config)
    return f"{candidate.name} ({config})" if config else candidate.name


def label(task: Task) -> str:
    """ "quant_linear K=256 N=64, 3-4 tokens"; "quant_linear T=4*T K=..": four rows per token."""
    return f"{task.op} {_sizes(describe(task.example)['dims'])}, {span_text(task.span)} tokens"


def _sizes(dims: Mapping[str, int | str]) -> str:
    return " ".join(f"{name}={size}" for name, size in dims.items() if size != "T")


def record_cells(record: Record) -> tuple[str, ...]:
    """Operator with sizes, tokens, kernel with configuration, time, date: a line of `dsv3 tune --list`."""
    key = record.key
    config = f" ({text_of(key['config'])})" if key["config"] else ""
    cost = f"WRONG: {record.wrong}" if record.wrong else f"{record.median_us:.1f} us"
    tokens = span_text((key["tokens"][0], key["tokens"][1]))
    return (
        f"{key['op']} {_sizes(key['dims'])}",
        tokens,
        f"{key['kernel']}{config}",
        cost,
        str(record.value.get("when", ""))[:10],
    )


def _extrapolated(took: list[tuple[int, float]], tokens: int) -> float:
    """Seconds for so many tokens, on the line through the last two measurements of the same call."""
    if not took:
        return 0.0
    last, seconds = took[-1]
    if len(took) == 1:
        return seconds
    before, less = took[-2]
    return seconds + max(seconds - less, 0.0) / max(last - before, 1) * (tokens - last)


def _physical_memory() -> int:
    """Bytes, 0 if the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
