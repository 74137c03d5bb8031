"""The CPU backend: what a probe costs, where compiled kernels go, threads, the same story as the reference."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dsv3
from dsv3_cpu import backend, facts, objects, views
from dsv3_cpu.programs import Kernel

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
    objects.cache_folder.cache_clear()
    try:
        folder = objects.cache_folder()
        assert folder is not None and folder.parent == tmp_path / "dsv3" / "numba" and folder.is_dir()
        (tmp_path / "file").touch()
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "below"))
        objects.cache_folder.cache_clear()
        assert objects.cache_folder() is None
    finally:
        objects.cache_folder.cache_clear()


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


def test_drafts_change_no_token_of_the_story_as_it_is_run_by_default() -> None:
    """FP8 weights, bfloat16 in and out: verified tokens are computed as decoded ones are, to the last bit."""
    prompts = ["Once upon a time", "The little fox", "One day a girl named Lily", "Tom had a red ball"]
    with dsv3.load("demo", backend="cpu") as model:
        plain = [model.generate(p, max_new_tokens=90, ignore_eos=True).ids for p in prompts]  # past 64 keys
        for k in (1, 3):
            found = [model.generate(p, max_new_tokens=90, ignore_eos=True, draft="mtp", draft_tokens=k) for p in prompts]
            assert [g.ids for g in found] == plain
            assert sum(g.stats["accepted"] for g in found) > 0


def _in_a_process(code: str, folder: Path) -> str:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


_NORM = (
    "import sys, torch; from dsv3_cpu.pointwise import rms_norm; from dsv3 import ops; x, w = torch.randn(2, 8), torch.ones(8);"
    "torch.testing.assert_close(rms_norm(x, w, 1e-6), ops.rms_norm(x=x, weight=w, eps=1e-6)); print('numba' in sys.modules)"
)


def test_a_start_that_finds_its_kernels_does_without_numba(tmp_path: Path) -> None:
    assert _in_a_process(_NORM, tmp_path).split() == ["True"]
    assert _in_a_process(_NORM, tmp_path).split() == ["False"]


def test_a_damaged_object_is_compiled_again(tmp_path: Path) -> None:
    _in_a_process(_NORM, tmp_path)
    objects_there = sorted(tmp_path.glob("dsv3-cpu-*/*.o"))
    assert objects_there
    for n, path in enumerate(objects_there):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if n % 2 else data[:-8] + bytes(8))
    assert _in_a_process(_NORM, tmp_path).split() == ["True"]
    assert _in_a_process(_NORM, tmp_path).split() == ["False"]


@pytest.mark.skipif(sys.platform == "win32", reason="markers of ended processes are waited for there")
def test_who_compiles_and_dies_is_not_waited_for(tmp_path: Path) -> None:
    code = (
        "import os; from dsv3_cpu import ahead, programs;"
        "from dsv3_cpu.objects import cache_folder;"
        "ahead._take(ahead._marker(cache_folder(), 'some')); os._exit(0)"
    )
    _in_a_process(code, tmp_path)
    started = time.monotonic()
    _in_a_process("from dsv3_cpu import ahead\nwith ahead.alone('some'): pass", tmp_path)
    assert time.monotonic() - started < 20, "it would have waited for a minute"
    assert not list(tmp_path.glob("*/*.compiling"))


def test_a_kernel_without_memory_says_so() -> None:
    def greedy(team, me, crew, size, out):
        out[0] = np.empty(size, np.float64)[size - 1]

    with pytest.raises(MemoryError, match="no memory"):
        Kernel("test_backend.greedy", greedy)(0, 1 << 60, np.zeros(1))


def test_a_start_imports_nothing_that_the_model_does_not_need() -> None:
    code = (
        "import sys; from dsv3.cli import main; names = ('sympy', 'torch._dynamo', 'torch._inductor', 'triton', 'onnx');"
        "main(['run', 'Once', '--max-new-tokens', '3', '--backend', 'cpu']);"
        "from dsv3.loading import place; from dsv3.quant import SCHEMES;"
        "[place('demo', backend='cpu', quant=quant) for quant in SCHEMES];"
        "print([m for m in names if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
