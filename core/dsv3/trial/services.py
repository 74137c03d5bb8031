"""What a backend offers beside kernels: a place for tensors, the cache's form, capture of a step."""

from __future__ import annotations

from typing import get_args

import torch

from dsv3.dispatch import choose
from dsv3.dispatch.guard import IMPORT_LIMIT_S, root_cause
from dsv3.errors import BackendUnavailable
from dsv3.plugin import KvDType
from dsv3.trial.findings import Answer
from dsv3.trial.subject import Subject


def torch_device(subject: Subject) -> Answer:
    """A tensor can live where it says, and waiting for the device ends."""
    if subject.source is None:
        return Answer(absent=f"not tried: {subject.missing or 'no device is usable'}")
    source = subject.source
    try:
        place = choose.torch_device(source)
    except BackendUnavailable as error:
        return Answer(mistakes=[str(error)])
    waited = subject.ask(lambda: source.backend.synchronize(source.device), IMPORT_LIMIT_S)
    if waited.error is not None:
        return Answer(mistakes=[f"synchronize({source.device}): {root_cause(waited.error)}"])
    return Answer(note=str(place))


def cache_spec(subject: Subject) -> Answer:
    """It says how it wants the cache, for every dtype that the device has, and for FP8."""
    if subject.source is None:
        return Answer(absent=f"not tried: {subject.missing or 'no device is usable'}")
    answer, notes = Answer(), []
    for kv_dtype in get_args(KvDType):
        if kv_dtype != "fp8" and kv_dtype not in subject.source.capability.dtypes:
            continue
        try:
            found = choose.cache_spec(subject.source, kv_dtype)
        except BackendUnavailable as error:
            answer.mistakes.append(f"{kv_dtype}: {error}")
            continue
        notes.append(f"{kv_dtype}: pages of {found.page_size}" + ("" if found.kv_dtype == kv_dtype else f", {found.kv_dtype}"))
    answer.note = "; ".join(notes)
    return answer


def capture(subject: Subject) -> Answer:
    """None, or something that replays a step on what its inputs hold by then."""
    if subject.source is None:
        return Answer(absent=f"not tried: {subject.missing or 'no device is usable'}")
    source = subject.source
    try:
        place = choose.torch_device(source)
    except BackendUnavailable:
        return Answer(absent="not tried: l0/torch-device failed")
    given, made = torch.zeros(8, device=place), torch.zeros(8, device=place)
    outcome = subject.ask(lambda: source.backend.capture(lambda: made.copy_(given * 2), source.device), IMPORT_LIMIT_S)
    if outcome.error is not None:
        return Answer(mistakes=[f"capture(): {root_cause(outcome.error)}"])
    replay = outcome.value
    if replay is None:
        return Answer(note="it captures nothing")
    if not callable(replay):
        return Answer(mistakes=[f"capture() answered {replay!r}, neither None nor a callable"])
    for value in (3.0, 5.0):
        given.fill_(value)
        ran = subject.ask(replay, IMPORT_LIMIT_S)
        waited = subject.ask(lambda: source.backend.synchronize(source.device), IMPORT_LIMIT_S)
        if error := ran.error or waited.error:
            return Answer(mistakes=[f"the captured step: {root_cause(error)}"])
        if made.tolist() != [2 * value] * 8:
            found = made.tolist()[0]
            return Answer(mistakes=[f"the captured step gave {found:g} where its input makes it {2 * value:g}"])
    return Answer(note="a captured step replays")
