"""Level L0 as cases of the suite: `dsv3.trial` finds, this reports."""

from __future__ import annotations

from dsv3.conformance.result import CaseResult
from dsv3.plugin import Backend
from dsv3.trial.findings import Finding
from dsv3.trial.run import repeat, try_instance, try_plugin

OPERATOR = "plugin"


def run_loads(backend: str | Backend, emulate: str | None = None) -> list[CaseResult]:
    """All cases of level L0, in the order of `dsv3.trial.findings.ALL_IDS`.

    backend: the name of an installed one, which is tried in processes of its own, with accelerators as they are and hidden; or
    an instance, which is tried in this process, where the cases about its package are absent. emulate: "default" or an
    architecture. BackendUnavailable for a name that nothing bears; everything else that can go wrong is a failed case.
    """
    if isinstance(backend, str):
        return [_result(f, repeat(backend, f.id)) for f in try_plugin(backend, emulate)]
    return [_result(f, f"dsv3.conformance.run(backend, level='L0', cases='{f.id}')") for f in try_instance(backend, emulate)]


def _result(found: Finding, again: str) -> CaseResult:
    return CaseResult(
        id=found.id,
        op=OPERATOR,
        kernel="",
        status=found.status,
        margin=0.0,
        nmse=0.0,
        message=found.message,
        repeat=again,
        level="L0",
        seconds=found.seconds,
    )
