"""`dsv3 bench peers`: dsv3 beside other engines on the same tokens."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.cli.arguments_bench import PEERS
from dsv3.cli.bench_text import aligned, number
from dsv3.cli.common import pins_of, settings_of
from dsv3.errors import UsageError, nearest

if TYPE_CHECKING:
    from dsv3.bench.ceiling import Ceilings
    from dsv3.bench.peers.run import Job, Outcome
    from dsv3.bench.peers.workload import Workload


def main(arguments: argparse.Namespace) -> int:
    """1 if dsv3 itself gave nothing; a peer that does not run is only named."""
    from dsv3.bench.peers import workload
    from dsv3.bench.peers.run import run
    from dsv3.checkpoint.folder import folder_config, model_folder

    settings = settings_of(arguments)
    for name in ("tokens", "repeat", "timeout"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    pythons, wanted, kinds = _pythons(arguments.peer), _wanted(arguments.only), _kinds(arguments.gguf)
    workloads = workload.parse(arguments.workloads.split(",") if arguments.workloads else workload.DEFAULT, arguments.tokens)
    folder = model_folder(settings["model"], False)
    if folder is None:
        raise UsageError(f"--model {settings['model']!r} has no weights; peers are measured on a checkpoint folder")
    config = folder_config(folder)
    threads = settings["threads"] or os.cpu_count() or 1
    options = {name: settings[name] for name in ("backend", "device", "dtype", "quant", "kv_dtype", "strict")}
    options |= {"pins": pins_of(arguments.kernel), "emulate": arguments.emulate or False}
    common = {"threads": threads, "dtype": settings["dtype"] or config.torch_dtype, "repeats": arguments.repeat,
              "options": options, "vocabulary": config.vocab_size}  # fmt: skip
    with _folder(arguments.work) as kept, tempfile.TemporaryDirectory() as scratch:
        before = _ceilings(threads)
        jobs, missing = _jobs(settings["model"], str(folder), wanted, kinds, pythons, kept)
        found = [*run(jobs, workloads, common, Path(scratch), arguments.timeout, _say), *missing]
        after = _ceilings(threads)
    from dsv3.bench.results import unrest

    print(_text(found, workloads, before.best(after), threads, arguments.repeat, unrest(before, after)))
    if arguments.json:
        from dsv3.bench.results import write_json

        write_json(Path(arguments.json), _json(found, workloads, (before, after), threads, arguments, settings["model"]))
    return 0 if found[0].rates else 1


def _pythons(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or name not in PEERS:
            raise UsageError(f"--peer {text!r} is not NAME=PYTHON{nearest(name, PEERS)}; names are {', '.join(PEERS)}")
        if shutil.which(path) is None:
            raise UsageError(f"--peer {text!r}: {path!r} is no program; name the Python that has {name}")
        found[name] = path
    return found


def _wanted(text: str | None) -> list[str]:
    names = list(PEERS) if text is None else [word for word in text.split(",") if word]
    for name in names:
        if name not in PEERS:
            raise UsageError(f"--only {name!r} is not one of {', '.join(PEERS)}{nearest(name, PEERS)}")
    return names


def _kinds(text: str) -> list[str]:
    from dsv3.bench.peers.gguf_file import TYPES

    kinds = text.split(",")
    for kind in kinds:
        if kind not in TYPES:
            raise UsageError(f"--gguf {kind!r} is not one of {', '.join(TYPES)}{nearest(kind, TYPES)}")
    return kinds


@contextmanager
def _folder(named: str | None) -> Iterator[Path]:
    """Where llama.cpp's files go."""
    if named is not None:
        Path(named).mkdir(parents=True, exist_ok=True)
        yield Path(named)
        return
    with tempfile.TemporaryDirectory(prefix="dsv3-peers-") as made:
        yield Path(made)


def _jobs(
    model: str, folder: str, wanted: Sequence[str], kinds: Sequence[str], pythons: dict[str, str], kept: Path
) -> tuple[list[Job], list[Outcome]]:
    """dsv3 first. Files for llama.cpp are written before anything is measured; those that cannot be are outcomes already."""
    from dsv3.bench.peers.run import Job, Outcome, gguf

    jobs, missing = [Job("dsv3", sys.executable, model)], []
    for name in wanted:
        python = pythons.get(name, sys.executable)
        if name != "llama.cpp":
            jobs.append(Job(name, python, folder))
            continue
        for kind in kinds:
            _say(f"llama.cpp: {kind} file of the checkpoint")
            path, reason = gguf(folder, kind, python, kept)
            if reason:
                missing.append(Outcome(f"{name} {kind}", reason=reason))
            else:
                jobs.append(Job(name, python, path, kind))
    return jobs, missing


def _ceilings(threads: int) -> Ceilings:
    import torch

    from dsv3.bench.ceiling import measure

    _say("measuring what the machine can do")
    torch.set_num_threads(threads)
    return measure()


def _text(
    found: Sequence[Outcome], workloads: Sequence[Workload], best: Ceilings, threads: int, repeats: int, notes: Sequence[str]
) -> str:
    """Rates, what dsv3 is of each, memory, and the reasons of those that are not there."""
    names = [w.name for w in workloads]
    ours, here = found[0], [o for o in found if o.rates]
    head = f"{threads} threads, median of {repeats} repeats, tokens/s; read {best.read_gb_s:.1f} GB/s, "
    head += f"products {best.gflop_s:,.0f} GFLOP/s, best of before and after"
    lines: list[tuple[str, ...]] = [("engine", "version", *names, "load, s", "peak, GB")]
    lines += [(o.label, o.version, *(_rate(o, name) for name in names), *_facts(o)) for o in here]
    parts = [head, aligned(lines)]
    peers = [o for o in here if o is not ours]
    if peers and ours.rates:
        ratios: list[tuple[str, ...]] = [("dsv3 over", *names)]
        ratios += [(o.label, *(_ratio(ours, o, name) for name in names)) for o in peers]
        parts.append(aligned(ratios))
    reasons = [f"note: {note}" for note in notes]
    reasons += [f"{o.label}: {o.reason}" for o in found if o.reason]
    reasons += [f"{o.label}, {name}: {reason}" for o in found for name, reason in o.failed.items()]
    return "\n\n".join([*parts, *(["\n".join(reasons)] if reasons else [])])


def _rate(o: Outcome, name: str) -> str:
    return number(o.rates[name][1]) if name in o.rates else "-"


def _ratio(ours: Outcome, other: Outcome, name: str) -> str:
    both = name in ours.rates and name in other.rates
    return f"x {ours.rates[name][1] / other.rates[name][1]:.2f}" if both else "-"


def _facts(o: Outcome) -> tuple[str, str]:
    return (
        "-" if o.load_s is None else number(o.load_s),
        "-" if o.peak_bytes is None else number(o.peak_bytes / 1e9),
    )


def _json(
    found: Sequence[Outcome], workloads: Sequence[Workload], ceilings: tuple[Ceilings, Ceilings], threads: int,
    arguments: argparse.Namespace, model: str,
) -> dict[str, Any]:  # fmt: skip
    from dsv3.bench.results import KIND, SCHEMA

    before, after = ceilings
    engines = [
        {
            "engine": o.label, "version": o.version, "load_s": o.load_s, "peak_bytes": o.peak_bytes, "reason": o.reason,
            "tokens_per_s": {name: dict(zip(("low", "median", "high"), r, strict=True)) for name, r in o.rates.items()},
            "failed": o.failed, "same_tokens": {w.name: o.same(found[0], w.name) for w in workloads},
        }
        for o in found
    ]  # fmt: skip
    return {
        "kind": KIND, "schema": SCHEMA, "what": "peers", "model": model, "threads": threads, "repeats": arguments.repeat,
        "workloads": [vars(w) for w in workloads], "engines": engines,
        "ceilings": {"before": before.to_json(), "after": after.to_json(), "best": before.best(after).to_json()},
    }  # fmt: skip


def _say(text: str) -> None:
    print(f"dsv3: {text}", file=sys.stderr, flush=True)
