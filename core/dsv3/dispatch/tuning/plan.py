"""What there is to measure: every call of a model, in every token bucket, that more than one candidate could serve."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dsv3.dispatch.node import Node
from dsv3.dispatch.select import UNBOUNDED, Bucket, Candidate, Catalogue, bucket_edges, buckets
from dsv3.dispatch.site import Example, Sites, examples
from dsv3.dispatch.tuning.tuned import MOST_TOKENS, representative


@dataclass(frozen=True)
class Task:
    """One call in one bucket. candidates: kernel and configuration, the default order's first choice first. sites: how many
    places in the model make the call. tokens: for which number of them it is measured."""

    example: Example
    span: Bucket
    tokens: int
    candidates: tuple[Candidate, ...]
    sites: int

    @property
    def op(self) -> str:
        return self.example.op

    @property
    def value(self) -> int:
        """What there is to gain, roughly: bytes of weights read, at all its places; rows where it has no weights."""
        weights = sum(w.nbytes for w in self.example.weights.values())
        return self.sites * max(weights, sum(self.example.dims(1).values()))


@dataclass
class Plan:
    """The tasks, and how many calls have nothing to choose between."""

    tasks: list[Task] = field(default_factory=list)
    single: int = 0


def plan(catalogue: Catalogue, sites: Sites, only: Collection[str] = ()) -> Plan:
    """The tasks of a recorded graph: steps of one token first, then by value. only: operators to keep, none given: all."""
    found = Plan()
    tasks: dict[Hashable, Task] = {}
    single: set[Hashable] = set()
    for node, count in _distinct(sites):
        for example, span, at in _calls(catalogue, node, []):
            if only and example.op not in only:
                continue
            key = (example.op, example.key, span)
            if key in tasks:
                tasks[key] = replace(tasks[key], sites=tasks[key].sites + count)
                continue
            candidates = _candidates(catalogue, example, span)
            if len(candidates) > 1:
                tasks[key] = Task(example, span, at, tuple(candidates), count)
            elif candidates:
                single.add((example.op, example.key))
    found.tasks = sorted(tasks.values(), key=lambda t: (t.tokens > 1, -t.value, t.op, repr(t.example.key), t.tokens))
    found.single = len(single - {(t.op, t.example.key) for t in found.tasks})
    return found


def _distinct(sites: Sites) -> Iterator[tuple[Node, int]]:
    """The recorded calls, those of equal layers once, with how often they occur."""
    found: dict[Hashable, tuple[Node, int]] = {}
    for site in sites.all:
        if not site.seen[0]:
            continue
        node = Node(site.op, examples(site.op, *site.seen))
        key = (site.op, tuple(call.key for call in node.calls), tuple(call.shape_key for call in node.calls))
        first, count = found.get(key, (node, 0))
        found[key] = (first, count + 1)
    yield from found.values()


def _calls(catalogue: Catalogue, node: Node, above: list[Node]) -> Iterator[tuple[Example, Bucket, int]]:
    """(call, bucket, tokens) of this operator and those in its decomposition, where no kernel takes a whole around them."""
    for example in node.calls:
        for span in _spans(catalogue, example):
            at = representative(span)
            if at is not None and not any(_whole(catalogue, outer, at) for outer in above):
                yield example, span, at
    for child in node.children.values():
        yield from _calls(catalogue, child, [*above, node])


def _whole(catalogue: Catalogue, node: Node, tokens: int) -> bool:
    """Whether kernels take all calls of a composite whole."""
    return all(
        any(not c.reasons and not c.wrong for c in catalogue.candidates(node.op, group.calls, (tokens, tokens)))
        for group in node.groups.values()
    )


def _spans(catalogue: Catalogue, example: Example) -> list[Bucket]:
    """Token buckets to measure separately: powers of two, and wherever some kernel's eligibility changes."""
    if not any(example.slope.values()):
        return [(1, UNBOUNDED)]
    powers = {1 << n for n in range(MOST_TOKENS.bit_length() - 1)}
    return buckets(sorted({*bucket_edges([catalogue], [example]), *powers}))


def _candidates(catalogue: Catalogue, example: Example, span: Bucket) -> list[Candidate]:
    """Eligible kernels in the default order, each with its default configuration first, then the others of its table."""
    order = [kernel.name for kernel in catalogue.kernels.get(example.op, ())]
    found = [c for c in catalogue.candidates(example.op, [example], span) if not c.reasons]
    return [
        replace(c, config=config, cost=None, ranked=False, wrong="")
        for c in sorted(found, key=lambda c: order.index(c.kernel.name))
        for config in _default_first(catalogue, c, example, span)
    ]


def _default_first(catalogue: Catalogue, candidate: Candidate, example: Example, span: Bucket) -> Iterable[Any]:
    table = catalogue.table(candidate.kernel)
    if table is None:
        return [None]
    default = table.default(catalogue.source.device.arch, [example], span)
    return [default, *(c for c in catalogue.configs(candidate.kernel) if c != default)]
