"""A calibration text as windows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsv3.errors import UsageError
from dsv3.graph.config import ModelConfig

WIDTH = 256  # tokens; less for a shorter text
_CHARACTERS = 2 << 20  # of a file: encoding a whole library to keep a few thousand tokens helps nobody


def read_windows(paths: Sequence[Path], encode: Callable[[str], Sequence[int]], tokens: int) -> Tensor:
    """About `tokens` ids as int64 [S, W], the windows spread evenly over the files. UsageError for one that cannot be read, or
    for too little text."""
    if tokens < 2:
        raise UsageError(f"--calibrate-tokens {tokens}: at least 2")
    ids: list[int] = []
    for path in _files(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"calibration text {path}: cannot be read as UTF-8 text: {error}") from error
        ids += encode(text[:_CHARACTERS])
    width = min(WIDTH, len(ids), tokens)
    if width < 2:
        raise UsageError(f"the calibration text has {len(ids)} tokens; some thousands are needed")
    have = len(ids) // width
    count = min(have, max(1, tokens // width))
    starts = [i * have // count * width for i in range(count)]
    return torch.tensor([ids[at : at + width] for at in starts], dtype=torch.int64)


def check_windows(config: ModelConfig, windows: Tensor, mtp: bool) -> None:
    """UsageError if token ids [S, W] do not fit the model. mtp: with its MTP modules, each of which sees a token less."""
    modules = config.num_nextn_predict_layers if mtp else 0
    if windows.shape[1] <= modules:
        raise UsageError(f"windows of {windows.shape[1]} tokens: {modules} MTP modules need {modules + 1}; give more text")
    if (largest := int(windows.max())) >= config.vocab_size:
        what = f"the tokenizer gives id {largest}, the model has {config.vocab_size}"
        raise UsageError(f"the calibration text does not fit: {what}; the tokenizer is of another model")


def _files(paths: Sequence[Path]) -> list[Path]:
    """Files, and the text files of folders."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"calibration folder {path} holds no .txt file")
        found += inside
    return found
