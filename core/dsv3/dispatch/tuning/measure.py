"""One candidate: is its result right, and how long does it take?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsv3.budget import expect, judge
from dsv3.budget.expectation import Expectation
from dsv3.budget.tensors import map_tensors, to_cpu
from dsv3.dispatch.guard import guarded, root_cause
from dsv3.dispatch.registration import resolve
from dsv3.dispatch.select import Candidate
from dsv3.dispatch.wellformed import prepared_mistake
from dsv3.ops import spec
from dsv3.plugin import LatentCache, Prepared

# A first call may compile; a kernel that does not come back is given up on.
CALL_LIMIT_S = 120.0
SECONDS = 0.1
_SAMPLE_S = 5e-4
_SAMPLES = (3, 50)


@dataclass(frozen=True)
class Timing:
    """Median time of one call in microseconds, the middle half's width relative to it, and how many calls were timed."""

    median_us: float
    spread: float
    repeats: int


@dataclass(frozen=True)
class Measurement:
    """wrong: why the candidate cannot be used, and then no timing; else its timing and the margin of its error budget."""

    wrong: str = ""
    margin: float = 0.0
    timing: Timing | None = None


class Bench:
    """The arguments of one call, on the CPU and on the device, for all the candidates to it."""

    def __init__(self, op: str, arguments: Mapping[str, Any], place: torch.device) -> None:
        self.op, self.arguments, self.place = op, arguments, place
        self._expected: dict[str, list[Expectation]] = {}
        self._weights: dict[tuple[str, str], Prepared] = {}

    def measure(self, candidate: Candidate, seconds: float = SECONDS) -> Measurement:
        """Verify, then time for about `seconds`. Nothing that a kernel does raises here, other than an interrupt."""
        outcome = guarded(lambda: self._verified(candidate), CALL_LIMIT_S)
        if outcome.error is not None or outcome.value is None:
            return Measurement(f"raised {root_cause(outcome.error or TypeError('no result'))}")
        wrong, margin, call = outcome.value
        if wrong:
            return Measurement(wrong, margin)
        backend, device = candidate.source.backend, candidate.source.device
        timed = guarded(lambda: time_call(call, lambda: backend.synchronize(device), seconds), CALL_LIMIT_S)
        if timed.error is not None or timed.value is None:
            return Measurement(f"raised {root_cause(timed.error or TypeError('no result'))} when it was called again")
        return Measurement("", margin, timed.value)

    def _verified(self, candidate: Candidate) -> tuple[str, float, Callable[[], Any]]:
        """(what is wrong, margin, the call as it will be timed)."""
        kernel, source = candidate.kernel, candidate.source
        function = resolve(kernel, source.name)
        fixed = dict(spec(self.op).defaults)
        if candidate.config is not None:
            fixed["config"] = candidate.config
        with torch.inference_mode():
            given = {**fixed, **self._on_device(candidate)}
            outputs = function(**given)
            source.backend.synchronize(source.device)
            verdict = self._verdict(candidate, given, outputs)
            for name, before in self.arguments.items():
                if name not in spec(self.op).mutates and _differs(before, given[name]):
                    return f"changed its input {name}", verdict.margin, lambda: None
        return verdict.message, verdict.margin, lambda: function(**given)

    def _verdict(self, candidate: Candidate, given: Mapping[str, Any], outputs: Any) -> Any:
        numerics = candidate.kernel.numerics
        if numerics not in self._expected:
            self._expected[numerics] = expect(self.op, self.arguments, numerics)
        after = to_cpu(given["cache"]) if "cache" in spec(self.op).mutates else None
        found = to_cpu(outputs) if isinstance(outputs, torch.Tensor | tuple | list) else outputs
        expected = self._expected[numerics]
        return judge(self.op, self.arguments, found, numerics=numerics, after=after, expected=expected)

    def _on_device(self, candidate: Candidate) -> dict[str, Any]:
        """Fresh copies of what a kernel could write to; weights in the layouts that it reads, made once."""

        def moved(path: str, value: Any) -> Any:
            if isinstance(value, Prepared):
                return self._prepared(candidate, path, value)
            if isinstance(value, Mapping):
                return {name: moved(f"{path}.{name}", member) for name, member in value.items()}
            if isinstance(value, torch.Tensor | LatentCache):
                return map_tensors(value, lambda t: t.to(self.place, copy=True))
            return value

        return {name: moved(name, value) for name, value in self.arguments.items()}

    def _prepared(self, candidate: Candidate, path: str, weight: Prepared) -> Prepared:
        layout = candidate.kernel.layouts.get(path, "canonical")
        if (path, layout) not in self._weights:
            made: Prepared = map_tensors(weight, lambda t: t.to(self.place, copy=True))
            if layout != "canonical":
                made = candidate.source.backend.prepare(made, layout, candidate.source.device)
                if mistake := prepared_mistake(made, weight, layout):
                    raise ValueError(f"preparing {path} as {layout!r} gave {mistake}")
            self._weights[path, layout] = made
        return self._weights[path, layout]


def _differs(before: Any, after: Any) -> bool:
    """Whether a tensor is not what it was, bit by bit."""
    if not isinstance(before, torch.Tensor):
        return False
    now = to_cpu(after).contiguous().view(-1)
    return now.shape[0] != before.numel() or not bool(
        (now.view(torch.uint8) == before.contiguous().view(-1).view(torch.uint8)).all()
    )


def time_call(call: Callable[[], Any], synchronize: Callable[[], None], seconds: float) -> Timing:
    """Median over samples of at least half a millisecond each, for about `seconds`; at least 3 samples, however long they
    take. The call must have been made before."""
    with torch.inference_mode():
        start = time.perf_counter()
        call()
        synchronize()
        once = time.perf_counter() - start
        calls = max(1, min(1000, round(_SAMPLE_S / max(once, 1e-9))))
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while len(samples) < _SAMPLES[0] or (time.perf_counter() < end and len(samples) < _SAMPLES[1]):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            synchronize()
            samples.append((time.perf_counter() - start) / calls)
    median = max(statistics.median(samples), 1e-9)
    quarters = statistics.quantiles(samples, n=4)
    return Timing(median * 1e6, (quarters[2] - quarters[0]) / median, len(samples) * calls)
