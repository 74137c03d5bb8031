"""Eligibility and order of kernels for a call. All reasons are kept, not only the first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv3.dispatch.choose import Source
from dsv3.dispatch.configs import Config, ConfigTable, config_table
from dsv3.dispatch.guard import CALL_LIMIT_S, guarded, root_cause
from dsv3.dispatch.registration import load_target, registered_kernels
from dsv3.dispatch.site import Example
from dsv3.dispatch.tuning.fingerprint import config_id
from dsv3.dispatch.tuning.order import by_cost
from dsv3.dispatch.tuning.tuned import Cost, Tuned, read_tuned
from dsv3.errors import BackendUnavailable
from dsv3.ops import spec
from dsv3.plugin import Call, Kernel
from dsv3.plugin.needs import AtLeast, Divides, _Bound, merge_alternatives

# "Any number of tokens": more than a step ever has.
UNBOUNDED = 1 << 20
Bucket = tuple[int, int]


class NoKernel(BackendUnavailable):
    """Not even the reference can run an operator."""


@dataclass(frozen=True)
class Candidate:
    """A kernel of a source, with the reasons against it (none: eligible). config: what it is bound with. cost: as measured
    for the very calls; ranked: it decided the order. wrong: what tuning found, which a pin overrules."""

    source: Source
    kernel: Kernel
    reasons: tuple[str, ...] = ()
    config: Config | None = None
    cost: Cost | None = None
    ranked: bool = False
    wrong: str = ""

    @property
    def name(self) -> str:
        return f"{self.source.name}.{self.kernel.name}"


def rank(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Order inside a backend: priority, then the number of narrowing needs, then name."""
    return sorted(kernels, key=lambda k: (-k.priority, -len(k.needs), k.name))


class Catalogue:
    """The kernels of one source by operator, in order, with memory of what was found eligible. tuning: the folder of
    measurements, read once; None: none are looked for."""

    def __init__(self, source: Source, tuning: Path | None = None) -> None:
        self.source = source
        by_op: dict[str, list[Kernel]] = {}
        kernels = registered_kernels(source.backend, source.device)
        for kernel in kernels:
            by_op.setdefault(kernel.op, []).append(kernel)
        self.kernels: Mapping[str, list[Kernel]] = {op: rank(found) for op, found in by_op.items()}
        self.tuned: Tuned | None = None if tuning is None else read_tuned(source, kernels, tuning)
        self._accepts: dict[str, Callable[[Call], str | None]] = {}
        self._candidates: dict[Hashable, tuple[Candidate, ...]] = {}
        self._refusals: dict[Hashable, tuple[str, ...]] = {}

    def candidates(self, op: str, calls: Iterable[Example], bucket: Bucket) -> list[Candidate]:
        """Every kernel for the operator, with all the reasons against it over all the calls at both ends of the bucket; in the
        order of measured cost where that is known, else of `rank`."""
        calls = list(calls)
        key = (op, bucket, *(call.key for call in calls))
        if key not in self._candidates:
            self._candidates[key] = tuple(self._judged(op, calls, bucket))
        return list(self._candidates[key])

    def _judged(self, op: str, calls: list[Example], bucket: Bucket) -> list[Candidate]:
        found = []
        for position, kernel in enumerate(self.kernels.get(op, ())):
            reasons: dict[str, None] = {}
            for example in calls:
                varying = _varying(kernel, example, bucket)
                reasons.update(dict.fromkeys(varying))
                for tokens in () if varying else dict.fromkeys(bucket):
                    # The layers of a model ask the same questions many times over.
                    key = (op, position, tokens, example.key)
                    if key not in self._refusals:
                        call = Call(op, example.dims(tokens), example.dtypes, example.quant, self.source.device)
                        self._refusals[key] = tuple(self.refusals(kernel, call))
                    reasons.update(dict.fromkeys(self._refusals[key]))
            config = None
            if (table := self.table(kernel)) is not None:
                config = table.default(self.source.device.arch, calls, bucket)
                if config is None:
                    reasons[f"its table {table.where} has no configuration for {self.source.device.arch} and this call"] = None
            found.append(Candidate(self.source, kernel, tuple(reasons), config))
        return by_cost(self, found, calls, bucket) if self.tuned else found

    def table(self, kernel: Kernel) -> ConfigTable | None:
        """The kernel's meta-parameters; BadRegistration if its table is not one."""
        return config_table(kernel, self.source.name)

    def configs(self, kernel: Kernel) -> list[Config | None]:
        """What tuning tries with the kernel: its configurations for the device, or None for one without any."""
        table = self.table(kernel)
        return [None] if table is None else list(table.candidates(self.source.device.arch))

    def refusals(self, kernel: Kernel, call: Call) -> list[str]:
        """All reasons why the kernel does not take the call."""
        capability = self.source.capability
        needs = merge_alternatives(kernel.needs)
        reasons = [reason for need in needs if (reason := need.refuse(call, capability))]
        reasons += [
            f"{name} is {found}, which {self.source.device} does not have"
            for name, found in _activations(call)
            if found not in capability.dtypes
        ]
        if kernel.accepts and not reasons:
            answer = guarded(functools.partial(self._accept(kernel), call), CALL_LIMIT_S)
            if answer.error is not None:
                reasons.append(f"its accepts function failed: {root_cause(answer.error)}")
            elif isinstance(answer.value, str):
                reasons.append(answer.value)
            elif answer.value is not None:
                reasons.append(f"its accepts function answered {answer.value!r}, neither None nor a reason")
        return reasons

    def _accept(self, kernel: Kernel) -> Callable[[Call], str | None]:
        assert kernel.accepts is not None
        if kernel.accepts not in self._accepts:
            self._accepts[kernel.accepts] = load_target(kernel.accepts, f"accepts of {self.source.name}.{kernel.name}")
        return self._accepts[kernel.accepts]


_REAL = frozenset({"float64", "float32", "bfloat16", "float16"})


def _activations(call: Call) -> Iterator[tuple[str, str]]:
    """What must be among a device's dtypes: the activation, and the output where an argument names its dtype. Weights,
    tables and quantised operands have dtypes of their own."""
    activation = spec(call.op).activation
    names = [activation] if activation else ["cache"]
    for name in [*names, "dtype", "out_dtype"]:
        if (found := call.dtypes.get(name)) in _REAL:
            yield name, found


def _varying(kernel: Kernel, example: Example, bucket: Bucket) -> list[str]:
    """Needs that hold for some sizes of a bucket and not for others, though they may hold at both its ends."""
    first, last = bucket
    found = []
    for need in kernel.needs:
        if not isinstance(need, _Bound) or need.dim not in example.slope:
            continue
        slope, base = example.slope[need.dim], example.base[need.dim]
        if isinstance(need, Divides) and slope and (first != last or need.dim in example.ragged):
            if slope % need.value or base % need.value:
                found.append(f"needs {need.dim} a multiple of {need.value}; it varies with the number of tokens")
        elif isinstance(need, AtLeast) and need.dim in example.ragged and need.value > 1:
            found.append(f"needs {need.dim} at least {need.value}; it may be 1 in a step of any size")
    return found


def bucket_edges(catalogues: Iterable[Catalogue], calls: Iterable[Example]) -> list[int]:
    """Token counts at which some kernel's eligibility can change, ascending: the last of each bucket but the final one.

    Read off the kernels' needs and tables, and off measurements where another candidate becomes the fastest; a kernel with an
    `accepts` of its own may change anywhere, so for one of those the powers of two are added, and it is asked about both ends
    of a bucket.
    """
    catalogues = list(catalogues)
    edges: set[int] = set()
    seen: set[Hashable] = set()
    for example in calls:
        if (example.op, example.key) in seen:
            continue
        seen.add((example.op, example.key))
        for catalogue in catalogues:
            for kernel in catalogue.kernels.get(example.op, ()):
                edges |= _edges(kernel, example)
                if (table := catalogue.table(kernel)) is not None:
                    edges |= table.edges(example)
            if catalogue.tuned:
                edges |= catalogue.tuned.edges(example, functools.partial(_best, catalogue, example))
    return sorted(e for e in edges if 1 <= e < UNBOUNDED)


def _best(catalogue: Catalogue, example: Example, tokens: int) -> tuple[str, str] | None:
    """Kernel and configuration that a step of this many tokens would get by measured cost; None where that does not decide."""
    found = catalogue.candidates(example.op, [example], (tokens, tokens))
    first = next((c for c in found if not c.reasons and not c.wrong), None)
    return None if first is None or first.cost is None else (first.name, config_id(first.config))


def _edges(kernel: Kernel, example: Example) -> set[int]:
    edges: set[int] = set()
    if kernel.accepts:
        edges |= {1 << n for n in range(14)}
    for need in kernel.needs:
        dim, value = getattr(need, "dim", None), getattr(need, "value", None)
        if not isinstance(dim, str) or not isinstance(value, int) or not example.slope.get(dim):
            continue
        slope = example.slope[dim]
        kind = type(need).__name__
        last = (value - example.base[dim]) // slope if kind == "AtMost" else (value - 1 - example.base[dim]) // slope
        if kind in ("AtMost", "AtLeast"):
            edges.add(last)
    return edges


def buckets(edges: list[int]) -> list[Bucket]:
    """[4, 64] -> [(1, 4), (5, 64), (65, UNBOUNDED)]."""
    starts = [1, *(e + 1 for e in edges)]
    return list(zip(starts, [*edges, UNBOUNDED], strict=True))


def span_text(bucket: Bucket) -> str:
    """ "1", "3-4", ">=1025", "any"."""
    low, high = bucket
    if high >= UNBOUNDED:
        return "any" if low == 1 else f">={low}"
    return str(low) if low == high else f"{low}-{high}"
