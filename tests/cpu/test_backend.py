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
from dsv3.budget.units import BF16_OPERAND
from dsv3.plugin import LatentCache, Prepared
from dsv3.quant import dequantize, quantize
from dsv3_cpu import attention, backend, compile, experts, facts, linear, views

SCHEMES = ("none", "fp8-w8a16", "int8-w8a16", "int4-w4a16", "int8-w8a8")
NEEDS_TOUCHING = "import dsv3_cpu, sys; b = dsv3_cpu.backend; d = b.devices()[0]; b.probe(d); list(b.kernels(d)); "


def _weight(quant: str, *shape: int, dtype: torch.dtype = torch.float32) -> Prepared:
    torch.manual_seed(sum(shape))
    real = torch.randn(*shape[-2:]).to(dtype)
    if len(shape) == 2:
        return Prepared("canonical", quant, shape, dict(quantize(real, quant)))
    parts = [quantize(torch.randn(*shape[-2:]).to(dtype), quant) for _ in range(shape[0])]
    return Prepared("canonical", quant, shape, {name: torch.stack([p[name] for p in parts]) for name in parts[0]})


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


@pytest.fixture
def threads():
    """Sets the number of threads; restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("quant", ["none", "fp8-w8a16"])
def test_products_do_not_depend_on_the_number_of_threads(
    quant: str, rows: int, threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile, "_WORTH_THREADS", 0)
    w = _weight(quant, 200, 300, dtype=torch.bfloat16)
    x = torch.randn(rows, 300)
    found = []
    for count in (1, 2):
        threads(count)
        found.append(linear.quant_linear(x.to(torch.bfloat16), w))
    assert torch.equal(*found)


def test_attention_does_not_depend_on_the_number_of_threads(threads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "_WORTH_THREADS", 0)
    cache = LatentCache(torch.randn(6, 16, 32), torch.randn(6, 16, 8))
    found = []
    for count in (1, 2):
        threads(count)
        found.append(
            attention.mla_decode(
                q_c=torch.ones(3, 8, 32), q_pe=torch.ones(3, 8, 8), cache=cache,
                block_table=torch.tensor([[3, 1, 5], [0, 2, 4]]), seq_lens=torch.tensor([40, 17]),
                cu_q=torch.tensor([0, 2, 3]), max_q=2, max_k=40, scale=0.1, start=0,
            )
        )  # fmt: skip
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("quant", SCHEMES[:4])
def test_products_in_bfloat16_are_within_their_class(quant: str) -> None:
    """What runs where the processor multiplies bfloat16 in hardware; torch computes the same elsewhere, slowly."""
    w = _weight(quant, 160, 300, dtype=torch.bfloat16)
    x = torch.randn(33, 300).to(torch.bfloat16)
    real = dequantize(w, torch.float64)
    wanted, size = x.double() @ real.T, x.double().abs() @ real.abs().T
    error = (linear.quant_linear_bf16(x, w).double() - wanted).abs()
    assert bool((error <= 2 * 2.0**-8 * wanted.abs() + BF16_OPERAND * size).all())


@pytest.mark.parametrize("quant", SCHEMES)
def test_experts_agree_between_few_and_many_tokens(quant: str) -> None:
    w13, w2 = _weight(quant, 6, 256, 128), _weight(quant, 6, 128, 128)
    x = torch.randn(60, 128)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(60)]).to(torch.int32)
    ids[::7, 1] = -1
    weights = torch.rand(60, 3)
    many = experts.fused_experts(x, weights, ids, w13, w2)
    few = torch.cat([experts.fused_experts(x[i : i + 6], weights[i : i + 6], ids[i : i + 6], w13, w2) for i in range(0, 60, 6)])
    # An INT8 code of an activation may fall to its neighbour where the two ways round differently before it.
    torch.testing.assert_close(
        many, few, rtol=2e-2 if quant.endswith("a8") else 1e-4, atol=2e-1 if quant.endswith("a8") else 1e-2
    )


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
