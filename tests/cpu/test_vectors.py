"""The same kernels with other vectors than this processor's: AVX-512 masked, and sixteen lanes on registers for eight."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_AVX2 = "+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt"
# LLVM obeys the last word of a feature; the kernels count lanes by whether it is named at all.
FEATURES = {"masked": f"{_AVX2},-avx512f", "sixteen": f"+avx512f,-avx512f,{_AVX2}"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the features named are those of x86")
@pytest.mark.parametrize("vectors", FEATURES)
def test_products_and_layers_are_right(vectors: str, tmp_path: Path) -> None:
    environment = {
        **os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": FEATURES[vectors], "NUMBA_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    lanes = subprocess.run(
        [sys.executable, "-c", "from dsv3_cpu.processor import LANES; print(LANES)"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert lanes.stdout.strip() == {"masked": "8", "sixteen": "16"}[vectors]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/cpu/test_products.py",
        "tests/cpu/test_layers.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
