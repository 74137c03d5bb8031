"""Which backend and device a model runs on. Never load order: a rule, a name, or an error that asks for one."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsv3.dispatch.guard import CALL_LIMIT_S, IMPORT_LIMIT_S, guarded, root_cause
from dsv3.dispatch.plugins import Plugin, discover, load_plugin
from dsv3.dispatch.registration import BadRegistration, registered_kernels
from dsv3.dispatch.wellformed import cache_spec_mistake, device_mistake, probe_mistake
from dsv3.errors import BackendUnavailable, UsageError, nearest
from dsv3.plugin import Backend, CacheSpec, Capability, Device, KvDType, Probe

if TYPE_CHECKING:
    import torch

# Built-in backends by preference; those that this installation lacks are skipped.
ACCELERATORS = ("cuda", "rocm", "ascend")
CPU_ORDER = ("cpu", "reference")
MOST_DEVICES = 256
_REPORT = "report it to the plugin's authors"


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
    # Our own may ask a driver that is slow to wake, and the reference must never be lost to that.
    return probe_backend(plugin.backend, plugin.source, emulate, IMPORT_LIMIT_S if plugin.builtin else CALL_LIMIT_S)


def probe_backend(
    backend: Backend, origin: str, emulate: str | None = None, limit_s: float = CALL_LIMIT_S
) -> list[tuple[Device | None, Probe]]:
    """(device, answer) of a backend instance; every failure is a Probe with state "error". limit_s: for each call."""
    found = guarded(lambda: list(itertools.islice(backend.devices(emulate=emulate), MOST_DEVICES + 1)), limit_s)
    if found.error is not None:
        return [(None, _failed("devices()", found.error, origin))]
    devices = found.value or []
    if not devices:
        if emulate:
            detail = f"backend {backend.name!r} does not emulate {emulate!r}"
            return [(None, Probe("no-device", detail=detail, remedy="leave --emulate out, or name another backend"))]
        return [(None, Probe("no-device", detail=f"backend {backend.name!r} found no device"))]
    if len(devices) > MOST_DEVICES or (mistake := next(filter(None, map(device_mistake, devices)), None)):
        what = f"more than {MOST_DEVICES} devices" if len(devices) > MOST_DEVICES else mistake
        return [(None, Probe("error", detail=f"devices() of {origin} answered {what}", remedy=_REPORT))]
    if emulate and (real := [d for d in devices if not d.emulated or emulate not in ("default", d.arch)]):
        detail = f"asked to emulate {emulate!r}, devices() of {origin} answered {real[0]}"
        return [(None, Probe("no-device", detail=detail, remedy=f"backend {backend.name!r} does not emulate that"))]
    return [(device, _probe_device(backend, device, origin, limit_s)) for device in devices]


def _probe_device(backend: Backend, device: Device, origin: str, limit_s: float) -> Probe:
    outcome = guarded(lambda: backend.probe(device), limit_s)
    if outcome.error is not None or outcome.value is None:
        return _failed("probe()", outcome.error or TypeError("it answered None"), origin)
    if mistake := probe_mistake(outcome.value):
        return Probe("error", detail=f"probe() of {origin} answered {mistake}", remedy="return a complete Probe")
    if outcome.value.state == "usable":
        return _registered(backend, device, origin) or outcome.value
    return outcome.value


def _registered(backend: Backend, device: Device, origin: str) -> Probe | None:
    """A device is no use if the kernels for it are registered wrongly: None if they are right."""
    try:
        registered_kernels(backend, device)
    except BackendUnavailable as error:
        return Probe("error", detail=str(error), remedy=f"report it to the authors of {origin}")
    return None


def _failed(what: str, error: BaseException, origin: str) -> Probe:
    return Probe("error", detail=f"{root_cause(error)} ({what} of {origin})", remedy=_REPORT)


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
    accelerated: dict[str, Source] = {}
    for source in usable:
        first.setdefault(source.name, source)
        if source.device.family != "cpu":
            accelerated.setdefault(source.name, source)
    for name in ACCELERATORS:
        if name in accelerated:
            return accelerated[name]
    third = [s for s in accelerated.values() if s.name not in CPU_ORDER]
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
    if index and not (index.isascii() and index.isdigit()):
        raise UsageError(f"device {device!r} is not family:index, such as cuda:1")
    return found.family == family and (not index or found.index == int(index))


def probe() -> list[tuple[str, Device | None, Probe]]:
    """Every backend and device with its state; broken plugins included. (backend name, device or None, Probe)."""
    return [(plugin.name, device, answer) for plugin in discover() for device, answer in probe_plugin(plugin)]


def torch_device(source: Source) -> torch.device:
    """Where the source's tensors live, tried out with one; BadRegistration if it cannot hold any."""
    import torch

    def attempt() -> torch.device:
        place = torch.device(source.backend.torch_device(source.device))
        torch.empty(1, device=place)
        return place

    outcome = guarded(attempt, IMPORT_LIMIT_S)  # the first allocation on a GPU starts its driver
    if outcome.error is not None or outcome.value is None:
        error = outcome.error or TypeError("torch_device() answered None")
        raise BadRegistration(f"{root_cause(error)} (torch_device() of backend {source.name!r} for {source.device})") from error
    return outcome.value


def cache_spec(source: Source, kv_dtype: KvDType) -> CacheSpec:
    """How the source wants the latent cache; BadRegistration if it does not say."""
    outcome = guarded(lambda: source.backend.cache_spec(source.device, kv_dtype), CALL_LIMIT_S)
    if outcome.error is not None:
        raise BadRegistration(f"{root_cause(outcome.error)} (cache_spec() of backend {source.name!r})") from outcome.error
    if mistake := cache_spec_mistake(outcome.value):
        raise BadRegistration(f"cache_spec() of backend {source.name!r} answered {mistake}")
    assert outcome.value is not None
    return outcome.value
