"""A plugin or an instance through all checks, whatever it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3.dispatch.guard import LATE
from dsv3.dispatch.plugins import Plugin, discover
from dsv3.errors import BackendUnavailable, nearest
from dsv3.plugin import ENTRY_POINT_GROUP
from dsv3.trial.findings import ALL_IDS, ENTRY_IDS, HIDDEN_ID, INSTANCE_IDS, Finding, absent
from dsv3.trial.process import Trial

if TYPE_CHECKING:
    from dsv3.plugin import Backend


def repeat(name: str, case: str) -> str:
    """The command that runs one case of an installed plugin."""
    return f"dsv3 conformance --backend {name} --level L0 --cases '{case}'"


def _ordered(found: list[Finding]) -> list[Finding]:
    return sorted(found, key=lambda f: ALL_IDS.index(f.id))


def _meant(name: str) -> Plugin:
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


def try_plugin(name: str, emulate: str | None = None) -> list[Finding]:
    """An installed plugin, in two processes of its own. BackendUnavailable for a name that nothing bears."""
    return _ordered(_installed(name, emulate))


def _installed(name: str, emulate: str | None) -> list[Finding]:
    plugin = _meant(name)
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


def try_instance(backend: Backend, emulate: str | None = None) -> list[Finding]:
    """An instance, in this process; the cases about its package are absent."""
    from dsv3.trial.checks import run_checks
    from dsv3.trial.subject import Ear, Subject

    found = absent((*ENTRY_IDS, HIDDEN_ID), "an instance has no entry point: asked of installed backends only")
    run_checks(Subject(backend, type(backend).__module__, emulate, Ear()), lambda case, limit: None, found.append)
    return _ordered(found)
