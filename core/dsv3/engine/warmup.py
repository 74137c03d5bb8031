"""What compiles at a first call, done before the first request: all kernels in all buckets, and the graphs of decode steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from dsv3.checkpoint.progress import steps_progress
from dsv3.dispatch.select import span_text
from dsv3.engine.cache import PagedCache, Run
from dsv3.engine.engine import PREFILL_TOKENS
from dsv3.engine.graphs import MIN_KEYS, MOST_EXACT, Size, power

SPARE = 3  # slots that a request has behind its last token, with one draft at a time

if TYPE_CHECKING:
    from dsv3.engine.model import Model

_Work = tuple[str, Callable[[], object]]


def warm_up(model: Model, batch: int, tokens: int, draft: bool, progress: bool | None) -> None:
    """Prefill of every bucket that a prompt can fall into, decode of every bucket that a batch can, and what graphs there are.

    batch: sequences. tokens: of each at most, for which the cache and graphs are made. draft: with the MTP module too.
    """
    queries = 2 if draft else 1
    work = [*_prefills(model, draft), *_decodes(model, batch, queries, draft)]
    graphs = model.graphs.offered()
    sizes = _sizes(batch, queries, tokens, model.graphs.exactly) if graphs else []
    with steps_progress("warming up", len(work) + len(sizes), progress) as advance:
        for text, run in work:
            advance(text)
            run()
        if not sizes:
            return
        engine = model.engine
        engine.reserve([tokens + SPARE] * batch)
        for size in sizes:
            advance(f"graph of {size.batch} sequences, {size.queries} tokens each, up to {size.max_k} cached")
            model.capture(engine.cache, size)


def _sizes(batch: int, queries: int, tokens: int, exactly: bool) -> list[Size]:
    """Every size of graph that decoding these can take."""
    keys, longest = [MIN_KEYS], power(tokens + 1)
    while keys[-1] < longest:
        keys.append(2 * keys[-1])
    batches = range(1, batch + 1) if exactly else [1 << n for n in range(power(batch).bit_length())]
    found = [Size(b, q, k) for k in keys for b in batches for q in range(1, queries + 1)]
    return [size for size in found if size.rows <= MOST_EXACT] if exactly else found


def _prefills(model: Model, draft: bool) -> list[_Work]:
    """A bucket that no step is large enough for may still be that of the cached keys: then one token after so many."""
    found: list[_Work] = []
    for span in model.placement().binding.buckets:
        first = span[0]
        if first >= model.config.max_position_embeddings:
            break
        count = first if first <= PREFILL_TOKENS else 1

        def run(first: int = first, count: int = count) -> None:
            cache = model.new_cache([first + 2])
            runs = [Run(0, [0] * count, first - count)]
            _, states = model.forward(cache, runs, False)
            if draft:
                model.mtp_forward(cache, [Run(0, [0] * count, first - count + 1)], states, False)

        found.append((f"prefill, {span_text(span)} tokens", run))
    return found


def _decodes(model: Model, batch: int, queries: int, draft: bool) -> list[_Work]:
    found: list[_Work] = []
    for span in model.placement().binding.buckets:
        count = span[0]
        if count > batch * queries:
            break

        def run(count: int = count) -> None:
            rows = min(count, batch)
            cache = model.new_cache([4] * rows)
            runs = [Run(row, [0] * (1 + (row < count - rows)), 1) for row in range(rows)]
            hidden, states = model.forward(cache, runs, True)
            if draft:
                _draft(model, cache, runs, states)
            model.draw(model.head(hidden), [0] * count, [0] * count, [1.0] * count)

        found.append((f"decode, {span_text(span)} tokens", run))
    return found


def _draft(model: Model, cache: PagedCache, runs: list[Run], states: torch.Tensor) -> None:
    model.mtp_forward(cache, [Run(run.row, run.ids, run.position + 1) for run in runs], states, True)
