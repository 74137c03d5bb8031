"""Conversions in a process of their own, and checkpoints compared tensor by tensor as bytes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv3.checkpoint.header import TensorInfo, read_header

NUMPY = {
    "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F8_E4M3": ml_dtypes.float8_e4m3fn, "I8": np.int8, "I32": np.int32,
    "I64": np.int64,
}  # fmt: skip


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dsv3", "convert", *map(str, arguments)]


def convert(*arguments: object, code: int = 0, **options: Any) -> str:
    """Run `dsv3 convert`; what it said on standard error."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == code, f"exit {done.returncode}: {done.stderr}"
    return done.stderr


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's files, whatever their layout."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        for name, info in read_header(path).items():
            assert name not in found or folder.name.startswith("demo"), name
            found[name] = _array(raw, info)
    return found


def _array(raw: bytes, info: TensorInfo) -> np.ndarray:
    return np.frombuffer(raw[info.start : info.end], NUMPY[info.dtype]).reshape(info.shape)


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        x.dtype == b[n].dtype and x.shape == b[n].shape and x.tobytes() == b[n].tobytes() for n, x in a.items()
    )


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def expand(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Block scales at every number: indexed by row // 128 and column // 128."""
    rows, cols = (np.arange(n) // 128 for n in shape)
    return scale[rows][:, cols]
