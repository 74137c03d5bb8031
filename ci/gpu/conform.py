"""The conformance suite on the device, levels L0 to L3, within a time limit."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from dsv3 import conformance
from dsv3.conformance.report.suite import frozen, level_of
from dsv3.conformance.result import LEVELS, CaseResult, Level, Size
from dsv3.conformance.suite import VERSION, suite_name
from dsv3.dispatch.guard import root_cause
from dsv3.plugin import Backend

_MOST_FAILURES = 100


class OutOfTime(BaseException):
    """No case may take it for its own failure."""


class Watch:
    """Keeps every result, and ends the run before the first case that begins too late. A case that has begun is not ended."""

    def __init__(self, say: Any) -> None:
        self.results: list[CaseResult] = []
        self.deadline = 0.0
        self._say, self._said = say, 0.0

    def start(self, case: str) -> None:
        now = time.monotonic()
        if now > self.deadline:
            raise OutOfTime
        if now - self._said > 5:
            self._said = now
            self._say(f"conformance: {len(self.results)} results, {self.deadline - now:.0f} s left; {case}")

    def finish(self, result: CaseResult) -> None:
        self.results.append(result)
        if result.status == "failed":
            self._say(f"conformance: FAILED {result.id} {result.kernel}: {result.message[:200]}")


def conform(
    backend: str | Backend, size: Size, emulate: str | None, seconds: float, folder: str | None, say: Any
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The suite's outcome: counts by level and status, failures; and what was left out.

    A run in the suite's own order has most of the time; if operators take all of it, levels 2 and 3 have the rest. folder:
    where the suite's reports go; a run that is cut short writes none.
    """
    watch = Watch(say)
    begun = time.monotonic()
    watch.deadline = begun + 0.7 * seconds
    error = _run(backend, size, emulate, watch, None, folder)
    complete = error == ""
    if error == "time":
        watch.deadline = begun + seconds
        for level in ("L2", "L3"):
            if not any(r.level == level for r in watch.results):
                later = _run(backend, size, emulate, watch, level, None)
                error = error if later in ("", "time") else later
    left = _left_out(watch.results, size, "time" if error in ("", "time") else error)
    failed = [r for r in watch.results if r.status == "failed"]
    outcome = {
        "suite": suite_name(size),
        "complete": complete,
        "seconds": round(time.monotonic() - begun, 1),
        "counts": {level: dict(Counter(r.status for r in watch.results if r.level == level)) for level in LEVELS},
        "failures": [{"id": r.id, "kernel": r.kernel, "message": r.message} for r in failed[:_MOST_FAILURES]],
        "failed": len(failed),
        "error": "" if error == "time" else error,
    }
    return outcome, left


def _run(backend: str | Backend, size: Size, emulate: str | None, watch: Watch, only: Level | None, folder: str | None) -> str:
    """ "" if it came to its end, "time" if that ran out, else what was raised."""
    try:
        conformance.run(
            backend, level=only or "L3", cases=f"{only.lower()}/*" if only else None, size=size, emulate=emulate or False,
            report=folder, watch=watch,
        )  # fmt: skip
    except OutOfTime:
        return "time"
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is, the rest of the job goes on
        return root_cause(error) or type(error).__name__
    return ""


def _left_out(results: list[CaseResult], size: Size, why: str) -> list[dict[str, str]]:
    """A line per level of which cases did not run."""
    ran = {r.id for r in results}
    missing = Counter(level_of(case) for case in frozen(VERSION, size).ids if case not in ran)
    return [{"what": f"conformance {level}: {missing[level]} cases", "why": why} for level in LEVELS if missing[level]]
