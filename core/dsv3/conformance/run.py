"""The suite: cases of the levels asked for, on every kernel that the backend claims."""

from __future__ import annotations

import fnmatch
import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dsv3.budget.verdict import Verdict
from dsv3.conformance.case import Case
from dsv3.conformance.cases import cases_of
from dsv3.conformance.exam import Exam
from dsv3.conformance.report.suite import frozen, level_of
from dsv3.conformance.result import LEVELS, SIZES, CaseResult, Level, Report, Size
from dsv3.conformance.roundtrip import round_trips
from dsv3.conformance.suite import VERSION, header, suite_name
from dsv3.conformance.target import Target, source_of
from dsv3.conformance.waivers import apply
from dsv3.conformance.waivers import read as read_waivers
from dsv3.errors import BackendUnavailable, UsageError, nearest
from dsv3.ops import spec
from dsv3.plugin import Backend, Kernel


class Watcher(Protocol):
    """Is told of every case before it runs, and of every result."""

    def start(self, case_id: str) -> None: ...

    def finish(self, result: CaseResult) -> None: ...


@dataclass
class Plan:
    """What a run is asked for. repeat: what a case's command needs beside its id and seed."""

    backend: str | Backend
    level: Level = "L1"
    ops: Sequence[str] | None = None
    cases: str | None = None
    seed: int = 0
    size: Size = "full"
    emulate: bool | str = False
    watch: Watcher | None = None

    def check(self) -> None:
        """UsageError for what is no word of the suite."""
        for what, value, known in (("level", self.level, LEVELS), ("size", self.size, SIZES)):
            if value not in known:
                raise UsageError(f"{what} {value!r} is not one of {', '.join(known)}{nearest(str(value), known)}")
        for op in self.ops or ():
            spec(op)
        if self.cases is not None and not isinstance(self.cases, str):
            raise UsageError(f"cases is {self.cases!r}; expected a case id or a glob over ids")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise UsageError(f"seed is {self.seed!r}; expected an integer")
        if not self.ids():
            larger = [s for s in SIZES if replace(self, size=s, level="L3").ids()]
            hint = f"; size {larger[0]}, level L3 has some" if larger else nearest(str(self.cases), frozen(VERSION, "full").ids)
            raise UsageError(f"no case of size {self.size}, level {self.level} matches {self.cases or self.ops!r}{hint}")

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels that run: all up to the one asked for, but only level 1 where operators are named."""
        upto = LEVELS[: LEVELS.index(self.level) + 1]
        return ("L1",) if self.ops is not None and "L1" in upto else upto if self.ops is None else ()

    def wants(self, case: str) -> bool:
        """Whether a case's id matches the filter: a glob, or the id itself."""
        return self.cases is None or case == self.cases or fnmatch.fnmatchcase(case, self.cases)

    def ids(self) -> list[str]:
        """The ids of the cases that a run has."""
        known = frozen(VERSION, self.size).ids
        return [i for i in known if level_of(i) in self.levels and self.wants(i) and self._of_ops(i)]

    def _of_ops(self, case: str) -> bool:
        return self.ops is None or case.partition("/")[0] in self.ops

    def repeat(self, case: str) -> str:
        """The command that runs a case alone."""
        name = self.backend if isinstance(self.backend, str) else self.backend.name
        words = ["dsv3", "conformance", "--backend", name, "--size", self.size, "--seed", str(self.seed)]
        level = case.partition("/")[0].upper()
        words += ["--level", level if level in LEVELS else "L1"]
        if self.emulate:
            words += ["--emulate"] if self.emulate is True else [f"--emulate={self.emulate}"]
        return shlex.join([*words, "--cases", case])


def run(
    backend: str | Backend,
    *,
    level: Level = "L1",
    ops: Sequence[str] | None = None,
    cases: str | None = None,
    seed: int = 0,
    size: Size = "full",
    emulate: bool | str = False,
    waivers: str | None = None,
    report: str | None = None,
    watch: Watcher | None = None,
    fail_fast: bool = False,
) -> Report:
    """Run the conformance suite against a backend.

    backend: a name, or a Backend instance, which runs in this process (its entry-point cases are absent). level: L0 loads, L1
    operators, L2 model, L3 serving; lower ones run too unless `ops` names operators. cases: a glob over case ids. size: "quick"
    (for CI), "small" (what an interpreter can do), "full" (what a certificate needs). emulate: True or an architecture.
    waivers: a file of `case-id  reason  url` lines. report: a folder that the reports are written to. watch: told of progress.
    fail_fast: end at the first case that fails.

    Raises UsageError for unknown words, BackendUnavailable if the backend cannot be had.
    """
    if isinstance(ops, str):
        raise UsageError(f"ops is the string {ops!r}; expected a list of operator names, such as [{ops!r}]")
    plan = Plan(backend, level, None if ops is None else list(ops), cases, seed, size, emulate, watch)
    plan.check()
    known = None if waivers is None else read_waivers(waivers)
    started = time.perf_counter()
    results: list[CaseResult] = []
    target: Target | None = None
    levels = {level_of(case) for case in plan.ids()}
    for one in (level for level in plan.levels if level in levels):  # a level of which the filter leaves nothing costs nothing
        if one == "L0":
            from dsv3.conformance.loads import run_loads

            arch = "default" if emulate is True else emulate or None
            found: Iterable[CaseResult] = [r for r in run_loads(backend, arch) if plan.wants(r.id)]
        else:
            target = target or Target(source_of(backend, emulate))
            found = _level(one, plan, target)
        for result in found:
            results.append(result)
            if watch:
                watch.finish(result)
            if fail_fast and result.status == "failed":
                break
        if fail_fast and any(r.status == "failed" for r in results):
            break
    info = header(plan, target, results, time.perf_counter() - started)
    made = Report(results, suite_name(size), info)
    if known is not None:
        waived, unmatched, passes = apply(made.cases, known)
        made = Report(waived, made.suite, {**info, "unmatched_waivers": unmatched, "unexpected_passes": passes})
    if report is not None:
        from dsv3.conformance.report import write_all

        write_all(made, report)
    return made


def _level(level: Level, plan: Plan, target: Target) -> Iterator[CaseResult]:
    if level == "L1":
        return _operators(plan, target)
    if level == "L2":
        from dsv3.conformance.model import model_cases

        return _named("L2", plan, target, model_cases(plan.size))
    from dsv3.conformance.serving import serving_cases

    return _named("L3", plan, target, serving_cases(plan.size))


Check = Callable[[Target, int], tuple[float, float, str] | str]


def _named(level: Level, plan: Plan, target: Target, checks: Iterable[tuple[str, Check]]) -> Iterator[CaseResult]:
    """Cases of levels 2 and 3: a check answers (margin, nmse, message), or why it does not apply."""
    from dsv3.dispatch.guard import root_cause

    wanted = [(case, check) for case, check in checks if plan.wants(case)]
    for case, check in wanted:
        if plan.watch:
            plan.watch.start(case)
        started = time.perf_counter()
        try:
            answer = check(target, plan.seed)
        except (Exception, SystemExit) as error:
            answer = (math.inf, 0.0, f"raised {root_cause(error)}")
        margin, nmse, message = (0.0, 0.0, answer) if isinstance(answer, str) else answer
        status = "absent" if isinstance(answer, str) else "failed" if not margin <= 1 else "passed"
        op = "model" if level == "L2" else "serving"
        seconds = time.perf_counter() - started
        yield CaseResult(case, op, target.name, status, margin, nmse, message, plan.repeat(case), level, "", seconds)  # type: ignore[arg-type]


def _operators(plan: Plan, target: Target) -> Iterator[CaseResult]:
    """Level 1. Every case gives one result per kernel, or one that is absent."""
    wanted = [c for c in cases_of(plan.size, plan.ops) if plan.wants(c.id)]
    trips = [t for t in round_trips(plan.size, plan.ops) if plan.wants(t.id)]
    for case in wanted:
        if plan.watch:
            plan.watch.start(case.id)
        kernels = target.kernels(case.op)
        if not kernels:
            yield _absent(plan, case.id, case.op, "", f"the backend offers no kernel for {case.op}")
        for kernel in kernels:
            yield _examine(plan, target, case, kernel)
    for trip in trips:
        if plan.watch:
            plan.watch.start(trip.id)
        yield from trip.results(target, plan.seed, plan.repeat(trip.id))


def _absent(plan: Plan, case: str, op: str, kernel: str, why: str) -> CaseResult:
    return CaseResult(case, op, kernel, "absent", 0.0, 0.0, why, plan.repeat(case))


def _examine(plan: Plan, target: Target, case: Case, kernel: Kernel) -> CaseResult:
    started = time.perf_counter()
    name = f"{target.name}.{kernel.name}"
    try:
        if case.kv and not target.keeps(case.kv):
            kind = "FP8" if case.kv == "fp8" else case.kv
            return _absent(plan, case.id, case.op, name, f"the backend keeps no {kind} cache")
        arguments = {**spec(case.op).defaults, **case.arguments(plan.seed, target.setting(case))}
        if why := target.refusal(kernel, arguments, case.needs_dtypes):
            return _absent(plan, case.id, case.op, name, why)
        verdict = Exam(target, kernel, case, plan.seed, arguments).run()
    except BackendUnavailable as error:  # cache_spec() failed, or a table of configurations is none
        verdict = Verdict(math.inf, 0.0, str(error))
    return CaseResult(
        case.id, case.op, name, "passed" if verdict.passed else "failed", verdict.margin, verdict.nmse, verdict.message,
        plan.repeat(case.id), "L1", kernel.numerics, time.perf_counter() - started, _details(verdict.details),
    )  # fmt: skip


def _details(details: Any) -> dict[str, Any]:
    return {k: v for k, v in details.items() if v is not None}
