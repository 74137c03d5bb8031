"""From the files to the first token."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

from dsv3.bench import memory
from dsv3.bench.ceiling import Ceilings
from dsv3.bench.results import Figure, Result, measured, subject_of
from dsv3.bench.session import Session
from dsv3.checkpoint.folder import model_folder
from dsv3.engine.model import Model


def bench_load(load: Callable[[], Model], ceilings: Callable[[Model], Ceilings], *, model: str, repeats: int) -> Result:
    """Load once, then `repeats` times more in this process, each up to the first token after a prompt of one. The files are in
    the page cache at the latest after the first load: medians are of a warm cache. What is compiled once for a process, or
    for a machine, is in the first load's own figures, and so is memory."""
    nbytes, watch, start = checkpoint_bytes(model), memory.Watch(), memory.anonymous()
    began = time.perf_counter()
    loaded = load()
    first = time.perf_counter() - began
    peak, held = watch.peak(), memory.anonymous()
    began = time.perf_counter()
    Session(loaded, 1, 1, 1).prefill()
    first_token = first + time.perf_counter() - began
    before = ceilings(loaded)
    seconds, tokens = [], []
    for _ in range(repeats):
        del loaded
        gc.collect()
        began = time.perf_counter()
        loaded = load()
        seconds.append(time.perf_counter() - began)
        Session(loaded, 1, 1, 1).prefill()
        tokens.append(time.perf_counter() - began)
    result = Result("load", subject_of(loaded, 0, 0, 0, repeats), before, ceilings(loaded), [])
    result.figures = [
        measured("load", seconds, "s", "less"),
        measured("load, checkpoint bytes", [nbytes / s / 1e9 for s in seconds], "GB/s", bound="read"),
        measured("load to the first token", tokens, "s", "less"),
        Figure("first load", first, "s", better="less"),
        Figure("first load to the first token", first_token, "s", better="less"),
        Figure("checkpoint", nbytes / 1e9, "GB"),
        Figure("weights as kept", loaded.weight_bytes / 1e9, "GB", better="less"),
        *_memory(nbytes, peak, None if held is None or start is None else held - start),
    ]
    result.notes += ["the page cache was warm, at the latest after the first load", *watch.notes]
    return result


def _memory(nbytes: int, peak: int | None, anonymous: int | None) -> list[Figure]:
    """Of the first load, beside the checkpoint's bytes; mapped files count as resident and not as anonymous."""
    found = []
    for name, value in (("peak resident while loading", peak), ("anonymous after loading", anonymous)):
        if value is not None:
            found.append(Figure(name, value / 1e9, "GB", better="less"))
            found.append(Figure(f"{name}, of the checkpoint", value / nbytes, "", better="less"))
    return found


def checkpoint_bytes(model: str) -> int:
    """Of the checkpoint's tensor files."""
    folder = model_folder(model, False)
    return sum(p.stat().st_size for p in Path(folder or ".").glob("*.safetensors"))
