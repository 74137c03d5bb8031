"""Which kernel a step failed in, read off the traceback: so that naming it costs nothing while nothing fails.

Callers of bound operators have two forms only: `self.NAME[BUCKET](..)` in the graph, NAME a `Site`, and `ops.NAME(..)` in
a decomposition. Python keeps the source range of every call (PEP 657), so each frame says which call it was in.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from dsv3.dispatch.failure import failed, is_device_error, shapes_of
from dsv3.dispatch.guard import root_cause
from dsv3.dispatch.site import Site, switch_key
from dsv3.errors import KernelFailed
from dsv3.ops import spec

if TYPE_CHECKING:
    from dsv3.dispatch.decision import Decision

_SITE = re.compile(r"self\.(\w+)\[([\w.]+)\]\(")
_PART = re.compile(r"ops\.(\w+)\(")
_NAMED = 8  # kernels listed in a message
_DEVICE = "A device error: start again, with fewer tokens or another device"


def blamed(error: BaseException, plans: Mapping[tuple[str, str], list[Decision]]) -> BaseException:
    """KernelFailed for an error that a bound kernel raised, by (operator, site) -> decisions per bucket; else the error."""
    if isinstance(error, KernelFailed):
        return error
    calls = [(frame, text) for frame, text in _frames(error.__traceback__)]
    for at, (frame, text) in enumerate(calls):
        found = _SITE.match(text)
        site = getattr(frame.f_locals.get("self"), found[1], None) if found else None
        if found and isinstance(site, Site) and (plan := plans.get((site.op, site.where))):
            bucket = _value(frame, found[2])
            decision = plan[bucket if isinstance(bucket, int) else 0]
            return _error(error, site.where, decision, calls[at + 1 :])
    return _late(error, plans) if is_device_error(error) else error


def _late(error: BaseException, plans: Mapping[tuple[str, str], list[Decision]]) -> KernelFailed:
    """For a device error outside every bound call: devices report errors when they are next asked."""
    every = (d.kernel.name for plan in plans.values() for top in plan for d in top.walk() if d.kernel)
    kernels = list(dict.fromkeys(every))
    more = ", .." if len(kernels) > _NAMED else ""
    text = f"outside a kernel; a kernel that ran before may be at fault: {', '.join(kernels[:_NAMED])}{more}"
    return KernelFailed(f"{root_cause(error)} ({text}). {_DEVICE}", {"kernels": kernels})


def _error(error: BaseException, where: str, decision: Decision, inner: list[tuple[FrameType, str]]) -> KernelFailed:
    """Follow the decision inwards, along the calls that the frames are in."""
    outer = decision
    for frame, text in inner:
        if decision.cases and "arguments" in frame.f_locals:
            key = switch_key(spec(decision.op), frame.f_locals["arguments"])
            decision = decision.cases.get(key, decision)
        elif decision.parts and (found := _PART.match(text)) and found[1] in decision.parts:
            decision = decision.parts[found[1]]
    site = where if decision.op == outer.op else f"{where}, inside {outer.op}"
    another = f"Choose another kernel with --kernel {decision.op}=BACKEND.KERNEL, or another backend"
    return failed(error, decision, site, _shapes(decision, inner), _DEVICE if is_device_error(error) else another)


def _shapes(decision: Decision, inner: list[tuple[FrameType, str]]) -> str:
    """The arguments as the innermost frame that has all of them holds them; "" where none does."""
    for frame, _ in reversed(inner):
        arguments: Mapping[str, Any] = frame.f_locals.get("arguments", frame.f_locals)
        if all(parameter in arguments for parameter in spec(decision.op).parameters):
            return shapes_of(decision.op, arguments)
    return ""


def _frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, str]]:
    """(frame, source from the beginning of the call it is in), the outermost first."""
    while traceback is not None:
        frame, code = traceback.tb_frame, traceback.tb_frame.f_code
        line, _, column, _ = next(islice(code.co_positions(), traceback.tb_lasti // 2, None), (None,) * 4)
        source = linecache.getline(code.co_filename, line) if line is not None else ""
        # Columns count bytes of UTF-8.
        yield frame, source.encode()[column or 0 :].decode(errors="replace")
        traceback = traceback.tb_next


def _value(frame: FrameType, dotted: str) -> Any:
    first, *rest = dotted.split(".")
    value = frame.f_locals.get(first)
    for name in rest:
        value = getattr(value, name, None)
    return value
