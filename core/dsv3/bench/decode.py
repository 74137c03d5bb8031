"""Tokens per second of decoding, beside what the machine could do: the roofline of the very steps that were timed."""

from __future__ import annotations

from collections.abc import Callable

from dsv3.bench import memory
from dsv3.bench.ceiling import Ceilings
from dsv3.bench.cost import Cost
from dsv3.bench.ops import operator_rows, profile_figures
from dsv3.bench.profile import profile
from dsv3.bench.results import Figure, Point, Result, measured, subject_of
from dsv3.bench.session import Session
from dsv3.engine.model import Model

Load = Callable[[], Model]
Ceil = Callable[[Model], Ceilings]


def bench_decode(
    load: Load, ceilings: Ceil, *, batch: int, context: int, tokens: int, repeats: int, profiled: bool = False
) -> Result:
    """Prefill `batch` sequences of `context` random tokens, then `repeats` times decode `tokens` steps from there, after a turn
    that is not counted. Peak memory is of loading and running, the ceilings' own buffer aside. profiled: also how the time of a
    step divides over operators."""
    watch = memory.Watch()
    model = load()
    with watch.aside():
        before = ceilings(model)
    session = Session(model, batch, context, tokens)
    session.prefill()
    session.decode(max(2, tokens // 4))  # kernels compile, caches of the processor fill
    rates, steps = [], []
    for _ in range(repeats):
        times = session.decode(tokens)
        rates.append(batch * tokens / sum(times))
        steps += times
    cost, peak = session.cost(tokens // 2), watch.peak()
    result = Result("decode", subject_of(model, batch, context, tokens, repeats), before, ceilings(model), [])
    result.figures = _figures(result, rates, steps, cost, batch, peak)
    rate = result.figures[0].value
    label = f"decode b{batch}, context {context}"
    result.points = [Point(label, cost.intensity, cost.flop * rate / batch / 1e9, "workload")]
    if cost.distinct:
        result.notes.append(f"{cost.distinct:.1f} different experts per MoE layer in the first step")
    result.notes += watch.notes
    if profiled:
        session.eager = True
        found = profile(model, lambda: session.step(session.first, 0), tokens * repeats)
        result.figures += profile_figures(found, "profiled")
        result.rows = operator_rows(found)
    return result


def _figures(result: Result, rates: list[float], steps: list[float], cost: Cost, batch: int, peak: int | None) -> list[Figure]:
    best = result.best
    rate = measured("decode", rates, "tokens/s", bound="read")
    second = batch / rate.value
    limit = cost.seconds(best.read_gb_s, best.gflop_s)
    bound = cost.bound(best.read_gb_s, best.gflop_s)
    figures = [
        Figure(rate.name, rate.value, rate.unit, rate.low, rate.high, "more", bound),  # type: ignore[arg-type]
        measured("step", [1e3 * s for s in steps], "ms", "less", bound),  # type: ignore[arg-type]
        Figure("bytes of a step", cost.nbytes / 1e6, "MB", better="less"),
        Figure("of these, cache", cost.cache_bytes / 1e6, "MB", better="less"),
        Figure("FLOP of a step", cost.flop / 1e9, "GFLOP"),
        Figure("read", cost.nbytes / second / 1e9, "GB/s", better="more", bound="read"),
        Figure("roofline of a step", limit * 1e3, "ms", better="less"),
        Figure("share of the roofline", limit / second, "", better="more"),
    ]
    if peak is not None:
        figures.append(Figure("peak memory", peak / 1e9, "GB", better="less"))
    return figures
