"""Where the time of a step goes: how long each bound kernel runs, and what is left outside of them.

Every kernel is replaced, in the very place that the graph calls it from, by one that reads the clock before and after it. That
costs time itself, so two kinds of steps run in turns: plain ones give the time of a step, timed ones that of the kernels. The
timer's own share is taken off each call; it is measured on a function that does nothing. What a plain step takes beyond its
kernels is the graph's Python, the tensors it makes between calls, the step's metadata, and the choice of the next token.

On an accelerator the timed steps wait for the device before and after each kernel, and steps are never replayed graphs: there
"outside" is what would not be hidden if nothing ran ahead.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dsv3.bench.ceiling import synchronize
from dsv3.bench.traffic import traffic
from dsv3.dispatch.firstcall import Slot
from dsv3.dispatch.site import switch_key
from dsv3.engine.model import Model
from dsv3.ops import spec

Key = tuple[str, str, tuple[int, ...]]  # operator, kernel, shape of its first weight or tensor


@dataclass
class Group:
    """Calls of one kernel with one shape: seconds of each, corrected; calls, bytes and FLOP of one step."""

    seconds: list[float] = field(default_factory=list)
    calls: int = 0
    nbytes: int = 0
    flop: int = 0


@dataclass
class Profile:
    """step: seconds of plain steps. kernels: seconds of all kernels in timed steps. calls: of kernels in a step. timer: seconds
    taken off each call."""

    step: list[float]
    kernels: list[float]
    calls: int
    timer: float
    groups: dict[Key, Group]

    @property
    def outside(self) -> float:
        """Seconds of a step in which no kernel runs, from the medians."""
        return statistics.median(self.step) - statistics.median(self.kernels)


def profile(model: Model, step: Callable[[], Any], turns: int) -> Profile:
    """`step` runs one step of the model, all of whose kernels have run before; plain and timed in `turns` turns."""
    timer, groups = timer_cost(), defaultdict[Key, Group](Group)
    plain: list[float] = []
    kernels: list[float] = []
    calls = 0
    for _ in range(turns):
        start = time.perf_counter()
        step()
        plain.append(time.perf_counter() - start)
        log = _timed_step(model, step)
        calls = len(log)
        taken = [max(0.0, ns / 1e9 - timer) for _, ns in log]
        kernels.append(sum(taken))
        for (key, _), seconds in zip(log, taken, strict=True):
            groups[key].seconds.append(seconds)
    _count(model, step, groups)
    return Profile(plain, kernels, calls, timer, dict(groups))


def _timed_step(model: Model, step: Callable[[], Any]) -> list[tuple[Key, int]]:
    """Nanoseconds of every call of a kernel, in order."""
    log: list[tuple[Key, int]] = []
    with _wrapped(model, lambda slot, function: _timed(model, slot, function, log)):
        step()
    return log


def _count(model: Model, step: Callable[[], Any], groups: dict[Key, Group]) -> None:
    """Calls, bytes and FLOP of one more step."""

    def counting(slot: Slot, function: Callable[..., Any]) -> Callable[..., Any]:
        op = slot.decision.op

        def call(**arguments: Any) -> Any:
            group = groups[_key(slot, arguments)]
            nbytes, flop = traffic(op, {**spec(op).defaults, **arguments})
            group.calls += 1
            group.nbytes += nbytes
            group.flop += flop
            return function(**arguments)

        return call

    with _wrapped(model, counting):
        step()


def _key(slot: Slot, arguments: Mapping[str, Any]) -> Key:
    return slot.decision.op, slot.kernel.name, switch_key(spec(slot.decision.op), arguments)


def _timed(model: Model, slot: Slot, function: Callable[..., Any], log: list[tuple[Key, int]]) -> Callable[..., Any]:
    clock, device, waits = time.perf_counter_ns, model.device, model.device.type != "cpu"

    def call(**arguments: Any) -> Any:
        if waits:
            synchronize(device)
        start = clock()
        result = function(**arguments)
        if waits:
            synchronize(device)
        taken = clock() - start
        log.append((_key(slot, arguments), taken))
        return result

    return call


def timer_cost(calls: int = 2000) -> float:
    """Seconds by which a timed call seems longer than it is: what is measured of a function that does nothing, less what it
    costs to call that directly."""
    clock = time.perf_counter_ns

    def nothing(**arguments: Any) -> None:
        pass

    def through(**arguments: Any) -> int:
        start = clock()
        nothing(**arguments)
        return clock() - start

    arguments = {"x": 1, "weight": 2, "eps": 3}
    inside = statistics.median(through(**arguments) for _ in range(calls))
    start = clock()
    for _ in range(calls):
        nothing(**arguments)
    direct = (clock() - start) / calls
    return max(0.0, inside - direct) / 1e9


@contextmanager
def _wrapped(model: Model, wrap: Callable[[Slot, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While open, every bound kernel of the model is called through what `wrap` makes of it."""
    replaced = []
    for slot in model.placement().binding.slots:
        function = slot.holder[slot.key]
        if slot.live:
            wrapper = wrap(slot, function)
            slot.holder[slot.key] = wrapper
            replaced.append((slot, function))
    try:
        yield
    finally:
        for slot, function in replaced:
            slot.holder[slot.key] = function
