"""Tokens per second of reading prompts, against the machine's matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsv3.bench import memory
from dsv3.bench.ceiling import Ceilings
from dsv3.bench.cost import Cost
from dsv3.bench.results import Figure, Point, Result, measured, subject_of
from dsv3.bench.session import Session
from dsv3.engine.model import Model


def bench_prefill(
    load: Callable[[], Model],
    ceilings: Callable[[Model], Ceilings],
    *,
    batch: int,
    contexts: Sequence[int],
    repeats: int,
) -> Result:
    """Prompts of each length, `repeats` times after a turn that is not counted, each to its first token. The subject's context
    is the longest."""
    watch = memory.Watch()
    model = load()
    with watch.aside():
        before = ceilings(model)
    runs: list[tuple[int, list[float], Cost]] = []
    for context in contexts:
        session = Session(model, batch, context, 1)
        session.prefill()
        runs.append((context, [session.prefill() for _ in range(repeats)], session.prefill_cost()))
    peak = watch.peak()
    result = Result("prefill", subject_of(model, batch, max(contexts), 0, repeats), before, ceilings(model), [])
    for context, times, cost in runs:
        result.figures += _figures(result.best, context, batch, times, cost)
        middle = batch * context / result.figures[-4].value
        result.points.append(Point(f"prefill {context}", cost.intensity, cost.flop / middle / 1e9, "workload"))
    if peak is not None:
        result.figures.append(Figure("peak memory", peak / 1e9, "GB", better="less"))
    result.notes += watch.notes
    return result


def _figures(best: Ceilings, context: int, batch: int, times: list[float], cost: Cost) -> list[Figure]:
    """The first is the rate."""
    rate = measured(f"prefill {context}", [batch * context / t for t in times], "tokens/s", bound="matmul")
    seconds, limit = batch * context / rate.value, cost.seconds(best.read_gb_s, best.gflop_s)
    products = cost.flop / seconds / 1e9
    return [
        rate,
        Figure(f"prefill {context}, products", products, "GFLOP/s", better="more", bound="matmul"),
        Figure(f"prefill {context}, share of products", products / best.gflop_s, "", better="more"),
        Figure(f"prefill {context}, share of the roofline", limit / seconds, "", better="more"),
    ]
