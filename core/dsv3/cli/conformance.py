"""`dsv3 conformance`: run the suite against a backend, write its cases as vectors, check a certificate."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dsv3.cli.common import settings_of
from dsv3.errors import UsageError


def main(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    if arguments.action != "run" and arguments.path is None:
        what = "a folder to write" if arguments.action == "export" else "a certificate.json"
        raise UsageError(f"dsv3 conformance {arguments.action} needs {what}")
    if settings["threads"] is not None:
        import torch

        torch.set_num_threads(settings["threads"])
    if arguments.action == "export":
        return _export(arguments)
    if arguments.action == "verify":
        return _verify(arguments.path)
    if arguments.path is not None:
        raise UsageError(f"{arguments.path!r} is not understood; a backend is named with --backend")
    return _run(arguments, settings["backend"])


def _run(arguments: argparse.Namespace, backend: str) -> int:
    from dsv3.conformance import run
    from dsv3.conformance.report import terminal
    from dsv3.conformance.run import Plan

    if backend == "auto":
        from dsv3.dispatch.choose import choose

        backend = choose("auto", None, None).name
    size: Any = arguments.size or "full"
    ops = arguments.ops.split(",") if arguments.ops else None
    plan = Plan(backend, arguments.level, ops, arguments.cases, arguments.seed, size, arguments.emulate or False)
    plan.check()
    with terminal.Progress(len(plan.ids())) as progress:
        report = run(
            backend, level=arguments.level, ops=ops, cases=arguments.cases, seed=arguments.seed, size=size,
            emulate=arguments.emulate or False, waivers=arguments.waivers, report=arguments.report, watch=progress,
            fail_fast=arguments.fail_fast,
        )  # fmt: skip
    print(terminal.summary(report, verbose=arguments.verbose))
    if arguments.report is not None:
        print(f"reports are in {arguments.report}", file=sys.stderr)
    return 1 if report.failed else 0


def _export(arguments: argparse.Namespace) -> int:
    from dsv3.conformance.export import export_vectors

    ops = arguments.ops.split(",") if arguments.ops else None

    def tell(done: int, total: int, case: str) -> None:
        if done % 100 == 0:
            print(f"{done} of {total} cases, {case}", file=sys.stderr)

    counts = export_vectors(arguments.path, ops=ops, seed=arguments.seed, size=arguments.size or "quick", progress=tell)
    print(f"{sum(counts.values())} vectors for {len(counts)} operators are in {arguments.path}; next:")
    print(f"  python -m dsv3.export.run_vectors {arguments.path} OUTPUTS --runtime onnxruntime   # or your own runtime")
    print(f"  python -m dsv3.export.compare {arguments.path} OUTPUTS   # or configs/conformance/compare.cpp")
    return 0


def _verify(path: str) -> int:
    from dsv3.conformance.report import certificate

    problems = certificate.verify(path)
    for problem in problems:
        print(problem)
    print(f"{path}: {f'{len(problems)} problems' if problems else 'good'}")
    return 1 if problems else 0
