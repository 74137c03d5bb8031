"""Every kind of broken checkpoint ends in exit code 4, with one error that names what is wrong, in under a second."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dsv3
from dsv3.cli import main
from tests.support.damage import KINDS


def test_there_are_at_least_forty_kinds() -> None:
    assert len(KINDS) >= 40


@pytest.mark.parametrize("layout", ["single", "sharded", "fp8", "demo"])
def test_the_unbroken_checkpoints_load(layout: str, whole: dict[str, Path]) -> None:
    model = dsv3.load(str(whole[layout]))
    assert model.logits([0, 5, 9]).isfinite().all()
    assert model.mtp_logits([0, 5, 9]).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_broken_checkpoint_is_refused_by_name(
    kind: str, whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, damage, words = KINDS[kind]
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole[layout], folder)
    damage(folder)
    start = time.process_time()  # not what other processes take meanwhile
    code = main(["run", "x", "--model", str(folder), "--max-new-tokens", "1"])
    seconds = time.process_time() - start
    out, err = capsys.readouterr()
    assert code == 4, err
    assert out == ""
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err, f"{word!r} is not in {err!r}"
    print(f"{kind}: {seconds * 1000:.0f} ms: {err.strip()}")
    assert seconds < 1.0


@pytest.mark.parametrize("kind", ["missing tensor", "header bomb", "NaN scale", "FP8 NaN code", "V4"])
def test_the_whole_process_takes_under_a_second(kind: str, whole: dict[str, Path], tmp_path: Path) -> None:
    """Start of Python included: small checkpoints are checked before torch is imported."""
    layout, damage, _ = KINDS[kind]
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole[layout], folder)
    damage(folder)
    seconds = []
    for _ in range(3):  # the fastest: the machine's noise only adds
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "dsv3", "run", "x", "--model", str(folder)], capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 4
    print(f"{kind}: {min(seconds) * 1000:.0f} ms with the start of Python")
    assert min(seconds) < 1.0
