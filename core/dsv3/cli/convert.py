"""`dsv3 convert SRC DST --to ...`: another number format, or another layout. The folder written goes to standard output."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dsv3.errors import UsageError


def main(arguments: argparse.Namespace) -> int:
    from dsv3.checkpoint.convert.run import convert, plan_conversion
    from dsv3.checkpoint.convert.target import Target

    target = Target(
        arguments.to, arguments.model_parallel, arguments.scale_fmt, arguments.weight_only, mtp=not arguments.no_mtp
    )  # fmt: skip
    workers = arguments.workers if arguments.workers is not None else min(8, len(os.sched_getaffinity(0)))
    if not 1 <= workers <= 256:
        raise UsageError(f"--workers {workers}: a number from 1 to 256")
    folder = Path(arguments.dst)
    if arguments.dry_run:
        from dsv3.checkpoint.convert.describe import describe

        print(describe(plan_conversion(arguments.src, folder, target)))
        return 0
    convert(arguments.src, folder, target, workers=workers, progress=True)
    print(folder)
    return 0
