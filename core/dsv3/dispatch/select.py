"""Eligibility and order of kernels for a call. All reasons are kept, not only the first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from dsv3.dispatch.choose import Source
from dsv3.dispatch.guard import CALL_LIMIT_S, guarded, root_cause
from dsv3.dispatch.registration import load_target, registered_kernels
from dsv3.dispatch.site import Example
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
    """A kernel of a source, with the reasons against it (none: eligible)."""

    source: Source
    kernel: Kernel
    reasons: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.source.name}.{self.kernel.name}"


def rank(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Order inside a backend: priority, then the number of narrowing needs, then name."""
    return sorted(kernels, key=lambda k: (-k.priority, -len(k.needs), k.name))


class Catalogue:
    """The kernels of one source by operator, in order, with memory of what was found eligible."""

    def __init__(self, source: Source) -> None:
        self.source = source
        by_op: dict[str, list[Kernel]] = {}
        for kernel in registered_kernels(source.backend, source.device):
            by_op.setdefault(kernel.op, []).append(kernel)
        self.kernels: Mapping[str, list[Kernel]] = {op: rank(found) for op, found in by_op.items()}
        self._accepts: dict[str, Callable[[Call], str | None]] = {}
        self._refusals: dict[Hashable, tuple[str, ...]] = {}

    def candidates(self, op: str, calls: Iterable[Example], bucket: Bucket) -> list[Candidate]:
        """Every kernel for the operator, with all the reasons against it over all the calls at both ends of the bucket."""
        calls = list(calls)
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
            found.append(Candidate(self.source, kernel, tuple(reasons)))
        return found

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

    Read off the kernels' needs; a kernel with an `accepts` of its own may change anywhere, so for one of those the
    powers of two are added, and it is asked about both ends of a bucket.
    """
    catalogues = list(catalogues)
    edges: set[int] = set()
    for example in calls:
        for catalogue in catalogues:
            for kernel in catalogue.kernels.get(example.op, ()):
                edges |= _edges(kernel, example)
    return sorted(e for e in edges if 1 <= e < UNBOUNDED)


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
