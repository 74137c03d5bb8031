"""The example backend, installed by pip into a folder of its own: the door from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _install(source: Path, target: Path) -> dict[str, str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": str(target)}


def _run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _install(ROOT / "plugins" / "dsv3-numpy", tmp_path_factory.mktemp("site"))


FORMATS = ("--dtype", "float32", "--quant", "none", "--max-new-tokens", "12")


def test_it_tells_the_references_story(installed: dict[str, str]) -> None:
    runs = {
        name: _run(installed, "-m", "dsv3", "run", "Once upon a time", "--backend", name, *FORMATS)
        for name in ("numpy", "reference")
    }
    assert runs["numpy"].returncode == 0, runs["numpy"].stderr
    assert "demo on numpy" in runs["numpy"].stderr
    assert runs["numpy"].stdout == runs["reference"].stdout != ""


def test_explain_and_probe_show_it(installed: dict[str, str]) -> None:
    found = json.loads(
        _run(installed, "-m", "dsv3", "explain", "quant_linear", "--backend", "numpy", *FORMATS[:4], "--json").stdout
    )
    assert {"numpy.transposed_matmul"} <= {c["chosen"] for c in found["choices"]}
    bf16 = json.loads(_run(installed, "-m", "dsv3", "explain", "quant_linear", "--backend", "numpy", "--json").stdout)
    reasons = [r["reason"] for c in bf16["choices"] for r in c["rejected"] if r["kernel"] == "numpy.transposed_matmul"]
    assert any("needs x in float32; it is bfloat16" in r and "needs weights in none; they are fp8-w8a16" in r for r in reasons)
    rows = json.loads(_run(installed, "-m", "dsv3", "probe", "--json").stdout)
    (row,) = [r for r in rows if r["backend"] == "numpy"]
    assert (row["state"], row["package"]) == ("usable", "dsv3-numpy 0.1.0")


def test_its_own_tests_pass(installed: dict[str, str]) -> None:
    done = _run(
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


def test_the_template_becomes_a_plugin_that_works(tmp_path: Path) -> None:
    words = {"__dist__": "dsv3-fresh", "__module__": "dsv3_fresh", "__name__": "fresh"}
    source = tmp_path / "source"
    for path in (ROOT / "plugins" / "template").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            text, place = path.read_text(), str(path.relative_to(ROOT / "plugins" / "template"))
            for word, value in words.items():
                text, place = text.replace(word, value), place.replace(word, value)
            (source / place).parent.mkdir(parents=True, exist_ok=True)
            (source / place).write_text(text)
    environment = _install(source, tmp_path / "site")
    done = _run(environment, "-m", "dsv3", "run", "Once", "--backend", "fresh", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert "demo on fresh" in done.stderr
    tests = _run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(source / "tests"))
    assert tests.returncode == 0, tests.stdout + tests.stderr
