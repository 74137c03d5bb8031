"""The ONNX Runtime backend, installed by pip into a folder of its own: it runs the demo as the reference does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="the plugin's dependency onnxruntime is not installed: pip install dsv3[test]")

ROOT = Path(__file__).parents[2]
FLOAT32 = ("--dtype", "float32", "--quant", "none", "--max-new-tokens", "16")
LOGITS = """
import dsv3, json, torch
ids = [0, *torch.randint(4, 4000, (90,), generator=torch.Generator().manual_seed(1)).tolist()]
for dtype in ("float32", "bfloat16"):
    found, wanted = (dsv3.load("demo", backend=name, dtype=dtype) for name in ("onnxruntime", "reference"))
    exact = dsv3.load("demo", backend="reference", dtype="float64")
    y, r, e = (m.logits(ids).double() for m in (found, wanted, exact))
    print(json.dumps({op: d["chosen"] for op, d in found.placement().to_json()["ops"].items()}))
    print(dtype, float((y - r).norm() / r.norm()), float((y - e).norm() / e.norm()), float((r - e).norm() / e.norm()))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*command, str(ROOT / "plugins" / "dsv3-onnxruntime")], check=True, capture_output=True)
    path = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def _run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_it_tells_the_references_story(installed: dict[str, str]) -> None:
    runs = {
        name: _run(installed, "-m", "dsv3", "run", "Once upon a time", "--backend", name, *FLOAT32)
        for name in ("onnxruntime", "reference")
    }
    assert runs["onnxruntime"].returncode == 0, runs["onnxruntime"].stderr
    assert "demo on onnxruntime" in runs["onnxruntime"].stderr
    assert runs["onnxruntime"].stdout == runs["reference"].stdout != ""


def test_its_logits_are_the_references(installed: dict[str, str]) -> None:
    done = _run(installed, "-c", LOGITS)
    assert done.returncode == 0, done.stderr
    *_, chosen, _ = lines = done.stdout.splitlines()
    for op in ("quant_linear", "fused_experts", "mla_prefill", "route", "add_rms_norm", "silu_mul", "linear"):
        assert "onnxruntime.ort" in json.loads(chosen)[op], op
    figures = {name: [float(v) for v in rest] for name, *rest in map(str.split, lines[1::2])}
    assert figures["float32"][0] < 1e-5
    _, ours, references = figures["bfloat16"]
    assert ours < 2 * references < 0.1


def test_explain_and_probe_show_it(installed: dict[str, str]) -> None:
    rows = json.loads(_run(installed, "-m", "dsv3", "probe", "--json").stdout)
    states = {(r["state"], r["package"]) for r in rows if r["backend"] == "onnxruntime"}
    assert ("usable", "dsv3-onnxruntime 0.1.0") in states
    wide = _run(installed, "-m", "dsv3", "explain", "rms_norm", "--backend", "onnxruntime", "--dtype", "float64", "--json")
    reasons = [r["reason"] for c in json.loads(wide.stdout)["choices"] for r in c["rejected"]]
    assert any("needs x in float32 or bfloat16; it is float64" in r for r in reasons)


def test_its_own_tests_pass(installed: dict[str, str]) -> None:
    tests = str(ROOT / "plugins" / "dsv3-onnxruntime" / "tests")
    done = _run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, tests)
    assert done.returncode == 0, done.stdout + done.stderr
