"""`dsv3 convert SRC DST --to ...`: another number format, or another layout. The folder written goes to standard output."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def main(arguments: argparse.Namespace) -> int:
    from dsv3.checkpoint.convert.run import complete, convert, plan_conversion
    from dsv3.checkpoint.convert.target import Target

    target = Target(
        arguments.to, arguments.model_parallel, arguments.scale_fmt, arguments.weight_only, not arguments.no_mtp,
        bool(arguments.calibrate),
    )  # fmt: skip
    workers = arguments.workers if arguments.workers is not None else min(8, len(os.sched_getaffinity(0)))
    if not 1 <= workers <= 256:
        raise UsageError(f"--workers {workers}: a number from 1 to 256")
    folder = Path(arguments.dst)
    if arguments.dry_run:
        from dsv3.checkpoint.convert.describe import describe

        print(describe(plan_conversion(arguments.src, folder, target)))
        return 0
    planned = plan_conversion(arguments.src, folder, target)
    windows = _windows(arguments) if arguments.calibrate else None
    if complete(planned, windows):
        print(f"{folder} holds this conversion already: nothing to do", file=sys.stderr)
        print(folder)
        return 0
    convert(arguments.src, folder, target, windows=windows, workers=workers, progress=True)
    print(folder)
    return 0


def _windows(arguments: argparse.Namespace) -> Tensor:
    """The calibration text as token ids, spread evenly over it."""
    from dsv3.checkpoint.calibrate.windows import read_windows
    from dsv3.checkpoint.folder import model_folder
    from dsv3.engine.text import Tokenizer

    folder = model_folder(arguments.src, False)
    assert folder is not None
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise UsageError(f"{folder} has no tokenizer.json; --calibrate needs it to read the text")
    return read_windows([Path(p) for p in arguments.calibrate], tokenizer.encode, arguments.calibrate_tokens)
