"""Files that commands write, looked at before the work."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv3.errors import UsageError


def check_outputs(arguments: argparse.Namespace) -> None:
    """UsageError for a --json or --plot that could not be written after the work."""
    for name in ("json", "plot"):
        if (value := getattr(arguments, name)) is not None:
            path = Path(value)
            if path.is_dir() or not path.parent.is_dir():
                why = "is a folder" if path.is_dir() else f"is in {str(path.parent)!r}, which is no folder"
                raise UsageError(f"--{name} {value!r} {why}; name a file in a folder that exists")
    if arguments.plot is not None:
        from dsv3.drawing.save import check_plot

        check_plot(Path(arguments.plot))
