"""Does `unprepare` undo `prepare` to the bit, for every layout and scheme that a kernel claims?"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dsv3.budget.tensors import raw_bytes
from dsv3.dispatch.choose import torch_device
from dsv3.dispatch.guard import root_cause
from dsv3.dispatch.select import Catalogue
from dsv3.dispatch.wellformed import prepared_mistake
from dsv3.errors import BackendUnavailable
from dsv3.ops import spec
from dsv3.plugin import Kernel, Prepared
from dsv3.quant import SCHEMES, quantize
from dsv3.trial.calls import accepted_calls
from dsv3.trial.findings import Answer
from dsv3.trial.subject import Subject

LIMIT_S = 20.0


def layouts(subject: Subject) -> Answer:
    """A small weight of every layout, shape and scheme that a kernel takes goes through both ways."""
    if subject.kernels is None or subject.source is None:
        return Answer(absent=f"not tried: {subject.missing or 'l0/registration failed'}")
    claimed = [kernel for kernel in subject.kernels if kernel.layouts]
    if not claimed:
        return Answer(note="no kernel has a layout of its own")
    try:
        place = torch_device(subject.source)
    except BackendUnavailable:
        return Answer(absent="not tried: l0/torch-device failed")
    catalogue, answer = Catalogue(subject.source), Answer()
    done: set[tuple[object, ...]] = set()
    for kernel in claimed:
        count = len(done)
        for argument, layout, weight in _weights(kernel, catalogue):
            key = (layout, weight.quant, weight.shape, weight.scale_fmt, weight.tensors["weight"].dtype)
            if key in done:
                continue
            done.add(key)
            moved = {name: t.to(place) for name, t in weight.tensors.items()}
            weight = Prepared("canonical", weight.quant, weight.shape, moved, weight.scale_fmt)
            if mistake := _round_trip(subject, weight, layout):
                shape = "x".join(map(str, weight.shape))
                answer.mistakes.append(
                    f"{subject.backend.name}.{kernel.name}: {argument} [{shape}] in {weight.quant}: {mistake}"
                )
        if len(done) == count and not answer.mistakes:
            answer.warnings += _untried(kernel, subject, catalogue)
    answer.note = f"{len(done)} weights in {len({k[0] for k in done})} layouts, exact"
    return answer


def _untried(kernel: Kernel, subject: Subject, catalogue: Catalogue) -> list[str]:
    if next(accepted_calls(kernel, catalogue), None) is not None:
        return []  # another kernel's weights were the same
    return [f"{kernel.op} {subject.backend.name}.{kernel.name} takes none of the calls it was offered; its layout is untried"]


def _weights(kernel: Kernel, catalogue: Catalogue) -> Iterator[tuple[str, str, Prepared]]:
    """(argument, layout, canonical weight)."""
    for call in accepted_calls(kernel, catalogue):
        for argument, layout in kernel.layouts.items():
            term = next(t for t in spec(kernel.op).terms if t.path == argument)
            shape = tuple(dim.value(call.dims) or 0 for dim in term.dims)
            act = call.dtypes.get(spec(kernel.op).activation or "", "float32")
            for fmt in ("float32", "ue8m0") if SCHEMES[call.quant].weights == "fp8" else ("float32",):
                yield argument, layout, _weight(shape, call.quant, act, fmt)


@functools.lru_cache(maxsize=256)
def _weight(shape: tuple[int, ...], quant: str, dtype: str, scale_fmt: str) -> Prepared:
    generator = torch.Generator().manual_seed(sum(shape))
    *lead, n, k = shape
    count = lead[0] if lead else 1
    made: list[Mapping[str, Tensor]] = []
    for _ in range(count):
        real = torch.randn(n, k, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))
        made.append(quantize(real, quant, scale_fmt))  # type: ignore[arg-type]
    tensors = {name: torch.stack([m[name] for m in made]) if lead else made[0][name] for name in made[0]}
    return Prepared("canonical", quant, shape, tensors, scale_fmt)  # type: ignore[arg-type]


def _round_trip(subject: Subject, weight: Prepared, layout: str) -> str | None:
    """What is wrong with prepare and unprepare of this weight; None if nothing is."""
    assert subject.source is not None
    device, backend = subject.source.device, subject.backend
    kept = {name: tensor.clone() for name, tensor in weight.tensors.items()}
    outcome = subject.ask(lambda: backend.prepare(weight, layout, device), LIMIT_S)
    if outcome.error is not None:
        return f"prepare to {layout!r}: {root_cause(outcome.error)}; narrow the kernel with Scheme(..) or mend prepare()"
    if mistake := prepared_mistake(outcome.value, weight, layout):
        return f"prepare to {layout!r} gave {mistake}"
    prepared = outcome.value
    assert prepared is not None
    if changed := _difference(weight.tensors, kept):
        return f"prepare to {layout!r} changes the weight it is given ({changed})"
    back = subject.ask(lambda: backend.unprepare(prepared), LIMIT_S)
    if back.error is not None:
        return f"unprepare of {layout!r}: {root_cause(back.error)}"
    if mistake := prepared_mistake(back.value, weight, "canonical"):
        return f"unprepare of {layout!r} gave {mistake}"
    assert back.value is not None
    if different := _difference(back.value.tensors, kept):
        return f"unprepare of {layout!r} is not the inverse of prepare: {different}"
    return None


def _difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """How two sets of tensors differ, by their bits; an FP8 -0 may come back as 0, because e4m3fnuz has none."""
    if found.keys() != wanted.keys():
        return f"tensors {', '.join(sorted(found))}; expected {', '.join(sorted(wanted))}"
    for name, want in wanted.items():
        have = found[name]
        if have.dtype != want.dtype or have.shape != want.shape:
            return f"{name} is {have.dtype} {list(have.shape)}; expected {want.dtype} {list(want.shape)}"
        size = want.element_size()
        a, b = (raw_bytes(t.cpu()).view(-1, size) for t in (have, want))
        if want.dtype == torch.float8_e4m3fn:
            a, b = (torch.where(t == 0x80, torch.zeros_like(t), t) for t in (a, b))
        wrong = (a != b).any(dim=1).nonzero()
        if len(wrong):
            first = int(wrong[0])
            at = [int(i) for i in torch.unravel_index(torch.tensor(first), want.shape)]
            values = (float(t.cpu().reshape(-1)[first].to(torch.float64)) for t in (have, want))
            return "{} differs in {} of {} elements, first at {}: found {:g}, expected {:g}".format(
                name, len(wrong), want.numel(), at, *values
            )
    return None
