"""Does it answer what devices there are and what they can do: in time, well-formed, and the same again?"""

from __future__ import annotations

import itertools
import time
from typing import Any

from dsv3.dispatch.guard import root_cause
from dsv3.dispatch.plugins import REQUIRED
from dsv3.dispatch.wellformed import device_mistake, probe_mistake
from dsv3.plugin import Device, Probe
from dsv3.trial.findings import Answer
from dsv3.trial.subject import Subject

MOST_DEVICES = 256
PROBE_LIMIT_S = 0.05
_REPEATS = 5


def interface(subject: Subject) -> Answer:
    """Everything that core calls is there and callable; name and version are text that the command line can take."""
    backend, answer = subject.backend, Answer()
    for name in REQUIRED:
        if not hasattr(backend, name):
            answer.mistakes.append(f"it has no {name}; derive it from dsv3.plugin.BackendBase")
        elif name not in ("name", "version") and not callable(getattr(backend, name)):
            answer.mistakes.append(f"its {name} is {type(getattr(backend, name)).__name__}, not a method")
    if isinstance(backend, type):
        answer.mistakes.append("it is a class; name an instance")
    for name in ("name", "version"):
        value = getattr(backend, name, None)
        if not isinstance(value, str) or not value:
            answer.mistakes.append(f"its {name} is {value!r}, not text")
    answer.mistakes += name_mistakes(getattr(backend, "name", ""))
    return answer


def name_mistakes(name: Any) -> list[str]:
    """What would make a backend's name unusable in `--backend NAME` and `--kernel OP=NAME.KERNEL`."""
    if not isinstance(name, str):
        return []
    if name == "auto":
        return ["the name 'auto' means that dsv3 chooses the backend"]
    bad = sorted({c for c in name if not (c.isalnum() or c in "-_")})
    return [f"its name {name!r} contains {' '.join(bad)!r}; a pin OP=BACKEND.KERNEL could not name it"] if bad else []


def devices(subject: Subject) -> Answer:
    """Sets `subject.devices`: those present, else the default emulated one, so that the rest is checked on any machine."""
    answer = Answer()
    found = _listed(subject, subject.emulate, answer)
    if found is None:
        return answer
    again = _listed(subject, subject.emulate, answer)
    if again is not None and again != found:
        answer.mistakes.append(f"devices() answers {_names(found)} first and {_names(again)} the second time")
    if subject.emulate and not found:
        answer.mistakes.append(f"it does not emulate {subject.emulate!r}")
    if not found and not subject.emulate:
        found = _listed(subject, "default", answer) or []
        where = f"checked as emulated {found[0].arch}" if found else "it emulates none either"
        answer.note = f"no device here; {where}"
    subject.devices = found
    subject.missing = "" if found else "no device here, and it emulates none: its kernels cannot be listed"
    answer.note = answer.note or _names(found)
    return answer


def _names(found: list[Device]) -> str:
    return ", ".join(map(str, found[:4])) + (f" and {len(found) - 4} more" if len(found) > 4 else "") or "no device"


def _listed(subject: Subject, emulate: str | None, answer: Answer) -> list[Device] | None:
    call = f"devices({f'emulate={emulate!r}' if emulate else ''})"
    backend = subject.backend
    outcome = subject.ask(lambda: list(itertools.islice(backend.devices(emulate=emulate), MOST_DEVICES + 1)))
    if outcome.error is not None:
        answer.mistakes.append(f"{call}: {root_cause(outcome.error)}")
        return None
    found = outcome.value or []
    if len(found) > MOST_DEVICES:
        answer.mistakes.append(f"{call} answered more than {MOST_DEVICES} devices")
        return None
    if mistake := next(filter(None, map(device_mistake, found)), None):
        answer.mistakes.append(f"{call} answered {mistake}")
        return None
    if emulate and (real := [d for d in found if not d.emulated or emulate not in ("default", d.arch)]):
        answer.mistakes.append(f"{call} answered {real[0]}; answer a Device with emulated=True, or none")
        return None
    return found


def probe(subject: Subject) -> Answer:
    """Sets `subject.probes`. Where no device is usable, the default emulated one joins them, so that the rest is checked."""
    if not subject.devices:
        return Answer(absent=subject.missing or "not tried: l0/devices failed")
    answer = Answer()
    notes: list[str] = []
    _probe_all(subject, subject.devices, answer, notes)
    if not subject.emulate and not answer.mistakes and all(p.state != "usable" for p in subject.probes):
        emulated = _listed(subject, "default", Answer()) or []
        subject.devices = [*subject.devices, *emulated]
        _probe_all(subject, emulated, answer, notes)
    answer.note = "; ".join(notes[:4])
    return answer


def _probe_all(subject: Subject, devices: list[Device], answer: Answer, notes: list[str]) -> None:
    for device in devices:
        outcome = subject.ask(lambda d=device: subject.backend.probe(d))  # type: ignore[misc]
        first = outcome.value
        if outcome.error is not None or (mistake := probe_mistake(first)):
            what = root_cause(outcome.error) if outcome.error else f"it answered {mistake}"
            answer.mistakes.append(f"probe({device}): {what}")
            subject.probes.append(Probe("error"))
            continue
        assert first is not None
        subject.probes.append(first)
        answer.warnings += _unexplained(first, device)
        seconds, same = _again(subject, device, first)
        notes.append(f"{device}: {first.state}, {1000 * seconds:.1f} ms")
        if not same:
            answer.mistakes.append(f"probe({device}) does not answer the same when asked again")
        if seconds > PROBE_LIMIT_S:
            answer.warnings.append(f"probe({device}) takes {1000 * seconds:.0f} ms; the limit is {1000 * PROBE_LIMIT_S:.0f} ms")


def _unexplained(found: Probe, device: Device) -> list[str]:
    if found.state == "usable" or found.detail:
        return []
    return [f"probe({device}) answers {found.state!r} without a detail; say what is wrong and the remedy"]


def _again(subject: Subject, device: Device, first: Probe) -> tuple[float, bool]:
    """Seconds of the fastest of a few repeats, and whether each answered the same."""
    fastest, same = float("inf"), True
    for _ in range(_REPEATS):
        start = time.perf_counter()
        outcome = subject.ask(lambda: subject.backend.probe(device))
        fastest = min(fastest, time.perf_counter() - start)
        same = same and outcome.value == first
        if outcome.late:
            break
    return fastest, same


def hidden(subject: Subject) -> Answer:
    """With every accelerator hidden: no device or a usable one, said cleanly."""
    answer = Answer()
    found = _listed(subject, None, answer)
    states = []
    for device in found or ():
        outcome = subject.ask(lambda d=device: subject.backend.probe(d))  # type: ignore[misc]
        if outcome.error is not None or (mistake := probe_mistake(outcome.value)):
            what = root_cause(outcome.error) if outcome.error else f"it answered {mistake}"
            answer.mistakes.append(f"probe({device}): {what}")
        elif outcome.value is not None:
            states.append(f"{device} {outcome.value.state}")
    answer.mistakes = [f"with all accelerators hidden, {m}" for m in answer.mistakes]
    answer.note = "with all accelerators hidden: " + (", ".join(states[:4]) or "no device")
    return answer
