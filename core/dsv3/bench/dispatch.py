"""What a bound call costs beyond the direct call of the same function with the same keyword arguments, and that steps select
nothing.

Overheads are differences of two short loops that run in turns, many times. Kernels that do nothing show them; beside a real
kernel they are lost in its own variation, so that one is shown for comparison and not judged. The bar: under 1 us.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dsv3.bench.noop import NoOp, grouped_linear, rms_norm, silu_mul
from dsv3.dispatch import firstcall
from dsv3.dispatch.bind import Binder
from dsv3.dispatch.choose import Source, named
from dsv3.dispatch.firstcall import Assembly, FirstCall
from dsv3.dispatch.select import Catalogue
from dsv3.dispatch.site import Sites
from dsv3.engine.model import Model
from dsv3.engine.trace import trace
from dsv3.errors import UsageError
from dsv3.graph.config import ModelConfig
from dsv3.graph.mlp import Moe
from dsv3.graph.transformer import Transformer
from dsv3.graph.weights import MoeWeights, meta_weights
from dsv3.graph.yarn import cos_sin_table
from dsv3.plugin import CacheSpec

BAR_NS = 1000.0
STEPS = 32
_WARMING = 10  # turns that are not counted
_PROMPT = (1, 2, 3, 4)


@dataclass(frozen=True)
class Row:
    """Nanoseconds per call: of the direct call (median), and the overhead's median, quartiles and number of repeats."""

    what: str
    kernel: str
    direct_ns: float
    overhead_ns: float
    low_ns: float
    high_ns: float
    repeats: int
    calls: int
    judged: bool = True


@dataclass(frozen=True)
class Figures:
    """rows; calls of the functions that select, bind and guard: while loading and warming up, where there are many, and over
    `steps` decode steps, where there must be none."""

    rows: list[Row]
    loading: dict[str, int]
    decoding: dict[str, int]
    steps: int
    placement: str
    bar_ns: float = BAR_NS

    @property
    def failures(self) -> list[str]:
        """What is not as it must be."""
        slow = [
            f"{r.what}: {r.overhead_ns:.0f} ns is over the bar" for r in self.rows if r.judged and r.overhead_ns >= self.bar_ns
        ]
        work = [f"{n} calls of {name} while decoding" for name, n in self.decoding.items() if n]
        return slow + work

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "failures": self.failures, "torch": torch.__version__}


def measure(load: Callable[[], Model], repeats: int = 201) -> Figures:
    """All figures for the model that `load` gives, which must have weights and a MoE layer."""
    with counted() as loading:
        model = load()
        _decode(model, STEPS)
    with counted() as decoding:
        _decode(model, STEPS)
    rows = [*_noop_rows(model.config, repeats), _real_row(model, repeats)]
    return Figures(rows, dict(loading), dict(decoding), STEPS, model.placement().summary)


def _decode(model: Model, steps: int) -> None:
    model.generate(list(_PROMPT), max_new_tokens=steps, ignore_eos=True)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """While open, calls of everything that selects, binds or guards are counted."""
    counts: Counter[str] = Counter()
    watched = [(Catalogue, "candidates"), (Catalogue, "refusals"), (Binder, "bind"), (Binder, "redecide"),
               (Assembly, "place"), (FirstCall, "__call__"), (firstcall, "resolve")]  # fmt: skip
    kept = [(owner, name, getattr(owner, name)) for owner, name in watched]
    for owner, name, function in kept:
        what = f"{getattr(owner, '__qualname__', 'registration')}.{name}"
        counts[what] = 0
        setattr(owner, name, _counting(function, counts, what))
    try:
        yield counts
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def _counting(function: Callable[..., Any], counts: Counter[str], what: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[what] += 1
        return function(*args, **kwargs)

    return call


def _real_row(model: Model, repeats: int) -> Row:
    """A kernel of the model's own, at the site and with the arguments of a decode step."""
    site = model.graph.blocks[0].first_norm
    bucket = model.placement().binding.bucket(1)
    kernel, seen = site[bucket], []

    def spy(**arguments: Any) -> Any:
        seen.append(arguments)
        return kernel(**arguments)

    site[bucket] = spy
    try:
        _decode(model, 2)
    finally:
        site[bucket] = kernel
    last = seen[-1]
    with torch.inference_mode():
        row = _row("site", "the model's", kernel, lambda n: _at_site(site, bucket, last, n), last, repeats, 20)
    return replace(row, judged=False)


def _noop_rows(config: ModelConfig, repeats: int) -> list[Row]:
    """The three forms in which a kernel is bound, on a graph of the model's shapes with kernels that do nothing."""
    graph, moe, weights = _noop_graph(config)
    site, x = graph.blocks[0].first_norm, torch.zeros(1, config.hidden_size)
    parts = moe.moe[0].args[0].fused_experts.args[0]
    norm = {"x": x, "weight": weights.gate, "eps": 1e-6}
    act = {"x": torch.zeros(1, weights.w13.shape[1])}
    grouped = {"x": x, "w": weights.w13, "offsets": torch.zeros(weights.w13.shape[0] + 1, dtype=torch.int32)}
    site[0](**norm)
    parts.silu_mul(**act)
    parts.grouped_linear(**grouped)
    parts.grouped_linear(**{**grouped, "w": weights.w2})
    nothing, calls = "does nothing", 1000
    return [
        _row("site", nothing, rms_norm, lambda n: _at_site(site, 0, norm, n), norm, repeats, calls),
        _row("part of a composite", nothing, silu_mul, lambda n: _as_part(parts, act, n), act, repeats, calls),
        _row("part, by shape", nothing, grouped_linear, lambda n: _by_shape(parts, grouped, n), grouped, repeats, calls),
    ]


def _noop_graph(config: ModelConfig) -> tuple[Transformer, Moe, MoeWeights]:
    weights = meta_weights(config, torch.float32, "none", cos_sin_table(config, "meta"), mtp=False)
    sites = Sites()
    graph = Transformer(config, weights, sites)
    sample = sites("gumbel_argmax", "sampler")
    found = next((b.mlp for b in graph.blocks if isinstance(b.mlp, Moe)), None)
    if found is None or found.w.w2.shape[2] >= config.hidden_size:
        raise UsageError("this measures a model with experts narrower than its hidden size; name another with --model")
    backend = NoOp(found.w.w2.shape[2])
    (device,) = backend.devices()
    source = Source(backend, device, backend.capability, "dsv3 bench")
    for run in (0, 1):
        with sites.recording(run):
            trace(graph, config, torch.float32, CacheSpec(64, "float32"), run + 1, sample, sites)
    Binder(Catalogue(source), Catalogue(named("reference", "cpu", None)), {}).bind(sites)
    return graph, found, found.w


def _row(
    what: str,
    kernel: str,
    function: Callable[..., Any],
    bound: Callable[[int], int],
    arguments: Mapping[str, Any],
    repeats: int,
    calls: int,
) -> Row:
    """Direct and bound loops in turns; the overhead is the difference within a turn."""
    direct, over = [], []
    for turn in range(repeats + _WARMING):
        one, other = _direct(function, arguments, calls) / calls, bound(calls) / calls
        if turn >= _WARMING:
            direct.append(one)
            over.append(other - one)
    low, middle, high = statistics.quantiles(over, n=4)
    return Row(what, kernel, statistics.median(direct), middle, low, high, repeats, calls)


# One loop per form: a call through anything common would be part of what is measured.


def _direct(function: Callable[..., Any], arguments: Mapping[str, Any], n: int) -> int:
    start = time.perf_counter_ns()
    for _ in range(n):
        function(**arguments)
    return time.perf_counter_ns() - start


def _at_site(site: Any, bucket: int, arguments: Mapping[str, Any], n: int) -> int:
    start = time.perf_counter_ns()
    for _ in range(n):
        site[bucket](**arguments)
    return time.perf_counter_ns() - start


def _as_part(ops: Any, arguments: Mapping[str, Any], n: int) -> int:
    start = time.perf_counter_ns()
    for _ in range(n):
        ops.silu_mul(**arguments)
    return time.perf_counter_ns() - start


def _by_shape(ops: Any, arguments: Mapping[str, Any], n: int) -> int:
    start = time.perf_counter_ns()
    for _ in range(n):
        ops.grouped_linear(**arguments)
    return time.perf_counter_ns() - start
