"""Installing a distribution with pip into a folder of its own, and running Python with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def install(source: Path, target: Path) -> None:
    """pip install --target, from what is on this machine."""
    options = ("-q", "--no-deps", "--no-build-isolation", "--target", str(target))
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_python(target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the folder on its path, before everything else."""
    path = os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
