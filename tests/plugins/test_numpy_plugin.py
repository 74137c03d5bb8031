"""The example backend, installed by pip into a folder of its own: the door from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.install import install, run_python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    install(ROOT / "plugins" / "dsv3-numpy", target)
    return target


FORMATS = ("--dtype", "float32", "--quant", "none", "--max-new-tokens", "12")


def test_it_tells_the_references_story(installed: Path) -> None:
    runs = {
        name: run_python(installed, "-m", "dsv3", "run", "Once upon a time", "--backend", name, *FORMATS)
        for name in ("numpy", "reference")
    }
    assert runs["numpy"].returncode == 0, runs["numpy"].stderr
    assert "demo on numpy" in runs["numpy"].stderr
    assert runs["numpy"].stdout == runs["reference"].stdout != ""


def test_explain_and_probe_show_it(installed: Path) -> None:
    found = json.loads(
        run_python(installed, "-m", "dsv3", "explain", "quant_linear", "--backend", "numpy", *FORMATS[:4], "--json").stdout
    )
    assert {"numpy.transposed_matmul"} <= {c["chosen"] for c in found["choices"]}
    bf16 = json.loads(run_python(installed, "-m", "dsv3", "explain", "quant_linear", "--backend", "numpy", "--json").stdout)
    reasons = [r["reason"] for c in bf16["choices"] for r in c["rejected"] if r["kernel"] == "numpy.transposed_matmul"]
    assert any("needs x in float32; it is bfloat16" in r and "needs weights in none; they are fp8-w8a16" in r for r in reasons)
    rows = json.loads(run_python(installed, "-m", "dsv3", "probe", "--json").stdout)
    (row,) = [r for r in rows if r["backend"] == "numpy"]
    assert (row["state"], row["package"]) == ("usable", "dsv3-numpy 0.1.0")


def test_its_own_tests_pass(installed: Path) -> None:
    done = run_python(
        installed,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        str(ROOT / "plugins" / "dsv3-numpy" / "tests"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
