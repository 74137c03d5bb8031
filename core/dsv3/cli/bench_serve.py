"""`dsv3 bench serve`: a server under load, measured from outside."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.bench.serve.client import Sample
from dsv3.bench.serve.figures import Goal, Outcome, outcome, to_json
from dsv3.bench.serve.http import Target, target
from dsv3.bench.serve.load import FIRST_ID, Lengths, lengths, model_of, plan, run
from dsv3.cli.bench_text import aligned, number
from dsv3.cli.files import check_outputs
from dsv3.errors import UsageError

_NAMES = {"ttft": "first token", "itl": "between events", "per token": "per token", "whole answer": "whole answer"}


@dataclass(frozen=True)
class Job:
    """What is asked of whom. rate: requests a second; concurrency: at once, None: any number; timeout: seconds of a request."""

    where: Target
    count: int
    rate: float
    concurrency: int | None
    inputs: Lengths
    outputs: Lengths
    vocabulary: int
    seed: int
    timeout: float
    goal: Goal

    def says(self, model: str) -> str:
        """For a head and a title."""
        rate = "all at once" if math.isinf(self.rate) else f"{self.rate:g} a second"
        cap = "" if self.concurrency is None else f", {self.concurrency} under way at most"
        size = f"{self.inputs} tokens in, {self.outputs} out"
        return f"{model} at {self.where}: {self.count} requests {rate}{cap}; {size}; seed {self.seed}"

    def to_json(self, model: str) -> dict[str, Any]:
        return {
            "url": str(self.where), "model": model, "requests": self.count,
            "rate": None if math.isinf(self.rate) else self.rate, "concurrency": self.concurrency,
            "input_tokens": [self.inputs.low, self.inputs.high],
            "output_tokens": [self.outputs.low, self.outputs.high], "vocabulary": self.vocabulary, "seed": self.seed,
            "timeout": self.timeout,
        }  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    """1 if no request was answered whole."""
    job = _job(arguments)
    check_outputs(arguments)
    questions = plan(job.count, job.rate, job.inputs, job.outputs, job.vocabulary, job.seed)

    async def measure() -> tuple[str, list[Sample]]:
        model = await model_of(job.where)
        _say(job.says(model))
        return model, await run(job.where, model, questions, job.concurrency, job.timeout, _progress(job.count))

    model, samples = asyncio.run(measure())
    found = outcome(samples, job.goal)
    print(shown(found, job.says(model), job.goal))
    if arguments.json:
        _write(Path(arguments.json), json.dumps(to_json(found, samples, job.to_json(model), job.goal)) + "\n")
    if arguments.plot:
        from dsv3.bench.serve.plot import svg
        from dsv3.drawing.save import save

        save(svg(found, samples, job.says(model), job.goal), Path(arguments.plot))
    return 0 if found.whole else 1


def _job(a: argparse.Namespace) -> Job:
    """UsageError for every flag that is wrong."""
    for name in ("requests", "concurrency"):
        if (value := getattr(a, name)) is not None and value < 1:
            raise UsageError(f"--{name} {value}: expected at least 1")
    if not a.rate > 0:
        raise UsageError(f"--rate {a.rate:g}: expected requests a second above 0, or inf for all at once")
    for name in ("timeout", "slo_ttft", "slo_itl"):
        if (value := getattr(a, name)) is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: expected a time above 0")
    if a.vocabulary <= FIRST_ID:
        raise UsageError(f"--vocabulary {a.vocabulary}: expected more than {FIRST_ID}; prompts are made of ids from there on")
    seed = a.seed if a.seed is not None else secrets.randbelow(1 << 31)
    goal = Goal(None if a.slo_ttft is None else a.slo_ttft / 1e3, None if a.slo_itl is None else a.slo_itl / 1e3)
    return Job(
        target(a.url, _key(a.key_file)), a.requests, a.rate, a.concurrency, lengths(a.input_tokens, "input-tokens"),
        lengths(a.output_tokens, "output-tokens"), a.vocabulary, seed, a.timeout, goal,
    )  # fmt: skip


def _key(path: str | None) -> str | None:
    """The first line of a file: a key in an argument could be read by every user of the machine."""
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--key-file {path!r}: {error}") from error
    return next((line.strip() for line in lines if line.strip()), "")


def shown(found: Outcome, head: str, goal: Goal) -> str:
    """Latencies, rates, errors, notes."""
    parts = [head]
    if found.spreads:
        rows: list[tuple[str, ...]] = [("ms", "median", "p90", "p99", "worst", "measured")]
        for name, s in found.spreads.items():
            rows.append((_NAMES[name], *(number(1e3 * v) for v in (s.median, s.p90, s.p99, s.worst)), f"{s.count:,}"))
        parts.append(aligned(rows))
    parts.append(aligned(_rates(found, goal), last=True))
    if found.errors:
        parts.append(aligned([("errors", "requests"), *((kind, f"{n:,}") for kind, n in found.errors.items())]))
    if found.notes:
        parts.append("\n".join(f"note: {note}" for note in found.notes))
    return "\n\n".join(parts)


def _rates(found: Outcome, goal: Goal) -> Sequence[Sequence[str]]:
    whole = f"requests/s; {found.whole:,} of {found.requests:,} in {found.seconds:.1f} s"
    rows = [
        ("generated", number(found.tokens_s), "tokens/s"),
        ("prompts and generated", number((found.tokens + found.prompt_tokens) / found.seconds), "tokens/s"),
        ("whole answers", number(found.requests_s), whole),
    ]
    limits = [
        f"{name} {1e3 * limit:g} ms" for name, limit in (("first token", goal.ttft), ("per token", goal.per_token)) if limit
    ]
    if limits:
        share = f"{100 * found.good / found.requests:.1f} % kept {' and '.join(limits)}"
        rows.append(("goodput", number(found.goodput), f"requests/s; {share}"))
    if found.drafted:
        rows.append(("drafts accepted", f"{100 * found.accepted / found.drafted:.1f}", f"% of {found.drafted:,}"))
    return [("figure", "value", ""), *rows]


def _progress(count: int) -> Callable[[int], None]:
    """A line for each tenth."""
    step = max(1, math.ceil(count / 10))
    return lambda n: _say(f"{n} of {count}") if n % step == 0 or n == count else None


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _say(text: str) -> None:
    print(f"dsv3: {text}", file=sys.stderr, flush=True)
