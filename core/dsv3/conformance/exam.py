"""One case on one kernel: value, structure, repetition, and the memory it was given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dsv3.budget import expect, judge
from dsv3.budget.expectation import Expectation, Real
from dsv3.budget.tensors import clone_cache, map_tensors, raw_bytes, to_cpu
from dsv3.budget.verdict import Verdict
from dsv3.conformance.case import Case
from dsv3.conformance.place import Placed
from dsv3.conformance.relations import RELATIONS
from dsv3.conformance.slices import alone
from dsv3.conformance.target import Target
from dsv3.dispatch.guard import root_cause
from dsv3.ops import spec
from dsv3.plugin import Kernel, LatentCache

# Cases with more input elements than this are called twice, not with second data as well.
_LARGE = 4_000_000
_SMALL = 20_000  # and these one time more, so that what alternates shows
_PAST_THE_END = frozenset({"mla_prefill", "mla_decode"})
_MAY_ALIAS = frozenset({"all_reduce"})  # over one rank it is the identity, and may return what it got


class Exam:
    """Calls a kernel with a case's arguments as a model would, and as no kernel expects."""

    def __init__(self, target: Target, kernel: Kernel, case: Case, seed: int, arguments: Mapping[str, Any]) -> None:
        self.target, self.kernel, self.case = target, kernel, case
        self.known = spec(case.op)
        self.setting = target.setting(case)
        self.arguments = {**self.known.defaults, **arguments}
        self.seed = seed
        self.alive: list[Any] = []  # the outputs of all calls, so that no memory of theirs is free to be used again
        self.worst = Verdict(0.0, 0.0)
        self.side_stream = False

    def run(self) -> Verdict:
        """The verdict over all calls; the first failure ends it."""
        try:
            self.function = self.target.function(self.case.op, self.kernel.name)
            with torch.inference_mode():
                message = self._steps()
        except (Exception, SystemExit) as error:
            return Verdict(math.inf, 0.0, f"raised {root_cause(error)}")
        if message:
            return Verdict(
                math.inf if self.worst.margin <= 1 else self.worst.margin, self.worst.nmse, message, self.worst.details
            )
        return self.worst

    # -- the steps

    def _steps(self) -> str:
        placed = Placed(self.arguments, self.target.device, self.known.mutates)
        prepared = self.target.prepare(self.kernel, placed.given)
        if mistake := placed.disturbed():
            return f"prepare(): {mistake}"
        expected = expect(self.case.op, self.arguments, self.kernel.numerics)
        first = self._call(prepared)
        if message := self._structure(first, placed) or self._value(first, prepared, self.arguments, expected):
            return message
        kept = to_cpu(first)
        kept = map_tensors(kept, lambda t: t.clone())
        state = self._state(prepared)
        if self._size() <= _LARGE and (message := self._other_data(placed, prepared, first, kept)):
            return message
        return self._again(placed, prepared, expected, kept, state) or self._claims(expected, kept)

    def _other_data(self, placed: Placed, prepared: Mapping[str, Any], first: Any, kept: Any) -> str:
        """New data in the same memory, as a captured graph or a step's buffers have it; the first output must survive."""
        other = {**self.known.defaults, **self.case.arguments(self.seed + 1, self.setting, weights=False)}
        weights = tuple(dict.fromkeys(path.partition(".")[0] for path in self.known.weights))
        other = {k: self.arguments[k] if k in weights else v for k, v in other.items()}
        placed.overwrite(other, weights)
        second = self._call(prepared)
        if message := self._structure(second, placed):
            return f"with other data in the same memory: {message}"
        if message := self._value(second, prepared, other, expect(self.case.op, other, self.kernel.numerics)):
            return f"with other data in the same memory: {message}"
        if self.case.op not in _MAY_ALIAS and not _same_bits(to_cpu(first), kept):
            return "an output of an earlier call changed in a later one: outputs must be fresh memory"
        placed.overwrite(self.arguments, weights)
        return ""

    def _again(
        self, placed: Placed, prepared: Mapping[str, Any], expected: list[Expectation], kept: Any, state: LatentCache | None
    ) -> str:
        """The first data again, and again: bit for bit if the kernel is deterministic."""
        for again in range(2 if self._size() <= _SMALL else 1):
            if self.known.mutates:
                placed.overwrite(self.arguments, ())
            self.side_stream = again == 1
            if message := self._repeated(placed, prepared, expected, kept, state):
                return message
        return ""

    def _repeated(
        self, placed: Placed, prepared: Mapping[str, Any], expected: list[Expectation], kept: Any, state: LatentCache | None
    ) -> str:
        third = self._call(prepared)
        if message := self._structure(third, placed) or self._value(third, prepared, self.arguments, expected):
            return f"at the second call with the same data: {message}"
        if self.kernel.deterministic:
            after, third = self._state(prepared), to_cpu(third)
            if not _same_bits(self._specified(third, expected), self._specified(kept, expected)) or (
                state is not None and not _same_bits(after, state)
            ):
                return "the second call with the same data gave other bits, and the kernel says it is deterministic"
        return ""

    def _claims(self, expected: list[Expectation], kept: Any) -> str:
        """Batch invariance where it is claimed, and the case's metamorphic relation."""
        if self.kernel.batch_invariant:
            for given, choose in alone(self.case.op, self.arguments):
                if not _same_bits(to_cpu(self._fresh(given)), choose(kept)):
                    return "some rows alone gave other bits than among others, and the kernel says it is batch invariant"
        if self.case.relation:
            changed, follow = RELATIONS[self.case.relation](self.arguments)
            found = to_cpu(self._fresh(changed))
            one, other = (self._specified(outputs, expected) for outputs in (found, follow(kept)))
            if self.kernel.deterministic and not _same_bits(one, other):
                return f"the relation {self.case.relation!r} does not hold bit for bit"
        return ""

    # -- parts

    def _call(self, prepared: Mapping[str, Any]) -> Any:
        self.target.synchronize()
        with self._stream():
            outputs = self.function(**prepared)
        self.target.synchronize()
        self.alive.append(outputs)
        return outputs

    def _stream(self) -> AbstractContextManager[Any]:
        """Now and then a stream other than the default one: a kernel launches where its caller works."""
        if self.side_stream and self.target.device.type == "cuda":
            return torch.cuda.stream(torch.cuda.Stream(self.target.device))
        return nullcontext()

    def _fresh(self, arguments: Mapping[str, Any]) -> Any:
        placed = Placed(arguments, self.target.device, self.known.mutates)
        return self._call(self.target.prepare(self.kernel, placed.given))

    def _structure(self, outputs: Any, placed: Placed) -> str:
        for tensor in _tensors(outputs):
            if tensor.device != self.target.device and tensor.device.type != self.target.device.type:
                return f"an output is on {tensor.device}; expected {self.target.device}"
            if self.case.op not in _MAY_ALIAS and (owner := placed.owns(tensor)):
                return f"an output shares memory with input {owner}: outputs must be fresh memory"
            if tensor.numel() and any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
                return f"elements of an output share memory (strides {list(tensor.stride())}): outputs must be fresh memory"
        if self.case.op not in _MAY_ALIAS and self._used_again(outputs):
            return "an output lies in the memory of an earlier call's output: outputs must be fresh memory"
        return placed.disturbed()

    def _used_again(self, outputs: Any) -> bool:
        """Whether an output begins where one of an earlier call does; both are alive, so no allocator did this."""
        now = {t.data_ptr() for t in _tensors(outputs) if t.numel()}
        return any(t.data_ptr() in now for old in self.alive[:-1] for t in _tensors(old) if t.numel())

    def _value(
        self, outputs: Any, prepared: Mapping[str, Any], arguments: Mapping[str, Any], expected: list[Expectation]
    ) -> str:
        after = self._state(prepared)
        verdict = judge(self.case.op, arguments, to_cpu(outputs), numerics=self.kernel.numerics, after=after, expected=expected)
        if verdict.message or verdict.margin >= self.worst.margin:
            self.worst = Verdict(verdict.margin, max(verdict.nmse, self.worst.nmse), "", verdict.details)
        return verdict.message

    def _specified(self, outputs: Any, expected: list[Expectation]) -> Any:
        """The outputs on the CPU, with zeros where attention may leave anything: in rows past the last sequence."""
        if self.case.op not in _PAST_THE_END:
            return outputs
        made = list(outputs)
        for e in expected:
            if isinstance(e, Real) and e.skip is not None:
                made[e.index] = made[e.index].masked_fill(e.skip, 0)
        return made

    def _state(self, prepared: Mapping[str, Any]) -> LatentCache | None:
        """The mutated cache, on the CPU."""
        return clone_cache(to_cpu(prepared["cache"])) if self.known.mutates else None

    def _size(self) -> int:
        return sum(t.numel() for t in _tensors(self.arguments))


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def _same_bits(a: Any, b: Any) -> bool:
    """Equal shapes and bytes of all tensors; NaN included."""
    left, right = _tensors(a), _tensors(b)
    return len(left) == len(right) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(raw_bytes(x), raw_bytes(y))
        for x, y in zip(left, right, strict=True)
    )
