"""The kernels of a decode step or a prompt, one by one: time, bytes and FLOP of a call, and their share of what is possible."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from dsv3.bench import memory
from dsv3.bench.ceiling import Ceilings
from dsv3.bench.profile import Profile, profile
from dsv3.bench.results import Figure, Point, Result, measured, subject_of
from dsv3.bench.session import Session
from dsv3.engine.model import Model


def bench_ops(
    load: Callable[[], Model],
    ceilings: Callable[[Model], Ceilings],
    *,
    phase: str,
    batch: int,
    context: int,
    tokens: int,
    repeats: int,
) -> Result:
    """phase "decode": steps of `batch` sequences behind `context` tokens; `tokens * repeats` turns. "prefill": the prompts
    themselves, `repeats` turns. A turn is a plain and a timed step."""
    watch = memory.Watch()
    model = load()
    with watch.aside():
        before = ceilings(model)
    session = Session(model, batch, context, tokens, eager=True)
    session.prefill()
    found = _profile(session, phase, tokens, repeats)
    subject = subject_of(model, batch, context, tokens if phase == "decode" else 0, repeats)
    result = Result("ops", subject, before, ceilings(model), profile_figures(found, phase))
    best = result.best
    result.rows = [_row(key, group, found, best) for key, group in _by_time(found)]
    result.points = [
        Point(f"{op} {_size(shape)}", g.flop / g.nbytes, g.flop / g.calls / statistics.median(g.seconds) / 1e9, "operator")
        for (op, _, shape), g in _by_time(found)
        if g.flop and g.nbytes and g.calls and statistics.median(g.seconds) > 0
    ]
    result.notes += [f"{phase}: the rest of a step is Python between kernels, see `dsv3.bench.profile`", *watch.notes]
    return result


def _profile(session: Session, phase: str, tokens: int, repeats: int) -> Profile:
    if phase == "prefill":
        return profile(session.model, session.prefill, repeats)
    session.decode(tokens)
    return profile(session.model, lambda: session.step(session.first, 0), tokens * repeats)


def profile_figures(found: Profile, phase: str) -> list[Figure]:
    """Of a step: its time, that of kernels, that outside."""
    step = statistics.median(found.step)
    return [
        measured(f"{phase} step", [1e3 * s for s in found.step], "ms", "less"),
        measured("in kernels", [1e3 * s for s in found.kernels], "ms", "less"),
        Figure("outside kernels", 1e3 * found.outside, "ms", better="less"),
        Figure("outside kernels, share", found.outside / step, "", better="less"),
        Figure("kernel calls", found.calls, "a step"),
        Figure("timer, taken off each", 1e9 * found.timer, "ns"),
    ]


def operator_rows(found: Profile) -> list[dict[str, Any]]:
    """A line per operator and kernel: its part of a step."""
    step = statistics.median(found.step)
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (op, kernel, _), group in found.groups.items():
        totals[op, kernel][0] += group.calls
        totals[op, kernel][1] += group.calls * statistics.median(group.seconds)
    rows = [
        {"operator": op, "kernel": kernel, "calls": int(calls), "ms": 1e3 * seconds, "of the step, %": 100 * seconds / step}
        for (op, kernel), (calls, seconds) in sorted(totals.items(), key=lambda item: -item[1][1])
    ]
    outside = {"operator": "outside kernels", "kernel": "", "calls": 0, "ms": 1e3 * found.outside}
    return [*rows, {**outside, "of the step, %": 100 * found.outside / step}]


def _by_time(found: Profile) -> list[tuple[Any, Any]]:
    return sorted(found.groups.items(), key=lambda item: -item[1].calls * statistics.median(item[1].seconds))


def _row(key: Any, group: Any, found: Profile, best: Ceilings) -> dict[str, Any]:
    """limit: the share of the roofline that a call reaches."""
    (op, kernel, shape), calls = key, max(group.calls, 1)
    seconds, step = statistics.median(group.seconds), statistics.median(found.step)
    nbytes, flop = group.nbytes / calls, group.flop / calls
    limit = max(nbytes / best.read_gb_s, flop / best.gflop_s) / 1e9
    timed = seconds if seconds > 0 else None
    return {
        "operator": op, "kernel": kernel, "shape": _size(shape), "calls": group.calls, "us a call": 1e6 * seconds,
        "of the step, %": 100 * calls * seconds / step, "MB": nbytes / 1e6, "GB/s": nbytes / timed / 1e9 if timed else None,
        "MFLOP": flop / 1e6, "GFLOP/s": flop / timed / 1e9 if timed and flop else None,
        "of the limit, %": 100 * limit / timed if timed else None,
    }  # fmt: skip


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "-"
