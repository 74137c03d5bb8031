"""What the machine can do, measured in the run that is to be judged: bytes read per second, and matrix products.

What was measured another day says little: neighbours come and go, clocks change. So the ceilings are measured before and after
the work, and a fraction is one of the better of the two.
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dsv3.bench.memory import available

BUFFER = 1 << 30  # bytes: much more than any last-level cache
SIZES = ((512, 1024, 2816), (64, 1024, 1024), (1024, 1024, 1024), (2048, 2048, 2048))  # (M, K, N)
DEVICE_SIZES = ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192))
_REPEATS = 7
_BUDGET_S = 1.0  # of one size of product: a CPU without bf16 instructions needs seconds for the largest


@dataclass(frozen=True)
class Ceilings:
    """read_gb_s: bytes of a large buffer read per second by all threads, 1e9 of them; best of several loops and repeats.
    read_median_gb_s: the same loop's median. read_one_gb_s: by one thread, best; None on an accelerator. read_loop: the fastest
    loop. bf16_gflop_s, f32_gflop_s: torch's matrix products with operands in that type, best of several sizes."""

    read_gb_s: float
    read_median_gb_s: float
    read_one_gb_s: float | None
    read_loop: str
    bf16_gflop_s: float
    f32_gflop_s: float

    @property
    def gflop_s(self) -> float:
        """The better of the two types: on a CPU without bf16 instructions that is float32."""
        return max(self.bf16_gflop_s, self.f32_gflop_s)

    def best(self, other: Ceilings) -> Ceilings:
        """The larger of each figure."""
        first = self if self.read_gb_s >= other.read_gb_s else other
        values: dict[str, Any] = {"read_loop": first.read_loop}
        for f in fields(self):
            if f.name != "read_loop":
                found = [v for v in (getattr(self, f.name), getattr(other, f.name)) if v is not None]
                values[f.name] = max(found) if found else None
        return Ceilings(**values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(device: torch.device | str = "cpu", buffer: int | None = None, repeats: int = _REPEATS) -> Ceilings:
    """Measure on a device, with torch's present number of threads. buffer: bytes, BUFFER unless given; a quarter of the free
    memory if that is less."""
    place, size = torch.device(device), buffer or BUFFER
    with _buffer(place, min(size, available() // 4) if place.type == "cpu" else size) as memory:
        loop, times = _read(memory, place, repeats)
        nbytes = memory.numel() * memory.element_size()
        one = _one_thread(memory, place, repeats)
    flops = {dtype: _product(dtype, place) for dtype in (torch.bfloat16, torch.float32)}
    return Ceilings(
        read_gb_s=nbytes / min(times) / 1e9,
        read_median_gb_s=nbytes / statistics.median(times) / 1e9,
        read_one_gb_s=None if one is None else nbytes / one / 1e9,
        read_loop=loop,
        bf16_gflop_s=flops[torch.bfloat16] / 1e9,
        f32_gflop_s=flops[torch.float32] / 1e9,
    )


@contextmanager
def _buffer(place: torch.device, nbytes: int) -> Iterator[Tensor]:
    """int64 of so many bytes, all touched; on a CPU in huge pages where there are any, and handed back at the end."""
    count = nbytes // 8 // (1 << 17) * (1 << 17)
    if place.type != "cpu":
        yield torch.ones(count, dtype=torch.int64, device=place)
        return
    memory = mmap.mmap(-1, count * 8)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    yield torch.frombuffer(memory, dtype=torch.int64).zero_()  # memory goes with the last tensor over it


def _loops(memory: Tensor) -> dict[str, Callable[[], Any]]:
    """Ways to read all of it. Which one reaches the memory's speed depends on the processor."""
    reals = memory.view(torch.float32)
    x = torch.ones(4096, device=memory.device)
    return {
        "sum of float32": lambda: reals.sum(),
        "sum of int64": lambda: memory.sum(),
        "sum of rows": lambda: reals.view(-1, 1 << 16).sum(1),
        "matrix by vector": lambda: torch.mv(reals.view(-1, 4096), x),
    }


def _read(memory: Tensor, place: torch.device, repeats: int) -> tuple[str, list[float]]:
    """The fastest loop, and its times: each is tried twice, the best of them goes on."""
    tried = {name: min(timed(loop, place), timed(loop, place)) for name, loop in _loops(memory).items()}
    name = min(tried, key=lambda n: tried[n])
    loop = _loops(memory)[name]
    return name, [tried[name], *(timed(loop, place) for _ in range(repeats))]


def _one_thread(memory: Tensor, place: torch.device, repeats: int) -> float | None:
    if place.type != "cpu":
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return min(_read(memory, place, max(1, repeats // 2))[1])
    finally:
        torch.set_num_threads(threads)


def _product(dtype: torch.dtype, place: torch.device) -> float:
    """FLOP per second of the best size. The right operand lies as weights do, [N, K]: that is what there is to multiply by."""
    best = 0.0
    for m, k, n in SIZES if place.type == "cpu" else DEVICE_SIZES:
        flop = 2 * m * k * n
        if best and flop / best * 4 > _BUDGET_S and place.type == "cpu":
            continue
        x, w = (torch.randn(rows, k, device=place).to(dtype) for rows in (m, n))
        out = torch.empty(m, n, dtype=dtype, device=place)
        times = [timed(lambda x=x, w=w, out=out: torch.mm(x, w.t(), out=out), place) for _ in range(4)]  # type: ignore[misc]
        best = max(best, flop / min(times[1:]))
    return best


def timed(run: Callable[[], Any], place: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(place)
    start = time.perf_counter()
    run()
    synchronize(place)
    return time.perf_counter() - start


def synchronize(place: torch.device) -> None:
    """Wait for everything a device was given to do; nothing on a CPU."""
    if place.type != "cpu":
        torch.accelerator.synchronize(place)
