"""What the ahead-of-time matrix sees: spills, matrix instructions, load widths; and that a broken expectation is said."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dsv3.bench.aot import compiled, jobs  # noqa: E402
from dsv3.errors import UsageError  # noqa: E402
from dsv3_triton.aot.build import build  # noqa: E402
from dsv3_triton.aot.expect import violations  # noqa: E402
from dsv3_triton.aot.inspect import Binary, inspect  # noqa: E402
from dsv3_triton.facts import ARCHITECTURES  # noqa: E402


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[None, :] * K + k[:, None])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    before = triton.knobs.cache.dir
    triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
    yield
    triton.knobs.cache.dir = before


def _product(arch, dtype, rows, warps=4, columns=64):
    a, b, c = (torch.empty(256, 256, dtype=d, device="meta") for d in (dtype, dtype, torch.float32))
    made = build(product_kernel, (a, b, c), {"M": rows, "N": columns, "K": 128, "num_warps": warps}, arch)
    return inspect(made, ARCHITECTURES[arch])


@pytest.mark.parametrize(
    "arch, rows, dtype, unit",
    [
        ("sm_90", 64, torch.float8_e4m3fn, "wgmma.m64n64k32.f32.e4m3.e4m3"),
        ("sm_90", 16, torch.bfloat16, "mma.sync.m16n8k16"),
        ("sm_100", 128, torch.bfloat16, "tcgen05"),
        ("gfx942", 64, torch.float8_e4m3fnuz, "v_mfma_f32_32x32x16_fp8_fp8"),
        ("gfx942", 64, torch.float8_e4m3fn, "f16"),  # the silent upcast that the gate is there for
        ("gfx90a", 64, torch.bfloat16, "v_mfma_f32"),
    ],
)
def test_the_matrix_unit_is_recognised(arch, rows, dtype, unit):
    found = _product(arch, dtype, rows)
    assert any(unit in name for name in found.matrix), found.matrix
    assert found.spills == 0 and found.occupancy >= 1 and found.registers > 16
    assert found.loads.get(16, 0) + found.loads.get(8, 0) > 0


def test_spills_are_found_and_told():
    found = _product("sm_80", torch.bfloat16, 128, warps=1, columns=128)
    assert found.spills > 0
    said = violations("any", {}, ["bfloat16"], found, ARCHITECTURES["sm_80"])
    assert any("no spills" in text for text in said)


def test_each_expectation_can_fail():
    facts = ARCHITECTURES["sm_90"]
    good = Binary(64, 0, 1024, 4, 2, {"wgmma.m64n64k32.e4m3.e4m3": 4}, {16: 2})
    fp8, constants = ["float8_e4m3fn", "float8_e4m3fn", "bfloat16"], {"BLOCK_M": 64}

    def said(name="block_scaled_kernel", **changes):
        binary = Binary(**{**vars(good), **changes})
        return violations(name, constants, fp8, binary, facts)

    assert said() == []
    assert "spills" in said(spills=8)[0]
    assert "shared memory" in said(shared=1 << 20)[0]
    assert "room" in said(occupancy=0)[0]
    assert "expected wgmma with 64 rows" in said(matrix={"mma.sync.m16n8k16.e4m3": 1})[0]
    assert "upcast" in said(matrix={"wgmma.m64n64k16.bf16.bf16": 1})[0]
    assert "16 bytes" in said(loads={4: 8})[0]
    assert "no matrix instructions" in said("route_kernel")[0]


def test_a_kernel_goes_through_the_whole_matrix(tmp_path):
    (job,) = jobs(["cuda", "rocm"], ["gfx950"], False, ["act_quant", "moe_combine"])
    rows = compiled(type(job)(job.backend, job.arch, job.full, job.ops, str(tmp_path)))
    assert {r["op"] for r in rows} == {"act_quant", "moe_combine"}
    assert all(r["violations"] == [] and r["registers"] > 0 for r in rows)
    assert os.listdir(tmp_path)


def test_unknown_architectures_and_operators_are_usage_errors():
    with pytest.raises(UsageError, match=r"sm_91.*sm_90"):
        jobs(["cuda"], ["sm_91"], False, None)
    with pytest.raises(UsageError, match="linaer"):
        jobs(["cuda"], None, False, ["linaer"])
