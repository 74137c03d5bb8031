"""Which backend and device a model runs on. Never load order: a rule, a name, or an error that asks for one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from dsv3.dispatch.guard import CALL_LIMIT_S, guarded, root_cause
from dsv3.dispatch.plugins import Plugin, discover, load_plugin
from dsv3.dispatch.registration import registered_kernels
from dsv3.errors import BackendUnavailable, UsageError, nearest
from dsv3.plugin import Backend, Capability, Device, Probe

# Built-in backends by preference; those that this installation lacks are skipped.
ACCELERATORS = ("cuda", "rocm", "ascend")
CPU_ORDER = ("cpu", "reference")
REFERENCE = "reference"


@dataclass
class Source:
    """A backend on one usable device."""

    backend: Backend
    device: Device
    capability: Capability
    origin: str
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.backend.name


def probe_plugin(plugin: Plugin, emulate: str | None = None) -> list[tuple[Device | None, Probe]]:
    """Load, list devices and probe each; every failure is a Probe with state "error"."""
    load_plugin(plugin)
    if plugin.backend is None:
        return [(None, plugin.problem or Probe("error", detail="not loaded"))]
    return probe_backend(plugin.backend, plugin.source, emulate)


def probe_backend(backend: Backend, origin: str, emulate: str | None = None) -> list[tuple[Device | None, Probe]]:
    found = guarded(lambda: list(backend.devices(emulate=emulate)), CALL_LIMIT_S)
    if found.error is not None:
        return [(None, _failed("devices()", found.error, origin))]
    if not found.value:
        if emulate:
            detail = f"backend {backend.name!r} does not emulate {emulate!r}"
            return [(None, Probe("no-device", detail=detail, remedy="leave --emulate out, or name another backend"))]
        return [(None, Probe("no-device", detail=f"backend {backend.name!r} found no device"))]
    answers: list[tuple[Device | None, Probe]] = []
    for device in found.value:
        outcome = guarded(lambda device=device: backend.probe(device), CALL_LIMIT_S)  # type: ignore[misc]
        answer = outcome.value
        if outcome.error is not None:
            answer = _failed("probe()", outcome.error, origin)
        elif not isinstance(answer, Probe) or (answer.state == "usable" and answer.capability is None):
            answer = Probe("error", detail=f"probe() of {origin} answered {answer!r}", remedy="return a complete Probe")
        elif answer.state == "usable":
            answer = _registered(backend, device, origin) or answer
        answers.append((device, answer))
    return answers


def _registered(backend: Backend, device: Device, origin: str) -> Probe | None:
    """A device is no use if the kernels for it are registered wrongly: None if they are right."""
    try:
        registered_kernels(backend, device)
    except BackendUnavailable as error:
        return Probe("error", detail=str(error), remedy=f"report it to the authors of {origin}")
    return None


def _failed(what: str, error: BaseException, origin: str) -> Probe:
    return Probe("error", detail=f"{root_cause(error)} ({what} of {origin})", remedy="report it to the plugin's authors")


def choose(backend: str, device: str | None, emulate: str | None, exclude: Collection[str] = ()) -> Source:
    """The backend by name ("auto": by rule, without the excluded ones) on a device ("family:index", None: its first
    usable one).

    Raises BackendUnavailable, root cause first, or UsageError for a name that nothing bears.
    """
    plugins = discover()
    if backend != "auto":
        return named(backend, device, emulate, plugins)
    if emulate:
        raise UsageError("--emulate needs a backend to emulate: add --backend cuda, rocm or ascend")
    notes: list[str] = []
    usable: list[Source] = []
    for plugin in plugins:
        if plugin.name in exclude:
            continue
        if plugin.builtin or plugin.problem is None:
            for found, answer in probe_plugin(plugin):
                if found and answer.state == "usable" and answer.capability and _matches(found, device):
                    usable.append(Source(plugin.backend, found, answer.capability, plugin.source))  # type: ignore[arg-type]
                elif answer.state in ("error", "driver"):
                    notes.append(f"{plugin.name}: {answer.detail}")
        else:
            notes.append(f"{plugin.name}: {plugin.problem.detail}")
    chosen = _by_rule(usable, device)
    chosen.notes = notes
    return chosen


def _by_rule(usable: list[Source], device: str | None) -> Source:
    first: dict[str, Source] = {}
    for source in usable:
        first.setdefault(source.name, source)
    for name in ACCELERATORS:
        if name in first:
            return first[name]
    third = [s for s in first.values() if s.name not in CPU_ORDER and s.device.family != "cpu"]
    if len(third) > 1:
        names = ", ".join(f"{s.name} ({s.origin})" for s in third)
        raise BackendUnavailable(f"several backends can run on this machine: {names}; choose one with --backend")
    if third:
        return third[0]
    for name in CPU_ORDER:
        if name in first:
            return first[name]
    where = f" for device {device!r}" if device else ""
    raise BackendUnavailable(f"no usable backend{where}; `dsv3 probe` lists what was found")


def named(name: str, device: str | None, emulate: str | None, plugins: list[Plugin] | None = None) -> Source:
    """The backend of this name; only it is imported."""
    plugins = discover() if plugins is None else plugins
    claimed = [p for p in plugins if p.name == name]
    if not claimed:
        known = sorted({p.name for p in plugins})
        raise BackendUnavailable(
            f"backend {name!r} is not installed{nearest(name, known)}; installed: {', '.join(known) or 'none'}. "
            "A backend comes with a package that has an entry point in dsv3.backends.v1"
        )
    plugin = next((p for p in claimed if p.builtin), None) or next((p for p in claimed if not p.problem), claimed[0])
    answers = probe_plugin(plugin, emulate)
    return usable_source(plugin, answers, device)


def usable_source(plugin: Plugin, answers: Iterable[tuple[Device | None, Probe]], device: str | None) -> Source:
    refused: list[str] = []
    for found, answer in answers:
        if found is not None and answer.state == "usable" and answer.capability is not None:
            if _matches(found, device):
                assert plugin.backend is not None
                return Source(plugin.backend, found, answer.capability, plugin.source)
            refused.append(f"it has {found}, not {device!r}")
        else:
            refused.append(answer.detail + (f"; {answer.remedy}" if answer.remedy else ""))
    raise BackendUnavailable(f"{'; '.join(refused)} [backend {plugin.name!r}]") from plugin.error


def _matches(found: Device, device: str | None) -> bool:
    if device is None or device == "meta":
        return True
    family, _, index = device.partition(":")
    if index and not index.isdigit():
        raise UsageError(f"device {device!r} is not family:index, such as cuda:1")
    return found.family == family and (not index or found.index == int(index))


def probe() -> list[tuple[str, Device | None, Probe]]:
    """Every backend and device with its state; broken plugins included. (backend name, device or None, Probe)."""
    return [(plugin.name, device, answer) for plugin in discover() for device, answer in probe_plugin(plugin)]
