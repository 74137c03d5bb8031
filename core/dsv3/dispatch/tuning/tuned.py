"""What the tuning database says about a source as it is now: costs for its calls, and how they order its kernels.

A measurement counts only if every condition under which it was made still holds; the others are ignored, counted and named.
Costs order the kernels of a call if all the eligible ones have been measured (or found wrong) for it: comparing a measured
kernel with one that is only said to be good would mean little. Otherwise the order is the default one. A kernel that was found
wrong for a call is not used for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.dispatch.choose import Source
from dsv3.dispatch.configs import Config
from dsv3.dispatch.site import Example
from dsv3.dispatch.tuning.database import Database, Record
from dsv3.dispatch.tuning.fingerprint import Conditions, call_id, changed, config_id, describe, device_id
from dsv3.plugin import Kernel

# Steps of more tokens are not measured: they are taken to be like this one.
MOST_TOKENS = 2048
# Times that differ by less are taken to be equal.
NOISE = 1.03
Span = tuple[int, int]


class Cost(NamedTuple):
    """Time of a call in microseconds, with which configuration, the day it was measured, and at how many tokens."""

    us: float
    config: Config | None
    day: str
    tokens: int


@dataclass(frozen=True)
class Stale:
    """A measurement that no longer counts, and why."""

    record: Record
    reason: str


def representative(span: Span) -> int | None:
    """The number of tokens that stands for a bucket: its last, or the most that is measured; None beyond that."""
    return None if span[0] > MOST_TOKENS else min(span[1], MOST_TOKENS)


def fastest(times: Sequence[float]) -> int:
    """The index of the least time; of those within the noise of measuring the first, which is the default order's choice, so
    that a model does not change kernels from bucket to bucket for nothing."""
    limit = min(times) * NOISE
    return next(i for i, t in enumerate(times) if t <= limit)


class Tuned:
    """The measurements of one source that count, by call and token span."""

    def __init__(self, source: Source, kernels: Iterable[Kernel], records: Iterable[Record], notes: Iterable[str] = ()) -> None:
        self.stale: list[Stale] = []
        self._spans: dict[str, dict[Span, dict[str, dict[str, Record]]]] = {}
        self._described: dict[Any, str] = {}
        self._notes = list(notes)
        self.fresh: list[Record] = []
        conditions = Conditions(source)
        known = {(k.op, f"{source.name}.{k.name}"): k for k in kernels}
        here = device_id(source)
        for record in records:
            name = record.key["kernel"]
            if name.partition(".")[0] != source.name or any(record.key[field] != value for field, value in here.items()):
                continue
            kernel = known.get((record.key["op"], name))
            reason = f"there is no kernel {name} now" if kernel is None else changed(record.key, conditions.of(kernel))
            if reason:
                self.stale.append(Stale(record, reason))
            else:
                self.fresh.append(record)
                self._insert(record)
        latest = {s.record.identity: s for s in self.stale}
        measured_again = {record.identity for record in self.fresh}
        self.stale = [s for identity, s in latest.items() if identity not in measured_again]

    def _insert(self, record: Record) -> None:
        key = record.key
        spans = self._spans.setdefault(call_id(key), {})
        kernels = spans.setdefault((key["tokens"][0], key["tokens"][1]), {})
        kernels.setdefault(key["kernel"], {})[config_id(key["config"])] = record

    def __bool__(self) -> bool:
        return bool(self._spans)

    @property
    def notes(self) -> list[str]:
        """Malformed lines, and stale measurements counted by reason."""
        counted = Counter(s.reason for s in self.stale)
        stale = [f"{n} tuning measurements ignored: {reason}; run dsv3 tune again" for reason, n in counted.items()]
        return [*self._notes, *stale]

    def spans(self, example: Example) -> list[Span]:
        """The token spans in which the call was measured, in order."""
        return sorted(self._spans.get(self._call(example), {}))

    def _call(self, example: Example) -> str:
        key = (example.op, example.key)
        if key not in self._described:
            self._described[key] = call_id(describe(example))
        return self._described[key]

    def record(self, example: Example, tokens: int, kernel: str, config: Config | None) -> Record | None:
        """The measurement of a candidate for a step of this many tokens."""
        for (first, last), kernels in self._spans.get(self._call(example), {}).items():
            if first <= tokens <= last and (found := kernels.get(kernel, {}).get(config_id(config))):
                return found
        return None

    def wrong(self, examples: Iterable[Example], tokens: int | None, kernel: str, config: Config | None) -> str:
        """Why the kernel must not be used for these calls; "" if nothing speaks against it. A fault found at another number of
        tokens counts, unless the result was right at this one."""
        for example in examples:
            here = None if tokens is None else self.record(example, tokens, kernel, config)
            if here is not None and not here.wrong:
                continue
            for kernels in self._spans.get(self._call(example), {}).values():
                found = kernels.get(kernel, {}).get(config_id(config))
                if found is not None and found.wrong:
                    return f"found wrong by dsv3 tune on {_day(found)}: {found.wrong}"
        return ""

    def cost(self, examples: Iterable[Example], tokens: int, kernel: str, configs: Iterable[Config | None]) -> Cost | None:
        """The least cost of the kernel over its configurations, the default first, for all the calls together; None if none
        is measured for all of them."""
        distinct = list({self._call(e): e for e in examples}.values())
        costs: list[Cost] = []
        for config in configs:
            found = [self.record(e, tokens, kernel, config) for e in distinct]
            right = [r for r in found if r is not None and not r.wrong]
            if right and len(right) == len(distinct):
                costs.append(Cost(sum(r.median_us for r in right), config, max(map(_day, right)), tokens))
        return costs[fastest([c.us for c in costs])] if costs else None

    def edges(self, example: Example, winner: Callable[[int], Any]) -> set[int]:
        """Token counts after which another candidate is the best: `winner` of a number of tokens, compared between spans."""
        found: set[int] = set()
        spans = self.spans(example)
        before: tuple[int, Any] | None = None
        for first, last in spans:
            at = representative((first, last))
            if at is None:
                continue
            best = winner(at)
            if before is None or before[0] != first - 1 or before[1] != best:
                found.add(first - 1)
                if before is not None:
                    found.add(before[0])
            before = (last, best)
        if before is not None:
            found.add(before[0])
        return found


def read_tuned(source: Source, kernels: Iterable[Kernel], folder: Path) -> Tuned:
    """The measurements for a source, from the file of its architecture. A file that is not there costs one look."""
    contents = Database(folder, source.device.arch).read()
    return Tuned(source, kernels, contents.records, contents.notes)


def _day(record: Record) -> str:
    return str(record.value.get("when", ""))[:10]
