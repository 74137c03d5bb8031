"""The checks of an instance, in order: later ones use what earlier ones learnt."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

from dsv3.dispatch.guard import guarded, root_cause
from dsv3.trial import devices, kernels, layouts, services
from dsv3.trial.findings import INSTANCE_IDS, Answer, Finding, finding
from dsv3.trial.subject import Subject

Begin = Callable[[str, float], None]
Emit = Callable[[Finding], None]


@dataclass(frozen=True)
class Check:
    """limit_s: after which the whole check is given up on; the calls within have limits of their own."""

    id: str
    run: Callable[[Subject], Answer]
    limit_s: float = 40.0


_RUN: tuple[Callable[[Subject], Answer], ...] = (
    devices.interface,
    devices.devices,
    devices.probe,
    kernels.capability,
    kernels.metadata,
    kernels.registration,
    kernels.targets,
    kernels.signatures,
    kernels.accepts,
    services.torch_device,
    layouts.layouts,
    services.cache_spec,
    services.capture,
)
CHECKS = tuple(Check(case, run) for case, run in zip(INSTANCE_IDS, _RUN, strict=True))


def run_checks(subject: Subject, begin: Begin, emit: Emit) -> None:
    """Run them all; `begin` hears of each before, `emit` after. Nothing that the backend does ends this but its killing the
    process."""
    for check in CHECKS:
        begin(check.id, check.limit_s)
        start = time.perf_counter()
        outcome = guarded(functools.partial(check.run, subject), check.limit_s, subject.ear.stream)
        answer = outcome.value
        if answer is None:
            answer = Answer(mistakes=[root_cause(outcome.error or TypeError("no answer"))])
        emit(finding(check.id, answer, time.perf_counter() - start))
