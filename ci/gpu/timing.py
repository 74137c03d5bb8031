"""How long a call takes on a GPU.

Several calls, each with its own weights, caches and results, are captured as one CUDA (HIP) graph, so that neither Python nor
the second-level cache shows: the copies together are larger than twice that cache. The graph is replayed between two events, a
number of times; the median counts, and the spread of the middle half is told.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Thunk = Callable[[], Any]
_MOST_COPIES = 128
_SHORTEST_US = 200.0  # of one replay: an event is good to about a microsecond
_REPEATS = (5, 50)
# AMD's last-level cache, which torch does not report. Source: CDNA 3 and 4 white papers.
_INFINITY_CACHE = {"gfx942": 256 << 20, "gfx950": 256 << 20}


@dataclass(frozen=True)
class Timing:
    """us: median of one call; spread: width of the middle half relative to it; least_us: the fastest replay. repeats: replays
    timed, of `calls` calls each. how: "graph", or "events" where the call cannot be captured, so that starting it counts."""

    us: float | None
    spread: float | None
    least_us: float | None
    repeats: int
    calls: int
    how: str

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Clock:
    """Times calls on a device; where it is emulated it runs them once and says nothing about time."""

    def __init__(self, device: torch.device, arch: str, emulated: bool) -> None:
        self.device, self.emulated = device, emulated
        self.cache_bytes = 0
        self.memory = 1 << 30
        if not emulated:
            properties = torch.cuda.get_device_properties(device)
            self.cache_bytes = max(int(getattr(properties, "L2_cache_size", 0)), _INFINITY_CACHE.get(arch, 0)) or 64 << 20
            self.memory = torch.cuda.mem_get_info(device)[0]

    def copies(self, nbytes: int) -> int:
        """How many calls it takes until the first one's data has left the cache: all of them together are twice as large."""
        if self.emulated:
            return 1
        wanted = -(-2 * self.cache_bytes // max(nbytes, 1)) + 1
        return max(1, min(wanted, _MOST_COPIES, self.memory // 4 // max(nbytes, 1)))

    def cold(self, nbytes: int) -> bool:
        """Whether that many copies suffice; what moves less than that stays in the cache, as it does between two layers."""
        return not self.emulated and self.copies(nbytes) * nbytes >= 2 * self.cache_bytes

    def time(self, calls: Sequence[Thunk], seconds: float = 0.15) -> Timing:
        """Time one of `calls`, which differ in their data only. Raises what they raise."""
        with torch.inference_mode():
            if self.emulated:
                for call in calls:
                    call()
                return Timing(None, None, None, 1, len(calls), "emulated")
            return self._timed(calls, seconds)

    def _timed(self, calls: Sequence[Thunk], seconds: float) -> Timing:
        with torch.cuda.device(self.device):
            for call in calls:  # compiles, and tells what raises before anything is captured
                call()
            torch.cuda.synchronize()
            once = self._between(lambda: [call() for call in calls]) / len(calls)
            rounds = max(1, round(_SHORTEST_US / max(once * len(calls), 1e-3)))
            rounds = min(rounds, max(1, 200 // len(calls)))
            replay, how, kept = self._captured(calls, rounds)
            count = len(calls) * rounds
            for _ in range(2):
                replay()
            torch.cuda.synchronize()
            samples: list[float] = []
            end = time.perf_counter() + seconds
            while len(samples) < _REPEATS[0] or (time.perf_counter() < end and len(samples) < _REPEATS[1]):
                samples.append(self._between(replay) / count)
            del kept
        quarters = statistics.quantiles(samples, n=4)
        median = statistics.median(samples)
        return Timing(median, (quarters[2] - quarters[0]) / median, min(samples), len(samples), count, how)

    def _captured(self, calls: Sequence[Thunk], rounds: int) -> tuple[Thunk, str, Any]:
        """A replay of all calls, `rounds` times over. Results are kept, so that no two calls of a round write to one place."""
        graph = torch.cuda.CUDAGraph()
        kept: list[Any] = []
        try:
            with torch.cuda.graph(graph):
                for _ in range(rounds):
                    kept.clear()
                    kept.extend(call() for call in calls)
        except RuntimeError:
            torch.cuda.synchronize()

            def again() -> None:
                for _ in range(rounds):
                    for call in calls:
                        call()

            return again, "events", None
        return graph.replay, "graph", (graph, kept)

    def _between(self, work: Thunk) -> float:
        """Microseconds between two events around the work."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3
