"""Are its kernels registered rightly, and do their functions exist, take the arguments and answer when asked?"""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Iterable

from dsv3.dispatch.choose import Source
from dsv3.dispatch.guard import IMPORT_LIMIT_S, root_cause
from dsv3.dispatch.registration import MOST_KERNELS, load_target, registered_kernels, resolve
from dsv3.dispatch.select import Catalogue
from dsv3.errors import BackendUnavailable, nearest
from dsv3.plugin import Capability, Device, Kernel
from dsv3.plugin.needs import merge_alternatives
from dsv3.trial.calls import calls
from dsv3.trial.findings import Answer
from dsv3.trial.subject import Subject, quoted

SLOW_TARGET_S = 5.0
_ACTIVATIONS = ("float64", "float32", "bfloat16", "float16")


def capability(subject: Subject) -> Answer:
    """Its facts are facts: torch's names for dtypes, text, whole numbers. Chooses `subject.device` and `subject.source`."""
    answer = Answer()
    if not subject.devices:
        return Answer(absent=subject.missing or "not tried: l0/devices failed")
    subject.device = subject.devices[0]
    for device, found in zip(subject.devices, subject.probes, strict=False):
        if found.state != "usable" or found.capability is None:
            continue
        answer.mistakes += [f"{device}: {m}" for m in _capability_mistakes(found.capability)]
        if subject.source is None:
            subject.device = device
            subject.source = Source(subject.backend, device, found.capability, subject.origin)
            answer.note = f"{device}: {', '.join(sorted(map(str, found.capability.dtypes)))}"
    if subject.source is None:
        states = "; ".join(f"{d}: {p.state} {p.detail}".strip() for d, p in zip(subject.devices, subject.probes, strict=False))
        subject.missing = f"no usable device here ({states})"
        return Answer(absent=subject.missing)
    return answer


def _capability_mistakes(found: Capability) -> Iterable[str]:
    import torch

    known = sorted(n for n in vars(torch) if isinstance(getattr(torch, n), torch.dtype))
    for name in found.dtypes:
        if name not in known:
            yield f"dtype {name!r} is no name of torch's{nearest(str(name), known)}"
    if not set(_ACTIVATIONS) & set(found.dtypes):
        yield f"it takes no activations: none of {', '.join(_ACTIVATIONS)} is among its dtypes"
    for feature in found.features:
        if not isinstance(feature, str):
            yield f"feature {feature!r} is not text"
    for name, value in found.limits.items():
        if not isinstance(name, str) or not isinstance(value, int) or isinstance(value, bool):
            yield f"limit {name!r} is {value!r}, not a whole number"


def metadata(subject: Subject) -> Answer:
    """`kernels()` lists without importing, and lists the same again."""
    if subject.device is None:
        return Answer(absent=subject.missing or "not tried: no device is known")
    device, answer = subject.device, Answer()
    before = set(sys.modules)
    listed = subject.ask(lambda: _listing(subject, device), subject.limit_s)
    if listed.late:
        subject.hangs = True
        return Answer(mistakes=[f"kernels(): {root_cause(listed.error or TimeoutError())}"])
    if listed.error is not None:
        return Answer(absent="not tried: see l0/registration")
    targets = {str(k.target).partition(":")[0] for k in listed.value or () if isinstance(k, Kernel)}
    # dsv3's own modules are there before any backend is asked.
    imported = sorted(t for t in targets & (set(sys.modules) - before) if not t.startswith("dsv3."))
    if imported:
        answer.warnings.append(f"kernels() imports {', '.join(imported)}; name targets as text, they are imported when bound")
    again = subject.ask(lambda: _listing(subject, device), subject.limit_s)
    if again.value != listed.value:
        answer.mistakes.append("kernels() does not list the same when asked again")
    answer.note = f"{len(listed.value or ())} kernels in {1000 * listed.seconds:.0f} ms"
    return answer


def _listing(subject: Subject, device: Device) -> list[Kernel]:
    return list(itertools.islice(subject.backend.kernels(device), MOST_KERNELS + 1))


def registration(subject: Subject) -> Answer:
    """Operators, needs, layouts and claims are known words, for every device."""
    if not subject.devices:
        return Answer(absent=subject.missing or "not tried: l0/devices failed")
    if subject.hangs:
        return Answer(absent="not tried: kernels() hangs")
    answer = Answer()
    archs: dict[tuple[str, str], Device] = {}
    for device in subject.devices:
        archs.setdefault((device.family, device.arch), device)
    for device in archs.values():
        try:
            found = registered_kernels(subject.backend, device)
        except BackendUnavailable as error:
            answer.mistakes.append(str(error))
            continue
        if device == subject.device or (device.family, device.arch) == _arch(subject.device):
            subject.kernels = found
            answer.note = f"{len(found)} kernels for {len({k.op for k in found})} operators"
            if not found:
                answer.warnings.append(f"it has no kernels for {device}: everything would run on the reference")
    return answer


def _arch(device: Device | None) -> tuple[str, str] | None:
    return (device.family, device.arch) if device else None


def targets(subject: Subject) -> Answer:
    """Every function it names can be imported, in time and in silence."""
    if absent := _unlisted(subject):
        return absent
    answer = Answer()
    named = dict.fromkeys(t for k in subject.kernels or () for t in (k.target, k.accepts) if t)
    for module in dict.fromkeys(t.partition(":")[0] for t in named):
        subject.ear.heard()
        outcome = subject.ask(functools.partial(importlib.import_module, module), IMPORT_LIMIT_S)
        if outcome.error is not None:
            answer.mistakes.append(f"importing {module}: {root_cause(outcome.error)}")
            named = {t: None for t in named if t.partition(":")[0] != module}
        if said := subject.ear.heard():
            answer.warnings.append(f"importing {module} prints {quoted(said)} to standard output")
        if outcome.seconds > SLOW_TARGET_S and outcome.error is None:
            answer.warnings.append(f"importing {module} takes {outcome.seconds:.1f} s")
    for target in named:
        try:
            load_target(target, "a kernel")
        except BackendUnavailable as error:
            answer.mistakes.append(str(error))
    answer.note = f"{len(named)} functions"
    return answer


def _unlisted(subject: Subject) -> Answer | None:
    if subject.kernels is None:
        return Answer(absent=subject.missing or "not tried: l0/registration failed")
    if subject.source is None:
        return Answer(absent=f"not tried: {subject.missing or 'no device is usable'}")
    return None


def signatures(subject: Subject) -> Answer:
    """Every kernel takes its operator's arguments by keyword."""
    if absent := _unlisted(subject):
        return absent
    answer = Answer()
    for kernel in subject.kernels or ():
        try:
            resolve(kernel, subject.backend.name)
        except BackendUnavailable as error:
            answer.mistakes.append(str(error))
    answer.note = f"{len(subject.kernels or ())} kernels"
    return answer


def accepts(subject: Subject) -> Answer:
    """Every `accepts` answers None or a reason, the same twice."""
    if absent := _unlisted(subject):
        return absent
    assert subject.source is not None
    catalogue, answer, asked = Catalogue(subject.source), Answer(), 0
    for kernel in subject.kernels or ():
        if not kernel.accepts:
            continue
        try:
            function = load_target(kernel.accepts, f"accepts of {subject.backend.name}.{kernel.name}")
        except BackendUnavailable as error:
            answer.mistakes.append(str(error))
            continue
        for call in calls(kernel, catalogue):
            if any(need.refuse(call, subject.source.capability) for need in merge_alternatives(kernel.needs)):
                continue  # it is asked only where its needs hold
            asked += 1
            first, second = (subject.ask(functools.partial(function, call)) for _ in range(2))
            where = f"{kernel.op} {subject.backend.name}.{kernel.name}: accepts({call.quant}, {dict(call.dims)})"
            if first.error is not None:
                answer.mistakes.append(f"{where} raised {root_cause(first.error)}")
                break
            if first.value is not None and not (isinstance(first.value, str) and first.value):
                answer.mistakes.append(f"{where} answered {first.value!r}, neither None nor a reason")
                break
            if second.value != first.value:
                answer.mistakes.append(f"{where} answers {first.value!r} first, then {second.value!r}")
                break
    answer.note = f"asked {asked} times" if asked else "no kernel has an accepts function"
    return answer
