"""Backend plugins: found through entry points without importing them, loaded one at a time.

Listing reads fresh metadata: stevedore's disk cache keeps modification times as float32 and can miss a plugin installed
moments ago. Loading goes through stevedore's DriverManager.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv3.dispatch.guard import IMPORT_LIMIT_S, guarded, root_cause
from dsv3.plugin import ABI, ENTRY_POINT_GROUP, Probe

if TYPE_CHECKING:
    from dsv3.plugin import Backend

_GROUP_STEM = "dsv3.backends.v"
_DISTRIBUTION = "dsv3"
_REQUIRED = (
    "name", "version", "devices", "probe", "kernels", "torch_device", "prepare", "unprepare", "cache_spec", "synchronize",
    "capture",
)  # fmt: skip


@dataclass
class Plugin:
    """One entry point. `problem` says why it cannot be used, if so; `error` is the exception behind it."""

    name: str
    group: str
    value: str
    dist: str
    version: str
    entry_point: Any = field(repr=False, default=None)
    problem: Probe | None = None
    error: BaseException | None = None
    backend: Backend | None = None
    load_seconds: float = 0.0

    @property
    def builtin(self) -> bool:
        return self.dist == _DISTRIBUTION

    @property
    def source(self) -> str:
        """The package it came from: "dsv3-onnxruntime 0.1.0"."""
        return f"{self.dist} {self.version}".strip()


def _entry_points() -> list[Any]:
    found = importlib.metadata.entry_points()
    return [ep for group in sorted(found.groups) if group.startswith(_GROUP_STEM) for ep in found.select(group=group)]


def discover() -> list[Plugin]:
    """All backend plugins by name, built-in ones first; wrong ABIs and duplicate names carry their problem. Imports nothing."""
    plugins = []
    for ep in _entry_points():
        dist = ep.dist.name if ep.dist else "unknown"
        version = ep.dist.version if ep.dist else ""
        plugins.append(Plugin(ep.name, ep.group, ep.value, re.sub(r"[-_.]+", "-", dist).lower(), version, ep))
    plugins.sort(key=lambda p: (not p.builtin, p.name, p.dist))
    for plugin in plugins:
        plugin.problem = _abi_problem(plugin) or _duplicate_problem(plugin, plugins)
    return plugins


def _abi_problem(plugin: Plugin) -> Probe | None:
    if plugin.group == ENTRY_POINT_GROUP:
        return None
    wanted = plugin.group.removeprefix(_GROUP_STEM)
    return Probe(
        "incompatible",
        detail=f"{plugin.source} needs dsv3 plugin ABI {wanted}; this is {ABI}",
        remedy=f"install a release of {plugin.dist} with entry points in {ENTRY_POINT_GROUP}",
    )


def _duplicate_problem(plugin: Plugin, plugins: list[Plugin]) -> Probe | None:
    others = [p for p in plugins if p is not plugin and p.name == plugin.name and p.group == plugin.group]
    if not others or plugin.builtin:  # a built-in name stays with dsv3; whoever else claims it is at fault
        return None
    sources = " and ".join(sorted({p.source for p in [plugin, *others]}))
    return Probe(
        "error",
        detail=f"backend name {plugin.name!r} is claimed by {sources}",
        remedy="uninstall one of them",
    )


def load_plugin(plugin: Plugin) -> Plugin:
    """Import the plugin and check the instance it names; sets `backend`, or `problem` and `error`."""
    if plugin.backend is not None or plugin.problem is not None:
        return plugin
    outcome = guarded(functools.partial(_import, plugin), IMPORT_LIMIT_S)
    plugin.load_seconds = outcome.seconds
    if outcome.error is not None:
        plugin.error = outcome.error
        what = "its import was given up on" if outcome.late else "its import failed"
        plugin.problem = Probe(
            "error",
            detail=f"{root_cause(outcome.error)} ({what}: {plugin.value} of {plugin.source})",
            remedy=f"repair or uninstall {plugin.dist}",
        )
        return plugin
    backend: Any = outcome.value
    missing = [name for name in _REQUIRED if not hasattr(backend, name)]
    if missing:
        detail = f"{plugin.value} of {plugin.source} is {type(backend).__name__}, without {', '.join(missing)}"
        plugin.problem = Probe("error", detail=detail, remedy="derive it from dsv3.plugin.BackendBase; name an instance")
    elif backend.name != plugin.name:
        detail = f"entry point {plugin.name!r} of {plugin.source} names a backend that calls itself {backend.name!r}"
        plugin.problem = Probe("error", detail=detail, remedy="make the two names equal")
    else:
        plugin.backend = backend
    return plugin


def _import(plugin: Plugin) -> Any:
    from stevedore import driver

    class Driver(driver.DriverManager[Any]):
        def list_entry_points(self) -> list[Any]:
            return [plugin.entry_point]

    def fail(manager: Any, entry_point: Any, error: BaseException) -> None:
        raise error

    return Driver(plugin.group, plugin.name, on_load_failure_callback=fail).driver
