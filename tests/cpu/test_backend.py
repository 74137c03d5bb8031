"""The CPU backend: what a probe costs, where compiled kernels go, threads, the same story as the reference."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dsv3
from dsv3_cpu import backend, compile, facts, views

NEEDS_TOUCHING = "import dsv3_cpu, sys; b = dsv3_cpu.backend; d = b.devices()[0]; b.probe(d); list(b.kernels(d)); "


def test_import_and_probe_load_neither_torch_nor_numba() -> None:
    check = NEEDS_TOUCHING + "print([m for m in ('torch', 'numba', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_probe_takes_under_50_ms() -> None:
    facts.described.cache_clear()
    facts.features.cache_clear()
    device = backend.devices()[0]
    started = time.perf_counter()
    answer = backend.probe(device)
    assert time.perf_counter() - started < 0.05
    assert answer.state == "usable" and answer.capability is not None and "float64" not in answer.capability.dtypes


def test_without_numba_the_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    answer = backend.probe(backend.devices()[0])
    assert answer.state == "incompatible" and "numba" in answer.detail and "pip install" in answer.remedy


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("sse4_2 f16c avx2", {"half"}),
        ("sse4_2 avx", set()),
        ("f16c avx2 avx512_bf16 avx512_vnni", {"half", "bf16_mm", "int8_mm"}),
    ],
)
def test_features_are_read_off_the_processor(
    words: str, wanted: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor: 0\nmodel name\t: Some CPU\nflags\t\t: {words}\n\nprocessor: 1\n")
    monkeypatch.setattr(facts, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(facts.platform, "machine", lambda: "x86_64")
    facts.described.cache_clear()
    facts.features.cache_clear()
    try:
        assert facts.described()[0] == "Some CPU" and facts.features() == wanted
    finally:
        facts.described.cache_clear()
        facts.features.cache_clear()


def test_compiled_kernels_go_to_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile.cache_folder.cache_clear()
    try:
        folder = compile.cache_folder()
        assert folder is not None and folder.parent == tmp_path / "dsv3" / "numba" and folder.is_dir()
        (tmp_path / "file").touch()
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "below"))
        compile.cache_folder.cache_clear()
        assert compile.cache_folder() is None
    finally:
        compile.cache_folder.cache_clear()
    assert not list(Path(compile.__file__).parent.rglob("*.nbi"))


def test_a_kernel_works_where_no_cache_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = (
        "import torch; from dsv3_cpu.pointwise import silu_mul; from dsv3 import ops; x = torch.randn(2, 8);"
        "torch.testing.assert_close(silu_mul(x), ops.silu_mul(x))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "below")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_views_follow_their_tensors() -> None:
    weight = torch.randn(4, 8)
    assert views.kept(weight) is views.kept(weight)
    weight.mul_(2)
    assert torch.equal(torch.from_numpy(views.kept(weight)), weight)
    weight.data = torch.zeros(4, 8)
    assert not views.kept(weight).any()
    key = id(weight)
    del weight
    assert key not in views._kept


def test_the_story_is_the_references() -> None:
    """Greedy tokens in float32, alone, together and with drafts."""
    prompts = ["Once upon a time", "The little fox", "Tom"]
    models = [dsv3.load("demo", backend=name, dtype="float32") for name in ("cpu", "reference")]
    assert models[0].placement().backend == "cpu" and not models[0].placement().fallbacks()
    for draft in (None, "mtp"):
        mine, theirs = ([g.ids for g in m.generate(prompts, max_new_tokens=24, draft=draft)] for m in models)
        assert mine == theirs
