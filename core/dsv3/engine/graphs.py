"""Decode steps as graphs that the device replays: one captured per size of step, over buffers that every step is copied into.

A step of S sequences with at most q tokens each takes the graph of `Size(batch, q, max_k)`: batch and max_k are powers of two
that it fits into; for backends that capture exactly, batch is S, and all sequences have q tokens. The graph is of batch * q
rows. Rows that a step leaves over are sequences of one token that reads slot 0 and writes nowhere: every row that a kernel sees
is then one its contract covers, with finite numbers in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dsv3.dispatch.guard import root_cause
from dsv3.dispatch.select import span_text
from dsv3.engine.cache import Indices, PagedCache, Run
from dsv3.errors import KernelFailed
from dsv3.graph.step import Step
from dsv3.graph.transformer import Transformer
from dsv3.ops import spec

if TYPE_CHECKING:
    from dsv3.dispatch.choose import Source
    from dsv3.dispatch.decision import Decision
    from dsv3.dispatch.placement import Placement

MIN_KEYS = 256
MOST_EXACT = 16  # rows of a step that is captured exactly: what is done between the kernels of a larger one hardly shows
COPIED = tuple(f.name for f in fields(Indices))  # what a replay needs anew
_ALIGN = 64  # numbers between the starts of two buffers: kernels find their tensors aligned as torch allocates them


class Size(NamedTuple):
    """Sequences, tokens of each, and cached tokens of the longest that a captured step has room for. drafting: a step of the
    first MTP module."""

    batch: int
    queries: int
    max_k: int
    drafting: bool = False

    @property
    def rows(self) -> int:
        return self.batch * self.queries


class Decoded(NamedTuple):
    """What a step gives for each of its T tokens: hidden [T, H], what an MTP module takes [T, H], logits [T, V]. They lie in
    memory that the next step overwrites."""

    hidden: Tensor
    for_mtp: Tensor
    logits: Tensor


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (max(n, 1) - 1).bit_length()


def size_of(runs: Many[Run], exactly: bool = False) -> Size | None:
    """The size of graph that a decode step over these runs takes; None where, captured exactly, it should have none."""
    longest = max(run.position + len(run.ids) for run in runs)
    most = max(len(run.ids) for run in runs)
    if exactly and (len(runs) * most > MOST_EXACT or any(len(run.ids) != most for run in runs)):
        return None
    return Size(len(runs) if exactly else power(len(runs)), most, max(MIN_KEYS, power(longest)))


def padded(found: Indices, rows: int) -> Indices:
    """The step with sequences of one token for the rows it leaves over; in all as many sequences as rows, the last without
    tokens if need be."""
    tokens, sequences = len(found.ids), len(found.seq_lens)
    spare, empty = rows - tokens, tokens - sequences
    keys = found.cu_k[-1]
    return Indices(
        ids=found.ids + [0] * spare,
        positions=found.positions + [0] * spare,
        slots=found.slots + [-1] * spare,
        block_table=found.block_table + [[0] * len(found.block_table[0]) if sequences else [0]] * (spare + empty),
        seq_lens=found.seq_lens + [1] * spare + [0] * empty,
        cu_q=[*found.cu_q, *range(tokens + 1, rows + 1), *[rows] * empty],
        cu_k=[*found.cu_k, *range(keys + 1, keys + spare + 1), *[keys + spare] * empty],
    )


class StaticStep:
    """A step whose index tensors keep their addresses. All lie in one piece of memory, so that one copy fills them."""

    def __init__(self, size: Size, page_size: int, bucket: Callable[[int], int], device: torch.device) -> None:
        rows = size.rows
        shapes: dict[str, tuple[int, ...]] = {f.name: (rows,) for f in fields(Indices)}
        shapes |= {"cu_q": (rows + 1,), "cu_k": (rows + 1,), "block_table": (rows, -(-size.max_k // page_size))}
        total = sum(_span(shape) for shape in shapes.values())
        self._host = torch.zeros(total, dtype=torch.int32)
        self._memory = self._host.to(device)  # the same where that is the host
        self._views = {name: view.numpy() for name, view in _views(self._host, shapes)}
        tensors: dict[str, Any] = dict(_views(self._memory, shapes))
        of = bucket(rows)
        self.step = Step(
            **tensors, max_q=size.queries, max_k=size.max_k, total_k=rows * size.max_k, bucket=of, bucket_k=of, absorbed=True,
            start=int(size.drafting),
        )  # fmt: skip
        self.rows = rows
        self.fill(Indices([], [], [], [], [], [0], [0]))

    def fill(self, found: Indices) -> None:
        """Copy a step into the buffers."""
        full = padded(found, self.rows)
        for name in COPIED:
            values, view = getattr(full, name), self._views[name]
            if name == "block_table":  # what lies beyond a sequence's pages is never read
                view = view[:, : len(values[0])]
            view[...] = values
        if self._memory is not self._host:
            self._memory.copy_(self._host)


def _span(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // _ALIGN) * _ALIGN


def _views(memory: Tensor, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    at = 0
    for name, shape in shapes.items():
        yield name, memory[at : at + math.prod(shape)].view(shape)
        at += _span(shape)


def _graph_safe(d: Decision) -> bool:
    """Whether what a decision itself runs, those below it aside, may be captured."""
    return d.kernel.kernel.graph_safe if d.kernel is not None else not (d.parts and spec(d.op).on_host)


@dataclass
class _Captured:
    """states [T, H]: what a step of an MTP module is given besides."""

    static: StaticStep
    replay: Callable[[], Any]
    out: list[Decoded]
    states: Tensor | None = None


class DecodeGraphs:
    """Captures decode steps and replays them, where backend and kernels allow it; what does not is a note in the placement.

    wanted: False never captures; None where the backend offers it; True also notes that it offers none. path: (operator, site)
    of all calls of a decode step.
    """

    def __init__(
        self,
        graph: Transformer,
        placement: Placement,
        source: Source,
        path: frozenset[tuple[str, str]],
        device: torch.device,
        wanted: bool | None,
    ) -> None:
        self._graph, self._placement, self._source, self._path = graph, placement, source, path
        self._device, self._wanted = device, wanted
        self._offered: bool | None = None
        self._steps = 0
        self.capturing = False
        # Who wants to look into steps asks for each so manyth to be run kernel by kernel, and finds in `looking` when it is.
        self.eager_every = 0
        self.looking = False
        self._refused: set[tuple[int, bool]] = set()  # buckets, and whether of drafts

    def offered(self) -> bool:
        """Whether steps may be captured at all. The backend is asked once, with a step of one addition."""
        if self._offered is None:
            self._offered = self._wanted is not False and self._ask()
        return self._offered

    def _ask(self) -> bool:
        if self._placement.binding.checker is not None:
            return self._unasked("every call is compared with its reference")
        if self._device.type == "meta":
            return False
        made = torch.zeros(1, device=self._device)
        made.add_(1)  # whatever a first call loads is not captured
        try:
            replay = self._source.backend.capture(lambda: made.add_(1), self._source.device)
        except (Exception, SystemExit) as error:
            self._note(f"{root_cause(error)} (capture() of backend {self._source.name!r})")
            return False
        return replay is not None or self._unasked(f"backend {self._source.name!r} captures no graphs")

    def _unasked(self, reason: str) -> bool:
        """False; a note only for who asked for graphs, for nothing is missing otherwise."""
        if self._wanted:
            self._note(reason)
        return False

    def run(self, cache: PagedCache, runs: Many[Run]) -> Decoded | None:
        """The step by replay; None where it has to run eagerly."""
        size = size_of(runs, self.exactly)
        captured = None if size is None or self._looked_at() else self.captured(cache, size)
        if captured is None:
            return None
        captured.static.fill(cache.indices(runs))
        captured.replay()
        tokens = sum(len(run.ids) for run in runs)
        hidden, for_mtp, logits = captured.out[0]
        return Decoded(hidden[:tokens], for_mtp[:tokens], logits[:tokens])

    def draft(self, cache: PagedCache, runs: Many[Run], states: Tensor) -> Tensor | None:
        """`Executor.mtp_forward`, absorbed, by replay; None where it has to run eagerly. Only for backends that capture
        exactly: a spare row would have no key to attend to."""
        size = size_of(runs, True) if self.exactly else None
        captured = None if size is None else self.captured(cache, size._replace(drafting=True))
        if captured is None or captured.states is None:
            return None
        captured.static.fill(cache.indices(runs, start=1))
        captured.states.copy_(states)
        captured.replay()
        return captured.out[0].hidden

    def _looked_at(self) -> bool:
        self._steps += 1
        self.looking = self.eager_every > 0 and self._steps % self.eager_every == 0 and self.offered()
        return self.looking

    @property
    def exactly(self) -> bool:
        """See `BackendBase.captures_exactly`."""
        return bool(getattr(self._source.backend, "captures_exactly", False))

    def captured(self, cache: PagedCache, size: Size) -> _Captured | None:
        """The graph of this size over the cache, captured now if it was not before; None where there is none."""
        if not self.offered() or (self._placement.binding.bucket(size.rows), size.drafting) in self._refused:
            return None
        if size not in cache.captured:
            try:
                made = self._capture(cache, size)
            except (Exception, SystemExit) as error:
                what = "drafts" if size.drafting else "a step"
                if size.drafting:
                    self._refused |= {(bucket, True) for bucket in range(len(self._placement.binding.buckets))}
                else:
                    self._offered = False
                self._note(f"{self._cause(error)} (capturing {what} of {size.batch} sequences)")
                return None
            if made is None:
                return None
            cache.captured[size] = made
        found: _Captured = cache.captured[size]
        return found

    def _capture(self, cache: PagedCache, size: Size) -> _Captured | None:
        """The step is run before: kernels compile, and one that fails is replaced. No token has a slot: nothing is written."""
        if self._refuses(size.rows, size.drafting):
            return None
        binding = self._placement.binding
        static = StaticStep(size, cache.page_size, binding.bucket, self._device)
        out: list[Decoded] = []
        layers = cache.layers
        states = None
        if size.drafting:
            states = torch.zeros(
                size.rows, self._graph.config.hidden_size, dtype=self._graph.w.embed.dtype, device=self._device
            )

        def step() -> None:
            if states is not None:
                hidden = self._graph.mtp_forward(static.step, states, layers)
                out[:] = [Decoded(hidden, hidden, hidden)]
                return
            hidden, for_mtp = self._graph.forward(static.step, layers)
            out[:] = [Decoded(hidden, for_mtp, self._graph.logits(hidden, static.step.bucket))]

        self.capturing = True
        try:
            step()
        finally:
            self.capturing = False
        if self._refuses(size.rows, size.drafting):  # what has taken over from a kernel that failed may be none
            return None
        binding.settled = self.capturing = True
        try:
            replay = self._source.backend.capture(step, self._source.device)
        finally:
            binding.settled = self.capturing = False
        if not callable(replay):
            raise TypeError(f"capture() of backend {self._source.name!r} answered {replay!r}, which cannot be called")
        return _Captured(static, replay, out, states)

    def obstacles(self, rows: int, drafting: bool = False) -> list[str]:
        """The kernels and decompositions that a decode step of so many rows calls and that are not graph-safe, in words."""
        bucket = self._placement.binding.bucket(rows)
        path = self._draft_path() if drafting else self._path
        plans = [plan[bucket] for op, where, plan in self._placement.binding.decisions if (op, where) in path]
        return list(dict.fromkeys(f"{d.name} of {d.op}" for plan in plans for d in plan.walk() if not _graph_safe(d)))

    def _draft_path(self) -> set[tuple[str, str]]:
        """What the first MTP module calls: what a layer of its kind does, and what is its own."""
        prefix = f"layers.{self._graph.config.num_hidden_layers}."
        ordinary = {(op, where.split(".", 2)[-1]) for op, where in self._path}
        ours = {"mtp_combine", "add_rms_norm", "embedding"}
        return {
            (op, where) for op, where, _ in self._placement.binding.decisions
            if where.startswith(prefix) and (op in ours or (op, where.removeprefix(prefix)) in ordinary)
        }  # fmt: skip

    def _refuses(self, rows: int, drafting: bool) -> bool:
        if others := self.obstacles(rows, drafting):
            binding = self._placement.binding
            bucket = binding.bucket(rows)
            self._refused.add((bucket, drafting))  # for good: reading all decisions at every step would cost more than the step
            span = span_text(binding.buckets[bucket])
            self._note(f"not graph-safe: {', '.join(others)}" + ("" if span == "any" else f" (steps of {span} tokens)"))
        return bool(others)

    def _cause(self, error: BaseException) -> str:
        named = self._placement.binding.blame(error)
        return str(named) if isinstance(named, KernelFailed) else root_cause(error)

    def _note(self, reason: str) -> None:
        note = f"decode runs without graphs: {reason}"
        if note not in self._placement.notes:
            self._placement.notes.append(note)
