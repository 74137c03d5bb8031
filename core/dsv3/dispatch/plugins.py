"""Backend plugins: found through entry points without importing them, loaded one at a time.

Listing reads fresh metadata: stevedore's disk cache keeps modification times as float32 and can miss a plugin installed
moments ago. Loading goes through stevedore's DriverManager.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from dsv3.dispatch.guard import IMPORT_LIMIT_S, guarded, root_cause
from dsv3.plugin import ABI, ENTRY_POINT_GROUP, Probe

if TYPE_CHECKING:
    from dsv3.plugin import Backend

_GROUP_STEM = "dsv3.backends.v"
_DISTRIBUTION = "dsv3"
REQUIRED = (
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


def _installed() -> list[Plugin]:
    """The backend entry points of every installed package, each read for itself: one with damaged metadata is a plugin with a
    problem, and hides no other."""
    found: list[Plugin] = []
    seen: set[str] = set()
    for dist in importlib.metadata.distributions():
        try:
            text = dist.read_text("entry_points.txt") or ""
            if _GROUP_STEM not in text:
                continue
            name = re.sub(r"[-_.]+", "-", dist.metadata["Name"]).lower()
            if name in seen:  # shadowed by an earlier folder of sys.path
                continue
            seen.add(name)
            entry_points = [ep for ep in dist.entry_points if ep.group.startswith(_GROUP_STEM)]
            found += [Plugin(ep.name, ep.group, ep.value, name, dist.version, ep) for ep in entry_points]
        except Exception as error:  # whatever the metadata of somebody's package can raise
            where = str(getattr(dist, "_path", dist))
            detail = f"{root_cause(error)} (reading the metadata in {where})"
            problem = Probe("error", detail=detail, remedy="reinstall or remove that package")
            short = re.sub(r"[^\w.-].*", "", where.replace("\\", "/").rpartition("/")[2]).partition("-")[0]
            found.append(Plugin(short or "unreadable", ENTRY_POINT_GROUP, "", short, "", problem=problem, error=error))
    return found


def discover() -> list[Plugin]:
    """All backend plugins by name, built-in ones first; wrong ABIs and duplicate names carry their problem. Imports nothing."""
    plugins = _installed()
    plugins.sort(key=lambda p: (not p.builtin, p.name, p.dist))
    for plugin in plugins:
        plugin.problem = plugin.problem or _abi_problem(plugin) or _duplicate_problem(plugin, plugins)
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


def load_plugin(plugin: Plugin, out: TextIO | None = None) -> Plugin:
    """Import the plugin and check the instance it names; sets `backend`, or `problem` and `error`. out: for its prints."""
    if plugin.backend is not None or plugin.problem is not None:
        return plugin
    outcome = guarded(functools.partial(_import_checked, plugin), IMPORT_LIMIT_S, out)
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
    backend, mistake, remedy = outcome.value or (None, "nothing was loaded", "")
    if mistake:
        plugin.problem = Probe("error", detail=f"{plugin.value} of {plugin.source} {mistake}", remedy=remedy)
    else:
        plugin.backend = backend
    return plugin


def _import_checked(plugin: Plugin) -> tuple[Any, str, str]:
    """(instance, what is wrong with it, remedy). Looking at attributes may run the plugin's code too."""
    backend = _import(plugin)
    missing = [name for name in REQUIRED if not hasattr(backend, name)]
    if missing:
        mistake = f"is {type(backend).__name__}, without {', '.join(missing)}"
        return None, mistake, "derive it from dsv3.plugin.BackendBase; name an instance"
    if backend.name != plugin.name:
        return None, f"calls itself {backend.name!r}, its entry point {plugin.name!r}", "make the two names equal"
    return backend, "", ""


def _import(plugin: Plugin) -> Any:
    from stevedore import driver

    class Driver(driver.DriverManager[Any]):
        def list_entry_points(self) -> list[Any]:
            return [plugin.entry_point]

    def fail(manager: Any, entry_point: Any, error: BaseException) -> None:
        raise error

    return Driver(plugin.group, plugin.name, on_load_failure_callback=fail).driver
