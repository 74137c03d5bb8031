"""What was decided: the kernel, parts or cases of every call site and bucket, and what became of it while running."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple

from dsv3.dispatch.blame import blamed
from dsv3.dispatch.check import Checker
from dsv3.dispatch.select import Bucket, Candidate
from dsv3.plugin import Kernel

if TYPE_CHECKING:
    from dsv3.dispatch.firstcall import Slot


class Layout(NamedTuple):
    """A layout's name, and the backend that can prepare it."""

    name: str
    backend: str = ""


CANONICAL = Layout("canonical")


@dataclass(eq=False)
class Decision:
    """What one operator does at one site in one bucket. Exactly one of kernel, parts, cases is set.

    kernel: a kernel taken whole. parts: a composite through its decomposition. cases: calls of different shapes inside one
    decomposition that were decided differently, by `switch_key`. It changes only when a kernel is quarantined.
    """

    op: str
    why: str
    rejected: tuple[tuple[str, str], ...]
    kernel: Candidate | None = None
    parts: Mapping[str, Decision] = field(default_factory=dict)
    cases: Mapping[tuple[int, ...], Decision] = field(default_factory=dict)
    fallback: bool = False

    def walk(self) -> Iterator[Decision]:
        """This decision and all below it."""
        yield self
        for inner in (*self.parts.values(), *self.cases.values()):
            yield from inner.walk()

    def become(self, other: Decision) -> None:
        """Take over everything from another decision: whoever holds this one sees it."""
        for f in fields(self):
            setattr(self, f.name, getattr(other, f.name))

    @property
    def pinned(self) -> bool:
        return self.why == "pinned"

    @property
    def name(self) -> str:
        """For programs: "backend.kernel", or "composite.part+part"."""
        if self.kernel:
            return self.kernel.name
        return f"composite.{'+'.join(self.parts)}" if self.parts else "composite.by_shape"


@dataclass(frozen=True)
class Quarantine:
    """A kernel that failed at its first call, and what runs instead for calls of these shapes."""

    op: str
    kernel: str
    cause: str
    site: str
    shapes: str
    instead: str

    def __str__(self) -> str:
        return (
            f"kernel {self.kernel} is quarantined: {self.cause} (first call of {self.op} at {self.site}, {self.shapes}); "
            f"{self.instead} runs instead wherever {self.op} has these shapes"
        )


@dataclass
class Binding:
    """The outcome: buckets, decisions per site and bucket, the layout and backend of each weight that is not canonical, and all
    kernels that were on offer, by backend and operator. quarantined: what failed while running. checker: compares every call
    with its reference; None unless asked for. settled: while a step is being captured no kernel takes another's place.
    slots: the places of all bound kernels, see `firstcall.Slot`."""

    buckets: list[Bucket]
    decisions: list[tuple[str, str, list[Decision]]]
    layouts: dict[int, Layout]
    offered: Mapping[str, Mapping[str, list[Kernel]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    quarantined: list[Quarantine] = field(default_factory=list)
    checker: Checker | None = None
    settled: bool = False
    slots: list[Slot] = field(default_factory=list)

    def bucket(self, tokens: int) -> int:
        """Index of the bucket that a step of this many tokens falls into; looked up once per step."""
        for index, (_, last) in enumerate(self.buckets):
            if tokens <= last:
                return index
        return len(self.buckets) - 1

    def blame(self, error: BaseException) -> BaseException:
        """The error to raise for one that came out of a step: KernelFailed naming kernel, operator and site if a bound kernel
        raised it, or all kernels if a device reports late what one of them did; else the error itself."""
        return blamed(error, {(op, where): plan for op, where, plan in self.decisions})
