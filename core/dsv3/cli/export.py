"""`dsv3 export MODEL DST --format onnx`: a checkpoint as ONNX graphs. The files written go to standard output."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv3.cli.common import settings_of


def main(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)

    from dsv3.export.model import export_onnx

    for path in export_onnx(settings["model"], Path(arguments.dst), dtype=settings["dtype"] or "float32", progress=True):
        print(path)
    return 0
