"""A drawn page as a file: SVG as it is, PNG where cairosvg is installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from dsv3.drawing.page import light_only
from dsv3.errors import UsageError


def check_plot(path: Path) -> None:
    """UsageError for a format that cannot be written here, before anything is measured."""
    suffix = path.suffix.lower()
    if suffix not in (".svg", ".png"):
        raise UsageError(f"--plot {str(path)!r}: SVG is written, or PNG; name a file that ends in .svg")
    if suffix == ".png" and importlib.util.find_spec("cairosvg") is None:
        raise UsageError(f"--plot {str(path)!r}: PNG needs cairosvg; pip install cairosvg, or name a file that ends in .svg")


def save(drawn: str, path: Path) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    if path.suffix.lower() == ".png":
        import cairosvg

        cairosvg.svg2png(bytestring=light_only(drawn).encode(), write_to=str(part), scale=2)
    else:
        part.write_text(drawn, encoding="utf-8")
    os.replace(part, path)
