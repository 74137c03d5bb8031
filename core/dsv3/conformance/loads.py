"""Level L0: does the backend load, say what it is, and register rightly? Needs no device, and costs two fresh processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3.conformance.l0.findings import ALL_IDS, ENTRY_IDS, HIDDEN_ID, INSTANCE_IDS, Finding, absent
from dsv3.conformance.l0.process import Trial
from dsv3.conformance.result import CaseResult
from dsv3.dispatch.guard import LATE
from dsv3.dispatch.plugins import Plugin, discover
from dsv3.errors import BackendUnavailable, nearest
from dsv3.plugin import ENTRY_POINT_GROUP

if TYPE_CHECKING:
    from dsv3.plugin import Backend

OPERATOR = "plugin"


def run_loads(backend: str | Backend, emulate: str | None = None) -> list[CaseResult]:
    """All cases of level L0, in the order of `ALL_IDS`.

    backend: the name of an installed one, which is tried in processes of its own, with accelerators as they are and hidden; or
    an instance, which is tried in this process, where the cases about its package are absent. emulate: "default" or an
    architecture. BackendUnavailable for a name that nothing bears; everything else that can go wrong is a failed case.
    """
    if isinstance(backend, str):
        found = _installed(backend, emulate)
    else:
        found = _instance(backend, emulate)
    order = {case: position for position, case in enumerate(ALL_IDS)}
    return [_result(f, backend) for f in sorted(found, key=lambda f: order[f.id])]


def _result(found: Finding, backend: str | Backend) -> CaseResult:
    if isinstance(backend, str):
        repeat = f"dsv3 conformance --backend {backend} --level L0 --cases '{found.id}'"
    else:
        repeat = f"dsv3.conformance.run(backend, level='L0', cases='{found.id}')"
    return CaseResult(
        id=found.id,
        op=OPERATOR,
        kernel="",
        status=found.status,
        margin=0.0,
        nmse=0.0,
        message=found.message,
        repeat=repeat,
        level="L0",
        seconds=found.seconds,
    )


def _plugin(name: str) -> Plugin:
    """The plugin that `--backend name` would mean."""
    plugins = discover()
    claimed = [p for p in plugins if p.name == name]
    if not claimed:
        known = sorted({p.name for p in plugins})
        raise BackendUnavailable(
            f"backend {name!r} is not installed{nearest(name, known)}; installed: {', '.join(known) or 'none'}. "
            f"Install the package that has it, or start one with `dsv3 plugin new {name}`"
        )
    return next((p for p in claimed if p.builtin), None) or next((p for p in claimed if not p.problem), claimed[0])


def _installed(name: str, emulate: str | None) -> list[Finding]:
    plugin = _plugin(name)
    if plugin.problem is not None:
        at = "l0/names" if plugin.group == ENTRY_POINT_GROUP else "l0/abi"
        at = "l0/metadata-files" if plugin.entry_point is None else at
        failed = Finding(at, "failed", f"{plugin.problem.detail}; {plugin.problem.remedy}")
        return [failed, *absent((c for c in ALL_IDS if c != at), f"not tried: {at} failed, so the plugin is not imported")]
    key = (plugin.name, plugin.dist, plugin.value)
    with (
        Trial(key, emulate, (*ENTRY_IDS, *INSTANCE_IDS), hidden=False) as whole,
        Trial(key, emulate, (HIDDEN_ID,), hidden=True) as unseen,
    ):
        found = whole.findings()
        hangs = [f.id for f in found if f.id in ("l0/devices", "l0/probe") and LATE in f.message and f.status == "failed"]
        # What hangs with the devices in sight is not waited for a second time.
        return found + (absent([HIDDEN_ID], f"not tried: {hangs[0]} hangs") if hangs else unseen.findings())


def _instance(backend: Backend, emulate: str | None) -> list[Finding]:
    from dsv3.conformance.l0.checks import run_checks
    from dsv3.conformance.l0.subject import Ear, Subject

    found = absent((*ENTRY_IDS, HIDDEN_ID), "an instance has no entry point: asked of installed backends only")
    run_checks(Subject(backend, type(backend).__module__, emulate, Ear()), lambda case, limit: None, found.append)
    return found
