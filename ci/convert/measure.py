"""Conversion against a plain copy of the same bytes, both flushed to disk: `python ci/convert/measure.py SRC WORK [TO]`.

The copy reads as many bytes as the conversion reads and writes as many as it writes. Prints bytes read plus written per second
of both, their ratio, and the peak of anonymous memory above the start of the conversion.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak:
    """The largest value seen while it runs, sampled every 5 ms."""

    def __init__(self) -> None:
        self.start = self.peak = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, anonymous())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def copy(sources: list[Path], read: int, write: int, folder: Path) -> None:
    """Read `read` bytes of the sources once, and write `write` bytes: what was read, again and again in the buffer."""
    folder.mkdir()
    left_read, left_write = read, write
    ratio = write / read
    for path in sources:
        with path.open("rb", buffering=0) as source, (folder / path.name).open("wb", buffering=0) as out:
            while left_read > 0 and (block := source.read(min(8 << 20, left_read))):
                left_read -= len(block)
                owed = min(left_write, round(len(block) * ratio))
                left_write -= owed
                while owed:
                    owed -= out.write(memoryview(block)[:owed])
            os.fsync(out.fileno())


def timed(run: Callable[[], object], sources: list[Path]) -> float:
    """Seconds, from a page cache without the sources to everything on the disk."""
    os.sync()
    for path in sources:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    start = time.perf_counter()
    run()
    os.sync()
    return time.perf_counter() - start


def main() -> None:
    source, work, to = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "bf16"
    from dsv3.checkpoint.convert.run import convert, plan_conversion
    from dsv3.checkpoint.convert.target import Target

    planned = plan_conversion(str(source), work / "out", Target(to))  # type: ignore[arg-type]
    read, write, files = planned.read_bytes, planned.write_bytes, sorted(planned.sources())
    work.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        seconds = {}
        for name in ("copy", "convert") if number % 2 else ("convert", "copy"):
            folder = work / "out"
            shutil.rmtree(folder, ignore_errors=True)
            with Peak() as peak:
                if name == "copy":
                    seconds[name] = timed(lambda: copy(files, read, write, work / "out"), files)
                else:
                    seconds[name] = timed(lambda: convert(str(source), work / "out", Target(to), workers=2), files)  # type: ignore[arg-type]
            if name == "convert":
                anon = peak.peak - peak.start
        rate = {name: (read + write) / s / 1e9 for name, s in seconds.items()}
        print(
            f"{to}: read {read / 1e9:.2f} GB, wrote {write / 1e9:.2f} GB; convert {rate['convert']:.2f} GB/s, copy "
            f"{rate['copy']:.2f} GB/s, ratio {rate['convert'] / rate['copy']:.2f}; anonymous +{anon / 1e6:.0f} MB",
            flush=True,
        )
    shutil.rmtree(work / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
