"""The ahead-of-time matrix: every kernel of a backend, compiled for devices that are not here, inspected and judged.

A backend takes part by an attribute `aot`, "module:class". The class is made with an architecture and a folder for the
compiler's files, and its `rows(call)` compiles what a call on meta tensors would start: a mapping per binary with "kernel",
"constants", "registers", "spills", "shared", "occupancy", "matrix", "loads", "copies", "violations", and "error" where it does
not compile.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch

from dsv3.bench.calls.shapes import V3, Call, Maker
from dsv3.bench.calls.table import all_calls
from dsv3.budget.tensors import map_tensors
from dsv3.conformance.target import Target, source_of
from dsv3.dispatch.configs import Config, text_of
from dsv3.dispatch.plugins import discover, load_plugin
from dsv3.dispatch.registration import resolve
from dsv3.errors import UsageError, nearest
from dsv3.ops import names, spec
from dsv3.plugin import Kernel

Row = dict[str, Any]
_ATTENTION = ("mla_decode", "mla_prefill")


@dataclass(frozen=True)
class Job:
    """One architecture of one backend. full: every configuration, and float32 too; else the default ones, in bfloat16."""

    backend: str
    arch: str
    full: bool
    ops: tuple[str, ...]
    cache: str


def architectures(backend: str) -> list[str]:
    """Those that a backend's kernels can be compiled for; [] for one without the hook."""
    plugin = next((p for p in discover() if p.name == backend), None)
    found = None if plugin is None else load_plugin(plugin).backend
    return list(getattr(found, "architectures", ())) if getattr(found, "aot", None) else []


def jobs(backends: Sequence[str], archs: Sequence[str] | None, full: bool, ops: Sequence[str] | None) -> list[Job]:
    """One per architecture; UsageError for one that no backend knows, or an unknown operator."""
    known = {(b, a) for b in backends for a in architectures(b)}
    listed = sorted({a for _, a in known})
    for arch in archs or ():
        if arch not in listed:
            raise UsageError(f"architecture {arch!r} is not one of {', '.join(listed) or 'any backend'}{nearest(arch, listed)}")
    for op in ops or ():
        spec(op)
    chosen = [(b, a) for b in backends for a in architectures(b) if archs is None or a in archs]
    return [Job(b, a, full, tuple(ops or names()), "") for b, a in chosen]


def run(todo: Sequence[Job], workers: int, done: Callable[[Job, list[Row]], None]) -> list[Row]:
    """The rows of all jobs, in their order. done: told as each architecture is complete."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compiled, replace(job, cache=folder)): job for job in todo}
        found: dict[Job, list[Row]] = {}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            done(futures[future], future.result())
    return [row for job in todo for row in found[job]]


def compiled(job: Job) -> list[Row]:
    """All binaries of one architecture."""
    torch.set_num_threads(1)
    target = Target(source_of(job.backend, job.arch))
    module, _, name = target.source.backend.aot.partition(":")  # type: ignore[attr-defined]
    matrix = getattr(importlib.import_module(module), name)(job.arch, job.cache)
    rows = []
    for call, kernel, config, run in _calls(job, target):
        where = {"arch": job.arch, "op": call.op, "variant": kernel.name, "call": call.name, "config": text_of(config)}
        for row in matrix.rows(run):
            rows.append(where | row)
    return rows


def _calls(job: Job, target: Target) -> Iterator[tuple[Call, Kernel, Config | None, Callable[[], Any]]]:
    sizes = (1, 16, 32, 64) if job.full else (1, 32)
    model = replace(V3, decode=sizes, prefill=(2048,))
    whole = replace(model, tp=1)  # attention that is not sliced: 128 heads
    encoding = next((d for d in ("float8_e4m3fnuz",) if d in target.source.capability.dtypes), "float8_e4m3fn")
    calls = [(call, Maker(model, "meta", encoding=encoding)) for call in all_calls(model)]
    calls += [(call, Maker(whole, "meta", encoding=encoding)) for call in all_calls(whole) if call.op in _ATTENTION]
    for call, maker in calls:
        if call.op not in job.ops:
            continue
        plain = call.arguments(maker)
        for arguments in (plain, _float32(plain)) if job.full else (plain,):
            for kernel in target.kernels(call.op):
                if target.refusal(kernel, arguments, ()):
                    continue
                function, given = resolve(kernel, target.name), target.prepare(kernel, arguments)
                for config in _configs(job, target, kernel, arguments):
                    more = {} if config is None else {"config": config}
                    yield call, kernel, config, functools.partial(function, **given, **more)


def _configs(job: Job, target: Target, kernel: Kernel, arguments: Mapping[str, Any]) -> list[Config | None]:
    if (table := target.catalogue.table(kernel)) is None:
        return [None]
    default = table.first(job.arch, spec(kernel.op).bind(arguments))
    others = [c for c in table.candidates(job.arch) if c != default] if job.full else []
    return [default, *others]


def _float32(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same call with float32 wherever it has bfloat16."""

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.float32) if tensor.dtype == torch.bfloat16 else tensor

    made = {}
    for name, value in arguments.items():
        inner = {k: map_tensors(v, wide) for k, v in value.items()} if isinstance(value, Mapping) else map_tensors(value, wide)
        made[name] = "float32" if name in ("dtype", "out_dtype") and value == "bfloat16" else inner
    return made
